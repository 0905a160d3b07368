"""What is told apart of one choice of an answer, as the messages of OpenAI's streams have it."""

import secrets
import string

import msgspec

from router.client_answer import ClientAnswer
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning
from router.requests.spec import AnswerReading

_SHORT_ID = string.ascii_letters + string.digits


class ToolCall(msgspec.Struct):
    """One call, as far as it has come. `ended`: it is whole."""

    id: str
    name: str
    arguments: list[str] = []
    ended: bool = False

    def shown(self) -> dict[str, object]:
        """In an answer in one body."""
        return {
            "id": self.id,
            "type": "function",
            "function": {"name": self.name, "arguments": "".join(self.arguments)},
        }


class ReadChoice:
    """What was told apart of one choice. A `Delta` is what an event adds to its message."""

    def __init__(self, answer: ClientAnswer, index: int, reading: AnswerReading) -> None:
        """Choice `index` of an answer."""
        self._parser, self._reading = answer.parser(index, reading), reading
        self.texts: dict[type[Event], list[str]] = {Content: [], Reasoning: []}
        self.calls: list[ToolCall] = []
        self._begun = 0

    @property
    def whole_calls(self) -> list[ToolCall]:
        """Those that came to their end."""
        return [call for call in self.calls if call.ended]

    def read(self, text: str, *, is_last: bool) -> list[dict[str, object]]:
        """The deltas of more text, those of one kind joined."""
        events = self._parser.feed(text) if text else []
        deltas: list[dict[str, object]] = []
        for event in [*events, *(self._parser.end() if is_last else ())]:
            self._add(event, deltas)
        return deltas

    def _add(self, event: Event, deltas: list[dict[str, object]]) -> None:
        self._begun += isinstance(event, CallBegin)
        is_kept = self._begun <= 1 or not self._reading.one_call
        match event:
            case Content(text):
                self.texts[Content].append(text)
                _join(deltas, "content", text)
            case Reasoning(text):
                if self._reading.shows_reasoning:
                    self.texts[Reasoning].append(text)
                    _join(deltas, "reasoning", text)
            case CallBegin(name, given) if is_kept:
                call = ToolCall(given or _new_id(short=self._reading.dialect.short_ids), name)
                self.calls.append(call)
                deltas.append({"tool_calls": [{**call.shown(), "index": len(self.calls) - 1}]})
            case CallArguments(text) if is_kept:
                self.calls[-1].arguments.append(text)
                part = {"index": len(self.calls) - 1, "function": {"arguments": text}}
                deltas.append({"tool_calls": [part]})
            case CallEnd() if is_kept:
                self.calls[-1].ended = True


def _join(deltas: list[dict[str, object]], key: str, text: str) -> None:
    """Behind the text of the last delta where that is of the same kind."""
    before = deltas.pop()[key] if deltas and key in deltas[-1] else ""
    whole = f"{before}{text}"
    deltas.append({key: whole} if key == "content" else {key: whole, "reasoning_content": whole})


def _new_id(*, short: bool) -> str:
    """`short`: nine letters and digits, which Mistral's templates ask for."""
    return "".join(secrets.choice(_SHORT_ID) for _ in range(9)) if short else f"call_{secrets.token_hex(12)}"
