"""The bodies of tests/vllm/bodies, one a row, as `chat/lengths/max-tokens-null`; and the known differences of their
answers, in tests/vllm/differences.yaml."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

BODIES = Path(__file__).parents[1] / "vllm" / "bodies"
KNOWN = BODIES.with_name("differences.yaml")
_ABSENT = "absent"


@dataclass(frozen=True, slots=True)
class Row:
    """One request. `fields`: those that it adds to the base of its file."""

    name: str
    method: str
    path: str
    body: Any
    fields: frozenset[str] = frozenset()


def read_rows() -> list[Row]:
    """All of them, in the files' order."""
    return [row for file in sorted(BODIES.glob("*.yaml")) for row in _rows_of(file)]


def _rows_of(file: Path) -> Iterator[Row]:
    content = yaml.safe_load(file.read_text())
    method, base = content.get("method", "POST"), content.get("base", {})
    for theme, rows in content["rows"].items():
        for name, given in rows.items():
            named = f"{file.stem}/{theme}/{name}"
            if method == "GET":
                yield Row(named, method, given, None)
            elif isinstance(given, str):
                yield Row(named, method, content["path"], given)
            else:
                body = {key: _expanded(value) for key, value in (base | given).items() if value != _ABSENT}
                yield Row(named, method, content["path"], body, frozenset(given))


def _expanded(value: Any) -> Any:
    """With `{repeat: text, times: number}` as the text that it stands for."""
    if isinstance(value, Mapping):
        if value.keys() == {"repeat", "times"}:
            return value["repeat"] * value["times"]
        return {key: _expanded(item) for key, item in value.items()}
    return [_expanded(item) for item in value] if isinstance(value, list) else value


@dataclass(frozen=True, slots=True)
class Known:
    """A difference that remains. `rows`, `shows`: patterns of rows' names and of what `differences` says of them."""

    what: str
    theirs: str
    ours: str
    rows: tuple[str, ...]
    shows: tuple[str, ...]

    def covers(self, row: str, difference: str) -> bool:
        """Whether it is this one."""
        return any(_fits(one, row) for one in self.rows) and any(_fits(one, difference) for one in self.shows)

    def unseen(self, found: Sequence[tuple[str, str]]) -> list[str]:
        """Patterns that none of what was `found`, (row, difference), needs any more."""
        mine = [pair for pair in found if self.covers(*pair)]
        return [one for one in self.rows if not any(_fits(one, row) for row, _ in mine)] + [
            one for one in self.shows if not any(_fits(one, text) for _, text in mine)
        ]


def known_differences() -> list[Known]:
    """The list."""
    return [
        Known(item["what"], item["theirs"], item["ours"], tuple(item["rows"]), tuple(item["shows"]))
        for item in yaml.safe_load(KNOWN.read_text())
    ]


@cache
def _pattern(text: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, text.split("*"))), re.DOTALL)


def _fits(pattern: str, text: str) -> bool:
    return _pattern(pattern).fullmatch(text) is not None
