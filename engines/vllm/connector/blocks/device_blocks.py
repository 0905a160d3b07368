"""vLLM's KV memory on a GPU: blocks are gathered into pinned host memory and scattered from it, on streams of our own.

The blocks of a chunk are packed on the device first, so that one copy takes them over the bus. Streams are used as
vLLM's own offloading connectors use them (v1/kv_offload/cpu, v1/simple_kv_offload):

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

from engines.vllm.connector.blocks.block_layout import BlockLayout
from engines.vllm.connector.blocks.packed_blocks import PackedBlocks
from engines.vllm.connector.limits import ConnectorLimits
from transfer.blocking import BatchDeadline, BlockingPool


class DeviceEvent(Protocol):
    """A point in a stream's work."""

    def synchronize(self) -> None:
        """Block until the work before it is done."""
        ...


class CopyStream(Protocol):
    """Work in order, beside the compute stream. Used from one thread at a time."""

    def wait(self, event: DeviceEvent) -> None:
        """What is queued from now on begins after `event`. Does not block."""
        ...

    def queue(self, work: Callable[[], None]) -> None:
        """Queue what `work` gives the device to do. Does not wait for that."""
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

    def device_memory(self, num_bytes: int) -> torch.Tensor:
        """Flat uint8 memory of the device."""
        ...


class DeviceBlocks:
    """`KVBlocks` over tensors of a device, through chunks of staging memory and two of the device's."""

    def __init__(
        self, layout: BlockLayout, streams: DeviceStreams, limits: ConnectorLimits = ConnectorLimits()
    ) -> None:
        self._streams = streams
        self._num_slots = limits.staging_slots
        self._slots: _SlotPool | None = None
        self._gathering = _Way("kvferry-gather", layout, streams, limits)
        self._scattering = _Way("kvferry-scatter", layout, streams, limits)
        self.block_bytes = layout.block_bytes
        self.num_blocks = layout.num_blocks
        self.layout_id = layout.layout_id
        self.build_spec = layout.build_spec
        self.mark = streams.mark

    def start(self, chunk_blocks: int) -> Sequence[memoryview]:
        """The staging memory."""
        slots = [self._streams.staging(chunk_blocks * self.block_bytes) for _ in range(self._num_slots)]
        self._slots = _SlotPool(slots)
        for way in (self._gathering, self._scattering):
            way.start(chunk_blocks * self.block_bytes)
        return [_bytes_of(slot) for slot in slots]

    @asynccontextmanager
    async def reading(self, block_ids: Sequence[int], after: DeviceEvent | None) -> AsyncIterator[Sequence[memoryview]]:
        """As KVBlocks.reading: a copy of the blocks, in a slot."""
        assert self._slots is not None and after is not None
        async with self._slots.take(1) as (slot,):
            host = slot[: len(block_ids) * self.block_bytes]
            await self._gathering.run(after, lambda: self._gathering.to_host(block_ids, host))
            yield [_bytes_of(host)]

    @asynccontextmanager
    async def writing(
        self, chunks: Sequence[Sequence[int]], keep_blocks: int, after: DeviceEvent | None
    ) -> AsyncIterator[Sequence[Sequence[memoryview]]]:
        """As KVBlocks.writing: slots, scattered at the end. `chunks` are no more than there are slots."""
        assert self._slots is not None and after is not None
        async with self._slots.take(len(chunks)) as slots:
            parts = zip(slots, chunks, strict=True)
            hosts = [slot[: len(block_ids) * self.block_bytes] for slot, block_ids in parts]
            yield [[_bytes_of(host)] for host in hosts]

            def scatter() -> None:
                keep = keep_blocks
                for host, block_ids in zip(hosts, chunks, strict=True):
                    kept = min(keep, len(block_ids))
                    keep -= kept
                    self._scattering.to_device(host[kept * self.block_bytes :], block_ids[kept:])

            await self._scattering.run(after, scatter)

    async def aclose(self) -> None:
        """As KVBlocks.aclose."""
        await self._gathering.aclose()
        await self._scattering.aclose()


class _Way:
    """One direction: a stream, the thread that uses it and waits for it, and a chunk of the device's memory.

    The stream's order is all that guards that memory: who comes next uses it once the last copy has.
    """

    def __init__(self, name: str, layout: BlockLayout, streams: DeviceStreams, limits: ConnectorLimits) -> None:
        self._blocks = PackedBlocks(layout)
        self._streams = streams
        self._stream = streams.copy_stream()
        self._pool = BlockingPool(name, 1)
        self._limits = limits
        self._packed: torch.Tensor | None = None

    def start(self, num_bytes: int) -> None:
        self._packed = self._streams.device_memory(num_bytes)

    async def run(self, after: DeviceEvent, work: Callable[[], None]) -> None:
        """Have the device do it after that event, and wait until it has. A cancelled caller waits as well, as copies
        cannot be stopped."""

        def run() -> None:
            self._stream.wait(after)
            try:
                self._stream.queue(work)
            finally:  # what was queued before an error uses the caller's memory, too
                self._stream.record().synchronize()

        await self._pool.run(run, lambda: None, BatchDeadline(self._limits.device_copy_s))

    def to_host(self, block_ids: Sequence[int], host: torch.Tensor) -> None:
        """Work for `run`."""
        packed = self._part(host.numel())
        self._blocks.gather(block_ids, packed)
        host.copy_(packed, non_blocking=True)

    def to_device(self, host: torch.Tensor, block_ids: Sequence[int]) -> None:
        """Work for `run`."""
        packed = self._part(host.numel())
        packed.copy_(host, non_blocking=True)
        self._blocks.scatter(packed, block_ids)

    def _part(self, num_bytes: int) -> torch.Tensor:
        assert self._packed is not None, "used before start"
        return self._packed[:num_bytes]

    async def aclose(self) -> None:
        await self._pool.aclose()


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
    """DeviceStreams over torch.cuda."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> DeviceEvent:
        """An event on the stream that is current in the calling thread: vLLM's compute stream in vLLM's own."""
        event: DeviceEvent = torch.cuda.current_stream(self._device).record_event()
        return event

    def copy_stream(self) -> CopyStream:
        """One of the lowest priority, as all are that ask for no other; vLLM's compute stream has the same."""
        return _CudaCopyStream(torch.cuda.Stream(self._device))

    def staging(self, num_bytes: int) -> torch.Tensor:
        """Pinned: only then is a copy asynchronous."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def device_memory(self, num_bytes: int) -> torch.Tensor:
        """Beside what vLLM reckons with."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)


class _CudaCopyStream:
    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def wait(self, event: DeviceEvent) -> None:
        self._stream.wait_event(event)

    def queue(self, work: Callable[[], None]) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def record(self) -> DeviceEvent:
        """Blocking: a gather waits for a whole step of the engine, and would keep a core busy for that long."""
        event: DeviceEvent = self._stream.record_event(torch.cuda.Event(blocking=True))
        return event
