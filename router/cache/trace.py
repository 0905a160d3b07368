"""The prompts of the last hour as hashes of their beginnings, in bounded memory, for replaying them. Pure.

Sampled as in SHARDS (Waldspurger et al., "Efficient MRC Construction with SHARDS", FAST 2015): a hash is kept if it is
below a threshold, whichever prompt it comes from, so that all uses of one beginning are kept or none. Over the bound
the threshold is halved, for what is already there too. At rate R distances between uses shrink to R times theirs.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.cache.prefixes import STEP, Hashes

Places = npt.NDArray[np.uint32]
_PAGE_PROMPTS = 4096
_OPEN_BYTES = 900
"""Beside the hashes of a prompt in the open page."""


@dataclass(frozen=True, slots=True)
class TracePage:
    """Some prompts, one after the other. `places[i]`: which of its prompt's hashes `hashes[i]` is, counted from 0;
    `prompts[i]`: of which prompt of this page. `lengths`: tokens of each prompt, `totals`: with its answer."""

    began: float
    hashes: Hashes
    places: Places
    prompts: Places
    lengths: Places

    @property
    def num_bytes(self) -> int:
        """Of its arrays."""
        return self.hashes.nbytes + self.places.nbytes + self.prompts.nbytes + self.lengths.nbytes

    def below(self, threshold: int) -> "TracePage":
        """What of it is below a lower threshold."""
        return self._only(self.hashes < np.uint64(threshold))

    def every(self, step: int) -> "TracePage":
        """The last hash of each `step`."""
        return self if step == 1 else self._only((self.places + 1) % step == 0)

    def _only(self, kept: npt.NDArray[np.bool_]) -> "TracePage":
        return TracePage(self.began, self.hashes[kept], self.places[kept], self.prompts[kept], self.lengths)


@dataclass(frozen=True, slots=True)
class TraceView:
    """The trace at one moment. It never changes, so another thread may read it."""

    pages: Sequence[TracePage]
    threshold: int

    def uses(self, chunk_tokens: int, max_samples: int) -> "ChunkUses":
        """The uses of chunks of this length, a multiple of 16. More than `max_samples` are sampled further."""
        step, threshold = chunk_tokens // STEP, self.threshold
        assert step * STEP == chunk_tokens
        pages = [page.every(step) for page in self.pages]
        before = np.cumsum([0, *(len(page.lengths) for page in pages)])
        hashes = np.concatenate([np.empty(0, np.uint64), *(page.hashes for page in pages)])
        places = np.concatenate([np.empty(0, np.int64), *(page.places // step for page in pages)])
        of_prompts = (first + page.prompts for first, page in zip(before, pages, strict=False))
        prompts = np.concatenate([np.empty(0, np.int64), *of_prompts])
        lengths = np.concatenate([np.empty(0, np.int64), *(page.lengths for page in pages)])
        while len(hashes) > max_samples:
            threshold //= 2
            kept = hashes < np.uint64(threshold)
            hashes, places, prompts = hashes[kept], places[kept], prompts[kept]
        return ChunkUses(chunk_tokens, hashes, places, prompts, lengths, threshold / (1 << 64))


@dataclass(frozen=True, slots=True)
class ChunkUses:
    """Uses of chunks of one length, prompt after prompt, each prompt's from its first chunk on.

    `rate`: which share of all chunks is here. `lengths`: tokens of every prompt.
    """

    chunk_tokens: int
    hashes: Hashes
    places: npt.NDArray[np.int64]
    prompts: npt.NDArray[np.int64]
    lengths: npt.NDArray[np.int64]
    rate: float

    @property
    def usable(self) -> npt.NDArray[np.int64]:
        """How many leading chunks of each prompt a cache may serve: one token is left to compute."""
        result: npt.NDArray[np.int64] = (self.lengths - 1) // self.chunk_tokens
        return result


class PromptTrace:
    """One a router."""

    def __init__(self, span_s: float, max_bytes: int) -> None:
        self._span_s = span_s
        self._max_bytes = max_bytes
        self._threshold = 1 << 64
        self._pages: deque[TracePage] = deque()
        self._bytes = 0
        self._open: list[tuple[Hashes, Places, int]] = []
        self._open_bytes = 0
        self._began = 0.0

    def __repr__(self) -> str:
        return f"<PromptTrace {len(self._pages)} pages, {self.num_bytes} bytes, rate {self._threshold / (1 << 64):g}>"

    @property
    def num_bytes(self) -> int:
        """What it takes now, about."""
        return self._bytes + self._open_bytes

    def add(self, steps: Hashes, prompt_tokens: int, now: float) -> None:
        """A prompt was served. `steps`: the hashes of the beginnings of it and of its answer. `now` never goes back."""
        if not self._open:
            self._began = now
        places = np.arange(len(steps), dtype=np.uint32)
        if self._threshold < 1 << 64:
            kept = steps < np.uint64(self._threshold)
            steps, places = steps[kept], places[kept]
        self._open.append((steps, places, prompt_tokens))
        self._open_bytes += 12 * len(steps) + _OPEN_BYTES
        full = len(self._open) >= _PAGE_PROMPTS or 4 * self._open_bytes > self._max_bytes
        if full or now - self._began > self._span_s / 60:
            self._close_page(now)

    def view(self, now: float) -> TraceView:
        """What there is of the last hour."""
        self._close_page(now)
        return TraceView(tuple(self._pages), self._threshold)

    def _close_page(self, now: float) -> None:
        if self._open:
            counts = [len(steps) for steps, _, _ in self._open]
            page = TracePage(
                self._began,
                np.concatenate([steps for steps, _, _ in self._open]),
                np.concatenate([places for _, places, _ in self._open]),
                np.repeat(np.arange(len(counts), dtype=np.uint32), counts),
                np.array([length for _, _, length in self._open], dtype=np.uint32),
            )
            self._open, self._open_bytes = [], 0
            self._pages.append(page)
            self._bytes += page.num_bytes
        while self._pages and now - self._pages[0].began > self._span_s:
            self._bytes -= self._pages.popleft().num_bytes
        while self._bytes > self._max_bytes and self._threshold > 1 << 40:
            self._threshold //= 2
            self._pages = deque(page.below(self._threshold) for page in self._pages)
            self._bytes = sum(page.num_bytes for page in self._pages)
        while self._bytes > self._max_bytes:
            self._bytes -= self._pages.popleft().num_bytes
