"""What every transport is: batches of one-sided reads and writes on the segments of other processes.

The target's program is not asked. A write has landed in the target's memory when `write` returns without an error for
it; a read has filled its buffers likewise. Every call has a deadline. After an error or a cancellation all resources
are released, nothing may be assumed about a write's range, and bytes on their way may still land in it: the metadata
server lets the room of such a write rest for longer than that takes (`StoreConfig.retire_grace_s`). A read's buffers
are left alone from then on.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from kvcore.errors import TransferError, TransferForgedError, TransferProofError, TransferProtocolError
from kvcore.types import Segment

Direction = Literal["read", "write"]
"""As the initiator sees it."""


@dataclass(frozen=True, slots=True)
class TransferOp:
    """One contiguous range `[offset, offset + sum of buffers)` of a segment, gathered from or scattered to buffers.

    Buffers are local C-contiguous views of bytes (writable for a read) that the caller keeps alive and, for a write,
    unchanged until the call returns or was cancelled *and* awaited. An empty op succeeds without any I/O.

    `on_part`: a transport may show it what has arrived, or in a write has been taken, part by part, each byte of the
    buffers once and in order, while it is still in the processor's cache (a checksum then costs next to nothing). It is
    called from any thread, one call at a time. A transport that shows only some of the bytes, or none, is as good. Of a
    read it may change what it is shown in place, as a decryption does: what it leaves there is what the buffers have.
    """

    segment: Segment
    offset: int
    buffers: Sequence[memoryview]
    on_part: Callable[[memoryview], None] | None = None

    @property
    def num_bytes(self) -> int:
        """Length of the range."""
        return sum(view.nbytes for view in self.buffers)


class TransferEngine(Protocol):
    """The initiator's side of one transport."""

    @property
    def kind(self) -> str:
        """`shm`, `tcp`, `inproc`, `ucx`, `nixl`."""
        ...

    def reaches(self, segment: Segment) -> bool:
        """Whether this transport can be tried for `segment` (has an address, same host where that matters). No I/O."""
        ...

    def register(self, region: memoryview) -> None:
        """Make local memory known to the transport, once, before buffers inside of it are used (pins it for RDMA)."""
        ...

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """Copy local buffers into segments. One result an op, in order; never raises TransferError itself."""
        ...

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """Copy ranges of segments into local buffers. One result an op, in order; never raises TransferError itself."""
        ...

    async def aclose(self) -> None:
        """Release every connection, mapping and thread. Idempotent. Operations under way end with an error."""
        ...


@runtime_checkable
class ChoosesTransport(Protocol):
    """An engine that hands each segment to one of several transports."""

    def transport_for(self, segment: Segment) -> str:
        """Kind of the transport that moves this segment's bytes."""
        ...


@runtime_checkable
class DescribesItself(Protocol):
    """An engine that can say more of how it reaches a segment than its kind."""

    def describe(self, segment: Segment) -> str:
        """Kind, and then the transports, devices and build in use."""
        ...


def transport_for(engine: TransferEngine, segment: Segment) -> str:
    """The transport under which bytes moved between us and `segment` are to be counted."""
    return engine.transport_for(segment) if isinstance(engine, ChoosesTransport) else engine.kind


def refusal(error: TransferProtocolError) -> str:
    """Why a connection was ended, as SegmentHost.refused counts it."""
    if isinstance(error, TransferForgedError):
        return "forged"
    return "proof" if isinstance(error, TransferProofError) else "protocol"


class SegmentHost(Protocol):
    """The target's side: what a node runs so that others reach its segment by one transport."""

    @property
    def address(self) -> str:
        """What goes into `Segment.addresses[kind]`; known after `start`."""
        ...

    @property
    def refused(self) -> Mapping[str, int]:
        """Connections that were ended, by why: `protocol` was broken, no `proof` of the cluster's secret, a frame was
        `forged`."""
        ...

    async def start(self) -> None:
        """Bind. Raises ConfigError (address in use, device missing) naming what and what to do."""
        ...

    async def aclose(self) -> None:
        """Stop serving; afterwards no peer can write into the memory. Idempotent."""
        ...
