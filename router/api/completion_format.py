"""The form of /v1/completions: its body and its stream chunks."""

from collections.abc import Sequence

from router.answering import ClientAnswer, TextPiece
from router.api.formatter import NamedLogprob, OpenAIFormatter
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
        entries = self._named(piece)
        offsets: list[int] = []
        for named in entries:
            offsets.append(self._offsets[piece.index])
            self._offsets[piece.index] += named.num_chars
        return {
            "tokens": [named.token.text for named in entries],
            "token_logprobs": [named.logprob for named in entries],
            "top_logprobs": [_by_text(named) for named in entries],
            "text_offset": offsets,
        }


def _by_text(named: NamedLogprob) -> dict[str, float]:
    """The token itself and the likeliest ones; of several that have the same text, the first."""
    shown = {named.token.text: named.logprob}
    for token, logprob in named.top:
        shown.setdefault(token.text, logprob)
    return shown
