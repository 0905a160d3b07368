"""Log-probabilities of a prompt's own tokens, packed: a long prompt has more of them than objects are worth. Pure.

Owns how they lie in bytes. A reader checks a piece before it unpacks it (`problem`).
"""

import struct
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import msgspec

MOST_ENTRIES = 1024
"""Of one piece: 8 KiB, and about a millisecond of whoever names its tokens."""


class PromptRow(NamedTuple):
    """One token of a prompt. `rank`: 1 is the likeliest. `top`: the likeliest tokens in its place, as (id, logprob)."""

    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class PromptLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Of consecutive tokens of a prompt, the first of which is token `start`, 1 or later: nothing is said of token 0.

    Each has `1 + top` entries: itself, and the likeliest ones from the best on. A reader ignores fields that it does
    not know.
    """

    start: int
    top: int
    token_ids: bytes
    """u32le, entry by entry, token by token."""
    logprobs: bytes
    """f32le, likewise: natural logarithms."""
    ranks: bytes
    """u32le, of the tokens themselves: how many are as likely or likelier."""

    @classmethod
    def pack(cls, start: int, top: int, rows: Sequence[PromptRow]) -> Self:
        """Of these tokens, each with `top` others."""
        ids = [i for row in rows for i in (row.token_id, *(other for other, _ in row.top))]
        values = [value for row in rows for value in (row.logprob, *(logprob for _, logprob in row.top))]
        assert len(ids) == len(rows) * (1 + top)
        return cls(
            start=start,
            top=top,
            token_ids=struct.pack(f"<{len(ids)}I", *ids),
            logprobs=struct.pack(f"<{len(ids)}f", *values),
            ranks=struct.pack(f"<{len(rows)}I", *(row.rank for row in rows)),
        )

    def __len__(self) -> int:
        """How many tokens."""
        return len(self.ranks) // 4

    @property
    def end(self) -> int:
        """The first token behind them."""
        return self.start + len(self)

    def problem(self, prompt: Sequence[int], top: int) -> str | None:
        """What is wrong with it as a piece of what was asked for: these tokens, `top` others each. None: nothing."""
        entries = len(self) * (1 + top)
        if self.top != top or not len(self) or 4 * entries != len(self.token_ids) or 4 * entries != len(self.logprobs):
            return "logprobs of a prompt that do not belong together"
        own = struct.unpack(f"<{entries}I", self.token_ids)[:: 1 + top]
        if self.start < 1 or self.end > len(prompt) or list(own) != list(prompt[self.start : self.end]):
            return "logprobs of another prompt"
        return None

    def from_token(self, start: int) -> Self:
        """Without the tokens before `start`, of which it has one at least behind that."""
        drop = max(0, start - self.start)
        assert drop < len(self)
        return self._part(drop, len(self)) if drop else self

    def pieces(self) -> Iterator[Self]:
        """The same in pieces of at most MOST_ENTRIES entries, one token at least each."""
        step = max(1, MOST_ENTRIES // (1 + self.top))
        for first in range(0, len(self), step):
            yield self._part(first, first + step)

    def _part(self, first: int, stop: int) -> Self:
        """Of its tokens `first .. stop`, counted from its own first one."""
        entries = slice(4 * first * (1 + self.top), 4 * stop * (1 + self.top))
        return type(self)(
            start=self.start + first,
            top=self.top,
            token_ids=self.token_ids[entries],
            logprobs=self.logprobs[entries],
            ranks=self.ranks[4 * first : 4 * stop],
        )

    def rows(self) -> Iterator[PromptRow]:
        """Token by token."""
        width = 1 + self.top
        ids = struct.unpack(f"<{len(self) * width}I", self.token_ids)
        values = struct.unpack(f"<{len(self) * width}f", self.logprobs)
        for number, rank in enumerate(struct.unpack(f"<{len(self)}I", self.ranks)):
            at, end = number * width, (number + 1) * width
            yield PromptRow(ids[at], values[at], rank, list(zip(ids[at + 1 : end], values[at + 1 : end], strict=True)))
