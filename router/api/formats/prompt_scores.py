"""The logprobs of a prompt's tokens in the form of answers: named, and in vLLM's `prompt_logprobs`. No I/O."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import msgspec

from nodeapi.prompt_logprobs import PromptLogprobs, PromptRow
from router.text.token_names import NamedToken, TokenNames
from router.text.tokenizer import Tokenizer

_encoder = msgspec.json.Encoder()


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


@dataclass(frozen=True, slots=True)
class NamedLogprob:
    """A token, its logprob, and those of the likeliest tokens in its place. `num_chars`: how much text it completes,
    whatever it is called."""

    token: NamedToken
    num_chars: int
    logprob: float
    top: Sequence[tuple[NamedToken, float]]


def by_id(token_id: int, token: NamedToken) -> NamedToken:
    """A token that is called by its id."""
    return replace(token, text=f"token_id:{token_id}")


class _Told(msgspec.Struct):
    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class NamedRow:
    """One token of a prompt, named; `others` are the names of `row.top`."""

    row: PromptRow
    token: NamedToken
    others: list[NamedToken]

    def shown(self) -> dict[str, _Told]:
        """As in `prompt_logprobs`: by token id, the prompt's own first. One that is among the likeliest has its place
        there for its rank, which is another one where several are as likely."""
        told = {str(self.row.token_id): _Told(finite(self.row.logprob), self.row.rank, self.token.text)}
        for rank, ((token_id, logprob), named) in enumerate(zip(self.row.top, self.others, strict=True), 1):
            told[str(token_id)] = _Told(finite(logprob), rank, named.text)
        return told

    def logprob(self, most: int | None, *, as_id: bool) -> NamedLogprob:
        """As of a token of an answer, with `most` others; None: with all that there are."""
        own, row = self.row.token_id, self.row
        others = [
            (_called(token, token_id, as_id), finite(logprob))
            for (token_id, logprob), token in zip(row.top, self.others, strict=True)
            if token_id != own
        ]
        return NamedLogprob(_called(self.token, own, as_id), len(self.token.text), finite(row.logprob), others[:most])


def _called(token: NamedToken, token_id: int, as_id: bool) -> NamedToken:
    return by_id(token_id, token) if as_id else token


class ScoredPrompt:
    """The tokens of one prompt, named as they come, and gathered for `prompt_logprobs`."""

    def __init__(self, tokenizer: Tokenizer, *, gathers: bool) -> None:
        self._names = TokenNames(tokenizer)
        self._gathers = gathers
        self._pieces = [b"[null"]
        """JSON: of the first token nothing is said."""

    def take(self, piece: PromptLogprobs) -> list[NamedRow]:
        """The next tokens."""
        named = list(self._named(piece))
        if self._gathers:
            self._pieces += (b",", _encoder.encode([row.shown() for row in named])[1:-1])
        return named

    def json(self) -> msgspec.Raw:
        """`prompt_logprobs` of what was taken."""
        return msgspec.Raw(b"".join([*self._pieces, b"]"]))

    def _named(self, piece: PromptLogprobs) -> Iterator[NamedRow]:
        for row in piece.rows():
            token, others = self._names.step(row.token_id, [other for other, _ in row.top])
            yield NamedRow(row, token, others)
