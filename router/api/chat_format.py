"""The form of /v1/chat/completions: its body and its stream chunks."""

from collections.abc import Sequence

from router.answering import TextPiece
from router.api.formatter import OpenAIFormatter
from router.text.token_names import NamedToken


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
        content = [
            {**_entry(named.token, named.logprob), "top_logprobs": [_entry(*other) for other in named.top]}
            for named in self._named(piece)
        ]
        return {"content": content, "refusal": None}


def _entry(token: NamedToken, logprob: float) -> dict[str, object]:
    return {"token": token.text, "logprob": logprob, "bytes": list(token.raw)}
