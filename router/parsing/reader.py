"""A text that is still being written, read as if it were all there: what a dialect is made of."""

import json
import re
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from router.parsing.events import Event, Parse, Reasoning

_SPACE = re.compile(r"\s*")
_IN_STRING = re.compile(r'["\\]')
_OUTSIDE = re.compile(r'["{}\[\]]')
_SCALAR_END = re.compile(r"[,}\]\s]")
Make = Callable[[str], Event]


@dataclass(slots=True)
class Thought:
    """Which characters of a text are reasoning. `end` None: those that follow are, too."""

    begin: int
    end: int | None = None


class Reader:
    """The text that has come and was not read yet. Its methods are used with `yield from`: they pause where the text
    ends before what they look for, until more has come or it has `ended`."""

    def __init__(self, prompt_end: str = "") -> None:
        """`prompt_end`: the last of the prompt, which may have begun what the text goes on with."""
        self.prompt_end = prompt_end
        self.text = ""
        self.ended = False
        self.position = 0
        """Characters that were read."""
        self.thoughts: deque[Thought] = deque()
        self._taken: list[str] | None = None

    def __repr__(self) -> str:
        return f"<Reader {len(self.text)} characters, {'ended' if self.ended else 'open'}>"

    def record(self) -> None:
        """Keep what is read from now on, for `recorded`."""
        self._taken = []

    def recorded(self) -> str:
        """What was read since `record`. Ends the keeping."""
        taken, self._taken = self._taken or [], None
        return "".join(taken)

    def forget(self) -> None:
        """Ends the keeping: what was read is not wanted back."""
        self._taken = None

    def take(self, length: int) -> str:
        """The next `length` characters, which are there."""
        taken, self.text = self.text[:length], self.text[length:]
        self.position += len(taken)
        if self._taken is not None:
            self._taken.append(taken)
        return taken

    def put_back(self, text: str) -> None:
        """What was read last comes again."""
        self.text = text + self.text
        self.position -= len(text)
        if self._taken is not None:
            self._taken[-1] = self._taken[-1].removesuffix(text)

    def more(self) -> Parse[bool]:
        """Waits for more text; False: none will come."""
        if self.ended:
            return False
        before = len(self.text)
        yield None
        return len(self.text) > before or not self.ended

    def skip_space(self) -> Parse[None]:
        """To the next character that is no white space."""
        while True:
            self.take(_SPACE.match(self.text).end())  # type: ignore[union-attr]
            if self.text or not (yield from self.more()):
                return

    def starts_with(self, wanted: str) -> Parse[bool]:
        """Whether `wanted` comes next; it is not read."""
        while len(self.text) < len(wanted) and wanted.startswith(self.text):
            if not (yield from self.more()):
                return False
        return self.text.startswith(wanted)

    def accept(self, wanted: str) -> Parse[bool]:
        """Reads `wanted` where it comes next, after white space or not."""
        yield from self.skip_space()
        found = yield from self.starts_with(wanted)
        if found:
            self.take(len(wanted))
        return found

    def text_until(self, markers: Sequence[str], make: Make | None, *, trim: bool = False) -> Parse[str | None]:
        """Events of the text before the first of `markers`, as it comes; reads that marker and returns it. None: the
        text ended without one. `trim`: white space before a marker is left out. Without `make` there are no events."""
        while True:
            at, marker = _first(self.text, markers)
            if marker is not None:
                before = self.take(at)
                self.take(len(marker))
                if make is not None and (shown := before.rstrip() if trim else before):
                    yield make(shown)
                return marker
            free = len(self.text) if self.ended else len(self.text) - _held(self.text, markers)
            if trim and not self.ended:
                free = len(self.text[:free].rstrip())
            if (out := self.take(free)) and make is not None:
                yield make(out)
            if not (yield from self.more()) and not self.text:
                return None

    def thought_until(self, markers: Sequence[str], *, trim: bool = False, skips: bool = False) -> Parse[str | None]:
        """As `text_until`, of reasoning, which begins here. `skips`: white space before its text is left out."""
        thought = Thought(self.position)
        self.thoughts.append(thought)
        if skips:
            yield from self.skip_space()
        found = yield from self.text_until(markers, Reasoning, trim=trim)
        if found is not None:
            thought.end = self.position - len(found)
        return found

    def take_until(self, *markers: str) -> Parse[tuple[str, str | None]]:
        """(the text before the first of `markers`, which one it is). Both are read."""
        longest, looked = max(map(len, markers)), 0
        while True:
            at, marker = _first(self.text, markers, looked)
            if marker is not None:
                before = self.take(at)
                self.take(len(marker))
                return before, marker
            looked = max(0, len(self.text) - longest + 1)
            if not (yield from self.more()):
                return self.take(len(self.text)), None

    def json_value(self, make: Make | None = None) -> Parse[str | None]:
        """The raw text of the JSON value that comes next; events of it as it comes. None: it did not come to its end.
        What strings hold, brackets and markers too, is theirs."""
        yield from self.skip_space()
        if self.text[:1] not in ("{", "[", '"'):
            return (yield from self._scalar(make))
        pieces: list[str] = []
        depth, in_string, at, whole = 0, False, 0, False
        while True:
            while not whole and (found := (_IN_STRING if in_string else _OUTSIDE).search(self.text, at)) is not None:
                at = found.end()
                match found.group():
                    case "\\" if at == len(self.text):  # what it escapes has not come
                        at -= 1
                        break
                    case "\\":
                        at += 1
                    case '"':
                        in_string = not in_string
                        whole = not in_string and depth == 0
                    case "{" | "[":
                        depth += 1
                    case _:
                        depth -= 1
                        whole = depth == 0
            else:
                at = at if whole else len(self.text)
            if piece := self.take(at):
                pieces.append(piece)
                if make is not None:
                    yield make(piece)
            if whole:
                return "".join(pieces)
            at = 0
            if not (yield from self.more()):
                return None

    def json_string(self) -> Parse[str | None]:
        """The JSON string that comes next. None: none does."""
        yield from self.skip_space()
        if not self.text.startswith('"'):
            return None
        raw = yield from self.json_value()
        return loaded if raw is not None and isinstance(loaded := read_json(raw), str) else None

    def _scalar(self, make: Make | None) -> Parse[str | None]:
        while (end := _SCALAR_END.search(self.text)) is None:
            if not (yield from self.more()):
                break
        raw = self.take(end.start() if end else len(self.text))
        if raw and make is not None:
            yield make(raw)
        return raw or None


def read_json(text: str) -> object:
    """Its value; the text itself where it is no JSON, or holds what JSON has no word for."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text


def _refuse(name: str) -> object:
    raise ValueError(name)


def _first(text: str, markers: Sequence[str], start: int = 0) -> tuple[int, str | None]:
    """(where the first marker from `start` on stands, which it is); of two in one place the longer."""
    best: tuple[int, str | None] = (len(text), None)
    for marker in markers:
        at = text.find(marker, start)
        if at >= 0 and (at < best[0] or (at == best[0] and len(marker) > len(best[1] or ""))):
            best = at, marker
    return best


def _held(text: str, markers: Sequence[str]) -> int:
    """How many of the last characters may be the beginning of a marker."""
    longest = max(map(len, markers)) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return length
    return 0
