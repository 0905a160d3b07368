"""A GPU's KV to pinned memory and back as vLLM's worker moves it, and what the engine loses meanwhile.

Saves gather two chunks of a request at once, loads scatter four together.
Estimate: one copy of 32 MiB takes the bus's rate (PCIe 5.0 x16: about 53 GB/s), and 0.04 ms before or after it to pack
the blocks on the GPU. One copy for each of a chunk's 512 pieces would take 6 us of Python each: 10 GB/s.
Run on a machine with a GPU: python -m benchmarks.gpu_blocks [--rounds 30]
"""

import argparse
import asyncio
import json
import random
import statistics
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress

import torch

from engines.vllm.connector.blocks.block_layout import BlockLayout, measure
from engines.vllm.connector.blocks.device_blocks import CudaStreams, DeviceBlocks

BLOCK, CHUNK_BLOCKS, NUM_BLOCKS = 16, 16, 512
SHAPES = {  # layers, kv heads, head size, and the axes of [layers, blocks, heads, tokens, content] in memory
    "Llama-3.1-8B": (32, 8, 128, "LBHNC"),
    "Llama-3.1-8B, heads apart": (32, 8, 128, "LHBNC"),
    "Qwen2.5-7B": (28, 4, 128, "LBHNC"),
    "Llama-3.1-70B, one rank of 8": (80, 1, 128, "LBHNC"),
}
GATHERED, SCATTERED = 2, 4
SMALL_KERNELS = 20_000


def make_layout(layers: int, heads: int, head_size: int, order: str, device: torch.device) -> BlockLayout:
    """Of bfloat16 KV of random bytes, all layers in one allocation."""
    axes = {"L": layers, "B": NUM_BLOCKS, "H": heads, "N": BLOCK, "C": 2 * head_size}
    strides, stride = {}, 1
    for axis in reversed(order):
        strides[axis], stride = stride, stride * axes[axis]
    raw = torch.randint(0, 1 << 15, (stride,), dtype=torch.int16, device=device).view(torch.bfloat16)
    whole = torch.as_strided(raw, tuple(axes.values()), tuple(strides[axis] for axis in axes))
    caches = {f"layers.{number}.attn": layer for number, layer in enumerate(whole)}
    return measure(caches, num_blocks=NUM_BLOCKS, block_size=BLOCK)


async def median_s(work: Callable[[], Awaitable[None]], rounds: int) -> float:
    """Median of `rounds` single calls, after three more."""
    times = []
    for _ in range(rounds + 3):
        start = time.perf_counter()
        await work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[3:])


async def bus_rates(num_bytes: int, device: torch.device, rounds: int) -> tuple[float, float]:
    """GB/s of one copy of so many pinned bytes, to the host and to the GPU."""
    host = torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(num_bytes, dtype=torch.uint8, device=device)

    async def copy(target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source, non_blocking=True)
        torch.cuda.current_stream(device).synchronize()

    to_host = await median_s(lambda: copy(host, there), rounds)
    to_device = await median_s(lambda: copy(there, host), rounds)
    return num_bytes / to_host / 1e9, num_bytes / to_device / 1e9


class Mover:
    """Gathers and scatters chunks of blocks drawn at random."""

    def __init__(self, layout: BlockLayout, device: torch.device) -> None:
        self.blocks = DeviceBlocks(layout, CudaStreams(device))
        self.blocks.start(CHUNK_BLOCKS)
        self._draw = random.Random(0)

    async def gather(self) -> None:
        """GATHERED chunks, each by itself."""
        await asyncio.gather(*(self._gather() for _ in range(GATHERED)))

    async def scatter(self) -> None:
        """SCATTERED chunks."""
        drawn = self._draw.sample(range(NUM_BLOCKS), SCATTERED * CHUNK_BLOCKS)
        chunks = [drawn[at : at + CHUNK_BLOCKS] for at in range(0, len(drawn), CHUNK_BLOCKS)]
        async with self.blocks.writing(chunks, 0, self.blocks.mark()):
            pass

    async def _gather(self) -> None:
        async with self.blocks.reading(self._draw.sample(range(NUM_BLOCKS), CHUNK_BLOCKS), self.blocks.mark()):
            pass


def small_kernels_s(device: torch.device) -> float:
    """What an engine does between its large kernels: it launches small ones from Python, one after the other."""
    small = torch.zeros(64, device=device)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(SMALL_KERNELS):
        small.add_(1)
    torch.cuda.current_stream(device).synchronize()
    return time.perf_counter() - start


def slowdown(layout: BlockLayout, device: torch.device) -> tuple[float, float]:
    """(how many times as long small kernels take beside gathers without pause, those gathers' GB/s)."""
    alone = min(small_kernels_s(device) for _ in range(3))
    stopping, done = threading.Event(), [0]

    async def gather() -> None:
        mover = Mover(layout, device)
        while not stopping.is_set():
            await mover.gather()
            done[0] += GATHERED
        await mover.blocks.aclose()

    thread = threading.Thread(target=lambda: asyncio.run(gather()))
    thread.start()
    try:
        while not done[0]:
            time.sleep(0.001)
        before = done[0]
        beside = small_kernels_s(device)
        chunks = done[0] - before
    finally:
        stopping.set()
        thread.join()
    return beside / alone, chunks * CHUNK_BLOCKS * layout.block_bytes / beside / 1e9


async def run(rounds: int) -> None:
    """Print the table and the RESULT line."""
    device, result = torch.device("cuda", 0), {}
    print(f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}, chunks of {CHUNK_BLOCKS * BLOCK} tokens")
    print(f"{'GB/s':<30}{'pieces':>16}{'gather':>8}{'of bus':>8}{'scatter':>8}{'of bus':>8}")
    for name, shape in SHAPES.items():
        layout = make_layout(*shape, device)
        num_bytes, mover = CHUNK_BLOCKS * layout.block_bytes, Mover(layout, device)
        to_host, to_device = await bus_rates(num_bytes, device, rounds)
        gather = GATHERED * num_bytes / await median_s(mover.gather, rounds) / 1e9
        scatter = SCATTERED * num_bytes / await median_s(mover.scatter, rounds) / 1e9
        await mover.blocks.aclose()
        pieces = f"{CHUNK_BLOCKS * len(layout.ranges)} x {layout.ranges[0].length >> 10} KiB"
        print(f"{name:<30}{pieces:>16}{gather:>8.1f}{to_host:>8.1f}{scatter:>8.1f}{to_device:>8.1f}")
        result[name] = [round(rate, 1) for rate in (gather, to_host, scatter, to_device)]
    times, rate = slowdown(make_layout(*SHAPES["Llama-3.1-8B"], device), device)
    print(f"small kernels beside gathers of {rate:.1f} GB/s take {times:.2f} times as long")
    print("RESULT " + json.dumps({"rates": result, "slowdown": round(times, 2), "beside_gb_s": round(rate, 1)}))


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: this benchmark needs a GPU")
    with suppress(KeyboardInterrupt):
        asyncio.run(run(rounds))


if __name__ == "__main__":
    main()
