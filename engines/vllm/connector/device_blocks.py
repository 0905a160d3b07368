"""vLLM's KV memory on a GPU: blocks are gathered into pinned host memory and scattered from it, on streams of our own.

THE CUDA PART (`CudaStreams`) HAS NOT RUN ON A GPU. The rest runs in the tests, over CPU tensors and streams that check
the order. Streams are used as vLLM's own offloading connectors use them (v1/kv_offload/cpu, v1/simple_kv_offload):

- A gather waits for an event recorded on the compute stream after the step that filled its blocks.
- A scatter waits for one as well: vLLM may have queued zeroing of the same blocks.
- No kernel that reads scattered blocks is queued before the scatter's event was waited for on the host, and no bytes
  are handed to a transport before their gather's was.
- The tensors live as long as the engine, so the caching allocator need not know of our streams (`record_stream`).
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import torch

from engines.vllm.connector.block_layout import BlockLayout
from engines.vllm.connector.limits import ConnectorLimits
from transfer.blocking import BatchDeadline, BlockingPool

_SLOTS = 8
"""Chunks on their way between GPU and store at once; each has pinned memory of its own."""

Copy = tuple[torch.Tensor, torch.Tensor]
"""(target, source), flat, of equal size."""


class DeviceEvent(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Block until the work before it is done."""
        ...


class CopyStream(Protocol):
    """Copies in order, beside the compute stream. Used from any thread."""

    def wait(self, event: DeviceEvent) -> None:
        """What is queued from now on begins after `event`. Does not block."""
        ...

    def copy(self, copies: Sequence[Copy]) -> None:
        """Queue these copies. Does not wait for them."""
        ...

    def record(self) -> DeviceEvent:
        """The end of all that is queued."""
        ...


class DeviceStreams(Protocol):
    """What DeviceBlocks needs of a device."""

    def mark(self) -> DeviceEvent:
        """The end of what the calling thread has queued on the compute stream."""
        ...

    def copy_stream(self) -> CopyStream:
        """A new stream."""
        ...

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Flat uint8 host memory that the device copies to and from directly."""
        ...


class DeviceBlocks:
    """`KVBlocks` over tensors of a device, through `slots` chunks of staging memory."""

    def __init__(
        self,
        layout: BlockLayout,
        streams: DeviceStreams,
        slots: int = _SLOTS,
        limits: ConnectorLimits = ConnectorLimits(),
    ) -> None:
        self._layout = layout
        self._streams = streams
        self._num_slots = slots
        self._limits = limits
        self._slots: _SlotPool | None = None
        self._gathering = streams.copy_stream()
        self._scattering = streams.copy_stream()
        self._pool = BlockingPool("kvferry-copy", 2)
        self.block_bytes = layout.block_bytes
        self.num_blocks = layout.num_blocks
        self.layout_id = layout.layout_id
        self.build_spec = layout.build_spec
        self.mark = streams.mark

    def start(self, chunk_blocks: int) -> Sequence[memoryview]:
        """The staging memory."""
        slots = [self._streams.staging(chunk_blocks * self.block_bytes) for _ in range(self._num_slots)]
        self._slots = _SlotPool(slots)
        return [_bytes_of(slot) for slot in slots]

    @asynccontextmanager
    async def reading(self, block_ids: Sequence[int], after: DeviceEvent | None) -> AsyncIterator[Sequence[memoryview]]:
        """As KVBlocks.reading: a copy of the blocks, in a slot."""
        assert self._slots is not None and after is not None
        async with self._slots.take(1) as (slot,):
            copies = list(self._copies(slot, block_ids))
            await self._run(lambda: _copy(self._gathering, copies, after))
            yield [_bytes_of(slot)[: len(block_ids) * self.block_bytes]]

    @asynccontextmanager
    async def writing(
        self, chunks: Sequence[Sequence[int]], keep_blocks: int, after: DeviceEvent | None
    ) -> AsyncIterator[Sequence[Sequence[memoryview]]]:
        """As KVBlocks.writing: slots, scattered at the end. `chunks` are no more than there are slots."""
        assert self._slots is not None and after is not None
        async with self._slots.take(len(chunks)) as slots:
            views = zip(slots, chunks, strict=True)
            yield [[_bytes_of(slot)[: len(block_ids) * self.block_bytes]] for slot, block_ids in views]
            copies: list[Copy] = []
            for slot, block_ids in zip(slots, chunks, strict=True):
                kept = min(keep_blocks, len(block_ids))
                keep_blocks -= kept
                parts = self._copies(slot[kept * self.block_bytes :], block_ids[kept:])
                copies += [(device, host) for host, device in parts]
            await self._run(lambda: _copy(self._scattering, copies, after))

    async def aclose(self) -> None:
        """As KVBlocks.aclose."""
        await self._pool.aclose()

    async def _run(self, work: Callable[[], None]) -> None:
        """In a thread. A cancelled caller waits until the copies have ended, as they cannot be stopped."""
        await self._pool.run(work, lambda: None, BatchDeadline(self._limits.device_copy_s))

    def _copies(self, slot: torch.Tensor, block_ids: Sequence[int]) -> list[Copy]:
        """(place in the slot, place on the device) of all ranges of these blocks."""
        at, copies = 0, []
        for block_id in block_ids:
            for storage, start, end in self._layout.spans(block_id):
                copies.append((slot[at : at + end - start], self._layout.storages[storage][start:end]))
                at += end - start
        return copies


def _copy(stream: CopyStream, copies: Sequence[Copy], after: DeviceEvent) -> None:
    """Run the copies, after that event. Blocks until they are done."""
    stream.wait(after)
    stream.copy(copies)
    stream.record().synchronize()


def _bytes_of(slot: torch.Tensor) -> memoryview:
    return memoryview(slot.numpy())


class _SlotPool:
    """Gives a taker all of its slots at once, and serves one taker after the other, so that no two takers deadlock."""

    def __init__(self, slots: Sequence[torch.Tensor]) -> None:
        self._total = len(slots)
        self._free = list(slots)
        self._order = asyncio.Lock()
        self._returned = asyncio.Event()

    @asynccontextmanager
    async def take(self, count: int) -> AsyncIterator[list[torch.Tensor]]:
        """`count` slots."""
        assert count <= self._total, f"{count} of {self._total} staging slots"
        async with self._order:
            while len(self._free) < count:
                self._returned.clear()
                await self._returned.wait()
            taken = [self._free.pop() for _ in range(count)]
        try:
            yield taken
        finally:
            self._free += taken
            self._returned.set()


class CudaStreams:
    """DeviceStreams over torch.cuda. Not run on a GPU so far."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> DeviceEvent:
        """An event on the stream that is current in the calling thread: vLLM's compute stream in vLLM's own."""
        return _recorded(torch.cuda.current_stream(self._device))

    def copy_stream(self) -> CopyStream:
        """One of the lowest priority: copies give way to compute."""
        lowest, _ = torch.cuda.Stream.priority_range()
        return _CudaCopyStream(torch.cuda.Stream(self._device, priority=lowest))

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Pinned: only then is a copy asynchronous."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)


class _CudaCopyStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def wait(self, event: DeviceEvent) -> None:
        self._stream.wait_event(event)

    def copy(self, copies: Sequence[Copy]) -> None:
        with torch.cuda.stream(self._stream):
            for target, source in copies:
                target.copy_(source, non_blocking=True)

    def record(self) -> DeviceEvent:
        return _recorded(self._stream)


def _recorded(stream: Any) -> DeviceEvent:
    event: DeviceEvent = torch.cuda.Event()
    stream.record_event(event)
    return event
