"""The bodies and stream chunks of the OpenAI endpoints, from pieces of text.

Owns their exact form. A formatter has state for one answer; it does no I/O.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Protocol

import msgspec

from nodeapi.messages import TokenLogprob
from router.answering import ClientAnswer, TextPiece
from router.text.tokenizer import Tokenizer, finite

DONE = b"data: [DONE]\n\n"
_encoder = msgspec.json.Encoder()


class PromptTokensDetails(msgspec.Struct):
    """`cached_tokens`: prompt tokens that no node computed for this request."""

    cached_tokens: int


class Usage(msgspec.Struct):
    """Of one answer, over all its choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage_of(answer: ClientAnswer) -> Usage:
    """Final once the answer's pieces have ended."""
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(answer.cached_tokens))


def sse(body: object) -> bytes:
    """One server-sent event."""
    return b"data: " + _encoder.encode(body) + b"\n\n"


class Formatter(Protocol):
    """Makes the bodies and stream chunks of one answer, as its endpoint has them."""

    def opening(self) -> list[bytes]:
        """Events before the first piece."""
        ...

    def chunk(self, piece: TextPiece) -> bytes:
        """The event of one piece."""
        ...

    def closing(self) -> bytes:
        """Events after the last piece: usage, if the client asked for it, and the mark of the end."""
        ...

    def body(self, pieces: Sequence[TextPiece]) -> bytes:
        """The body of an answer that is not streamed."""
        ...


class _Common:
    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        self._answer = answer
        self._model = model
        self._created = created
        self._tokenizer = tokenizer

    def _event(
        self,
        kind: str,
        choices: list[dict[str, object]],
        usage: Usage | None = None,
        more: Mapping[str, object] = MappingProxyType({}),
    ) -> bytes:
        body: dict[str, object] = {
            "id": self._answer.id,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "choices": choices,
            **more,
        }
        if self._answer.shown.usage:
            body["usage"] = usage
        return sse(body)

    def _closing(self, kind: str) -> bytes:
        return (self._event(kind, [], usage_of(self._answer)) if self._answer.shown.usage else b"") + DONE

    def _body(
        self, kind: str, choices: list[dict[str, object]], more: Mapping[str, object] = MappingProxyType({})
    ) -> bytes:
        return _encoder.encode(
            {
                "id": self._answer.id,
                "object": kind,
                "created": self._created,
                "model": self._model,
                "choices": choices,
                "usage": usage_of(self._answer),
                **more,
            }
        )

    def _token_ids(self, piece: TextPiece) -> dict[str, object]:
        return {"token_ids": list(piece.token_ids)} if self._answer.shown.token_ids else {}

    def _prompt_token_ids(self, index: int) -> dict[str, object]:
        return {"prompt_token_ids": self._answer.prompt_token_ids(index)} if self._answer.shown.token_ids else {}

    def _gather(self, pieces: Sequence[TextPiece]) -> list[TextPiece]:
        by_choice: list[list[TextPiece]] = [[] for _ in range(self._answer.num_choices)]
        for piece in pieces:
            by_choice[piece.index].append(piece)
        gathered: list[TextPiece] = []
        for index, own in enumerate(by_choice):
            logprobs = [entry for piece in own for entry in piece.logprobs]
            reason = next((piece.finish_reason for piece in own if piece.finish_reason), None)
            token_ids = [token_id for piece in own for token_id in piece.token_ids]
            gathered.append(TextPiece(index, "".join(piece.text for piece in own), logprobs, reason, token_ids))
        return gathered


class ChatFormatter(_Common):
    """/v1/chat/completions."""

    def opening(self) -> list[bytes]:
        """The role of each choice, as OpenAI sends it first."""
        delta = {"role": "assistant", "content": ""}
        return [
            self._event(
                "chat.completion.chunk",
                [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}],
                more=self._prompt_token_ids(index),
            )
            for index in range(self._answer.num_choices)
        ]

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        choice: dict[str, object] = {
            "index": piece.index,
            "delta": {"content": piece.text} if piece.text else {},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            **self._token_ids(piece),
        }
        return self._event("chat.completion.chunk", [choice])

    def closing(self) -> bytes:
        """See Formatter."""
        return self._closing("chat.completion.chunk")

    def body(self, pieces: Sequence[TextPiece]) -> bytes:
        """See Formatter."""
        choices: list[dict[str, object]] = [
            {
                "index": piece.index,
                "message": {"role": "assistant", "content": piece.text, "refusal": None},
                "logprobs": self._logprobs(piece),
                "finish_reason": piece.finish_reason,
                **self._token_ids(piece),
            }
            for piece in self._gather(pieces)
        ]
        return self._body("chat.completion", choices, self._prompt_token_ids(0))

    def _logprobs(self, piece: TextPiece) -> dict[str, object] | None:
        if not piece.logprobs:
            return None
        return {"content": [self._token(token_id, logprob) for token_id, logprob in piece.logprobs], "refusal": None}

    def _token(self, token_id: int, logprob: TokenLogprob) -> dict[str, object]:
        top = [self._entry(other, value) for other, value in logprob.top]
        return {**self._entry(token_id, logprob.logprob), "top_logprobs": top}

    def _entry(self, token_id: int, logprob: float) -> dict[str, object]:
        text = self._tokenizer.decode([token_id])
        return {"token": text, "logprob": finite(logprob), "bytes": list(text.encode())}


class CompletionFormatter(_Common):
    """/v1/completions."""

    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._offsets = [0] * answer.num_choices
        self._begun: set[int] = set()
        """Choices that have said something."""

    def opening(self) -> list[bytes]:
        """Nothing."""
        return []

    def chunk(self, piece: TextPiece) -> bytes:
        """See Formatter."""
        return self._event("text_completion", [self._choice(piece)])

    def closing(self) -> bytes:
        """See Formatter."""
        return self._closing("text_completion")

    def body(self, pieces: Sequence[TextPiece]) -> bytes:
        """See Formatter."""
        return self._body("text_completion", [self._choice(piece) for piece in self._gather(pieces)])

    def _choice(self, piece: TextPiece) -> dict[str, object]:
        first = piece.index not in self._begun
        self._begun.add(piece.index)
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            **self._token_ids(piece),
            **(self._prompt_token_ids(piece.index) if first else {}),
        }

    def _logprobs(self, piece: TextPiece) -> dict[str, object] | None:
        if not piece.logprobs:
            return None
        tokens = [self._tokenizer.decode([token_id]) for token_id, _ in piece.logprobs]
        offsets: list[int] = []
        for token in tokens:
            offsets.append(self._offsets[piece.index])
            self._offsets[piece.index] += len(token)
        return {
            "tokens": tokens,
            "token_logprobs": [finite(logprob.logprob) for _, logprob in piece.logprobs],
            "top_logprobs": [
                {self._tokenizer.decode([other]): finite(value) for other, value in logprob.top}
                for _, logprob in piece.logprobs
            ],
            "text_offset": offsets,
        }
