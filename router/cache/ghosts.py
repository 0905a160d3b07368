"""What the same prompts would have hit in a cache of any size: the miss-ratio curve of least recently used. Pure.

The ghost list is the trace of hashes (`router.cache.trace`). A use hits in every cache that holds more chunks than
others were used since its last use, its reuse distance (Mattson et al., "Evaluation techniques for storage
hierarchies", 1970); so the distances of all uses are the whole curve. Prompts are looked up as a whole before they are
used, and used from their last chunk to their first, so that of one prompt the beginning stays longest, as with us.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from router.cache.trace import ChunkUses

Ints = npt.NDArray[np.int64]


def count_below(values: Ints, ends: Ints, bounds: Ints) -> Ints:
    """For each i, how many of `values[:ends[i]]` are below `bounds[i]`. None is negative. O(log) passes over arrays.

    A wavelet matrix, made level by level and used at once: at each bit, from the highest, values with a 0 go to the
    front in their order, and each query's range [low, high) follows the side on which its bound lies.
    """
    counts, low, high = np.zeros_like(ends), np.zeros_like(ends), ends.copy()
    top = int(max(values.max(initial=0), bounds.max(initial=0))).bit_length()
    for bit in range(top - 1, -1, -1):
        ones = (values >> bit & 1).astype(bool)
        zeros_before = np.concatenate([[0], np.cumsum(~ones)])
        zeros_low, zeros_high = zeros_before[low], zeros_before[high]
        right = (bounds >> bit & 1).astype(bool)
        counts += np.where(right, zeros_high - zeros_low, 0)
        low = np.where(right, zeros_before[-1] + low - zeros_low, zeros_low)
        high = np.where(right, zeros_before[-1] + high - zeros_high, zeros_high)
        values = np.concatenate([values[~ones], values[ones]])
    return counts


def reuse_distances(uses: ChunkUses) -> Ints:
    """Of each use that a cache may serve and that is not the first one of its chunk: how many other chunks were used
    between its last use and its prompt, among those sampled."""
    order = np.lexsort((-uses.places, uses.prompts))  # each prompt from its last chunk to its first
    hashes, prompts, places = uses.hashes[order], uses.prompts[order], uses.places[order]
    by_hash = np.argsort(hashes, kind="stable")
    same = hashes[by_hash[1:]] == hashes[by_hash[:-1]]
    previous = np.full(len(hashes), -1, dtype=np.int64)
    previous[by_hash[1:][same]] = by_hash[:-1][same]
    began = np.searchsorted(prompts, prompts, side="left")
    again = (previous >= 0) & (places < uses.usable[prompts])
    # Between the last use at `before` and the prompt at `end` a chunk was used that was not used since `before` until
    # then: those u < end with previous[u] <= before. All u <= before are among them and do not count.
    before, end = previous[again], began[again]
    return count_below(previous + 1, end, before + 2) - (before + 1)


@dataclass(frozen=True, slots=True)
class HitCurve:
    """The hit rate in tokens by the number of chunks that a cache holds. Made by `hit_curve`."""

    chunk_tokens: int
    distances: npt.NDArray[np.float64]
    """Sorted: of the uses that can hit, as if none had been left out."""
    num_lookups: int
    """Sampled ones, those that can hit in no cache included."""
    usable_share: float
    """Of the prompt tokens: in whole chunks that a cache may serve."""
    rate: float
    """Which share of all chunks was sampled."""

    def hit_rate(self, num_chunks: float | None) -> float:
        """With room for so many chunks; None: for all."""
        if not self.num_lookups:
            return 0.0
        hits = len(self.distances)
        if num_chunks is not None:
            hits = int(np.searchsorted(self.distances, num_chunks, side="left"))
        return self.usable_share * hits / self.num_lookups


def hit_curve(uses: ChunkUses) -> HitCurve:
    """Of all uses; exact where nothing was left out."""
    usable = uses.usable
    total = int(uses.lengths.sum())
    return HitCurve(
        uses.chunk_tokens,
        np.sort(reuse_distances(uses)) / uses.rate,
        int((uses.places < usable[uses.prompts]).sum()),
        int(usable.sum()) * uses.chunk_tokens / total if total else 0.0,
        uses.rate,
    )
