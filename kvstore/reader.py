"""Reading chunks: choose replicas, move all of a batch at once, verify the copies, go on with the next replicas.

Owns nothing between calls. Invariant: a chunk is OK only if its bytes in the caller's buffers were gone over after they
had been written there for the last time: while they arrived if the transport shows them, else once all have. What is
encrypted is opened there in that same pass.
"""

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.errors import SegmentUnknownError, TransferError, TransferTimeoutError
from kvcore.peer_log import PeerLog
from kvcore.types import OwnerTag, ReplicaRef, Segment
from kvstore.checksums import run_sized
from kvstore.chunk_format import HEADER_BYTES, Expected
from kvstore.counters import Count, StoreCounters
from kvstore.integrity.checks import Checking, Integrity
from kvstore.limits import StoreLimits
from kvstore.routes import Routes
from kvstore.types import Direction, GetOutcome, GetResult, Match, MovedBytes, RunBlocking
from metadata_server.messages import QuarantineItem, QuarantineReason
from transfer.base import TransferEngine, TransferOp

_log = logging.getLogger("kvstore")


@dataclass(frozen=True, slots=True)
class _Attempt:
    """One attempt: this replica, in this segment."""

    replica: ReplicaRef
    segment: Segment


@dataclass(slots=True)
class _Wanted:
    """A chunk under way. `attempts` are those not yet tried, best first."""

    attempts: list[_Attempt]
    header: memoryview
    payload: Sequence[memoryview]
    num_bytes: int
    owner: OwnerTag | None
    outcome: GetOutcome = GetOutcome.UNREACHABLE
    checking: Checking | None = None
    """Of the attempt under way."""

    def expected(self, replica: ReplicaRef, fingerprint: bytes) -> Expected:
        return Expected(replica.key, fingerprint, replica.generation, self.num_bytes - HEADER_BYTES, self.owner)

    @property
    def open(self) -> bool:
        return self.outcome is not GetOutcome.OK and bool(self.attempts)


@dataclass(frozen=True, slots=True)
class ReadReport:
    """The result for the caller, and the replicas that the index should hear of."""

    result: GetResult
    refused: list[QuarantineItem]


