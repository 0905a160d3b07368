"""A bucket or a folder as a tier that nodes and clusters share: one object a chunk, header and payload as in a segment.

Owns the names: `PREFIX/FINGERPRINT/KEY`, both in hex. A put is atomic in every such store, so an object is whole.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from kvcore.clock import Clock
from kvcore.config.tiers import ObjectTierConfig, TierConfig
from kvcore.errors import ConfigError, TransferTimeoutError
from kvcore.telemetry import log_fields
from kvstore.codecs.frame import FRONT_BYTES, is_whole
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, TierChunk, TierOutcome, TierStats
from kvstore.tiers.limits import ObjectLimits
from kvstore.tiers.objects.calls import CallPool, Grip
from kvstore.tiers.objects.generations import BucketGenerations
from kvstore.tiers.objects.place import object_place
from kvstore.tiers.opening import TierPlace
from transfer.blocking import BatchDeadline

if TYPE_CHECKING:
    from kvstore.tiers.objects.bucket import Bucket

_log = logging.getLogger(__name__)
_LATE = "it did not answer in time"
_FIND_SHARE = 0.9
"""Of the time for finding: who asks must not be gone when what was found is told."""


@dataclass(frozen=True, slots=True)
class _Answer:
    outcome: TierOutcome
    problem: str | None = None
    num_bytes: int | None = None
    """Of an object that is there."""


_Job = Callable[[Grip], _Answer]


class ObjectTier:
    """See `Tier`. It cannot know what lies in the bucket: `stats` says what was wrong at the last call, and no more."""

    name = "object"
    shared = True

    def __init__(
        self, bucket: "Bucket", clock: Clock, *, connections: int, limits: ObjectLimits = ObjectLimits()
    ) -> None:
        self.max_chunk_bytes = limits.max_chunk_bytes
        self._bucket, self._clock, self._limits = bucket, clock, limits
        self._chunks = CallPool("object-tier", connections)
        self._questions = CallPool("object-tier-ask", limits.questions)
        self._errands = CallPool("object-tier-errands", 1)
        self._sizes: OrderedDict[ChunkName, int] = OrderedDict()
        """Of objects that were found lately."""
        self._problem: str | None = None
        self._told = ""

    def __repr__(self) -> str:
        return f"<ObjectTier {self._bucket.place.shown}: {self._problem or 'well'}>"

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`. Asks a few at a time, in order, and no more after as many in a row that are not there: they count
        as not there either. So a prompt that is new costs one round trip. A long one that is there may take longer than
        there is: what was found by then is the answer."""
        found, deadline = [False] * len(names), BatchDeadline(_FIND_SHARE * timeout_s)
        for start in range(0, len(names), self._limits.questions):
            some = names[start : start + self._limits.questions]
            answers = await self._ask(some, deadline, late_is_wrong=start == 0)
            found[start : start + len(some)] = [answer.outcome is TierOutcome.OK for answer in answers]
            if not any(found[start : start + len(some)]):
                break
        return found

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`. What was found just now is not asked for again."""
        if self._questions.closed:
            return [TierOutcome.UNAVAILABLE] * len(names)
        unknown = [name for name in names if name not in self._sizes]
        answers = await self._ask(unknown, BatchDeadline(timeout_s))
        asked = {name: answer.outcome for name, answer in zip(unknown, answers, strict=True)}
        return [self._sizes.pop(name, asked.get(name, TierOutcome.MISSING)) for name in names]

    async def _ask(
        self, names: Sequence[ChunkName], deadline: BatchDeadline, *, late_is_wrong: bool = True
    ) -> list[_Answer]:
        jobs = [partial(self._head, name) for name in names]
        answers = await self._answers(self._questions, jobs, deadline, late_is_wrong=late_is_wrong)
        for name, answer in zip(names, answers, strict=True):
            if answer.num_bytes is not None:
                self._sizes[name] = answer.num_bytes
        while len(self._sizes) > self._limits.max_remembered:
            self._sizes.popitem(last=False)
        return answers

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        jobs = [partial(self._load, chunk) for chunk in chunks]
        return await self._each(self._chunks, jobs, BatchDeadline(timeout_s))

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`. What is there is not read to be counted as used: no bucket knows what that is."""
        end = None if ttl_s is None else self._clock.wall() + ttl_s
        jobs = [partial(self._save, chunk, end) for chunk in chunks]
        return await self._each(self._chunks, jobs, BatchDeadline(timeout_s))

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        await self._each(self._questions, [partial(self._remove, name) for name in names], BatchDeadline(timeout_s))

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`. In a bucket each is read and written anew."""
        end = None if ttl_s is None else self._clock.wall() + ttl_s
        jobs = [partial(self._set_end, name, end) for name in names]
        return (await self._each(self._chunks, jobs, BatchDeadline(timeout_s))).count(TierOutcome.OK)

    async def generations(self, *, timeout_s: float) -> GenerationList:
        """See `Tier`. In a bucket what has ended is counted until its lifecycle rule has removed it."""
        seen = self._generations(timeout_s)
        problem = await self._errand(seen.look, timeout_s)
        return seen.listed(problem)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        seen = self._generations(timeout_s)
        await self._errand(lambda: seen.mark(fingerprint, owner, note, ttl_s), timeout_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        seen = self._generations(timeout_s)
        problem = await self._errand(lambda: seen.clear(fingerprints, own), timeout_s)
        return Cleared(seen.num_cleared, problem or seen.incomplete)

    def stats(self) -> TierStats:
        """See `Tier`."""
        return TierStats(problem=self._problem)

    async def aclose(self) -> None:
        """See `Tier`."""
        await self._chunks.aclose(self._limits.close_s)
        await self._questions.aclose(self._limits.close_s)
        await self._errands.aclose(self._limits.close_s)

    def _generations(self, timeout_s: float) -> BucketGenerations:
        return BucketGenerations(self._bucket, self._limits, self._clock.wall, BatchDeadline(timeout_s))

    async def _errand(self, work: Callable[[], None], timeout_s: float) -> str:
        """What went wrong; empty: nothing."""

        def job(_: Grip) -> _Answer:
            work()
            return _Answer(TierOutcome.OK)

        (answer,) = await self._errands.run([partial(self._done, job)], timeout_s)
        if answer is None:
            return "the tier is closed" if self._errands.closed else _LATE
        return answer.problem or ""

    async def _each(self, pool: CallPool, jobs: Sequence[_Job], deadline: BatchDeadline) -> list[TierOutcome]:
        return [answer.outcome for answer in await self._answers(pool, jobs, deadline)]

    async def _answers(
        self, pool: CallPool, jobs: Sequence[_Job], deadline: BatchDeadline, *, late_is_wrong: bool = True
    ) -> list[_Answer]:
        try:
            timeout_s = deadline.remaining()
        except TransferTimeoutError:
            timeout_s = 0.0
        given = await pool.run([partial(self._done, job) for job in jobs], timeout_s)
        late = _Answer(TierOutcome.UNAVAILABLE, f"{self._bucket.place.shown}: {_LATE}" if late_is_wrong else None)
        answers = [late if answer is None else answer for answer in given]
        if answers and not pool.closed:
            self._problem = next((answer.problem for answer in answers if answer.problem), None)
            if self._problem is not None and self._problem != self._told:
                self._told = self._problem
                log_fields(_log, logging.WARNING, "object_tier", problem=self._problem)
        return answers

    # --- in threads ---

    def _done(self, job: _Job, grip: Grip) -> _Answer:
        from kvstore.tiers.objects.bucket import BucketError

        try:
            return job(grip)
        except FileNotFoundError:
            return _Answer(TierOutcome.MISSING)
        except BucketError as error:
            return _Answer(error.outcome, str(error))

    def _head(self, name: ChunkName, _: Grip) -> _Answer:
        stored = self._bucket.head(name.text)
        if self._ended(stored.end):
            return _Answer(TierOutcome.MISSING)
        return _Answer(TierOutcome.OK, num_bytes=stored.num_bytes)

    def _load(self, chunk: TierChunk, grip: Grip) -> _Answer:
        stored, value = self._bucket.get(chunk.name.text, chunk.num_bytes)
        if self._ended(stored.end):
            return _Answer(TierOutcome.MISSING)
        if value is None:
            front = self._bucket.get_front(chunk.name.text, FRONT_BYTES) if stored.num_bytes else b""
            whole = front is None or is_whole(front, stored.num_bytes)
            return _Answer(TierOutcome.TOO_LARGE if whole else TierOutcome.DAMAGED)
        return _Answer(TierOutcome.OK if grip.scatter(value, chunk.memory) else TierOutcome.UNAVAILABLE)

    def _save(self, chunk: TierChunk, end: float | None, grip: Grip) -> _Answer:
        if chunk.num_bytes > self.max_chunk_bytes:
            return _Answer(TierOutcome.TOO_LARGE)
        value = memoryview(bytearray(chunk.num_bytes))  # the call may outlive our hold on the segment
        if not grip.gather(chunk.memory, value):
            return _Answer(TierOutcome.UNAVAILABLE)
        path = chunk.name.text
        if not self._bucket.put(path, value, end=end):
            stored = self._bucket.head(path)
            if self._ended(stored.end) or stored.num_bytes != chunk.num_bytes:
                self._bucket.put(path, value, end=end, overwrite=True)
        return _Answer(TierOutcome.OK)

    def _remove(self, name: ChunkName, _: Grip) -> _Answer:
        self._bucket.delete(name.text)
        return _Answer(TierOutcome.OK)

    def _set_end(self, name: ChunkName, end: float | None, _: Grip) -> _Answer:
        if self._ended(self._bucket.head(name.text).end):
            return _Answer(TierOutcome.MISSING)
        self._bucket.set_end(name.text, end)
        return _Answer(TierOutcome.OK)

    def _ended(self, end: float | None) -> bool:
        return end is not None and self._clock.wall() >= end


def open_bucket(config: ObjectTierConfig) -> "Bucket":
    """The bucket or folder. Raises ConfigError."""
    place = object_place(config)
    try:
        from kvstore.tiers.objects.bucket import Bucket
    except ModuleNotFoundError as error:
        raise ConfigError(f"tiers.object needs {error.name}: pip install 'kvferry[object]'") from error
    return Bucket(place, config.timeout_s)


async def open_tier(config: TierConfig, place: TierPlace, clock: Clock) -> ObjectTier:
    """See `kvstore.tiers.opening`. Connects when it is first asked."""
    assert isinstance(config, ObjectTierConfig)
    return ObjectTier(open_bucket(config), clock, connections=config.connections)
