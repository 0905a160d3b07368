"""A grammar of vLLM's that does not begin at its request's first token. No vLLM here.

Owns where it begins: behind the reasoning, and behind the tokens of the answer that another engine has made already,
which to vLLM are part of the prompt.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from nodeapi.grammars.grammar import stands_before


class _Inner(Protocol):
    """vllm.v1.structured_output.backend_types.StructuredOutputGrammar."""

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool: ...

    def validate_tokens(self, tokens: list[int]) -> list[int]: ...

    def rollback(self, num_tokens: int) -> None: ...

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None: ...

    def is_terminated(self) -> bool: ...

    def reset(self) -> None: ...


@dataclass(frozen=True, slots=True)
class FreeText:
    """What may come before the grammar. `after`: sequences of tokens, each of which ends it; `opening`: the tokens that
    begin it where it is not under way already. See `nodeapi.grammars.grammar.Grammar`."""

    after: tuple[tuple[int, ...], ...] = ()
    opening: tuple[int, ...] = ()

    def start_in(self, tokens: Sequence[int], seen: int = 0) -> int | None:
        """Where in `tokens` the grammar begins; None: not yet. It is known not to begin in the first `seen`."""
        opening = self.opening[:1]  # a longer one is not told from its first token
        if not self.after or (tokens and opening and tokens[0] != opening[0]):
            return 0
        return next((end for end in range(seen + 1, len(tokens) + 1) if stands_before(tokens, end, self.after)), None)


class PlacedGrammar:
    """`inner` behind the free text. As vLLM's grammars, it is told of each token once and may be rolled back."""

    def __init__(self, inner: _Inner, free: FreeText) -> None:
        self._inner = inner
        self._free = free
        self._tokens: list[int] = []
        self._start = free.start_in([])

    def __repr__(self) -> str:
        return f"<PlacedGrammar {len(self._tokens)} tokens, starts at {self._start}>"

    def accept_tokens(self, request_id: str, tokens: list[int]) -> bool:
        """Whether all follow it."""
        before = len(self._tokens)
        self._tokens += tokens
        if self._start is None:
            self._start = self._free.start_in(self._tokens, before)
        if self._start is None:
            return True
        rest = self._tokens[max(self._start, before) :]
        return not rest or self._inner.accept_tokens(request_id, rest)

    def validate_tokens(self, tokens: list[int]) -> list[int]:
        """The first of them that follow it; its place stays."""
        before, start = len(self._tokens), self._start
        if start is None:
            self._tokens += tokens
            start = self._free.start_in(self._tokens, before)
            del self._tokens[before:]
        if start is None:
            return tokens
        free = max(0, start - before)
        return [*tokens[:free], *self._inner.validate_tokens(tokens[free:])]

    def rollback(self, num_tokens: int) -> None:
        """The last `num_tokens` did not come."""
        before = len(self._tokens)
        del self._tokens[before - num_tokens :]
        if self._start is not None:
            inside = before - max(self._start, len(self._tokens))
            if inside > 0:
                self._inner.rollback(inside)
            if self._start > len(self._tokens) or self._opens:
                self._start = None  # the first place where it could begin is gone

    def fill_bitmask(self, bitmask: Any, batch_index: int) -> None:
        """Which tokens may come; int32, a bit for each."""
        if self._start is None and not self._opens:
            bitmask[batch_index].fill_(-1)
            return
        self._inner.fill_bitmask(bitmask, batch_index)
        if self._opens:
            word, bit = divmod(self._free.opening[0], 32)
            bitmask[batch_index, word] |= -(1 << 31) if bit == 31 else 1 << bit

    def is_terminated(self) -> bool:
        """Whether it has come to its end."""
        return self._start is not None and self._inner.is_terminated()

    def reset(self) -> None:
        """To its beginning."""
        self._inner.reset()
        self._tokens = []
        self._start = self._free.start_in([])

    @property
    def _opens(self) -> bool:
        """Whether the first token may begin free text."""
        return bool(self._free.opening and self._free.after) and not self._tokens
