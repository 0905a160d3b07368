"""The form of /v1/chat/completions where a model's reasoning and calls are told apart from its answer."""

import secrets
import string
from collections.abc import Sequence

import msgspec

from router.api.formats.chat_format import ChatFormatter, logprobs_of
from router.api.formats.formatter import Formatter, stop_reason_of
from router.client_answer import ClientAnswer, TextPiece
from router.parsing.dialects import AnswerParser
from router.parsing.events import CallArguments, CallBegin, CallEnd, Content, Event, Reasoning
from router.requests.spec import AnswerReading
from router.text.tokenizer import Tokenizer

_PROMPT_END_TOKENS = 32
"""Of the prompt, in which the template may have opened the reasoning."""
_SHORT_ID = string.ascii_letters + string.digits


def chat_formatter(answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> Formatter:
    """Of one answer of /v1/chat/completions."""
    if answer.reading is None:
        return ChatFormatter(answer, model, created, tokenizer)
    return ParsedChatFormatter(answer, model, created, tokenizer, answer.reading)


class _ToolCall(msgspec.Struct):
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


class _ReadChoice:
    """What was told apart of one choice. A `Delta` is what an event adds to its message."""

    def __init__(self, parser: AnswerParser, reading: AnswerReading) -> None:
        self._parser = parser
        self._reading = reading
        self.texts: dict[type[Event], list[str]] = {Content: [], Reasoning: []}
        self.calls: list[_ToolCall] = []
        self._begun = 0

    def read(self, text: str, *, is_last: bool) -> list[dict[str, object]]:
        """The deltas of more text, those of one kind joined."""
        events = self._parser.feed(text) if text else []
        deltas: list[dict[str, object]] = []
        for event in [*events, *(self._parser.end() if is_last else ())]:
            self._add(event, deltas)
        return deltas

    def _add(self, event: Event, deltas: list[dict[str, object]]) -> None:
        left_out = self._reading.one_call and self._begun > 1
        match event:
            case Content(text):
                self.texts[Content].append(text)
                _join(deltas, "content", text)
            case Reasoning(text):
                if self._reading.shows_reasoning:
                    self.texts[Reasoning].append(text)
                    _join(deltas, "reasoning", text)
            case CallBegin(name, given):
                self._begun += 1
                if not (self._reading.one_call and self._begun > 1):
                    call = _ToolCall(given or _new_id(short=self._reading.dialect.short_ids), name)
                    self.calls.append(call)
                    begin = {**call.shown(), "index": len(self.calls) - 1}
                    deltas.append({"tool_calls": [begin]})
            case CallArguments(text) if not left_out:
                self.calls[-1].arguments.append(text)
                part = {"index": len(self.calls) - 1, "function": {"arguments": text}}
                deltas.append({"tool_calls": [part]})
            case CallEnd() if not left_out:
                self.calls[-1].ended = True


class ParsedChatFormatter(ChatFormatter):
    """One answer of /v1/chat/completions in a dialect."""

    # A piece of text may be several deltas, as where a call ends and the next begins, or none, as where it may be the
    # beginning of a mark. Each delta is an event of its own. What a piece has beside its text, logprobs and token ids,
    # goes with the first, which then has a delta without anything if need be; the reason of the end comes alone.

    def __init__(
        self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer, reading: AnswerReading
    ) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._choices: list[_ReadChoice] = []
        for index in range(answer.num_choices):
            end = tokenizer.decode(answer.prompt_token_ids(index)[-_PROMPT_END_TOKENS:], skip_special_tokens=False)
            self._choices.append(_ReadChoice(AnswerParser(reading.dialect, reading.tools, end), reading))

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        choice, reason = self._choices[piece.index], piece.finish_reason
        deltas = choice.read(piece.text, is_last=reason is not None)
        beside = {"logprobs": logprobs_of(self._entries(piece)), **self._token_ids(piece.token_ids)}
        if not deltas and (beside["logprobs"] or piece.token_ids):
            deltas = [{}]
        events = []
        for delta in deltas:
            events.append(self._delta(piece.index, delta, None, beside))
            beside = {"logprobs": None}
        if reason is not None:
            events.append(
                self._delta(piece.index, {}, _reason(reason, choice.calls), {"logprobs": None, **stop_reason_of(piece)})
            )
        return b"".join(events)

    def _delta(self, index: int, delta: object, reason: str | None, beside: dict[str, object]) -> bytes:
        choice = {"index": index, "delta": delta, "finish_reason": reason, **beside}
        return self._event("chat.completion.chunk", [choice])

    def take(self, piece: TextPiece) -> None:
        """See Formatter."""
        self._choices[piece.index].read(piece.text, is_last=piece.finish_reason is not None)
        super().take(piece)

    def _message(self, index: int) -> dict[str, object]:
        choice = self._choices[index]
        calls = [call for call in choice.calls if call.ended]
        message: dict[str, object] = {
            "role": "assistant",
            "content": "".join(choice.texts[Content]) or (None if calls else ""),
            "refusal": None,
        }
        if reasoning := "".join(choice.texts[Reasoning]):
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        if calls:
            message["tool_calls"] = [call.shown() for call in calls]
        return message

    def _finish_reason(self, index: int) -> str | None:
        reason = super()._finish_reason(index)
        return reason and _reason(reason, [call for call in self._choices[index].calls if call.ended])


def _reason(reason: str, calls: Sequence[_ToolCall]) -> str:
    return "tool_calls" if reason == "stop" and calls else reason


def _join(deltas: list[dict[str, object]], key: str, text: str) -> None:
    """Behind the text of the last delta where that is of the same kind."""
    before = deltas.pop()[key] if deltas and key in deltas[-1] else ""
    whole = f"{before}{text}"
    deltas.append({key: whole} if key == "content" else {key: whole, "reasoning_content": whole})


def _new_id(*, short: bool) -> str:
    """`short`: nine letters and digits, which Mistral's templates ask for."""
    return "".join(secrets.choice(_SHORT_ID) for _ in range(9)) if short else f"call_{secrets.token_hex(12)}"
