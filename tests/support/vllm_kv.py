"""KV tensors as vLLM hands them over, in any of its cache layouts, and streams that check how they are used."""

import math
import threading
from collections.abc import Callable, Mapping, Sequence

import torch

from engines.vllm.connector.blocks.block_layout import BlockLayout
from engines.vllm.connector.blocks.device_blocks import DeviceEvent
from engines.vllm.connector.blocks.kv_blocks import KVBlocks

BLOCK, HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 3
CPU = torch.device("cpu")
LAYOUTS = {  # axes of [layers, blocks, heads, tokens, content], outermost in memory first (vllm/v1/kv_cache_layout.py)
    "LBHNC": (0, 1, 2, 3, 4),
    "LBNHC": (0, 1, 3, 2, 4),
    "LHBNC": (0, 2, 1, 3, 4),
    "BLHNC": (1, 0, 2, 3, 4),
    "BLNHC": (1, 0, 3, 2, 4),
    "BHLNC": (1, 2, 0, 3, 4),
}


def kv_caches(
    num_blocks: int,
    layout: str = "LBHNC",
    dtype: torch.dtype = torch.float32,
    layers: int = LAYERS,
    device: torch.device = CPU,
) -> dict[str, torch.Tensor]:
    """One allocation for all layers, as vLLM makes it, filled with bytes that differ everywhere."""
    shape = (layers, num_blocks, HEADS, BLOCK, 2 * HEAD_DIM)
    order = LAYOUTS[layout]
    strides, stride = [0] * 5, 1
    for axis in reversed(order):
        strides[axis], stride = stride, stride * shape[axis]
    raw = torch.randint(0, 256, (math.prod(shape) * dtype.itemsize,), dtype=torch.uint8, device=device)
    whole = torch.as_strided(raw.view(dtype), shape, strides)
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(layers)]
    return dict(zip(names, whole, strict=True))


def block_bytes(caches: Mapping[str, torch.Tensor], block_id: int) -> list[bytes]:
    """A block's content, layer by layer, in the logical order whatever the layout."""
    layers = sorted(caches, key=lambda name: int(name.split(".")[2]))
    return [bytes(caches[name][block_id].contiguous().view(torch.uint8).flatten().tolist()) for name in layers]


def span_bytes(layout: BlockLayout, block_ids: Sequence[int]) -> bytes:
    """The blocks' bytes in a payload's order, read one span after the other."""
    spans = [span for block_id in block_ids for span in layout.spans(block_id)]
    return b"".join(layout.storages[storage][start:end].cpu().numpy().tobytes() for storage, start, end in spans)


async def payload(blocks: KVBlocks, block_ids: Sequence[int], after: DeviceEvent | None = None) -> bytes:
    """What is read of blocks."""
    async with blocks.reading(block_ids, after) as views:
        return b"".join(views)


class CheckedEvent:
    def __init__(self, streams: "CheckedStreams", work: list[Callable[[], object]]) -> None:
        self._streams = streams
        self._work = work
        self.done = False

    def synchronize(self) -> None:
        assert threading.get_ident() != self._streams.loop_thread, "waited for on the loop"
        while self._work:
            self._work.pop(0)()
        self.done = True


class CheckedStreams:
    """DeviceStreams over CPU tensors. Copies happen when an event behind them is waited for and not before; that they
    wait for the compute stream is checked, and that nobody waits on the thread that made this."""

    def __init__(self) -> None:
        self.loop_thread = threading.get_ident()
        self.computing: list[Callable[[], object]] = []
        self.num_copied = 0
        self.hold = threading.Event()
        self.hold.set()
        self.holding = threading.Event()

    def mark(self) -> CheckedEvent:
        return CheckedEvent(self, self.computing)

    def copy_stream(self) -> "CheckedCopyStream":
        return CheckedCopyStream(self)

    def staging(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)

    def device_memory(self, num_bytes: int) -> torch.Tensor:
        return torch.zeros(num_bytes, dtype=torch.uint8)


class CheckedCopyStream:
    def __init__(self, streams: CheckedStreams) -> None:
        self._streams = streams
        self._queued: list[Callable[[], object]] = []
        self._waited: set[CheckedEvent] = set()

    def wait(self, event: CheckedEvent) -> None:
        self._waited.add(event)
        self._queued.append(event.synchronize)

    def queue(self, work: Callable[[], None]) -> None:
        assert self._waited, "copies that wait for nothing"

        def act() -> None:
            self._streams.holding.set()
            assert self._streams.hold.wait(10)
            work()
            self._streams.num_copied += 1

        self._queued.append(act)

    def record(self) -> CheckedEvent:
        return CheckedEvent(self._streams, self._queued)
