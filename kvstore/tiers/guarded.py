"""A tier as its users have it: never asked while it is away, never given more at once than was agreed, and measured.

Owns a breaker, a bound of bytes under way, and running estimates of its speed; no chunk.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import replace
from typing import TypeVar

from kvcore.clock import Clock
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, Tier, TierChunk, TierOutcome, TierStats
from kvstore.tiers.limits import TierLimits
from kvstore.tiers.rate import RunningRate

_Result = TypeVar("_Result")
_AWAY = TierOutcome.UNAVAILABLE


class GuardedTier:
    """A `Tier` over another, whose closing it takes over.

    Breaker: after `limits.failures` calls in a row that were late or found the tier unavailable, calls are answered at
    once, as unavailable, for a pause that doubles each time; the first call after a pause goes through alone, and its
    outcome decides. `in_flight_bytes`: loads and saves wait, within their deadlines, while more are under way; one
    that is larger by itself goes alone.
    """

    def __init__(self, tier: Tier, clock: Clock, *, in_flight_bytes: int, limits: TierLimits = TierLimits()) -> None:
        self.name, self.shared, self.max_chunk_bytes = tier.name, tier.shared, tier.max_chunk_bytes
        self.counts: Counter[tuple[str, TierOutcome]] = Counter()
        """(`load` or `save`, outcome) -> chunks, since start."""
        self.moved_bytes: Counter[str] = Counter()
        """`load`, `save` -> bytes that arrived, since start."""
        self._tier, self._clock, self._limits = tier, clock, limits
        self._rates = {operation: RunningRate(limits.rate_weight) for operation in ("load", "save")}
        self._save_problem: str | None = None
        """Of the last save, if it kept nothing. The tier's own is of its last call, and to find and to load may be fine
        where all is full, or may not be written."""
        self._failures = 0
        self._pause_s = limits.pause_s
        self._closed_until = 0.0
        self._trying = False
        self._in_flight_bytes, self._under_way = in_flight_bytes, 0
        self._room = asyncio.Condition()

    def __repr__(self) -> str:
        state = "away" if self.away else "in use"
        return f"<GuardedTier {self.name}, {state}, {self._under_way} bytes under way>"

    @property
    def away(self) -> bool:
        """Whether the tier is left alone now."""
        return self._failures >= self._limits.failures and (self._trying or self._clock.now() < self._closed_until)

    def rate(self, operation: str) -> float | None:
        """Bytes a second of one `load` or `save` call, as a running estimate; None: not measured yet."""
        return self._rates[operation].value

    def doubt(self, operation: str) -> None:
        """It is used though what is known of `operation` speaks against it. See RunningRate."""
        self._rates[operation].doubt()

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`. What takes longer than `timeout_s` counts as a failure."""
        found = [False] * len(names)
        if not names or self.away:
            return found
        if not self.shared:  # it knows by heart what lies in it, which says nothing of how well it reads and writes
            return await self._tier.find(names, timeout_s=timeout_s)
        with _BreakerTry(self) as attempt:
            answer = await _in_time(self._tier.find(names, timeout_s=timeout_s), timeout_s)
            stats = self._tier.stats()
            attempt.ok = answer is not None and (stats.problem is None or stats.partly)
        return answer or found

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`."""
        unknown: list[int | TierOutcome] = [_AWAY] * len(names)
        if not names or self.away:
            return unknown
        return await _in_time(self._tier.sizes(names, timeout_s=timeout_s), timeout_s) or unknown

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        return await self._move("load", chunks, lambda left_s: self._tier.load(chunks, timeout_s=left_s), timeout_s)

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""

        async def call(left_s: float) -> list[TierOutcome]:
            outcomes = await self._tier.save(chunks, ttl_s=ttl_s, timeout_s=left_s)
            self._save_problem = None if TierOutcome.OK in outcomes else self._tier.stats().problem
            return outcomes

        return await self._move("save", chunks, call, timeout_s)

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        if names and not self.away:
            await _in_time(self._tier.remove(names, timeout_s=timeout_s), timeout_s)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        if not names or self.away:
            return 0
        return await _in_time(self._tier.expire(names, ttl_s, timeout_s=timeout_s), timeout_s) or 0

    async def generations(self, *, timeout_s: float) -> GenerationList | None:
        """See `Tier`."""
        if self.away:
            return GenerationList(incomplete=self._why_away())
        late = GenerationList(incomplete="it did not answer in time")
        return await _in_time(self._tier.generations(timeout_s=timeout_s), timeout_s, late)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        if not self.away:
            await _in_time(self._tier.mark(fingerprint, owner, note, ttl_s=ttl_s, timeout_s=timeout_s), timeout_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        if self.away:
            return Cleared(incomplete=self._why_away())
        late = Cleared(incomplete="it did not answer in time")
        clearing = self._tier.clear(fingerprints, own=own, timeout_s=timeout_s)
        return await _in_time(clearing, timeout_s, late) or late

    def stats(self) -> TierStats:
        """See `Tier`; while it is left alone its `problem` says so."""
        stats = self._tier.stats()
        if stats.problem is None and self._save_problem is not None:
            stats = replace(stats, problem=self._save_problem)
        return replace(stats, problem=self._why_away()) if self.away else stats

    async def aclose(self) -> None:
        """See `Tier`."""
        await self._tier.aclose()

    def _why_away(self) -> str:
        return f"left alone for a while: {self._tier.stats().problem or 'it did not answer in time'}"

    async def _move(
        self,
        operation: str,
        chunks: Sequence[TierChunk],
        call: Callable[[float], Coroutine[object, object, list[TierOutcome]]],
        timeout_s: float,
    ) -> list[TierOutcome]:
        if not chunks:
            return []
        num_bytes, began = sum(chunk.num_bytes for chunk in chunks), self._clock.now()
        outcomes: list[TierOutcome] | None = None
        if not self.away and await _in_time(self._enter(num_bytes), timeout_s):
            try:
                started = self._clock.now()
                left_s = timeout_s - (started - began)
                if left_s > 0 and not self.away:
                    try:
                        with _BreakerTry(self) as attempt:
                            outcomes = await _in_time(call(left_s), left_s)
                            some = outcomes is not None and any(outcome is not _AWAY for outcome in outcomes)
                            attempt.ok = some or (outcomes is not None and self._tier.stats().partly)
                    finally:  # a call that its caller gives up has taken some time, too
                        self._measure(operation, chunks, outcomes, self._clock.now() - started, left_s)
            finally:
                await asyncio.shield(self._leave(num_bytes))
        outcomes = outcomes or [_AWAY] * len(chunks)
        self.counts.update((operation, outcome) for outcome in outcomes)
        return outcomes

    def _measure(
        self,
        operation: str,
        chunks: Sequence[TierChunk],
        outcomes: Sequence[TierOutcome] | None,
        seconds: float,
        given_s: float,
    ) -> None:
        """`outcomes` None: the call was late, or its caller gave it up."""
        rate, seconds, arrived, late = self._rates[operation], max(seconds, 1e-6), 0, 0
        for chunk, outcome in zip(chunks, outcomes or [_AWAY] * len(chunks), strict=True):
            arrived += chunk.num_bytes * (outcome is TierOutcome.OK)
            late += chunk.num_bytes * (outcome is _AWAY)
        if arrived:
            self.moved_bytes[operation] += arrived
            rate.observe(arrived, seconds)
        elif rate.value is not None or seconds > 0.9 * given_s:  # what is refused at once says nothing of a speed
            rate.outlasted(late, seconds)

    async def _enter(self, num_bytes: int) -> bool:
        async with self._room:
            await self._room.wait_for(
                lambda: not self._under_way or self._under_way + num_bytes <= self._in_flight_bytes
            )
            self._under_way += num_bytes
        return True

    async def _leave(self, num_bytes: int) -> None:
        async with self._room:
            self._under_way -= num_bytes
            self._room.notify_all()

    def _begin(self) -> bool:
        """Whether the call is the one that goes through alone."""
        alone = self._failures >= self._limits.failures
        self._trying |= alone
        return alone

    def _end(self, ok: bool) -> None:
        if ok:
            self._failures, self._pause_s = 0, self._limits.pause_s
            return
        self._failures += 1
        if self._failures >= self._limits.failures:
            self._closed_until = self._clock.now() + self._pause_s
            self._pause_s = min(2 * self._pause_s, self._limits.longest_pause_s)


class _BreakerTry:
    """One call that the breaker learns from, unless it is cancelled by the caller."""

    def __init__(self, guard: GuardedTier) -> None:
        self.ok = self._alone = False
        self._guard = guard

    def __enter__(self) -> "_BreakerTry":
        self._alone = self._guard._begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._alone:
            self._guard._trying = False
        if kind is None or not issubclass(kind, asyncio.CancelledError):
            self._guard._end(self.ok)


async def _in_time(
    work: Coroutine[object, object, _Result], timeout_s: float, late: _Result | None = None
) -> _Result | None:
    """Its result; `late` when it takes longer. A tier gives up by itself: this is for one that does not."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        return late
