"""Reading chunks: choose replicas, move all of a batch at once, verify the copies, go on with the next replicas.

Owns nothing between calls. Invariant: a chunk is OK only if its bytes in the caller's buffers were hashed after they
had been written there for the last time: while they arrived if the transport shows them, else once all have.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvcore.errors import SegmentUnknownError, TransferError
from kvcore.types import ReplicaRef, Segment
from kvstore.checksums import run_sized
from kvstore.chunk_format import HEADER_BYTES, Expected, RunningChecksum, verify
from kvstore.counters import Count, StoreCounters
from kvstore.routes import Routes
from kvstore.types import Direction, GetOutcome, GetResult, Match, MovedBytes, RunBlocking
from metadata_server.messages import QuarantineItem, QuarantineReason
from transfer.base import TransferEngine, TransferOp


@dataclass(frozen=True, slots=True)
class _Way:
    """One try: this replica, in this segment."""

    replica: ReplicaRef
    segment: Segment


@dataclass(slots=True)
class _Wanted:
    """A chunk under way. `ways` are those not yet tried, best first."""

    ways: list[_Way]
    header: memoryview
    payload: Sequence[memoryview]
    num_bytes: int
    outcome: GetOutcome = GetOutcome.UNREACHABLE
    passed: RunningChecksum | None = None
    """Of the try under way."""

    @property
    def open(self) -> bool:
        return self.outcome is not GetOutcome.OK and bool(self.ways)


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
        check_payload: bool,
        run_blocking: RunBlocking,
    ) -> None:
        self._fingerprint = fingerprint
        self._transfer = transfer
        self._routes = routes
        self._clock = clock
        self._counters = counters
        self._check_payload = check_payload
        self._run_blocking = run_blocking

    async def read(
        self, match: Match, start: int, buffers: Sequence[Sequence[memoryview]], timeout_s: float
    ) -> ReadReport:
        """As KVStore.get_into. What is left of the time is shared evenly by the replicas still to try."""
        deadline = self._clock.now() + timeout_s
        report = ReadReport(GetResult([], []), [])
        wanted = self._plan(match, start, buffers, report)
        while pending := [chunk for chunk in wanted if chunk.open]:
            left_s = deadline - self._clock.now()
            if left_s <= 0:
                break
            await self._round(pending, left_s / max(len(chunk.ways) for chunk in pending), report)
        for chunk in wanted:
            report.result.outcomes.append(chunk.outcome)
            ok = chunk.outcome is GetOutcome.OK
            self._counters.add(Count.CHUNKS_GOT if ok else f"miss_{chunk.outcome}")
        return report

    def _plan(
        self, match: Match, start: int, buffers: Sequence[Sequence[memoryview]], report: ReadReport
    ) -> list[_Wanted]:
        headers = memoryview(bytearray(HEADER_BYTES * len(buffers)))
        wanted = []
        for index, payload in enumerate(buffers):
            header = headers[index * HEADER_BYTES : (index + 1) * HEADER_BYTES]
            num_bytes = HEADER_BYTES + sum(view.nbytes for view in payload)
            chunk = _Wanted([], header, payload, num_bytes)
            for replica in match.replicas[start + index]:
                if replica.length != num_bytes:
                    self._refuse(chunk, replica, GetOutcome.MALFORMED, report)
                elif self._routes.open(segment := match.segments[replica.segment_id]):
                    chunk.ways.append(_Way(replica, segment))
            chunk.ways.sort(key=lambda way: self._routes.distance(way.segment))
            wanted.append(chunk)
        return wanted

    async def _round(self, pending: Sequence[_Wanted], timeout_s: float, report: ReadReport) -> None:
        """Try each pending chunk's next way: one batch a transport, all at the same time."""
        batches: dict[str, list[tuple[_Wanted, _Way]]] = {}
        for chunk in pending:
            way = chunk.ways.pop(0)
            batches.setdefault(self._routes.transport(way.segment), []).append((chunk, way))
        async with asyncio.TaskGroup() as group:
            for transport, batch in batches.items():
                group.create_task(self._batch(transport, batch, timeout_s, report))

    async def _batch(
        self, transport: str, batch: Sequence[tuple[_Wanted, _Way]], timeout_s: float, report: ReadReport
    ) -> None:
        ops = [self._op(chunk, way) for chunk, way in batch]
        began = self._clock.now()
        errors = await self._transfer.read(ops, timeout_s)
        seconds = self._clock.now() - began
        arrived: list[tuple[_Wanted, _Way]] = []
        for (chunk, way), error in zip(batch, errors, strict=True):
            self._routes.report(way.segment, error)
            if error is None:
                arrived.append((chunk, way))
            else:
                self._not_read(chunk, way, error, report)
        if arrived:
            num_bytes = sum(chunk.num_bytes for chunk, _ in arrived)
            moved = MovedBytes(transport, Direction.GET, num_bytes, seconds)
            report.result.moved.append(moved)
            self._counters.add_moved(moved)
            await self._verify(arrived, report)

    def _op(self, chunk: _Wanted, way: _Way) -> TransferOp:
        chunk.passed = RunningChecksum(chunk.num_bytes - HEADER_BYTES) if self._check_payload else None
        show = chunk.passed.show if chunk.passed else None
        return TransferOp(way.segment, way.replica.offset, [chunk.header, *chunk.payload], show)

    async def _verify(self, arrived: Sequence[tuple[_Wanted, _Way]], report: ReadReport) -> None:
        def outcomes() -> list[GetOutcome]:
            return [self._outcome(chunk, way.replica) for chunk, way in arrived]

        hashed = sum(chunk.num_bytes for chunk, _ in arrived if chunk.passed and chunk.passed.value is None)
        for (chunk, way), outcome in zip(arrived, await run_sized(self._run_blocking, hashed, outcomes), strict=True):
            if outcome is GetOutcome.OK:
                chunk.outcome = outcome
            else:
                self._refuse(chunk, way.replica, outcome, report)

    def _outcome(self, chunk: _Wanted, replica: ReplicaRef) -> GetOutcome:
        expected = Expected(replica.key, self._fingerprint, replica.generation, chunk.num_bytes - HEADER_BYTES)
        known = chunk.passed.value if chunk.passed else None
        return verify(chunk.header, expected, chunk.payload, check_payload=self._check_payload, known_checksum=known)

    def _not_read(self, chunk: _Wanted, way: _Way, error: TransferError, report: ReadReport) -> None:
        """Only a peer that says "I do not hold that" is told on: silence may be our own link's fault."""
        if isinstance(error, SegmentUnknownError):
            self._refuse(chunk, way.replica, GetOutcome.UNREACHABLE, report)
            return
        chunk.outcome = GetOutcome.UNREACHABLE
        self._counters.add("replica_unreachable")

    def _refuse(self, chunk: _Wanted, replica: ReplicaRef, outcome: GetOutcome, report: ReadReport) -> None:
        """Tell on the replica; the chunk goes on with the others."""
        chunk.outcome = outcome
        self._counters.add(f"replica_{outcome}")
        report.refused.append(QuarantineItem(replica=replica, reason=QuarantineReason(outcome)))
