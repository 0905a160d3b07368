"""A GPU's blocks: the right bytes in every layout, at the right moment while it computes, whoever is cancelled."""

import asyncio
import dataclasses

import pytest
import torch
from support.gpus import cuda_device
from support.transfer_rigs import REMOTE, Rig
from support.vllm_kv import BLOCK, LAYOUTS, CheckedStreams, kv_caches, payload, span_bytes
from support.vllm_worker import PLACES, place, shared_world, stored

from engines.vllm.connector.blocks.block_layout import ByteRange, measure
from engines.vllm.connector.blocks.device_blocks import CudaStreams, DeviceBlocks
from engines.vllm.connector.blocks.kv_blocks import build_blocks
from engines.vllm.connector.blocks.packed_blocks import PackedBlocks
from engines.vllm.connector.limits import ConnectorLimits

NUM_BLOCKS = 37
CHUNK = 5
BUSY_CYCLES = 300_000_000
"""Of a GPU's clock: a fifth of a second or so."""
ON_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def fill(views: list[memoryview], content: bytes) -> None:
    """Put `content` into the views, one after the other."""
    at = 0
    for view in views:
        view[:] = content[at : at + view.nbytes]
        at += view.nbytes


def random_bytes(size: int) -> bytes:
    return torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()


class Subject:
    """DeviceBlocks over one set of tensors."""

    def __init__(self, device: str, layout: str = "LBHNC", dtype: torch.dtype = torch.bfloat16) -> None:
        self.device = cuda_device() if device == "cuda" else torch.device("cpu")
        self.caches = kv_caches(NUM_BLOCKS, layout, dtype, layers=4, device=self.device)
        self.layout = measure(self.caches, num_blocks=NUM_BLOCKS, block_size=BLOCK)
        self.streams = CudaStreams(self.device) if device == "cuda" else CheckedStreams()
        self.blocks = DeviceBlocks(self.layout, self.streams, ConnectorLimits(staging_slots=3))
        self.memory = self.blocks.start(CHUNK)

    def fill(self, block_id: int, number: float) -> None:
        for tensor in self.caches.values():
            tensor[block_id] = number

    def holds(self, block_id: int, number: float) -> bool:
        return all(bool(torch.all(tensor[block_id] == number)) for tensor in self.caches.values())


@pytest.fixture
async def make():
    made: list[Subject] = []

    def make(*args: object, **options: object) -> Subject:
        made.append(Subject(*args, **options))
        return made[-1]

    yield make
    for subject in made:
        await subject.blocks.aclose()


@pytest.fixture
async def cuda(make) -> Subject:
    return make("cuda")


# --- the bytes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ON_DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
async def test_in_every_layout_blocks_are_gathered_and_scattered(make, device, layout, dtype):
    subject = make(device, layout, dtype)
    blocks = subject.blocks
    for block_ids in ([3], [36, 0, 17, 5, 6], [7, 8]):
        assert await payload(blocks, block_ids, blocks.mark()) == span_bytes(subject.layout, block_ids)
    before = {block_id: span_bytes(subject.layout, [block_id]) for block_id in range(NUM_BLOCKS)}
    content = {block_id: random_bytes(blocks.block_bytes) for block_id in (30, 2, 9, 11, 12)}
    async with blocks.writing([[30, 2], [9, 11, 12]], 3, blocks.mark()) as (first, second):
        fill(first, b"".join(content[n] for n in (30, 2)))
        fill(second, b"".join(content[n] for n in (9, 11, 12)))
    for block_id in range(NUM_BLOCKS):
        kept = block_id not in (11, 12)
        wanted = before[block_id] if kept else content[block_id]
        assert span_bytes(subject.layout, [block_id]) == wanted, block_id


