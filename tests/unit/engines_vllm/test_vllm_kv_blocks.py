"""A block's bytes are found in every layout of vLLM's and copied at the right moment; what is not blocks is refused."""

import asyncio

import pytest
import torch
from support.vllm_kv import BLOCK, HEAD_DIM, HEADS, LAYERS, LAYOUTS, CheckedStreams, block_bytes, kv_caches, payload

from engines.vllm.connector.blocks.block_layout import measure
from engines.vllm.connector.blocks.device_blocks import DeviceBlocks
from engines.vllm.connector.blocks.kv_blocks import HostBlocks, build_blocks
from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.settings import Provenance
from kvcore.errors import ConfigError

NUM_BLOCKS = 7
PROVENANCE = Provenance(model_id="m", weights_digest="w", tokenizer_digest="t", attention="a")
BLOCK_BYTES = LAYERS * HEADS * BLOCK * 2 * HEAD_DIM * 4


def layout_of(caches, num_blocks=NUM_BLOCKS):
    return measure(caches, num_blocks=num_blocks, block_size=BLOCK)


def fill(views, number: int) -> None:
    for view in views:
        view[:] = bytes([number]) * view.nbytes


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensor", "why"),
    [
        (torch.zeros(NUM_BLOCKS + 1, HEADS, BLOCK, 16), r"layer a\.0: .*shape \[8, 2, 4, 16\].*dimension of 7 blocks"),
        (torch.zeros(1000, dtype=torch.int8), r"layer a\.0: .*dimension of 7 blocks"),
        (torch.zeros(NUM_BLOCKS, NUM_BLOCKS, BLOCK, HEADS, 8), r"layer a\.0: .*dimension of 7 blocks"),
        (torch.zeros(16, HEADS, BLOCK, NUM_BLOCKS).permute(3, 1, 2, 0), r"strides \[1, .*pieces of 4 bytes"),
        (torch.zeros(1, HEADS, BLOCK, 16).expand(NUM_BLOCKS, -1, -1, -1), r"blocks overlap"),
        (torch.zeros(NUM_BLOCKS, 1, BLOCK, 16).expand(-1, HEADS, -1, -1), r"pieces of 4 bytes"),
        ([torch.zeros(NUM_BLOCKS, 4)], r"layer a\.0: its KV is a list"),
    ],
)
def test_tensors_whose_blocks_are_not_ranges_of_bytes_are_refused_by_name(tensor, why):
    with pytest.raises(ConfigError, match=why):
        layout_of({"a.0": tensor})


def test_layers_of_different_shapes_are_refused():
    caches = {"a.0": torch.zeros(NUM_BLOCKS, 2, BLOCK, 16), "a.1": torch.zeros(NUM_BLOCKS, 1, BLOCK, 16)}
    with pytest.raises(ConfigError, match=r"layer a\.1: .*unlike a\.0's"):
        layout_of(caches)


def test_layers_that_share_a_part_of_their_memory_are_refused():
    raw = torch.zeros(2 * NUM_BLOCKS, HEADS, BLOCK, 16)
    with pytest.raises(ConfigError, match="share memory"):
        layout_of({"a.0": raw[:NUM_BLOCKS], "a.1": raw[NUM_BLOCKS - 1 : 2 * NUM_BLOCKS - 1]})


def test_no_layers_are_refused():
    with pytest.raises(ConfigError, match="no KV tensors"):
        layout_of({})


def test_a_chunk_that_is_not_whole_blocks_is_refused():
    with pytest.raises(ConfigError, match=r"kv\.chunk_tokens: 6 .*block size, 4"):
        layout_of(kv_caches(NUM_BLOCKS)).build_spec(PROVENANCE, 6, 0, 1)


@pytest.mark.parametrize("block_id", [-1, NUM_BLOCKS])
async def test_an_unknown_block_is_not_read(block_id):
    with pytest.raises(IndexError, match=f"{block_id} of 7"):
        await payload(HostBlocks(layout_of(kv_caches(NUM_BLOCKS))), [block_id])


# --- where the bytes are -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn])
async def test_a_cpu_block_is_its_layers_one_after_the_other(dtype):
    caches = kv_caches(NUM_BLOCKS, dtype=dtype, layers=12)
    blocks = build_blocks(dict(reversed(caches.items())), num_blocks=NUM_BLOCKS, block_size=BLOCK)
    assert isinstance(blocks, HostBlocks)
    wanted = b"".join(block_bytes(caches, 4) + block_bytes(caches, 2))
    assert await payload(blocks, [4, 2]) == wanted
    assert len(wanted) == 2 * blocks.block_bytes


