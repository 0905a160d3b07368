"""How fast this node reaches another: one measurement at a time, in room of the peer's segment reserved for it.

Owns the reservations and, while it measures, a transport of its own, built as the engine's is: the metrics of KV do
not count what it moves.
Invariant: nothing is written outside of the reservations, nor after the first of deadline, pause and `write_by`; they
are given back when no write is under way, and never committed.
"""

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

from kvcore.clock import Clock
from kvcore.config.schema import StoreConfig, TransportConfig
from kvcore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.types import ChunkKey, NodeInfo, ReplicaRef, Segment
from kvnode.limits import NodeLimits
from kvnode.tasks import PausableWork
from kvstore.placement import Placement
from metadata_server.account_messages import SegmentStats
from metadata_server.client import MetadataClient
from nodeapi.messages import ProbeReport, ProbeRequest
from transfer.links import link_of
from transfer.measure import SMALL_BYTES, measure
from transfer.select import TransferSelector, build_transfer

_PIECE_BYTES = 4 << 20
_PIECES = 16
_LEAST_BYTES = 64 << 10


class PeerProber:
    """Measures for one node. `node` and the client stay the caller's; `host_id` is that of the node's segment."""

    def __init__(
        self,
        *,
        node: NodeInfo,
        host_id: str,
        metadata: MetadataClient,
        transport: TransportConfig,
        store: StoreConfig,
        clock: Clock,
        open_transfer: Callable[[TransportConfig, str], TransferSelector] = build_transfer,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        self._node = node
        self._host_id = host_id
        self._metadata = metadata
        self._transport = transport
        self._store = store
        self._clock = clock
        self._open_transfer = open_transfer
        self._limits = limits
        self._placement = Placement(metadata, node_id=node.id, incarnation=node.incarnation, clock=clock, config=store)
        self.work: PausableWork[ProbeReport] = PausableWork()
        """The measurement, if one is under way."""

    def __repr__(self) -> str:
        state = "paused" if self.work.is_paused else "measuring" if len(self.work) else "idle"
        return f"<PeerProber of {self._node.id}, {state}>"

    async def probe(self, request: ProbeRequest) -> ProbeReport:
        """Raises OverloadedError while one runs or the peer's segment has no free room, NodeUnavailableError for a peer
        that is not there, TransferError for what happened on the way, DeadlineExceededError, MetadataUnavailableError,
        ConfigError. Cancelled: nothing is left, but give-backs that end by themselves."""
        name = self._node.id
        longest_s = self._limits.longest_probe_s
        if not 0 < request.timeout_s <= longest_s:
            raise InvalidRequestError(f"timeout_s is above 0 and at most {longest_s:g}", param="timeout_s")
        if request.peer == name:
            raise InvalidRequestError(f"{name} is this node itself: name another", param="peer")
        if self.work.is_paused:
            raise NodeUnavailableError(f"the engine of node {name} has just ended; ask again")
        if len(self.work):
            raise OverloadedError(f"node {name} is measuring already; ask again when that is over")
        report = await self.work.run(self._run(request))
        if report is None:
            raise NodeUnavailableError(f"node {name} gave the measurement up: its engine ended")
        return report

    async def aclose(self) -> None:
        """End what is under way, and wait for give-backs, bounded."""
        await self.work.aclose()
        await self._placement.aclose(self._limits.close_s)

    async def _run(self, request: ProbeRequest) -> ProbeReport:
        began = self._clock.now()
        try:
            async with asyncio.timeout(request.timeout_s):
                target = await self._target(request.peer)
                async with self._scratch(target, request.timeout_s) as (places, write_by):
                    left_s = min(began + request.timeout_s, write_by) - self._clock.now()
                    return await self._measure(request.peer, target.segment, places, began, left_s)
        except TimeoutError:
            raise DeadlineExceededError(
                f"measuring from {self._node.id} to {request.peer} did not end within {request.timeout_s:g} s"
            ) from None

    async def _target(self, peer: str) -> SegmentStats:
        """The peer's largest segment."""
        stats = await self._metadata.stats()
        found = [line for line in stats.segments if line.segment.node_id == peer]
        if not found:
            raise NodeUnavailableError(f"the metadata server knows no segment of node {peer}: it is down or was silent")
        return max(found, key=lambda line: line.segment.size_bytes)

    async def _measure(
        self, peer: str, segment: Segment, places: list[tuple[int, int]], began: float, left_s: float
    ) -> ProbeReport:
        transfer = self._open_transfer(self._transport, self._host_id)
        try:
            timeout_s = min(left_s, self._transport.timeout_s)
            found = await measure(transfer, segment, places, clock=self._clock, timeout_s=timeout_s)
            shown = transfer.choices()[segment.id]
            kind = transfer.transport_for(segment)
        finally:
            await transfer.aclose()
        link = await asyncio.to_thread(link_of, shown, segment)
        return ProbeReport(
            node=self._node.id,
            peer=peer,
            asked=self._transport.kind,
            transport=kind,
            shown=shown,
            devices=list(link.devices),
            link_rate=link.bytes_per_s,
            latency_s=found.latency_s,
            put_rate=found.put_rate,
            get_rate=found.get_rate,
            copy_rate=found.copy_rate,
            num_bytes=found.num_bytes,
            seconds=self._clock.now() - began,
        )

    @asynccontextmanager
    async def _scratch(
        self, target: SegmentStats, timeout_s: float
    ) -> AsyncIterator[tuple[list[tuple[int, int]], float]]:
        """(offset, length) of each piece of room that is ours in the segment, and until when it may be written.

        Reservations last little longer than the measurement, whatever becomes of us.
        """
        lengths = {ChunkKey(secrets.token_bytes(16)): size for size in self._sizes(target)}
        reserved = await self._placement.reserve(lengths, target.segment.id, timeout_s, ttl_s=2 * timeout_s)
        try:
            ours = _inside(reserved.granted, target.segment)
            if not ours:
                raise OverloadedError(f"no room was given in segment {target.segment.id}; ask again in some seconds")
            yield [(replica.offset, replica.length) for replica in ours], reserved.write_by
        finally:
            await self._placement.give_back(reserved)

    def _sizes(self, target: SegmentStats) -> list[int]:
        """Half of what is free at most, so that nothing is evicted and others find room meanwhile."""
        free = int(self._store.high_watermark * target.segment.size_bytes) - target.used_bytes
        room = free // 2
        if room < _LEAST_BYTES:
            raise OverloadedError(
                f"segment {target.segment.id} is full ({max(0, free)} bytes are free without an eviction); "
                "ask again when it is less full"
            )
        if room < _PIECE_BYTES:
            return [room // SMALL_BYTES * SMALL_BYTES]
        return [_PIECE_BYTES] * min(_PIECES, room // _PIECE_BYTES)


def _inside(granted: Mapping[ChunkKey, ReplicaRef], segment: Segment) -> list[ReplicaRef]:
    """Reservations in `segment`; others, which the server may give where it has no room there, are not written."""
    return [replica for replica in granted.values() if replica.segment_id == segment.id]
