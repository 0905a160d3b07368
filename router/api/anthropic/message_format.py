"""The form of /v1/messages: its body and its events.

Source: https://docs.anthropic.com/en/docs/build-with-claude/streaming.
"""

import msgspec

from kvcore.errors import KVFerryError
from router.api.anthropic.errors import anthropic_event
from router.api.formats.formatter import prompt_details
from router.api.formats.read_choice import ReadChoice
from router.client_answer import ClientAnswer, TextPiece
from router.parsing.dialects import Dialect
from router.parsing.events import Content, Reasoning
from router.parsing.reader import read_json
from router.requests.spec import AnswerReading
from router.text.tokenizer import Tokenizer

_encoder = msgspec.json.Encoder()
_PLAIN = AnswerReading(Dialect())
_TYPES = {"content": ("text", "text_delta", "text"), "reasoning": ("thinking", "thinking_delta", "thinking")}
"""Of a delta: the type of its block, and type and field of its event."""


class MessagesFormatter:
    """One answer of /v1/messages, which has one choice."""

    # An answer is a row of blocks, each of one kind: thinking, text, a call. A stream begins a block where the kind
    # changes, or another call begins, and ends it before the next, or at the end.

    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._model = model
        reading = answer.reading or _PLAIN
        self._choice = ReadChoice(answer, 0, reading)
        self._open: str | None = None
        """The type of the block that has begun and not ended."""
        self._count = 0
        self._finish: tuple[str, str | int | None] = "stop", None

    def opening(self) -> list[bytes]:
        """See Formatter."""
        message = self._message([], None, None)
        return [_event("message_start", message=message), _event("ping")]

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        return b"".join(event for delta in self._read(piece) for event in self._events(delta))

    def closing(self) -> bytes:
        """See Formatter."""
        reason, sequence = self._stop()
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        events = [*self._end_block(), _event("message_delta", delta=delta, usage=self._usage())]
        return b"".join([*events, _event("message_stop")])

    def failure(self, error: KVFerryError) -> bytes:
        """See Formatter."""
        return anthropic_event(error)

    def take(self, piece: TextPiece) -> None:
        """See Formatter."""
        self._read(piece)

    def body(self) -> bytes:
        """See Formatter."""
        texts, blocks = self._choice.texts, list[dict[str, object]]()
        if thought := "".join(texts[Reasoning]):
            blocks.append({"type": "thinking", "thinking": thought, "signature": ""})
        calls = self._choice.whole_calls
        if (text := "".join(texts[Content])) or not (calls or blocks):  # an empty one cannot be sent back
            blocks.append({"type": "text", "text": text})
        for call in calls:
            arguments = read_json("".join(call.arguments))
            # What is no object is none that a client could be given here; the model's words are not lost.
            shown = arguments if isinstance(arguments, dict) else {"arguments": arguments}
            blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": shown})
        return _encoder.encode(self._message(blocks, *self._stop()))

    def _read(self, piece: TextPiece) -> list[dict[str, object]]:
        if piece.finish_reason is not None:
            self._finish = piece.finish_reason, piece.stop_reason
        return self._choice.read(piece.text, is_last=piece.finish_reason is not None)

    def _events(self, delta: dict[str, object]) -> list[bytes]:
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            (part,) = calls
            if "id" in part:
                block = {"type": "tool_use", "id": part["id"], "name": part["function"]["name"], "input": {}}
                return self._begin_block(block)
            return [self._delta({"type": "input_json_delta", "partial_json": part["function"]["arguments"]})]
        kind = "reasoning" if "reasoning" in delta else "content"
        block_type, event_type, field = _TYPES[kind]
        begin = [] if self._open == block_type else self._begin_block({"type": block_type, field: ""})
        return [*begin, self._delta({"type": event_type, field: delta[kind]})]

    def _begin_block(self, block: dict[str, object]) -> list[bytes]:
        before = self._end_block()
        self._open = str(block["type"])
        self._count += 1
        return [*before, _event("content_block_start", index=self._count - 1, content_block=block)]

    def _end_block(self) -> list[bytes]:
        was_open, self._open = self._open, None
        return [_event("content_block_stop", index=self._count - 1)] if was_open is not None else []

    def _delta(self, delta: dict[str, object]) -> bytes:
        return _event("content_block_delta", index=self._count - 1, delta=delta)

    def _stop(self) -> tuple[str, str | None]:
        """(stop_reason, stop_sequence)."""
        finish, said = self._finish
        if finish == "length":
            return "max_tokens", None
        if self._choice.whole_calls:
            return "tool_use", None
        return ("stop_sequence", said) if isinstance(said, str) else ("end_turn", None)

    def _usage(self) -> dict[str, int]:
        answer, details = self._answer, prompt_details(self._answer)
        usage = {
            "input_tokens": answer.prompt_tokens - details.cached_tokens,
            "cache_read_input_tokens": details.cached_tokens,
            "output_tokens": answer.completion_tokens,
        }
        for name, tokens in (("approximate", details.approximate_tokens), ("computed", details.computed_tokens)):
            if tokens is not msgspec.UNSET:  # together they are `input_tokens`
                usage[f"{name}_input_tokens"] = tokens
        return usage

    def _message(self, blocks: list[dict[str, object]], reason: str | None, sequence: str | None) -> object:
        return {
            "id": self._answer.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": blocks,
            "stop_reason": reason,
            "stop_sequence": sequence,
            "usage": self._usage(),
        }


def _event(kind: str, **fields: object) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (kind.encode(), _encoder.encode({"type": kind, **fields}))
