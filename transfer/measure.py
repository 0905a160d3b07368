"""How fast a transport moves bytes between here and a segment: latency of small gets, rate of large puts and gets.

Uses only the places of the segment that it was given. Checks that it reads back what it had written.
"""

import asyncio
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from kvcore.clock import Clock
from kvcore.errors import TransferProtocolError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import Direction, TransferEngine, TransferOp

SMALL_BYTES = 4096
_WORDS_AT_ONCE = 1 << 17


@dataclass(frozen=True, slots=True)
class MeasureLimits:
    """How often and how long each kind of transfer is repeated at most."""

    small_gets: int = 200
    small_s: float = 0.5
    large_rounds: int = 4
    large_s: float = 0.75
    round_s: float = 0.4
    """A batch is cut down to what should take so long, so that a slow link is not asked for 64 MiB each time."""


@dataclass(frozen=True, slots=True)
class Measured:
    """`latency_s`: median of gets of SMALL_BYTES, one at a time. Rates: the best of some rounds of `num_bytes`, and of
    a copy inside of the same local buffer, in bytes/s."""

    latency_s: float
    put_rate: float
    get_rate: float
    copy_rate: float
    num_bytes: int


async def measure(
    engine: TransferEngine,
    segment: Segment,
    places: Sequence[tuple[int, int]],
    *,
    clock: Clock,
    timeout_s: float,
    limits: MeasureLimits = MeasureLimits(),
) -> Measured:
    """Write and read `places` of the segment, (offset, length) each, multiples of SMALL_BYTES; about 3 s.

    Raises TransferError as soon as one transfer fails; TransferTimeoutError when `timeout_s` is up. Takes as much
    memory as the places. Cancelling it ends the transfer under way, as TransferEngine says.
    """
    bench = _Bench(engine, segment, places, clock, clock.now() + timeout_s)
    copy_rate = await asyncio.to_thread(bench.prepare)
    engine.register(bench.words.data.cast("B"))
    first = bench.ops[:1]
    await bench.move("write", first)  # connects
    bench.shorten(await bench.move("write", first), limits.round_s)
    latencies = await bench.repeat("read", bench.small, limits.small_gets, limits.small_s)
    puts = await bench.repeat("write", bench.ops, limits.large_rounds, limits.large_s)
    await asyncio.to_thread(bench.clear)
    gets = await bench.repeat("read", bench.ops, limits.large_rounds, limits.large_s)
    if not await asyncio.to_thread(bench.intact):
        raise TransferProtocolError(f"segment {segment.id}: what was read is not what had been written")
    size = bench.num_bytes
    return Measured(statistics.median(latencies), size / min(puts), size / min(gets), copy_rate, size)


class _Bench:
    """The local buffer, and the batch between it and the places."""

    def __init__(
        self, engine: TransferEngine, segment: Segment, places: Sequence[tuple[int, int]], clock: Clock, deadline: float
    ) -> None:
        self._engine, self._segment, self._clock, self._deadline = engine, segment, clock, deadline
        self.words: npt.NDArray[np.uint64] = np.empty(sum(length for _, length in places) // 8, np.uint64)
        self.ops: list[TransferOp] = []
        view, at = self.words.data.cast("B"), 0
        for offset, length in places:
            self.ops.append(TransferOp(segment, offset, [view[at : at + length]]))
            at += length
        self.small = [TransferOp(segment, places[0][0], [view[:SMALL_BYTES]])]

    @property
    def num_bytes(self) -> int:
        """Of the batch."""
        return sum(op.num_bytes for op in self.ops)

    async def move(self, direction: Direction, ops: Sequence[TransferOp]) -> float:
        """Seconds that it took."""
        began = self._clock.now()
        left_s = self._deadline - began
        if left_s <= 0:
            raise TransferTimeoutError(f"segment {self._segment.id}: measuring took too long")
        move = self._engine.write if direction == "write" else self._engine.read
        errors = await move(ops, left_s)
        took_s = self._clock.now() - began
        for error in errors:
            if error is not None:
                raise error
        return max(took_s, 1e-9)

    async def repeat(self, direction: Direction, ops: Sequence[TransferOp], times: int, seconds: float) -> list[float]:
        """Seconds of each time: once at least, `times` at most, none begun after `seconds`."""
        until = self._clock.now() + seconds
        took = [await self.move(direction, ops)]
        while len(took) < times and self._clock.now() < until:
            took.append(await self.move(direction, ops))
        return took

    def shorten(self, seconds: float, round_s: float) -> None:
        """Keep as many ops as should take `round_s`, when the first takes `seconds`."""
        del self.ops[max(1, int(round_s / seconds)) :]

    def prepare(self) -> float:
        """Fault the buffer in, measure a copy inside of it, fill it. In a thread."""
        self.words.fill(0)
        half = len(self.words) // 2
        best = min(self._timed(lambda: np.copyto(self.words[:half], self.words[half : 2 * half])) for _ in range(3))
        for start in range(0, len(self.words), _WORDS_AT_ONCE):
            part = self.words[start : start + _WORDS_AT_ONCE]
            part[:] = _pattern(start, start + len(part))
        return half * 8 / best

    def clear(self) -> None:
        """Zero the buffer before a read, so that bytes that the read did not bring are noticed. In a thread."""
        self.words.fill(0)

    def intact(self) -> bool:
        """Whether the batch's part of the buffer is what `prepare` had filled it with. In a thread."""
        count = self.num_bytes // 8
        return all(
            np.array_equal(self.words[start : min(start + _WORDS_AT_ONCE, count)], _pattern(start, count))
            for start in range(0, count, _WORDS_AT_ONCE)
        )

    def _timed(self, work: Callable[[], None]) -> float:
        began = self._clock.now()
        work()
        return max(self._clock.now() - began, 1e-9)


def _pattern(start: int, end: int) -> npt.NDArray[np.uint64]:
    """A word for each place, none of them 0."""
    return np.arange(start + 1, min(start + _WORDS_AT_ONCE, end) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
