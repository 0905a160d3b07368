"""vLLM's KV memory as bytes of blocks: what the jobs read and write. On a CPU here; `device_blocks` has GPUs.

Owns no KV: the tensors are vLLM's, and who may touch which block is what the orders say.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Protocol

import torch

from engines.vllm.connector.blocks.block_layout import BlockLayout, measure
from engines.vllm.connector.blocks.device_blocks import CudaStreams, DeviceBlocks, DeviceEvent
from engines.vllm.connector.settings import Provenance
from kvcore.errors import ConfigError
from kvcore.types import KVSpec


class KVBlocks(Protocol):
    """One worker's. `start` first; `reading` and `writing` on one event loop; `mark` on the engine's thread."""

    @property
    def block_bytes(self) -> int:
        """Payload of one block."""
        ...

    @property
    def num_blocks(self) -> int:
        """Block ids are below it."""
        ...

    @property
    def layout_id(self) -> str:
        """As KVSpec.layout_id: everything that the order of the payload's bytes depends on."""
        ...

    def build_spec(self, provenance: Provenance, chunk_tokens: int, rank: int, size: int) -> KVSpec:
        """The KV's provenance; `num_kv_heads` are this rank's. Raises ConfigError unless a chunk is whole blocks."""
        ...

    def start(self, chunk_blocks: int) -> Sequence[memoryview]:
        """Allocate what copying takes, for chunks of at most `chunk_blocks` blocks. Returns the memory that `reading`
        and `writing` show parts of, to be registered with the transports."""
        ...

    def mark(self) -> DeviceEvent | None:
        """An event at the end of all work that the engine was given so far. Does not wait."""
        ...

    def reading(
        self, block_ids: Sequence[int], after: DeviceEvent | None
    ) -> AbstractAsyncContextManager[Sequence[memoryview]]:
        """One chunk's payload as it was at `after` or later; the views hold still inside of the context."""
        ...

    def writing(
        self, chunks: Sequence[Sequence[int]], keep_blocks: int, after: DeviceEvent | None
    ) -> AbstractAsyncContextManager[Sequence[Sequence[memoryview]]]:
        """Memory for these chunks' payloads, views a chunk. What was written there is in the blocks once the context is
        left without an error, not before `after`; the first `keep_blocks` blocks of all stay as they are. A cancelled
        context has ended its copies before it raises."""
        ...

    async def aclose(self) -> None:
        """End threads and give memory back. Idempotent."""
        ...


class HostBlocks:
    """KVBlocks over CPU tensors: the views are the engine's own memory, nothing is copied."""

    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout
        self._memory = [memoryview(storage.numpy()) for storage in layout.storages]
        self.block_bytes = layout.block_bytes
        self.num_blocks = layout.num_blocks
        self.layout_id = layout.layout_id
        self.build_spec = layout.build_spec

    def start(self, chunk_blocks: int) -> Sequence[memoryview]:
        """All of the engine's KV memory."""
        return self._memory

    def mark(self) -> None:
        """A forward pass on a CPU has ended when it returns."""

    @asynccontextmanager
    async def reading(self, block_ids: Sequence[int], after: DeviceEvent | None) -> AsyncIterator[Sequence[memoryview]]:
        """As KVBlocks.reading."""
        yield self._views(block_ids)

    @asynccontextmanager
    async def writing(
        self, chunks: Sequence[Sequence[int]], keep_blocks: int, after: DeviceEvent | None
    ) -> AsyncIterator[Sequence[Sequence[memoryview]]]:
        """As KVBlocks.writing; bytes are in the blocks as they come."""
        buffers = []
        for block_ids in chunks:
            kept = min(keep_blocks, len(block_ids))
            keep_blocks -= kept
            scratch = [memoryview(bytearray(kept * self.block_bytes))] if kept else []
            buffers.append([*scratch, *self._views(block_ids[kept:])])
        yield buffers

    async def aclose(self) -> None:
        """Nothing to do."""

    def _views(self, block_ids: Sequence[int]) -> list[memoryview]:
        spans = (span for block_id in block_ids for span in self._layout.spans(block_id))
        return [self._memory[storage][start:end] for storage, start, end in spans]


def build_blocks(kv_caches: Mapping[str, torch.Tensor], *, num_blocks: int, block_size: int) -> KVBlocks:
    """For what vLLM's register_kv_caches hands over. Raises ConfigError for tensors that kvferry does not know."""
    layout = measure(kv_caches, num_blocks=num_blocks, block_size=block_size)
    match layout.device.type:
        case "cpu":
            return HostBlocks(layout)
        case "cuda":
            return DeviceBlocks(layout, CudaStreams(layout.device))
        case other:
            raise ConfigError(f"vLLM's KV lies on a device of type {other}; kvferry knows cpu and cuda")