@pytest.mark.parametrize("device", ON_DEVICES)
async def test_layers_in_allocations_of_their_own(make, device):
    subject = make(device)
    caches = {name: tensor.clone() for name, tensor in subject.caches.items()}
    layout = measure(caches, num_blocks=NUM_BLOCKS, block_size=BLOCK)
    blocks = DeviceBlocks(layout, subject.streams)
    blocks.start(CHUNK)
    assert len(layout.storages) == 4
    assert await payload(blocks, [4, 1], blocks.mark()) == span_bytes(subject.layout, [4, 1])
    async with blocks.writing([[36]], 0, blocks.mark()) as (views,):
        fill(views, bytes(blocks.block_bytes))
    assert span_bytes(layout, [36]) == bytes(blocks.block_bytes)
    await blocks.aclose()


@pytest.mark.parametrize("device", ON_DEVICES)
async def test_an_unknown_block_is_refused_before_the_device_hears_of_it(make, device):
    subject = make(device)
    for block_id in (-1, NUM_BLOCKS):
        with pytest.raises(IndexError, match=f"{block_id} of {NUM_BLOCKS}"):
            await payload(subject.blocks, [0, block_id], subject.blocks.mark())
        with pytest.raises(IndexError, match=f"{block_id} of {NUM_BLOCKS}"):
            async with subject.blocks.writing([[0, block_id]], 0, subject.blocks.mark()):
                pass
    assert await payload(subject.blocks, [2], subject.blocks.mark()) == span_bytes(subject.layout, [2])


@pytest.mark.parametrize("device", ON_DEVICES)
async def test_ranges_that_no_word_divides_are_copied_by_the_byte(make, device):
    subject = make(device)
    raw = torch.randint(0, 256, (3 + NUM_BLOCKS * 21,), dtype=torch.uint8, device=subject.device)
    parts = (ByteRange(0, 3, 21, 5), ByteRange(0, 13, 21, 5), ByteRange(0, 10, 21, 2))
    layout = dataclasses.replace(subject.layout, storages=(raw,), ranges=parts)
    packed = torch.zeros(2 * 12, dtype=torch.uint8, device=subject.device)
    blocks = PackedBlocks(layout)
    blocks.gather([5, 1], packed)
    assert packed.cpu().numpy().tobytes() == span_bytes(layout, [5, 1])
    before = raw.clone()
    blocks.scatter(packed, [6, 7])
    assert span_bytes(layout, [6, 7]) == span_bytes(layout, [5, 1])
    blocks.scatter(torch.cat([before[start:end] for n in (6, 7) for _, start, end in layout.spans(n)]), [6, 7])
    assert torch.equal(raw, before), "no byte beside them was touched"


@pytest.mark.gpu
async def test_tensors_of_a_gpu_get_blocks_of_a_gpu():
    caches = kv_caches(NUM_BLOCKS, device=cuda_device())
    blocks = build_blocks(caches, num_blocks=NUM_BLOCKS, block_size=BLOCK)
    assert isinstance(blocks, DeviceBlocks)
    await blocks.aclose()


@pytest.mark.gpu
def test_a_copy_stream_is_of_the_lowest_priority_and_its_staging_memory_pinned():
    streams = CudaStreams(cuda_device())
    lowest, highest = torch.cuda.Stream.priority_range()
    assert highest < 0 <= lowest
    assert streams.copy_stream()._stream.priority == lowest
    assert streams.staging(100).is_pinned()


# --- the moment --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
async def test_a_gather_sees_what_was_queued_before_its_mark_and_waits_for_nothing_after_it(cuda):
    cuda.fill(3, 1.0)
    torch.cuda._sleep(BUSY_CYCLES)
    cuda.fill(3, 2.0)
    mark = cuda.blocks.mark()
    torch.cuda._sleep(4 * BUSY_CYCLES)
    later = cuda.blocks.mark()
    read = await payload(cuda.blocks, [3], mark)
    assert not later.query(), "the GPU still computes"
    torch.cuda.synchronize()
    assert read == span_bytes(cuda.layout, [3]) and cuda.holds(3, 2.0)


@pytest.mark.gpu
async def test_a_scatter_comes_after_what_was_queued_before_its_mark(cuda):
    content = random_bytes(cuda.blocks.block_bytes)
    torch.cuda._sleep(BUSY_CYCLES)
    cuda.fill(8, 0.0)
    async with cuda.blocks.writing([[8]], 0, cuda.blocks.mark()) as (views,):
        fill(views, content)
    cuda.fill(9, 4.0)  # reads and writes that follow are queued once the context was left
    torch.cuda.synchronize()
    assert span_bytes(cuda.layout, [8]) == content and cuda.holds(9, 4.0)