class ChunkReader:
    """Reads for one KVStore. Any number of reads may run at once, into different buffers."""

    def __init__(
        self,
        *,
        fingerprint: bytes,
        transfer: TransferEngine,
        routes: Routes,
        clock: Clock,
        counters: StoreCounters,
        integrity: Integrity,
        run_blocking: RunBlocking,
        limits: StoreLimits,
    ) -> None:
        self._fingerprint = fingerprint
        self._transfer = transfer
        self._routes = routes
        self._clock = clock
        self._counters = counters
        self._integrity = integrity
        self._run_blocking = run_blocking
        self._inline_bytes = limits.inline_cipher_bytes if integrity.encrypt else limits.inline_hash_bytes
        self._peer_log = PeerLog(_log, clock=clock)

    async def read(
        self,
        match: Match,
        start: int,
        buffers: Sequence[Sequence[memoryview]],
        timeout_s: float,
        *,
        owner: OwnerTag | None = None,
    ) -> ReadReport:
        """As KVStore.get_into. What is left of the time is shared evenly by the replicas still to try."""
        deadline = self._clock.now() + timeout_s
        report = ReadReport(GetResult([], []), [])
        wanted = self._plan(match, start, buffers, owner, report)
        while pending := [chunk for chunk in wanted if chunk.open]:
            left_s = deadline - self._clock.now()
            if left_s <= 0:
                break
            await self._round(pending, left_s / max(len(chunk.attempts) for chunk in pending), report)
        for chunk in wanted:
            report.result.outcomes.append(chunk.outcome)
            ok = chunk.outcome is GetOutcome.OK
            self._counters.add(Count.CHUNKS_GOT if ok else f"miss_{chunk.outcome}")
        return report

    def _plan(
        self,
        match: Match,
        start: int,
        buffers: Sequence[Sequence[memoryview]],
        owner: OwnerTag | None,
        report: ReadReport,
    ) -> list[_Wanted]:
        # Each replica that the index names is one of three:
        # 1. of another length than the caller's buffers: not the chunk that is wanted; reported, never read;
        # 2. in a segment that no transport reaches, or that failed a moment ago: left out, nothing is said of it;
        # 3. an attempt. The nearest segment comes first: the own node's, then the own host's, then any other.
        headers = memoryview(bytearray(HEADER_BYTES * len(buffers)))
        wanted = []
        ranks: dict[str, int | None] = {}  # each segment is looked at once, however many chunks lie there
        for index, payload in enumerate(buffers):
            header = headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]
            num_bytes = HEADER_BYTES + sum(view.nbytes for view in payload)
            chunk = _Wanted([], header, payload, num_bytes, owner)
            for replica in match.replicas[start + index]:
                if replica.length != num_bytes:
                    self._refuse(chunk, replica, GetOutcome.MALFORMED, report)
                    continue
                segment = match.segments[replica.segment_id]
                if segment.id not in ranks:
                    ranks[segment.id] = self._routes.rank(segment)
                if ranks[segment.id] is not None:
                    chunk.attempts.append(_Attempt(replica, segment))
            chunk.attempts.sort(key=lambda attempt: ranks[attempt.segment.id] or 0)
            wanted.append(chunk)
        return wanted

    async def _round(self, pending: Sequence[_Wanted], timeout_s: float, report: ReadReport) -> None:
        """Try each pending chunk's next attempt: one batch a transport and machine, all at the same time, so that it is
        known how long each machine's took."""
        batches: dict[tuple[str, str], list[tuple[_Wanted, _Attempt]]] = {}
        transports: dict[str, str] = {}
        for chunk in pending:
            attempt = chunk.attempts.pop(0)
            segment = attempt.segment
            if segment.id not in transports:
                transports[segment.id] = self._routes.transport(segment)
            batches.setdefault((transports[segment.id], segment.host_id), []).append((chunk, attempt))
        async with asyncio.TaskGroup() as group:
            for way, batch in batches.items():
                group.create_task(self._batch(way, batch, timeout_s, report))

    async def _batch(
        self, way: tuple[str, str], batch: Sequence[tuple[_Wanted, _Attempt]], timeout_s: float, report: ReadReport
    ) -> None:
        """`way`: transport and machine."""
        ops: list[TransferOp] = []
        for chunk, attempt in batch:
            checking = chunk.checking = self._integrity.checking(chunk.expected(attempt.replica, self._fingerprint))
            show = checking.show if self._integrity.verify != "header" else None
            ops.append(TransferOp(attempt.segment, attempt.replica.offset, [chunk.header, *chunk.payload], show))
        began = self._clock.now()
        errors = await self._transfer.read(ops, timeout_s)
        seconds = self._clock.now() - began
        arrived: list[tuple[_Wanted, _Attempt]] = []
        late_bytes = 0
        for (chunk, attempt), error in zip(batch, errors, strict=True):
            self._routes.report(attempt.segment, error)
            if error is None:
                arrived.append((chunk, attempt))
            else:
                late_bytes += chunk.num_bytes * isinstance(error, TransferTimeoutError)
                self._not_read(chunk, attempt, error, report)
        if arrived:
            num_bytes = sum(chunk.num_bytes for chunk, _ in arrived)
            moved = MovedBytes(way[0], Direction.GET, num_bytes, seconds, way[1])
            report.result.moved.append(moved)
            self._counters.add_moved(moved)
            await self._verify(arrived, report)
        elif late_bytes:
            report.result.moved.append(MovedBytes(way[0], Direction.GET, 0, seconds, way[1], late_bytes))

    async def _verify(self, arrived: Sequence[tuple[_Wanted, _Attempt]], report: ReadReport) -> None:
        checks = [(chunk.checking, chunk) for chunk, _ in arrived if chunk.checking is not None]

        def outcomes() -> list[GetOutcome]:
            return [checking.outcome(chunk.header, chunk.payload) for checking, chunk in checks]

        hashed = sum(chunk.num_bytes for checking, chunk in checks if not checking.done)
        found = await run_sized(self._run_blocking, hashed, outcomes, inline_bytes=self._inline_bytes)
        for (chunk, attempt), outcome in zip(arrived, found, strict=True):
            if outcome is GetOutcome.OK:
                chunk.outcome = outcome
            else:
                self._refuse(chunk, attempt.replica, outcome, report)

    def _not_read(self, chunk: _Wanted, attempt: _Attempt, error: TransferError, report: ReadReport) -> None:
        """Only a peer that says "I do not hold that" is reported: silence may be our own link's fault."""
        if isinstance(error, SegmentUnknownError):
            self._refuse(chunk, attempt.replica, GetOutcome.UNREACHABLE, report)
            return
        chunk.outcome = GetOutcome.UNREACHABLE
        self._counters.add("replica_unreachable")

    def _refuse(self, chunk: _Wanted, replica: ReplicaRef, outcome: GetOutcome, report: ReadReport) -> None:
        """Report the replica; the chunk goes on with its other replicas."""
        chunk.outcome = outcome
        self._counters.add(f"replica_{outcome}")
        if outcome is GetOutcome.FORGED:
            segment_id, key = replica.segment_id, replica.key
            self._peer_log.say(logging.WARNING, "chunk_forged", "forged", segment_id, chunk=key)
        report.refused.append(QuarantineItem(replica=replica, reason=QuarantineReason(outcome)))
