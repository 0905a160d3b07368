"""The node's segment: its memory, what serves it to peers, its description, and the list of what lies in it.

Owns memory and hosts. Knows nothing of who writes there. Invariant: hosts are closed before the memory goes.
"""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from types import TracebackType
from typing import Self

from kvcore.config.schema import NodeConfig, TransportConfig
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from kvstore.manifest import scan
from metadata_server.messages import SegmentManifest
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import SegmentHosts, start_segment_hosts


class SegmentOwner:
    """Entering it allocates and faults in the memory (about 1 s a GB, on a thread) and binds the transports."""

    def __init__(
        self,
        node_id: str,
        incarnation: int,
        node: NodeConfig,
        transport: TransportConfig,
        trust: ClusterTrust = OPEN,
    ) -> None:
        self.trust = trust
        self._node_id = node_id
        self._segment_id = f"{node_id}.{incarnation:x}"
        self._node = node
        self._transport = transport
        self._stack = AsyncExitStack()
        self._memory: SegmentMemory | None = None
        self._hosts: SegmentHosts | None = None
        self._host_id = node.host_id or host_identity()
        self.on_change: Callable[[], None] = lambda: None
        """Called when `segment` has other addresses than before."""
        self.host_restarts = 0
        """How often the process that serves the segment ended and was started again."""

    async def __aenter__(self) -> Self:
        """Raises ConfigError: too little memory, no such huge pages or NUMA node, address in use, unknown transport."""
        async with AsyncExitStack() as stack:
            memory = await asyncio.to_thread(
                SegmentMemory.create,
                self._segment_id,
                int(self._node.segment),
                hugepages=self._node.hugepages,
                numa_node=self._node.numa_node,
            )
            stack.callback(memory.close)
            hosts = await start_segment_hosts(
                self._transport,
                memory,
                host=self._node.host,
                port=self._node.transfer_port,
                on_change=self._changed,
                on_reseal=self._resealed,
                trust=self.trust,
            )
            stack.push_async_callback(hosts.aclose)
            self._memory, self._hosts = memory, hosts
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    def __repr__(self) -> str:
        if self._memory is None or self._hosts is None:
            return f"<SegmentOwner {self._segment_id}, not entered>"
        served = ", ".join(sorted(self._hosts.addresses)) or "no transport"
        return (
            f"<SegmentOwner {self._segment_id}, {self._memory.size_bytes} bytes, served by {served}, "
            f"{self.host_restarts} host restarts>"
        )

    @property
    def segment(self) -> Segment:
        """The segment as peers must know it now: its addresses change when its host is restarted."""
        assert self._memory is not None and self._hosts is not None, "the segment was not entered"
        return Segment(
            id=self._segment_id,
            node_id=self._node_id,
            size_bytes=self._memory.size_bytes,
            host_id=self._host_id,
            addresses=self._hosts.addresses,
        )

    @property
    def refused(self) -> dict[tuple[str, str], int]:
        """Connections of peers that were ended, by transport and why."""
        return {} if self._hosts is None else self._hosts.refused

    @property
    def view(self) -> memoryview:
        """The segment's memory."""
        assert self._memory is not None, "the segment was not entered"
        return self._memory.view

    def _changed(self) -> None:
        self.host_restarts += 1
        self.on_change()

    def _resealed(self) -> None:
        self.on_change()

    async def manifests(self) -> list[SegmentManifest]:
        """What lies in the segment now, by its chunk headers. Scans on a thread, about 0.1 s a 10 GiB."""
        assert self._memory is not None, "the segment was not entered"
        entries = await asyncio.to_thread(scan, self._memory.view)
        return [SegmentManifest(segment=self.segment, entries=entries)]
