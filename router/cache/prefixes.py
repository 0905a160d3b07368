"""Hashes of the beginnings of prompts, every 16 tokens, and which of them earlier prompts had. Pure.

A hash stands for all tokens up to its place, as a chunk key does, so the chunks of every length that is a multiple of
16 have theirs among them. They are 64 bits wide, made for counting, of a seed that differs from router to router: no
KV is ever found by one.

Block i of 16 tokens t has b_i = sum(w_j * t_j) with random odd w (multilinear hashing), and the prefix up to its end
sum over k <= i of mix(b_k + k * golden + root), all modulo 2**64; mix is the finalizer of splitmix64.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Tokens = npt.NDArray[np.uint32]

STEP = 16
"""Tokens between two hashes."""
EARLY = 64
"""Up to here there is one at each token, as prompts that differ early do so in a date or a name near their start."""
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_SHIFTS = (np.uint64(30), np.uint64(27), np.uint64(31))


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Of one sequence of tokens. `hashes[i]` stands for its first `STEP * (i + 1)` tokens, of the first `num_steps`;
    behind them those of its first 1, 2, 3, ... tokens follow, up to `EARLY`."""

    hashes: Hashes
    num_steps: int

    @property
    def steps(self) -> Hashes:
        """Those at every 16th token."""
        return self.hashes[: self.num_steps]


def packed(token_ids: Sequence[int]) -> Tokens:
    """Token ids, which lie in [0, 2**32), as an array."""
    return np.frombuffer(array("I", token_ids), dtype=np.uint32)


class PrefixHasher:
    """Those with the same seed give the same hashes."""

    def __init__(self, seed: int = 0) -> None:
        numbers = np.random.default_rng(seed)
        self._weights = numbers.integers(0, 1 << 64, STEP, dtype=np.uint64) | np.uint64(1)
        self._places = np.arange(1, 1 << 12, dtype=np.uint64) * _GOLDEN

    def prefixes(self, tokens: Tokens, root: bytes) -> Prefixes:
        """About 10 ns a token. `root`: tokens behind different roots share no hash."""
        num_steps, early = len(tokens) // STEP, tokens[:EARLY]
        hashes = np.empty(num_steps + len(early), dtype=np.uint64)
        np.dot(tokens[: num_steps * STEP].reshape(-1, STEP).astype(np.uint64), self._weights, out=hashes[:num_steps])
        np.multiply(early, self._weights[0], out=hashes[num_steps:], dtype=np.uint64)
        hashes += self._salted(num_steps, len(early), sha256(root).digest())
        mixed(hashes)
        np.cumsum(hashes[:num_steps], out=hashes[:num_steps])
        np.cumsum(hashes[num_steps:], out=hashes[num_steps:])
        return Prefixes(hashes, num_steps)

    def _salted(self, num_steps: int, num_early: int, digest: bytes) -> Hashes:
        """What is added to each block's hash: of its place, and of the root."""
        if len(self._places) < num_steps:
            self._places = np.arange(1, 2 * num_steps, dtype=np.uint64) * _GOLDEN
        roots = np.frombuffer(digest[:16], dtype=np.uint64)
        return np.concatenate([self._places[:num_steps] + roots[0], self._places[:num_early] + roots[1]])


def mixed(values: Hashes) -> Hashes:
    """`values`, each spread over all 64 bits; changed in place."""
    values ^= values >> _SHIFTS[0]
    values *= _MIX[0]
    values ^= values >> _SHIFTS[1]
    values *= _MIX[1]
    values ^= values >> _SHIFTS[2]
    return values


class KnownHashes:
    """A set of hashes that takes a fixed room: each has one place, and the newer of two with the same one stays."""

    def __init__(self, num_places: int) -> None:
        assert num_places & (num_places - 1) == 0, "a power of two"
        self._table: Hashes = np.zeros(num_places, dtype=np.uint64)
        self._mask = np.uint64(num_places - 1)

    def __repr__(self) -> str:
        return f"<KnownHashes of {len(self._table)} places>"

    def add(self, hashes: Hashes) -> None:
        """They are known from now on."""
        self._table[hashes & self._mask] = hashes

    def has(self, hashes: Hashes) -> npt.NDArray[np.bool_]:
        """Of each, whether it is known. Never true of one that was not added (but for one in 2**64)."""
        same: npt.NDArray[np.bool_] = self._table[hashes & self._mask] == hashes
        return same

    def known_tokens(self, prefixes: Prefixes) -> int:
        """How long the longest beginning is that is known. As a hash stands for all before it, one that was forgotten
        in the middle costs nothing."""
        places, steps = np.flatnonzero(self.has(prefixes.hashes)), prefixes.num_steps
        split = int(np.searchsorted(places, steps))
        by_steps = STEP * (int(places[split - 1]) + 1) if split else 0
        by_early = int(places[-1]) - steps + 1 if split < len(places) else 0
        return max(by_steps, by_early)