@pytest.mark.parametrize("layout", LAYOUTS)
async def test_in_every_layout_a_block_has_its_own_bytes_and_all_of_them(layout):
    caches = kv_caches(NUM_BLOCKS, layout)
    blocks = HostBlocks(layout_of(caches))
    assert blocks.block_bytes == BLOCK_BYTES
    read = [await payload(blocks, [block_id]) for block_id in range(NUM_BLOCKS)]
    for block_id in range(NUM_BLOCKS):
        assert sorted(read[block_id]) == sorted(b"".join(block_bytes(caches, block_id)))
    async with blocks.writing([[5]], 0, None) as (views,):
        fill(views, 77)
    for block_id in range(NUM_BLOCKS):
        assert await payload(blocks, [block_id]) == (b"M" * BLOCK_BYTES if block_id == 5 else read[block_id])


async def test_one_layouts_payload_written_into_another_engines_blocks_is_the_same_kv():
    source, target = kv_caches(NUM_BLOCKS, "LHBNC"), kv_caches(9, "LHBNC")
    blocks = HostBlocks(layout_of(source))
    async with (
        blocks.reading([3], None) as read,
        HostBlocks(layout_of(target, 9)).writing([[8]], 0, None) as (written,),
    ):
        for one, other in zip(written, read, strict=True):
            one[:] = other
    assert block_bytes(target, 8) == block_bytes(source, 3)


async def test_where_keys_and_values_are_apart_a_block_is_its_keys_then_its_values():
    tensor = torch.randint(0, 256, (2, NUM_BLOCKS, BLOCK, HEADS, HEAD_DIM), dtype=torch.uint8)
    layout = layout_of({"layers.0": tensor})
    assert (layout.num_kv_heads, layout.head_dim) == (HEADS, HEAD_DIM)
    both = [bytes(tensor[part, 6].flatten().tolist()) for part in range(2)]
    assert await payload(HostBlocks(layout), [6]) == b"".join(both)


async def test_a_block_of_several_kernel_blocks_is_all_of_them():
    caches = {"layers.0": torch.randint(0, 256, (3 * NUM_BLOCKS, HEADS, BLOCK, 2 * HEAD_DIM), dtype=torch.uint8)}
    layout = measure(caches, num_blocks=NUM_BLOCKS, block_size=3 * BLOCK)
    assert (layout.num_kv_heads, layout.head_dim) == (HEADS, HEAD_DIM)
    assert await payload(HostBlocks(layout), [2]) == bytes(caches["layers.0"][6:9].flatten().tolist())


async def test_a_layer_that_shows_another_ones_tensor_adds_nothing():
    caches = kv_caches(NUM_BLOCKS)
    shared = caches | {"model.layers.9.self_attn.attn": caches["model.layers.1.self_attn.attn"]}
    assert layout_of(shared).layout_id == layout_of(caches).layout_id
    assert layout_of(shared).block_bytes == BLOCK_BYTES


async def test_blocks_that_are_kept_get_scratch_memory():
    caches = kv_caches(NUM_BLOCKS)
    before = [block_bytes(caches, block_id) for block_id in range(NUM_BLOCKS)]
    blocks = HostBlocks(layout_of(caches))
    async with blocks.writing([[0, 1], [2, 3]], 3, None) as chunks:
        for views in chunks:
            assert sum(view.nbytes for view in views) == 2 * BLOCK_BYTES
            fill(views, 5)
    assert [block_bytes(caches, n) for n in range(NUM_BLOCKS) if n != 3] == before[:3] + before[4:]
    assert b"".join(block_bytes(caches, 3)) == bytes([5]) * BLOCK_BYTES


# --- the name of the order ---------------------------------------------------------------------------------------


def test_the_layout_id_names_all_that_the_order_of_bytes_depends_on():
    ids = {layout_of(kv_caches(NUM_BLOCKS, layout)).layout_id for layout in LAYOUTS}
    assert len(ids) == 2  # tokens before heads within a block, or heads before tokens: the rest is where blocks lie
    ids.add(layout_of(kv_caches(NUM_BLOCKS, dtype=torch.bfloat16)).layout_id)
    ids.add(layout_of(kv_caches(NUM_BLOCKS, layers=4)).layout_id)
    ids.add(measure(kv_caches(NUM_BLOCKS), num_blocks=NUM_BLOCKS, block_size=2).layout_id)
    ids.add(layout_of({"layers.0": torch.zeros(2, NUM_BLOCKS, BLOCK, HEADS, HEAD_DIM)}).layout_id)
    assert len(ids) == 6
    text = layout_of(kv_caches(NUM_BLOCKS)).layout_id
    assert text.startswith("vllm.v1.cpu.") and text.endswith(".float32.b4.2x4x16.L3")


