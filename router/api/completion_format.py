"""The form of /v1/completions: its body and its stream chunks."""

from collections.abc import Sequence

from router.answering import ClientAnswer, TextPiece
from router.api.formatter import OpenAIFormatter, finite
from router.text.tokenizer import Tokenizer


class CompletionFormatter(OpenAIFormatter):
    """One answer of /v1/completions."""

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
        return self._body("text_completion", [self._choice(piece) for piece in self._one_per_choice(pieces)])

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
