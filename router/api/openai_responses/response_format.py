"""The form of /v1/responses: its body and its events.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import msgspec

from kvcore.errors import KVFerryError
from router.api.formats.chat_format import token_entries
from router.api.formats.formatter import OpenAIFormatter, prompt_details
from router.api.formats.read_choice import ReadChoice
from router.api.openai_responses.items import InputItem
from router.api.openai_responses.output import OutputEvent, OutputItems
from router.api.openai_responses.request import ResponsesRequest
from router.client_answer import ClientAnswer, TextPiece
from router.parsing.dialects import Dialect
from router.requests.spec import AnswerReading
from router.text.tokenizer import Tokenizer

Keep = Callable[[str, bytes, bytes], bool]
"""Keeps an answer: its id, its body and the items up to it. False: it is not kept."""
_encoder = msgspec.json.Encoder()
_PLAIN_TEXT = AnswerReading(Dialect())


class ResponsesFormatter(OpenAIFormatter[msgspec.Raw]):
    """One answer of /v1/responses. `items`: those up to it. `keep` None: it is not to be kept. What failed never is."""

    def __init__(
        self,
        answer: ClientAnswer,
        model: str,
        created: int,
        tokenizer: Tokenizer,
        *,
        asked: ResponsesRequest,
        items: Sequence[InputItem],
        keep: Keep | None,
    ) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._asked, self._items, self._keep = asked, items, keep
        self._choice = ReadChoice(answer, 0, answer.reading or _PLAIN_TEXT)
        self._output = OutputItems(self._choice)
        self._sent = 0
        self._cut = False
        """It has ended for its length."""
        self._logprobs: list[msgspec.Raw] = []
        """Of tokens whose text has not been told apart yet."""

    def opening(self) -> list[bytes]:
        """See Formatter."""
        fields: dict[str, object] = {"response": self._response("in_progress")}
        return [self._told(OutputEvent(f"response.{name}", fields)) for name in ("created", "in_progress")]

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        return b"".join(map(self._told, self._read(piece)))

    def closing(self) -> bytes:
        """See Formatter."""
        events = self._output.end(cut=self._cut)
        body = msgspec.Raw(self._whole())
        ended = "incomplete" if self._cut else "completed"
        return b"".join(map(self._told, [*events, OutputEvent(f"response.{ended}", {"response": body})]))

    def failure(self, error: KVFerryError) -> bytes:
        """See Formatter."""
        said = {"code": "server_error", "message": error.message}
        return self._told(OutputEvent("response.failed", {"response": self._response("failed", error=said)}))

    def take(self, piece: TextPiece) -> None:
        """See Formatter."""
        self._read(piece)

    def body(self) -> bytes:
        """See Formatter."""
        self._output.end(cut=self._cut)
        return self._whole()

    def _read(self, piece: TextPiece) -> list[OutputEvent]:
        is_last = piece.finish_reason is not None
        self._cut = piece.finish_reason == "length"
        self._logprobs += token_entries(self._named(piece)) if piece.logprobs else []
        deltas = self._choice.read(piece.text, is_last=is_last)
        events: list[OutputEvent] = []
        for delta in deltas:
            events += self._output.add(delta, self._logprobs)
            self._logprobs = [] if "content" in delta else self._logprobs
        if deltas:  # those of reasoning and of calls are shown nowhere
            self._logprobs = []
        return events

    def _told(self, event: OutputEvent) -> bytes:
        number, self._sent = self._sent, self._sent + 1
        data = _encoder.encode({"type": event.type, "sequence_number": number, **event.fields})
        return b"event: %s\ndata: %s\n\n" % (event.type.encode(), data)

    def _whole(self) -> bytes:
        """The response that has ended; kept, if it is to be."""
        body = self._ended(kept=self._keep is not None)
        if self._keep is None:
            return body
        items = _encoder.encode([*self._items, *self._output.ended])
        return body if self._keep(self._answer.id, body, items) else self._ended(kept=False)

    def _ended(self, *, kept: bool) -> bytes:
        details = {"reason": "max_output_tokens"} if self._cut else None
        status = "incomplete" if self._cut else "completed"
        return _encoder.encode(self._response(status, incomplete_details=details, usage=self._usage(), store=kept))

    def _response(self, status: str, **fields: object) -> dict[str, object]:
        return {**self._fields, "status": status, "output": self._output.ended, **fields}

    @cached_property
    def _fields(self) -> dict[str, object]:
        asked, sampling = self._asked, self._answer.sampling
        return {
            "id": self._answer.id,
            "object": "response",
            "created_at": self._created,
            "status": "",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": sampling.max_tokens,
            "max_tool_calls": asked.max_tool_calls,
            "metadata": asked.metadata or {},
            "model": self._model,
            "output": [],
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "previous_response_id": asked.previous_response_id,
            "prompt": None,
            "prompt_cache_key": asked.prompt_cache_key,
            "reasoning": asked.reasoning,
            "service_tier": asked.service_tier or "auto",
            "store": self._keep is not None,
            "temperature": sampling.temperature,
            "text": asked.text or {"format": {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": sampling.logprobs,
            "top_p": sampling.top_p,
            "truncation": asked.truncation or "disabled",
            "usage": None,
            "user": asked.user,
        }

    def _usage(self) -> dict[str, object]:
        answer = self._answer
        return {
            "input_tokens": answer.prompt_tokens,
            "input_tokens_details": {**msgspec.to_builtins(prompt_details(answer)), "cache_write_tokens": 0},
            "output_tokens": answer.completion_tokens,
            "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens or 0},
            "total_tokens": answer.prompt_tokens + answer.completion_tokens,
        }
