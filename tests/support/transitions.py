"""The prose of a state machine's transition table, to be held against the table that the code asserts on."""

import re
from collections.abc import Mapping
from enum import StrEnum


def in_prose(states: type[StrEnum]) -> set[tuple[str, str]]:
    """(from, to) of each line `from -> to: when` in the docstring of an enumeration of states."""
    return set(re.findall(r"^\s*(\w+) -> (\w+): \S", states.__doc__ or "", re.MULTILINE))


def in_table(table: Mapping[StrEnum, frozenset[StrEnum]]) -> set[tuple[str, str]]:
    """The same of a table: each state to the states that may follow it."""
    return {(str(before), str(after)) for before, following in table.items() for after in following}
