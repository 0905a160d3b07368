"""A Redis or Valkey as a tier that nodes and clusters share: chunks in values of just under 4 MiB, uncopied.

Owns the order in which parts are written and read; `redis_parts` has their format. Part 0 is written last: where it is,
the chunk was whole. The server evicts parts one by one: a chunk that lacks any is a miss, and is written anew.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeVar

from kvcore.clock import Clock, SystemClock
from kvcore.telemetry import log_fields
from kvstore.tiers import redis_generations
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, TierChunk, TierOutcome, TierStats
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.redis_generations import RedisGenerations
from kvstore.tiers.redis_parts import HEAD, MAGIC, num_parts, part_key, parts_there, stored_bytes, views_of
from kvstore.tiers.resp import RespConnection, RespRefusal, RespValue, command
from kvstore.tiers.resp_client import ELSEWHERE, RespClient

_log = logging.getLogger(__name__)
_Share = list[tuple[int, TierChunk]]
"""Some of a call's chunks, with their positions in it."""
_Item = TypeVar("_Item")


class RedisTier:
    """See `Tier`. It cannot know what lies in the server: `stats` says what is wrong, and no more.

    `problem` is of the last call: `find` and `load` of a server that is full of chunks that it may not evict are fine.
    """

    name = "redis"
    shared = True

    def __init__(
        self,
        chunks: RespClient,
        questions: RespClient,
        limits: RedisLimits = RedisLimits(),
        *,
        errands: RespClient | None = None,
        clock: Clock | None = None,
        asking: bool = False,
    ) -> None:
        """`errands`: for what takes long and hurries nobody; None: it shares the questions' connections. `asking`: to a
        cluster's node that is about to get the slot, of which it answers nothing without that word before it."""
        self._before = [command(b"ASKING")] if asking else []
        self.max_chunk_bytes = limits.max_chunk_bytes
        self._chunks, self._questions, self._limits = chunks, questions, limits
        self._errands, self._clock = errands or questions, clock or SystemClock()
        self._problem: str | None = None
        self._told = ""

    def __repr__(self) -> str:
        return f"<RedisTier {self._chunks.server.shown}: {self._problem or 'well'}>"

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`. Whether part 0 is there."""
        found = [False] * len(names)

        def ask(connection: RespConnection) -> None:
            self._send(connection, [command(b"EXISTS", part_key(name, 0)) for name in names])
            for at in range(len(names)):
                found[at] = self._reply(connection) == 1

        if names:
            await self._run(self._questions, [ask], timeout_s)
        return found

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`. As part 0 says."""
        sizes: list[int | TierOutcome] = [TierOutcome.UNAVAILABLE] * len(names)

        def ask(connection: RespConnection) -> None:
            heads = [command(b"GETRANGE", part_key(name, 0), b"0", b"%d" % (HEAD.size - 1)) for name in names]
            self._send(connection, heads)
            for at in range(len(names)):
                reply = self._reply(connection)
                size = _refused(reply) if isinstance(reply, RespRefusal) else stored_bytes(reply)
                sizes[at] = TierOutcome.MISSING if size is None else size

        if names:
            await self._run(self._questions, [ask], timeout_s)
        return sizes

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        outcomes = [TierOutcome.UNAVAILABLE] * len(chunks)
        await self._move(list(enumerate(chunks)), outcomes, self._load_share, timeout_s)
        return outcomes

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`."""
        outcomes = [TierOutcome.UNAVAILABLE] * len(chunks)
        fitting: _Share = []
        for at, chunk in enumerate(chunks):
            if chunk.num_bytes > self.max_chunk_bytes:
                outcomes[at] = TierOutcome.TOO_LARGE
            else:
                fitting.append((at, chunk))

        def save_share(connection: RespConnection, share: _Share, outcomes: list[TierOutcome]) -> None:
            self._save_share(connection, share, outcomes, ttl_s)

        await self._move(fitting, outcomes, save_share, timeout_s)
        return outcomes

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`. Part 0 goes first."""

        def remove(connection: RespConnection) -> None:
            parts = [keys for keys in parts_there(connection, names, self._limits) if keys]
            connection.send([command(b"UNLINK", *keys) for keys in parts], replies=len(parts))
            for _ in parts:
                connection.reply()

        if names:
            await self._run(self._questions, [remove], timeout_s)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        known = 0

        def expire(connection: RespConnection) -> None:
            nonlocal known
            parts = [keys for keys in parts_there(connection, names, self._limits) if keys]
            ending = () if ttl_s is None else (b"%d" % max(1, round(ttl_s * 1000)),)
            words = [(b"PEXPIRE" if ending else b"PERSIST", key, *ending) for keys in parts for key in keys]
            connection.send([command(*line) for line in words], replies=len(words))
            refused = [isinstance(connection.reply(), RespRefusal) for _ in words]
            known = 0 if any(refused) else len(parts)

        if names:
            await self._errand(expire, timeout_s)
        return known

    async def generations(self, *, timeout_s: float, noted_too: bool = False) -> GenerationList:
        """See `Tier`. `noted_too`: and those of which there is a note or a mark, but no chunk."""
        seen = RedisGenerations(self._limits, self._clock.wall, noted_too=noted_too)
        problem = await self._errand(seen.look, timeout_s)
        seen.incomplete = seen.incomplete and (problem or seen.incomplete)
        return seen.listed()

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        note_s = self._limits.note_s

        def mark(connection: RespConnection) -> None:
            redis_generations.mark(connection, fingerprint, owner, note, ttl_s=ttl_s, note_s=note_s)

        await self._errand(mark, timeout_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        seen = RedisGenerations(self._limits, self._clock.wall)
        problem = await self._errand(lambda connection: seen.clear(connection, fingerprints, own), timeout_s)
        return Cleared(seen.num_cleared, seen.incomplete and (problem or seen.incomplete))

    def stats(self) -> TierStats:
        """See `Tier`."""
        return TierStats(problem=self._problem)

    async def aclose(self) -> None:
        """See `Tier`."""
        await self._chunks.aclose()
        await self._questions.aclose()
        await self._errands.aclose()

    # --- work in threads ---

    async def _move(
        self,
        work: _Share,
        outcomes: list[TierOutcome],
        job: Callable[[RespConnection, _Share, list[TierOutcome]], None],
        timeout_s: float,
    ) -> None:
        """The chunks over all connections that are idle, one at least."""
        if not work:
            return
        num_shares = min(self._chunks.idle, len(work))
        shares = [work[first::num_shares] for first in range(num_shares)]

        def of(share: _Share) -> Callable[[RespConnection], None]:
            return lambda connection: job(connection, share, outcomes)

        await self._run(self._chunks, [of(share) for share in shares], timeout_s)

    async def _run(
        self, client: RespClient, jobs: Sequence[Callable[[RespConnection], None]], timeout_s: float
    ) -> None:
        """Returns or raises when no job runs any longer."""
        if client.closed or timeout_s <= 0:
            return
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(client.run(job, timeout_s)) for job in jobs]
        self._problem = next((problem for task in running if (problem := task.result())), None)
        if self._problem is not None and self._problem != self._told:
            self._told = self._problem
            log_fields(_log, logging.WARNING, "redis_tier", problem=self._problem)

    async def _errand(self, job: Callable[[RespConnection], None], timeout_s: float) -> str | None:
        """None, or what went wrong; the tier is no worse for it."""
        return "it is closed" if self._errands.closed else await self._errands.run(job, timeout_s)

    def _load_share(self, connection: RespConnection, share: _Share, outcomes: list[TierOutcome]) -> None:
        wanted = ((at, chunk, part) for at, chunk in share for part in range(num_parts(chunk.num_bytes, self._limits)))
        under_way: deque[tuple[int, TierChunk, int]] = deque()
        failed = dict[int, TierOutcome]()
        while True:
            while len(under_way) < self._limits.gets_under_way and (entry := next(wanted, None)) is not None:
                if entry[0] not in failed:
                    self._send(connection, [command(b"GET", part_key(entry[1].name, entry[2]))])
                    under_way.append(entry)
            if not under_way:
                return
            at, chunk, part = under_way.popleft()
            outcome = self._receive(connection, chunk, part, wanted=at not in failed)
            if outcome is not TierOutcome.OK:
                outcomes[at] = failed.setdefault(at, outcome)
            elif part + 1 == num_parts(chunk.num_bytes, self._limits) and at not in failed:
                outcomes[at] = TierOutcome.OK

    def _receive(self, connection: RespConnection, chunk: TierChunk, part: int, *, wanted: bool) -> TierOutcome:
        """The next reply, into the memory of this part of the chunk if it is what belongs there."""
        if self._before:
            connection.reply()
        length = connection.bulk()
        if isinstance(length, RespRefusal):
            return _refused(length)
        if length is None:
            return TierOutcome.MISSING
        outcome = TierOutcome.OK
        if part == 0 and length >= HEAD.size:
            head = memoryview(bytearray(HEAD.size))
            connection.fill(head)
            length -= HEAD.size
            magic, num_bytes = HEAD.unpack(head)
            if magic != MAGIC:
                outcome = TierOutcome.DAMAGED
            elif num_bytes != chunk.num_bytes:
                outcome = TierOutcome.TOO_LARGE
        elif part == 0:
            outcome = TierOutcome.DAMAGED
        views = views_of(chunk, part, self._limits)
        if outcome is TierOutcome.OK and length != sum(view.nbytes for view in views):
            outcome = TierOutcome.DAMAGED
        if outcome is TierOutcome.OK and wanted:
            for view in views:
                connection.fill(view)
        else:
            connection.skip(length)
        connection.end_bulk()
        return outcome

    def _save_share(
        self, connection: RespConnection, share: _Share, outcomes: list[TierOutcome], ttl_s: float | None
    ) -> None:
        """What is there whole counts as used; the rest is written: also what a cluster's node has not all of yet that
        is about to get the slot (TRYAGAIN), as the one before it has none of it."""
        touches = []
        for _, chunk in share:
            keys = [part_key(chunk.name, part) for part in range(num_parts(chunk.num_bytes, self._limits))]
            touches.append(command(b"TOUCH", *keys))
        self._send(connection, touches)
        lacking: _Share = []
        for at, chunk in share:
            reply = self._reply(connection)
            if isinstance(reply, RespRefusal) and not (self._before and reply.code == "TRYAGAIN"):
                outcomes[at] = _refused(reply)
            elif reply == num_parts(chunk.num_bytes, self._limits):
                outcomes[at] = TierOutcome.OK
            else:
                lacking.append((at, chunk))
        for group in _runs(lacking, lambda one: one[1].num_bytes, self._limits.group_bytes):
            counts = [(at, chunk, num_parts(chunk.num_bytes, self._limits)) for at, chunk in group]
            later = [(at, chunk, part) for at, chunk, parts in counts for part in range(1, parts)]
            refused = {at: got for at, got in self._set(connection, later, ttl_s) if got is not TierOutcome.OK}
            first = [(at, chunk, 0) for at, chunk in group if at not in refused]
            for at, outcome in [*refused.items(), *self._set(connection, first, ttl_s)]:
                outcomes[at] = outcome

    def _set(
        self, connection: RespConnection, parts: Sequence[tuple[int, TierChunk, int]], ttl_s: float | None
    ) -> list[tuple[int, TierOutcome]]:
        """Write these parts; what became of each, by its chunk's position."""
        ending = b"" if ttl_s is None else b"$2\r\nPX\r\n" + _word(b"%d" % max(1, round(ttl_s * 1000)))
        part_bytes = self._limits.part_bytes
        sizes = [min(part_bytes, chunk.num_bytes - part * part_bytes) for _, chunk, part in parts]
        outcomes = []
        for run in _runs(list(zip(parts, sizes, strict=True)), lambda one: one[1], self._limits.enough_bytes):
            buffers = list[bytes | memoryview]()
            for (_, chunk, part), num_bytes in run:
                head = HEAD.pack(MAGIC, chunk.num_bytes) if part == 0 else b""
                words, key = 5 if ending else 3, _word(part_key(chunk.name, part))
                start = b"*%d\r\n$3\r\nSET\r\n%b$%d\r\n%b" % (words, key, len(head) + num_bytes, head)
                buffers += [*self._before, start, *views_of(chunk, part, self._limits), b"\r\n" + ending]
            connection.send(buffers, replies=len(run) * (1 + len(self._before)))
            for (at, _, _), _ in run:
                reply = self._reply(connection)
                taken = TierOutcome.OK if reply == b"OK" else TierOutcome.UNAVAILABLE
                outcomes.append((at, _refused(reply) if isinstance(reply, RespRefusal) else taken))
        return outcomes

    def _send(self, connection: RespConnection, commands: Sequence[bytes]) -> None:
        parts = [part for one in commands for part in (*self._before, one)]
        connection.send(parts, replies=len(parts))

    def _reply(self, connection: RespConnection) -> RespValue:
        """To one of the commands."""
        if self._before:
            connection.reply()
        return connection.reply()


def _runs(work: Sequence[_Item], num_bytes: Callable[[_Item], int], enough: int) -> Iterator[list[_Item]]:
    """All of it, in runs that end where they have `enough` bytes."""
    run, total = list[_Item](), 0
    for item in work:
        run.append(item)
        total += num_bytes(item)
        if total >= enough:
            yield run
            run, total = [], 0
    if run:
        yield run


def _refused(refusal: RespRefusal) -> TierOutcome:
    if refusal.code == "WRONGTYPE":
        return TierOutcome.DAMAGED
    if refusal.code in ELSEWHERE:
        return TierOutcome.MISSING
    return TierOutcome.FULL if refusal.code == "OOM" else TierOutcome.UNAVAILABLE


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(word), word)
