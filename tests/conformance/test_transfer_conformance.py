"""What every transport promises, held by each of them."""

import asyncio
import itertools
import random
from collections.abc import AsyncIterator

import pytest
from support.transfer_child import segment_process
from support.transfer_rigs import KINDS, REMOTE, SIZE_BYTES, Rig, renamed, resources
from support.transports import transport_config

from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferError, TransferTimeoutError
from transfer.base import TransferOp
from transfer.memory.segment import host_identity
from transfer.select import build_transfer

CHOICES = [*KINDS, "auto"]
_INVERTED = bytes(255 - byte for byte in range(256))


@pytest.fixture(params=CHOICES)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with Rig(request.param) as made:
        yield made


def content(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.mark.parametrize(("offset", "size"), [(-1, 10), (SIZE_BYTES - 9, 10), (SIZE_BYTES, 1), (1 << 62, 1)])
async def test_range_outside_is_refused_and_the_rest_of_the_batch_done(rig: Rig, offset: int, size: int) -> None:
    good = content(100)
    results = await rig.engine.write([rig.op(offset, b"x" * size), rig.op(64, good)], 5)
    assert isinstance(results[0], SegmentUnknownError)
    assert results[1] is None
    assert rig.memory.view[64:164] == good
    read = await rig.engine.read([rig.op(offset, bytearray(size))], 5)
    assert isinstance(read[0], SegmentUnknownError)


async def test_unknown_segment_is_refused(rig: Rig) -> None:
    before = bytes(rig.memory.view[:16])
    other = renamed(rig.segment, "rig.77", SIZE_BYTES)
    results = await rig.engine.write([TransferOp(other, 0, [memoryview(b"y" * 16)])], 5)
    assert isinstance(results[0], SegmentUnknownError)
    assert rig.memory.view[:16] == before


async def test_segment_announced_larger_than_it_is_never_written_outside(rig: Rig) -> None:
    larger = renamed(rig.segment, rig.segment.id, 2 * SIZE_BYTES)
    for _ in range(2):
        results = await rig.engine.write([TransferOp(larger, SIZE_BYTES, [memoryview(b"z" * 16)])], 5)
        assert isinstance(results[0], SegmentUnknownError)
        assert await rig.engine.write([rig.op(0, b"true size")], 5) == [None]


async def test_closed_segment_is_an_error_before_and_after_its_first_use(rig: Rig) -> None:
    first = rig.op(0, b"used")
    assert await rig.engine.write([first], 5) == [None]
    await rig.close_host()
    for results in (await rig.engine.write([first], 5), await rig.engine.read([rig.op(0, bytearray(4))], 5)):
        assert isinstance(results[0], PeerUnreachableError | SegmentUnknownError)


async def test_host_restarted_elsewhere_is_reached_and_its_former_life_is_not(rig: Rig) -> None:
    old = rig.op(0, b"old")
    assert await rig.engine.write([old], 5) == [None]
    await rig.close_host()
    await rig.host()
    results = await rig.engine.write([old, rig.op(0, b"new")], 5)
    assert isinstance(results[0], TransferError)
    assert results[1] is None
    assert rig.memory.view[:3] == b"new"


async def test_closed_engine_refuses(rig: Rig) -> None:
    await rig.engine.aclose()
    await rig.engine.aclose()
    assert isinstance((await rig.engine.write([rig.op(0, b"late")], 5))[0], PeerUnreachableError)


async def test_empty_ops_and_batches_need_no_io(rig: Rig) -> None:
    assert await rig.engine.write([], 5) == []
    assert await rig.engine.read([rig.op(5), rig.op(SIZE_BYTES, bytearray())], 5) == [None, None]


async def test_read_only_buffer_for_a_read_is_the_callers_mistake(rig: Rig) -> None:
    with pytest.raises(ValueError, match="writable"):
        await rig.engine.read([rig.op(0, b"constant")], 5)


@pytest.mark.parametrize("size", [1, 4095, 4096, (1 << 20) + 3, SIZE_BYTES])
async def test_what_was_written_is_read_back(rig: Rig, size: int) -> None:
    data, back = content(size), bytearray(size)
    offset = SIZE_BYTES - size
    assert await rig.engine.write([rig.op(offset, data)], 10) == [None]
    assert rig.memory.view[offset:] == data
    assert await rig.engine.read([rig.op(offset, back)], 10) == [None]
    assert back == data


async def test_gather_and_scatter_over_uneven_buffers(rig: Rig) -> None:
    data = content(300_000)
    cuts = [0, 1, 1, 4096, 70_000, 299_999, 300_000]
    pieces = [memoryview(data)[a:b] for a, b in itertools.pairwise(cuts)]
    assert await rig.engine.write([rig.op(7, *pieces)], 5) == [None]
    assert rig.memory.view[7:300_007] == data
    back = [bytearray(size) for size in (100_000, 0, 3, 199_997)]
    assert await rig.engine.read([rig.op(7, *back)], 5) == [None]
    assert b"".join(back) == data


@pytest.mark.parametrize("view_bytes", [1 << 20, 64 << 10, 1000])
async def test_what_is_shown_of_a_read_may_be_changed_there_and_lands_in_the_buffers(rig: Rig, view_bytes: int) -> None:
    """As a decryption does. Some show all, some nothing: what was shown is changed, once; the rest is as it came."""
    size = 4 << 20
    data = content(size)
    assert await rig.engine.write([rig.op(100, data)], 20) == [None]
    into = memoryview(bytearray(size))
    shown = 0

    def change(part: memoryview) -> None:
        nonlocal shown
        part[:] = bytes(part).translate(_INVERTED)
        shown += part.nbytes

    views = [into[start : start + view_bytes] for start in range(0, size, view_bytes)]
    op = TransferOp(rig.segment, 100, views, change)
    assert await rig.engine.read([op], 20) == [None]
    assert into[:shown] == data[:shown].translate(_INVERTED) and into[shown:] == data[shown:]
    assert shown == size or rig.kind not in ("inproc", "shm", "tcp")


async def test_a_thousand_small_ops_in_one_batch(rig: Rig) -> None:
    pieces = [content(4096 if i % 2 else 37, i) for i in range(1000)]
    back = [bytearray(len(piece)) for piece in pieces]
    assert await rig.engine.write([rig.op(8192 * i, p) for i, p in enumerate(pieces)], 10) == [None] * 1000
    assert await rig.engine.read([rig.op(8192 * i, b) for i, b in enumerate(back)], 10) == [None] * 1000
    assert back == pieces


async def test_concurrent_batches_do_not_mix(rig: Rig) -> None:
    size = SIZE_BYTES // 8

    async def one(i: int) -> None:
        data, back = content(size, i), bytearray(size)
        assert await rig.engine.write([rig.op(i * size, data)], 10) == [None]
        assert await rig.engine.read([rig.op(i * size, back)], 10) == [None]
        assert back == data

    async with asyncio.TaskGroup() as tasks:
        for i in range(8):
            tasks.create_task(one(i))


async def test_no_time_left_is_a_timeout(rig: Rig) -> None:
    results = await rig.engine.write([rig.op(0, bytes(SIZE_BYTES))], 0)
    assert rig.kind == "inproc" or isinstance(results[0], TransferTimeoutError)


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 5, 8])
async def test_cancelled_in_the_middle_then_used_again(rig: Rig, steps: int) -> None:
    data = content(SIZE_BYTES)
    task = asyncio.create_task(rig.engine.write([rig.op(0, data)], 10))
    for _ in range(steps):
        await asyncio.sleep(0)
    if task.cancel():
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await rig.engine.write([rig.op(0, data)], 10) == [None]
    assert rig.memory.view == data


