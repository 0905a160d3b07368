"""The grammar that an answer must follow, as nodes are told of it. Values only; what it means is `grammars`'."""

from collections.abc import Iterable, Sequence
from enum import StrEnum

import msgspec


class GrammarKind(StrEnum):
    """What the text of a grammar is."""

    JSON = "json"
    """A JSON schema."""
    REGEX = "regex"
    CHOICE = "choice"
    """A JSON list of strings, of which the answer is one."""
    GRAMMAR = "grammar"
    """Lark, as llguidance extends it, or GBNF, whose rules are written with `::=`."""
    STRUCTURAL_TAG = "structural_tag"
    """A JSON object, as xgrammar's structural tags are: text that is free up to a trigger, and a form behind it."""


class Grammar(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """The form of an answer. It holds from the first token on, unless the model may reason before: `after`.

    An answer ends where the grammar can only end, and by no end or stop token while the grammar cannot.
    """

    kind: GrammarKind
    text: str
    whitespace: str | None = None
    """Between the parts of JSON: any where it is None, none where it is empty, else what this pattern matches."""
    after: tuple[tuple[int, ...], ...] = ()
    """Sequences of tokens of which each ends the reasoning: what comes up to and with it is free. Empty: nothing is."""
    opening: tuple[int, ...] = ()
    """The tokens that begin the reasoning: an answer that begins otherwise follows the grammar at once. Empty: it is
    under way already. Counts beside `after` only."""


def stands_before(tokens: Sequence[int], end: int, marks: Iterable[tuple[int, ...]]) -> bool:
    """Whether `tokens` have one of `marks` right before place `end`."""
    return any(len(one) <= end and tuple(tokens[end - len(one) : end]) == one for one in marks)
