"""One segment behind each transport, for the conformance suite."""

import gc
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from support.nixl import needs_nixl
from support.transports import transport_config
from support.ucx import needs_ucx

from kvcore.types import Segment
from transfer.base import TransferEngine, TransferOp
from transfer.inproc import InprocTransfer
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import SegmentHosts, build_transfer, start_segment_hosts

SIZE_BYTES = 8 << 20
UCX = pytest.param("ucx", marks=needs_ucx)
NIXL = pytest.param("nixl", marks=needs_nixl)
REMOTE = ["shm", "tcp", UCX, NIXL]
"""Transports that reach another process: each is held to all that the suites say."""
KINDS = ["inproc", *REMOTE]


class Rig:
    """A hosted segment and an engine that reaches it."""

    engine: TransferEngine
    segment: Segment

    def __init__(self, kind: str, size_bytes: int = SIZE_BYTES, limits: TransferLimits = TransferLimits()) -> None:
        self.kind = kind
        self.limits = limits
        self._size_bytes = size_bytes
        self._incarnation = 0
        self.registry: dict[str, memoryview] = {}
        self._hosts: SegmentHosts | None = None

    async def __aenter__(self) -> Self:
        await self.host()
        if self.kind == "inproc":
            self.engine = InprocTransfer(self.registry)
        else:
            self.engine = build_transfer(transport_config(self.kind), host_identity(), self.limits)
        return self

    async def host(self) -> None:
        self._incarnation += 1
        segment_id = f"rig.{self._incarnation:x}"
        self.memory = SegmentMemory.create(segment_id, self._size_bytes)
        addresses = {"inproc": "here"}
        self.registry[segment_id] = self.memory.view
        if self.kind != "inproc":
            self._hosts = await start_segment_hosts(
                transport_config(self.kind), self.memory, host="127.0.0.1", limits=self.limits
            )
            addresses = self._hosts.addresses
        self.segment = Segment(
            id=segment_id, node_id="rig", size_bytes=self._size_bytes, host_id=host_identity(), addresses=addresses
        )

    async def close_host(self) -> None:
        if self._hosts is not None:
            await self._hosts.aclose()
        self.registry.clear()
        self.memory.close()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.engine.aclose()
        await self.close_host()

    def op(self, offset: int, *buffers: bytes | bytearray | memoryview) -> TransferOp:
        return TransferOp(self.segment, offset, [memoryview(buffer) for buffer in buffers])


def resources() -> tuple[int, int, int]:
    """Open descriptors, threads and mapped segments of this process."""
    gc.collect()
    mapped = Path("/proc/self/maps").read_text().count("/memfd:kvferry-")
    return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), mapped


def renamed(segment: Segment, segment_id: str, size_bytes: int) -> Segment:
    """Same addresses, another claim."""
    return Segment(
        id=segment_id,
        node_id=segment.node_id,
        size_bytes=size_bytes,
        host_id=segment.host_id,
        addresses=segment.addresses,
    )