@pytest.mark.gpu
@pytest.mark.parametrize("direction", ["gather", "scatter"])
async def test_a_cancelled_copy_has_ended_before_its_caller_goes_on(cuda, direction):
    torch.cuda._sleep(2 * BUSY_CYCLES)
    mark = cuda.blocks.mark()

    async def copy() -> None:
        if direction == "gather":
            await payload(cuda.blocks, [3], mark)
        else:
            async with cuda.blocks.writing([[3]], 0, mark) as (views,):
                fill(views, bytes([7]) * cuda.blocks.block_bytes)

    task = asyncio.create_task(copy())
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert mark.query(), "it did not leave before its copies had run"
    read = await payload(cuda.blocks, [3], cuda.blocks.mark())
    assert read == span_bytes(cuda.layout, [3])
    if direction == "scatter":
        assert read == bytes([7]) * cuda.blocks.block_bytes


@pytest.mark.gpu
async def test_gathers_and_scatters_at_once_while_the_gpu_computes(cuda):
    """Each writer has blocks of its own, each reader others that nobody writes."""
    readers = {n: span_bytes(cuda.layout, [n, n + 1]) for n in range(0, 12, 2)}
    a = torch.randn(1024, 1024, device=cuda.device)

    async def read(n: int) -> None:
        for _ in range(10):
            assert await payload(cuda.blocks, [n, n + 1], cuda.blocks.mark()) == readers[n]

    async def write(n: int) -> None:
        for _ in range(10):
            content = [random_bytes(2 * cuda.blocks.block_bytes), random_bytes(cuda.blocks.block_bytes)]
            async with cuda.blocks.writing([[n, n + 2], [n + 1]], 0, cuda.blocks.mark()) as (first, second):
                fill(first, content[0])
                fill(second, content[1])
            assert await payload(cuda.blocks, [n, n + 2, n + 1], cuda.blocks.mark()) == b"".join(content)

    async def compute() -> None:
        for _ in range(200):
            a.matmul(a)
            await asyncio.sleep(0)

    async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
        for n in readers:
            tasks.create_task(read(n))
        for n in range(12, 36, 3):
            tasks.create_task(write(n))
        tasks.create_task(compute())


# --- on its way --------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("kind", REMOTE)
async def test_every_transport_takes_the_pinned_memory(cuda, kind):
    blocks = cuda.blocks
    async with Rig(kind) as rig:
        for region in cuda.memory:
            rig.engine.register(region)
        wanted = span_bytes(cuda.layout, [3, 1])
        async with blocks.reading([3, 1], blocks.mark()) as views:
            assert await rig.engine.write([rig.op(4096, *views)], 10.0) == [None]
        async with blocks.writing([[20, 21]], 0, blocks.mark()) as (views,):
            assert await rig.engine.read([rig.op(4096, *views)], 10.0) == [None]
        assert span_bytes(cuda.layout, [20, 21]) == wanted


@pytest.mark.gpu
def test_a_device_and_a_host_share_their_chunks():
    device = cuda_device()
    with shared_world() as (world, make):
        gpu = make("a", device=device, make_blocks=lambda layout: DeviceBlocks(layout, CudaStreams(device)))
        host = make("b")
        torch.cuda._sleep(BUSY_CYCLES)
        gpu.fill(0, 1, number=2.5)
        gpu.saved("p", *PLACES)
        assert gpu.holds(0, 2.5) and stored(world, 0) == gpu.content(0, 1)
        assert gpu.loaded("d", place(1, 8, 9), place(2, 10, 11)) == []
        assert gpu.content(8, 9, 10, 11) == gpu.content(0, 1, 2, 3)
        assert host.half.spec.layout_id != gpu.half.spec.layout_id, "what a CPU packs otherwise is not a GPU's"
