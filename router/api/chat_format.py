"""The form of /v1/chat/completions: its body and its stream chunks."""

from collections.abc import Sequence

from nodeapi.messages import TokenLogprob
from router.answering import TextPiece
from router.api.formatter import OpenAIFormatter, finite


class ChatFormatter(OpenAIFormatter):
    """One answer of /v1/chat/completions."""

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
            for piece in self._one_per_choice(pieces)
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
