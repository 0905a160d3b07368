"""The job that loads chunks from the store into an engine's KV memory.

It serves any engine: it knows keys and bytes only, and the engine says where they go (`Destination`).
A job never fails a request: what cannot be loaded is computed, and counted.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence, Set
from contextlib import AbstractAsyncContextManager

from engines.jobs.context import JobContext
from kvcore.types import ChunkKey, OwnerTag
from kvstore.types import GetOutcome, Match, MovedBytes

Destination = Callable[[int, int], AbstractAsyncContextManager[Sequence[Sequence[memoryview]]]]
"""`(first, count)`, indices into a job's keys: memory for those chunks' payloads. Once the context is left without an
error their bytes are where the engine looks for them."""

Claim = Callable[[Set[str]], Awaitable[Sequence[str]]]
"""Asks for room for the chunks that were not loaded, before they are computed, and says which nodes were writing the
first of them already. Nothing is kept if one of them is another node, and not among those given."""


class LoadJob:
    """Reads consecutive chunks into an engine's memory, as they appear if somebody is computing them.

    `first`: index of `keys[0]` among the request's chunks. Chunks before `wait_chunks` (likewise counted) are waited
    for until `deadline` (Clock.now). `num_loaded`: that many leading chunks of the request are good. It grows batch by
    batch and holds after a cancellation too.

    With a `claim`, what the store lacks is to be computed here only if no other node does so: those that another one
    writes are waited for while it goes on.
    """

    def __init__(
        self,
        context: JobContext,
        keys: Sequence[ChunkKey],
        into: Destination,
        *,
        first: int = 0,
        wait_chunks: int = 0,
        deadline: float = 0.0,
        batch: int | None = None,
        loaded: Callable[[int], None] = lambda _: None,
        claim: Claim | None = None,
        store_only: bool = False,
        owner: OwnerTag | None = None,
        follow_s: float | None = None,
    ) -> None:
        """`batch`: chunks of one get at most, where the engine wants another number than the limits'. `loaded`: called
        with each new `num_loaded`. `store_only`: nobody wants to read the chunks here, if none has to be computed.
        `owner`: whose chunks they are. `follow_s`: instead of the limits'."""
        self._context = context
        self._keys = keys
        self._into = into
        self._first = first
        self._wait_chunks = wait_chunks
        self._deadline = deadline
        self._batch = context.limits.read_chunks if batch is None else batch
        self._loaded = loaded
        self._claim = claim
        self._store_only = store_only
        self._owner = owner
        self._follow_s = context.limits.follow_s if follow_s is None else follow_s
        self._followed: str | None = None
        self._follow_until = 0.0
        self._idle = False
        self._given_up: set[str] = set()
        self._seen = first
        self._watching = False
        """Other nodes have and write all that is missing: only `_seen` moves, and nothing is read."""
        self._ask: int | None = None
        """So many keys are asked for; None: all that are missing."""
        self._at_once = False
        self._may_wait = True
        self._waiting: asyncio.Timeout | None = None
        self.num_loaded = first
        self.all_stored = False
        """With `store_only`: every chunk is complete in the store, and was not read."""
        self.moved: list[MovedBytes] = []
        self.wait_s = 0.0
        self.load_s = 0.0

    def __repr__(self) -> str:
        waiting = f", waiting until {self._deadline:.3f}" if self._waiting is not None else ""
        return f"<LoadJob {self.num_loaded - self._first}/{len(self._keys)} chunks from {self._first} on{waiting}>"

    def stop_waiting(self) -> None:
        """Load what is in the store now, then end."""
        self._may_wait = False
        self._claim = None
        if self._waiting is not None and not self._waiting.expired():
            self._waiting.reschedule(asyncio.get_running_loop().time())

    def wait_until(self, deadline: float) -> None:
        """Wait so long (Clock.now), and no less than before: one more waits for the same."""
        self._deadline = max(self._deadline, deadline)

    async def run(self) -> None:
        """Ends when all is loaded, at the first chunk that is not good, or when nothing more is to be waited for.

        Cancelled, it raises once nothing writes into the memory any more."""
        clock, stop = self._context.clock, self._first + len(self._keys)
        # Each round asks the store for the chunks that are missing and reads those that it has. Whether the round is
        # the last one is decided before the question: `stop_waiting` during it earns one more round, without a wait.
        # 1. The store has some and all of them are good: read on, unless this was the last round.
        # 2. The store has some and one is not good: the chunks behind it are of no use. End.
        # 3. It has none and we may wait: the wait ended early (the metadata server is away). Pause, then ask again.
        # 4. It has none, or not all, in the last round, and another node is writing the next one: wait for that one.
        # 5. Nobody else is: the rest is absent, and the engine computes it. End.
        while self.num_loaded < stop:
            self._may_wait &= clock.now() < self._deadline and self.num_loaded < self._wait_chunks
            last = not self._may_wait
            start = (self._seen if self._watching else self.num_loaded) - self._first
            keys = self._keys[start:] if self._ask is None else self._keys[start : start + self._ask]
            whole = self._ask is None or self._watching
            match = await self._find(keys, self._deadline - clock.now())
            self._ask = max(self._context.limits.ask_chunks, 4 * match.num_chunks)
            if self._watches(match, len(keys) if whole else None):
                self._context.store.release_soon(match)
                if self.all_stored:
                    return
                continue
            if match.num_chunks:
                try:
                    good = await self._read(match)
                finally:
                    self._context.store.release_soon(match)
                if not good:
                    return
            elif not last and self._may_wait:
                paused_at = clock.now()
                left_s = self._deadline - paused_at  # a loop may wake a little early: time must go on nevertheless
                await asyncio.sleep(min(self._context.limits.retry_s, max(0.001, left_s)))
                self.wait_s += clock.now() - paused_at
            if match.num_chunks == len(keys):  # there may be more behind those
                self._got_on(self.num_loaded)
            elif last and not await self._follows(match):
                self._context.counters["chunk_miss_absent"] += stop - self.num_loaded
                return

    async def _find(self, keys: Sequence[ChunkKey], left_s: float) -> Match:
        """What the store has of `keys`: at once, or, while the job waits or follows, as soon as it has the first."""
        store, timeout_s = self._context.store, self._context.timeout_s
        if self._at_once:
            self._at_once = False
            return await store.match(keys, timeout_s=timeout_s, owner=self._owner)
        if self._followed is not None:
            left_s = min(self._context.limits.follow_poll_s, self._follow_until - self._context.clock.now())
        elif not self._may_wait:
            return await store.match(keys, timeout_s=timeout_s, owner=self._owner)
        started = self._context.clock.now()
        try:
            async with asyncio.timeout(left_s + timeout_s) as self._waiting:
                if self._idle:  # a server with too many waiters answers at once
                    await asyncio.sleep(self._context.limits.retry_s)
                leased = not self._watching
                return await store.wait(keys, more_than=0, timeout_s=left_s, leased=leased, owner=self._owner)
        except TimeoutError:
            return Match()
        finally:
            self._waiting = None
            self.wait_s += self._context.clock.now() - started

    def _watches(self, match: Match, asked: int | None) -> bool:
        """Whether nothing is to be read of this match: where the chunks are only wanted in the store, and every one
        that is missing here is complete elsewhere, or another node writes it and gets on. `asked`: so many keys were
        asked for; None: some of those that are missing here, which tell nothing of the others."""
        # Four cases:
        # 1. The chunks are wanted here, or some that were asked for nobody has or writes: read what there is.
        # 2. All are complete.
        # 3. All that were asked for are, which were not all: go on asking.
        # 4. The rest is being written: watch on, if the writer gets on and is another node.
        # Who watched and does so no more has looked at the end of them only, without a lease: it asks for all again.
        complete = (self._seen if self._watching else self.num_loaded) + match.num_chunks
        wanted = self._claim is not None and self._store_only
        if wanted and asked is not None and match.num_chunks + match.num_writing >= asked:
            self.all_stored = complete == self._first + len(self._keys)
            writer = self._followed if match.num_chunks == asked else self._to_follow(match.writers)
            here = self._context.store.node_id
            if self.all_stored or (writer not in (None, here) and self._waits_for(writer, complete)):
                self._watching = True
                return True
        watched, self._watching = self._watching, False
        if watched:
            self._at_once, self._ask = True, None
        return watched

    async def _follows(self, match: Match) -> bool:
        """Whether another node is computing the chunk behind all that was loaded, and this job waits for it."""
        # 1. There is no claim to be made, or all is loaded.
        # 2. A node writes it, and has begun, or completed one, within the time that is given it: wait.
        # 3. It has not: it may hang, or have more urgent things to do. From here on it counts for nothing.
        # 4. Nobody else writes it: room is asked for. Another node may have been faster since, and 2 holds for it.
        # 5. Nobody was, or this node is the writer: it is computed here.
        if self._claim is None or self.num_loaded == self._first + len(self._keys):
            return False
        here = self._context.store.node_id
        while (writer := self._to_follow(match.writers)) not in (None, here):
            if self._waits_for(writer, self.num_loaded):
                return True
            self._given_up.add(writer)
            self._context.counters["follow_given_up"] += 1
        if writer is None:
            writer = self._to_follow(await self._claim(self._given_up))
            self._ask = None
        return writer not in (None, here) and self._waits_for(writer, self.num_loaded)

    def _waits_for(self, writer: str, complete: int) -> bool:
        """Whether time is left for `writer`, now that so many of the request's leading chunks are complete."""
        now = self._context.clock.now()
        self._idle = writer == self._followed and complete <= self._seen
        if not self._idle:
            self._followed, self._follow_until = writer, now + self._follow_s
        self._seen = max(self._seen, complete)
        return now < self._follow_until

    def _got_on(self, complete: int) -> None:
        if self._followed is not None:
            self._waits_for(self._followed, complete)

    def _to_follow(self, writers: Sequence[str]) -> str | None:
        return next((writer for writer in writers if writer not in self._given_up), None)

    async def _read(self, match: Match) -> bool:
        """Read all matched chunks, batch by batch. False at the first one that is not good."""
        for start in range(0, match.num_chunks, self._batch):
            count = min(self._batch, match.num_chunks - start)
            began = self._context.clock.now()
            async with self._into(self.num_loaded - self._first, count) as buffers:
                result = await self._context.store.get_into(
                    match, start, buffers, timeout_s=self._context.timeout_s, owner=self._owner
                )
            self.load_s += self._context.clock.now() - began
            self.moved += result.moved
            for outcome in result.outcomes:
                if outcome is not GetOutcome.OK:
                    self._context.counters[f"chunk_miss_{outcome}"] += 1
                    return False
                self.num_loaded += 1
                self._context.counters["chunks_loaded"] += 1
            self._loaded(self.num_loaded)
        return True
