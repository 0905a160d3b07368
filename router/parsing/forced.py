"""Calls that a model had to make, by a grammar and not in its own dialect: read out of the answer's text.

Source of both forms: vLLM's server, where a model's parser knows no form of its own.
"""

from functools import partial

from router.parsing.dialects import AnswerParser, Dialect
from router.parsing.events import CallBegin, CallEnd, Content, Event, Parse
from router.parsing.json_calls import Tools, arguments_value, call_object
from router.parsing.reader import Reader


def list_of_calls(r: Reader, tools: Tools) -> Parse[None]:
    """`[{"name": …, "parameters": …}, …]`."""
    if (yield from r.accept("[")):
        while (yield from call_object(r)) and (yield from r.accept(",")):
            pass
        yield from r.accept("]")


def arguments_alone(name: str, r: Reader, tools: Tools) -> Parse[None]:
    """The arguments of the one call, of `name`."""
    yield from r.skip_space()
    if r.text:
        yield CallBegin(name)
        if (yield from arguments_value(r)):
            yield CallEnd()


class ForcedParser:
    """Of one answer, as `AnswerParser`: what the dialect leaves as the answer's text is calls. `name`: of the only
    function that may be called, whose arguments are all there is; empty: it is a list of calls."""

    def __init__(self, dialect: Dialect, name: str, prompt_end: str, *, continues: bool = False) -> None:
        calls = partial(arguments_alone, name) if name else list_of_calls
        self._outer = AnswerParser(dialect, None, prompt_end, continues=continues)
        self._inner = AnswerParser(Dialect(calls), {}, "")

    def __repr__(self) -> str:
        return f"<ForcedParser {self._inner}>"

    def feed(self, text: str) -> list[Event]:
        """What these characters add."""
        return self._read(self._outer.feed(text))

    def end(self) -> list[Event]:
        """What was still held back."""
        return [*self._read(self._outer.end()), *self._inner.end()]

    def _read(self, events: list[Event]) -> list[Event]:
        found: list[Event] = []
        for event in events:
            found += self._inner.feed(event.text) if isinstance(event, Content) else [event]
        return found