def test_the_spec_is_the_ranks_own():
    spec = layout_of(kv_caches(NUM_BLOCKS)).build_spec(PROVENANCE, 4 * BLOCK, 1, 2)
    assert (spec.num_layers, spec.num_kv_heads, spec.head_dim) == (LAYERS, HEADS, HEAD_DIM)
    assert (spec.tp_rank, spec.tp_size, spec.chunk_tokens, spec.chunk_bytes) == (1, 2, 16, 4 * BLOCK_BYTES)
    assert spec.dtype == "float32"


# --- through staging memory --------------------------------------------------------------------------------------


@pytest.fixture
async def device():
    streams = CheckedStreams()
    caches = kv_caches(NUM_BLOCKS, "LHBNC")
    blocks = DeviceBlocks(layout_of(caches), streams, ConnectorLimits(staging_slots=2))
    assert [view.nbytes for view in blocks.start(2)] == [2 * BLOCK_BYTES] * 2
    blocks.caches, blocks.streams = caches, streams
    yield blocks
    streams.hold.set()
    await blocks.aclose()


async def test_a_gather_sees_what_the_step_before_its_mark_has_computed(device):
    device.streams.computing.append(lambda: [tensor[3].fill_(1.5) for tensor in device.caches.values()])
    read = await payload(device, [3, 1], device.mark())
    assert read[:BLOCK_BYTES] == bytes(torch.full((BLOCK_BYTES // 4,), 1.5).view(torch.uint8).tolist())
    assert read[BLOCK_BYTES:] == await payload(HostBlocks(layout_of(device.caches)), [1])
    assert not device.streams.computing


async def test_a_scatter_comes_after_the_zeroing_of_its_blocks_and_before_the_load_is_told(device):
    device.streams.computing.append(lambda: [tensor[2].zero_() for tensor in device.caches.values()])
    before = block_bytes(device.caches, 4)
    async with device.writing([[4, 2], [5]], 1, device.mark()) as (first, second):
        fill(first, 7)
        fill(second, 8)
    assert block_bytes(device.caches, 4) == before
    assert b"".join(block_bytes(device.caches, 2)) == bytes([7]) * BLOCK_BYTES
    assert b"".join(block_bytes(device.caches, 5)) == bytes([8]) * BLOCK_BYTES


async def test_a_load_that_fails_scatters_nothing(device):
    before = block_bytes(device.caches, 4)
    with pytest.raises(OSError, match="lost"):
        async with device.writing([[4]], 0, device.mark()) as (views,):
            fill(views, 7)
            raise OSError("lost")
    assert block_bytes(device.caches, 4) == before and not device.streams.num_copied


@pytest.mark.parametrize("direction", ["gather", "scatter"])
async def test_a_cancelled_copy_has_ended_before_its_slot_is_another_ones(device, direction):
    device.streams.hold.clear()

    async def copy():
        if direction == "gather":
            await payload(device, [3], device.mark())
        else:
            async with device.writing([[3]], 0, device.mark()):
                pass

    task = asyncio.create_task(copy())
    assert await asyncio.to_thread(device.streams.holding.wait, 10)
    task.cancel()
    other = asyncio.create_task(payload(device, [1], device.mark()))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not task.done() and not device.streams.num_copied
    device.streams.hold.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert device.streams.num_copied >= 1
    assert await other == await payload(HostBlocks(layout_of(device.caches)), [1])


async def test_takers_of_several_slots_do_not_wait_for_each_others(device):
    async def write(number):
        async with device.writing([[number], [number + 1]], 0, device.mark()) as chunks:
            await asyncio.sleep(0)
            for views in chunks:
                fill(views, number)

    async with asyncio.timeout(60):
        await asyncio.gather(write(0), write(2), write(4), payload(device, [6], device.mark()))
    for number in range(6):
        assert b"".join(block_bytes(device.caches, number)) == bytes([number // 2 * 2]) * BLOCK_BYTES


async def test_who_is_cancelled_while_waiting_for_a_slot_takes_none(device):
    async with device.writing([[0], [1]], 0, device.mark()):
        task = asyncio.create_task(payload(device, [2], device.mark()))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(60):
        await payload(device, [2], device.mark())