async def test_closing_in_the_middle_ends_what_is_under_way(rig: Rig) -> None:
    data = bytes(SIZE_BYTES)
    tasks = [asyncio.create_task(rig.engine.write([rig.op(0, data)] * 4, 10)) for _ in range(4)]
    await asyncio.sleep(0)
    await rig.engine.aclose()
    for results in await asyncio.gather(*tasks):
        assert all(error is None or isinstance(error, PeerUnreachableError) for error in results)


async def use_and_abuse(kind: str) -> None:
    async with Rig(kind) as rig:
        assert await rig.engine.write([rig.op(0, content(1 << 20))], 5) == [None]
        await asyncio.gather(*(rig.engine.read([rig.op(0, bytearray(1 << 20))], 5) for _ in range(5)))
        task = asyncio.create_task(rig.engine.write([rig.op(0, bytes(SIZE_BYTES))], 10))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        await rig.close_host()
        await rig.host()
        await rig.engine.write([rig.op(0, b"again")], 5)
        task = asyncio.create_task(rig.engine.write([rig.op(0, bytes(SIZE_BYTES))], 10))
        await asyncio.sleep(0)
    await task


@pytest.mark.parametrize("kind", CHOICES)
async def test_nothing_is_left_open(kind: str) -> None:
    before = resources()
    for _ in range(2):
        await use_and_abuse(kind)
    assert resources() == before


@pytest.mark.parametrize("kind", REMOTE)
async def test_owner_killed_in_the_middle_is_an_error_soon(kind: str) -> None:
    engine = build_transfer(transport_config(kind), host_identity())
    data = bytes(32 << 20)
    with segment_process("child.1", len(data), kind) as child:
        op = TransferOp(child.segment, 0, [memoryview(data)])
        warm = asyncio.Event()

        async def pump() -> TransferError:
            while True:
                (error,) = await engine.write([op], 10)
                if error is not None:
                    return error
                warm.set()

        task = asyncio.create_task(pump())
        async with asyncio.timeout(60):
            await warm.wait()
            await asyncio.sleep(0)
            child.kill()
            assert isinstance(await task, PeerUnreachableError)
    await engine.aclose()


@pytest.mark.parametrize("kind", REMOTE)
async def test_owner_killed_between_batches_is_an_error_and_its_memory_goes(kind: str) -> None:
    before = resources()
    engine = build_transfer(transport_config(kind), host_identity())
    with segment_process("child.1", 1 << 20, kind) as child:
        op, back = (TransferOp(child.segment, 0, [memoryview(data)]) for data in (b"small", bytearray(5)))
        assert await engine.write([op], 10) == [None]
        child.kill()
        assert isinstance((await engine.write([op], 10))[0], PeerUnreachableError)
        assert isinstance((await engine.read([back], 10))[0], PeerUnreachableError)
        assert resources()[2] == 0
    await engine.aclose()
    assert resources() == before
