"""Which chunk length and which sizes would have served the last hour best: the trace replayed. Pure.

Sizes stand for one cache with least recently used eviction. A cluster keeps some chunks twice, and its nodes fill
unevenly, so that it needs a little more.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from kvcore.extents import aligned
from router.cache.ghosts import HitCurve, hit_curve
from router.cache.prefixes import STEP
from router.cache.report import RoomPoint
from router.cache.trace import TraceView

_HEADER_BYTES = 128  # in front of each chunk (docs/wire-formats.md)
_NEAR = 0.01
"""One point: what is within it of the best is as good."""


@dataclass(frozen=True, slots=True)
class CacheRoom:
    """What a cluster keeps chunks in. `memory_bytes`: of all segments, as far as they are filled; `tier_bytes`: the
    largest tier, over all nodes; 0: there is none, or nobody knows."""

    chunk_tokens: int
    chunk_bytes: int
    block_tokens: int
    memory_bytes: int
    tier_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        """Of the largest place; what lies in memory lies in the tiers too."""
        return max(self.memory_bytes, self.tier_bytes)

    def bytes_a_chunk(self, chunk_tokens: int) -> int:
        """With its header, as it lies in a segment."""
        return aligned(self.chunk_bytes * chunk_tokens // self.chunk_tokens + _HEADER_BYTES)


class ChunkLength(msgspec.Struct, frozen=True, kw_only=True):
    """What chunks of this length would have hit, with the room that there is and with any."""

    chunk_tokens: int
    hit_rate: float
    unlimited_hit_rate: float


class CacheAdvice(msgspec.Struct, frozen=True, kw_only=True):
    """The body of GET /v1/cache/advise. Hit rates are of the prompt tokens of the last hour, beginning empty."""

    prompts: int = 0
    """That were replayed."""
    sample_rate: float = 1.0
    """Which share of their chunks was."""
    chunk_tokens: int = 0
    """As it is."""
    room_bytes: int = 0
    """As it is: of the segments, or of the largest tier if that has more."""
    hit_rate: float = 0.0
    """What was replayed would have hit, as things are."""
    lengths: list[ChunkLength] = []
    best_chunk_tokens: int = 0
    """The longest of those within a point of the best, with the room that there is: long chunks cost less to move."""
    sizes: list[RoomPoint] = []
    """With chunks of `best_chunk_tokens`."""
    memory_bytes: int = 0
    """Where the curve of `sizes` bends: beyond it each byte brings less than the average one before it."""
    memory_hit_rate: float = 0.0
    enough_bytes: int = 0
    """The least room, of memory or a tier, within a point of unlimited room."""
    enough_hit_rate: float = 0.0
    advice: list[str] = []
    """The same in words."""


def room_points(
    curve: HitCurve, room: CacheRoom, times: Sequence[float | None] = (0.5, 1, 2, 4, None)
) -> list[RoomPoint]:
    """What the prompts of `curve` would have hit with so many times the room."""
    each, points = room.bytes_a_chunk(curve.chunk_tokens), []
    for factor in times:
        size = None if factor is None else round(factor * room.num_bytes)
        rate = curve.hit_rate(None if size is None else size / each)
        points.append(RoomPoint(times=factor, num_bytes=size, hit_rate=rate))
    return points


def chunk_lengths(room: CacheRoom, longest: int) -> Iterator[int]:
    """The present one, and the engine's block doubled again and again, as far as both 16 and the block divide it."""
    block = int(np.lcm(room.block_tokens, STEP))
    lengths = {block << doubled for doubled in range(13) if block << doubled <= longest}
    yield from sorted(lengths | ({room.chunk_tokens} if room.chunk_tokens % STEP == 0 else set()))


def advise(view: TraceView, room: CacheRoom, *, longest: int, max_samples: int) -> CacheAdvice:
    """`longest`: chunks of more tokens are not looked at. A second of one core at most, in numpy."""
    curves = [hit_curve(view.uses(length, max_samples)) for length in chunk_lengths(room, longest)]
    lengths = [
        ChunkLength(
            chunk_tokens=curve.chunk_tokens,
            hit_rate=curve.hit_rate(room.num_bytes / room.bytes_a_chunk(curve.chunk_tokens)),
            unlimited_hit_rate=curve.hit_rate(None),
        )
        for curve in curves
    ]
    if not any(curve.num_lookups for curve in curves):
        return CacheAdvice(chunk_tokens=room.chunk_tokens, room_bytes=room.num_bytes, advice=["nothing to go by yet"])
    best_rate = max(option.hit_rate for option in lengths)
    best = max(option.chunk_tokens for option in lengths if option.hit_rate >= best_rate - _NEAR)
    curve = next(curve for curve in curves if curve.chunk_tokens == best)
    each = room.bytes_a_chunk(best)
    bend, enough = bend_of(curve), enough_of(curve)
    now = next((option.hit_rate for option in lengths if option.chunk_tokens == room.chunk_tokens), 0.0)
    advice = CacheAdvice(
        prompts=sum(len(page.lengths) for page in view.pages),
        sample_rate=min(curve.rate for curve in curves),
        chunk_tokens=room.chunk_tokens,
        room_bytes=room.num_bytes,
        hit_rate=now,
        lengths=lengths,
        best_chunk_tokens=best,
        sizes=room_points(curve, room, (0.25, 0.5, 1, 2, 4, 8, 16, None)),
        memory_bytes=bend * each,
        memory_hit_rate=curve.hit_rate(bend),
        enough_bytes=enough * each,
        enough_hit_rate=curve.hit_rate(enough),
    )
    return msgspec.structs.replace(advice, advice=list(_words(advice)))


def _words(advice: CacheAdvice) -> Iterator[str]:
    best = next(option for option in advice.lengths if option.chunk_tokens == advice.best_chunk_tokens)
    if best.chunk_tokens == advice.chunk_tokens:
        yield f"kv.chunk_tokens: {best.chunk_tokens} as it is; other lengths would not have hit more"
    else:
        yield (
            f"kv.chunk_tokens: {best.chunk_tokens} would have hit {best.hit_rate:.1%} of the prompt tokens with the "
            f"present room, {advice.chunk_tokens} {advice.hit_rate:.1%}"
        )
    bend, enough = size_words(advice.memory_bytes), size_words(advice.enough_bytes)
    yield f"memory: {bend} over all segments (nodes.*.segment) would have hit {advice.memory_hit_rate:.1%}"
    if advice.enough_bytes > advice.memory_bytes:
        yield f"beyond it: {enough}, in memory or in a tier, would have hit {advice.enough_hit_rate:.1%}"
    yield f"there are {size_words(advice.room_bytes)}; unlimited room would have hit {best.unlimited_hit_rate:.1%}"


def size_words(num_bytes: float) -> str:
    """As people write it."""
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} GiB"


def enough_of(curve: HitCurve) -> int:
    """The fewest chunks that hit within a point of what all would."""
    spare = int(_NEAR * curve.num_lookups / curve.usable_share) if curve.usable_share else 0
    needed = curve.distances[: max(0, len(curve.distances) - spare)]
    return int(needed[-1]) + 1 if len(needed) else 0


def bend_of(curve: HitCurve) -> int:
    """The number of chunks at which the hit rate lies highest above the straight line from nothing to `enough_of`
    (Satopää et al., "Finding a Kneedle in a Haystack", 2011)."""
    enough = enough_of(curve)
    sizes = curve.distances[curve.distances < enough] + 1
    if not len(sizes):
        return 0
    above = np.arange(1, len(sizes) + 1) / len(sizes) - sizes / enough
    return int(sizes[int(np.argmax(above))])
