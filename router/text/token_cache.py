"""The tokens of texts that were encoded before, part by part: a chat's next turn, a document that is asked about again.

Exact: a part is found by its characters alone, and `router.text.cuts` says where a text may have parts. Bounded by what
it holds. Used by several threads.
"""

import sys
import threading
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TokenCacheLimits:
    """Bounds of what is kept, and of one step of encoding."""

    part_chars: int = 1024
    """A part has at least so many. A text that is shorter has one part, and is kept, too."""
    parts_at_once: int = 16
    """That are encoded without the interpreter's lock being wanted between them: some milliseconds."""
    max_bytes: int = 64 << 20


class TokenCache:
    """Of one tokenizer. `encode` makes the tokens of several texts. What one has asked speeds nobody else up: how long
    it takes would tell of it."""

    def __init__(
        self, encode: Callable[[Sequence[str]], list[list[int]]], limits: TokenCacheLimits = TokenCacheLimits()
    ) -> None:
        self._encode = encode
        self._limits = limits
        self._lock = threading.Lock()
        self._tokens: OrderedDict[tuple[str, str], array[int]] = OrderedDict()
        self.num_bytes = 0

    def __repr__(self) -> str:
        return f"<TokenCache {len(self._tokens)} parts, {self.num_bytes >> 10} KiB>"

    def tokens_of(self, parts: Sequence[str], whose: str) -> list[int]:
        """Of the parts, one after the other."""
        with self._lock:
            found = [self._find((whose, part)) for part in parts]
        missing = [number for number, tokens in enumerate(found) if tokens is None]
        at_once = self._limits.parts_at_once
        for first in range(0, len(missing), at_once):
            numbers = missing[first : first + at_once]
            for number, ids in zip(numbers, self._encode([parts[number] for number in numbers]), strict=True):
                found[number] = array("I", ids)
                with self._lock:
                    self._keep((whose, parts[number]), found[number])
        tokens: list[int] = []
        for each in found:
            assert each is not None
            tokens += each
        return tokens

    def _find(self, key: tuple[str, str]) -> "array[int] | None":
        tokens = self._tokens.get(key)
        if tokens is not None:
            self._tokens.move_to_end(key)
        return tokens

    def _keep(self, key: tuple[str, str], tokens: "array[int] | None") -> None:
        if tokens is None or key in self._tokens:
            return
        self._tokens[key] = tokens
        self.num_bytes += _size(key, tokens)
        while self.num_bytes > self._limits.max_bytes:
            self.num_bytes -= _size(*self._tokens.popitem(last=False))


def _size(key: tuple[str, str], tokens: "array[int]") -> int:
    """With what the entry itself takes, about."""
    return sys.getsizeof(key) + sum(map(sys.getsizeof, key)) + sys.getsizeof(tokens) + 200
