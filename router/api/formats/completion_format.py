"""The form of /v1/completions: its body and its stream chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from router.api.formats.formatter import NamedLogprob, OpenAIFormatter, raw_json, stop_reason_of
from router.client_answer import ClientAnswer, TextPiece
from router.text.tokenizer import Tokenizer


class CompletionEntry(NamedTuple):
    """Of one token's logprobs, as this endpoint shows them. `top`: JSON."""

    token: str
    logprob: float
    top: msgspec.Raw
    offset: int


class CompletionFormatter(OpenAIFormatter[CompletionEntry]):
    """One answer of /v1/completions."""

    def __init__(self, answer: ClientAnswer, model: str, created: int, tokenizer: Tokenizer) -> None:
        super().__init__(answer, model, created, tokenizer)
        self._offsets = [0] * answer.num_choices
        self._begun: set[int] = set()
        """Choices that have said something."""

    def opening(self) -> list[bytes]:
        """Nothing."""
        return []

    def _chunk(self, piece: TextPiece) -> bytes:
        shown: dict[str, object] = {
            "text": piece.text,
            "logprobs": _logprobs(self._entries(piece)),
            "finish_reason": piece.finish_reason,
            **stop_reason_of(piece),
        }
        return self._event("text_completion", [self._choice(piece.index, shown, piece.token_ids)])

    def closing(self) -> bytes:
        """See Formatter."""
        return self._closing("text_completion")

    def body(self) -> bytes:
        """See Formatter."""
        choices = [
            self._choice(
                index,
                {
                    "text": "".join(choice.texts),
                    "logprobs": _logprobs(choice.entries),
                    "finish_reason": choice.finish_reason,
                    "stop_reason": choice.stop_reason,
                },
                choice.token_ids,
            )
            for index, choice in enumerate(self._gathered)
        ]
        return self._body("text_completion", choices)

    def _choice(self, index: int, shown: dict[str, object], token_ids: Sequence[int]) -> dict[str, object]:
        first = index not in self._begun
        self._begun.add(index)
        ids = {**self._token_ids(token_ids), **(self._prompt_token_ids(index) if first else {})}
        return {"index": index, **shown, **ids}

    def _entries(self, piece: TextPiece) -> list[CompletionEntry]:
        entries: list[CompletionEntry] = []
        for named in self._named(piece) if piece.logprobs else ():
            offset = self._offsets[piece.index]
            entries.append(CompletionEntry(named.token.text, named.logprob, raw_json(_by_text(named)), offset))
            self._offsets[piece.index] += named.num_chars
        return entries


def _logprobs(entries: list[CompletionEntry]) -> dict[str, object] | None:
    if not entries:
        return None
    return {
        "tokens": [entry.token for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [entry.top for entry in entries],
        "text_offset": [entry.offset for entry in entries],
    }


def _by_text(named: NamedLogprob) -> dict[str, float]:
    """The token itself and the likeliest ones; of several that have the same text, the first."""
    shown = {named.token.text: named.logprob}
    for token, logprob in named.top:
        shown.setdefault(token.text, logprob)
    return shown
