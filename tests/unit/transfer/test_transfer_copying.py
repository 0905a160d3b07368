"""Copies within memory, and how a large batch over shared memory is shared out among threads."""

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvcore.errors import PeerUnreachableError
from kvcore.types import Segment
from transfer import shm
from transfer.base import TransferOp
from transfer.memory import copying
from transfer.memory.copying import copy, copy_holding_lock, streaming_copy, streams_above_bytes
from transfer.memory.segment import AttachedSegment, SegmentMemory, host_identity
from transfer.shm import ShmTransfer

SIZE = 96 << 20


@pytest.fixture(scope="module")
def memory() -> Iterator[SegmentMemory]:
    with SegmentMemory.create("n0.1", SIZE) as found:
        yield found


def segment_of(memory: SegmentMemory) -> Segment:
    return Segment(
        id="n0.1", node_id="n0", size_bytes=SIZE, host_id=host_identity(), addresses={"shm": memory.shm_address}
    )


@pytest.mark.parametrize("length", [1, 63, 4096, (1 << 20) + 17])
@pytest.mark.parametrize("at", [0, 1, 64, 4001])
def test_every_copy_copies_what_it_was_given_and_no_byte_more(length: int, at: int) -> None:
    source = memoryview(os.urandom(length + at))[at:]
    copies = [copy_holding_lock, copy]
    if (streaming := streaming_copy()) is not None:
        copies.append(streaming)
    for one in copies:
        target = bytearray(b"\xee" * (length + at + 64))
        one(memoryview(target)[at : at + length], source)
        assert target == b"\xee" * at + bytes(source) + b"\xee" * 64


def test_without_the_library_nothing_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "LIBRARY", "libnosuch.so.1")
    copying._libpmem.cache_clear()
    try:
        assert streaming_copy() is None
    finally:
        copying._libpmem.cache_clear()


def test_the_largest_cache_decides_what_streams_and_what_cannot_be_read_does_not(tmp_path: Path) -> None:
    for index, text in enumerate(["32K", "1024K", "96M\n", "nonsense", ""]):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(text)
    assert streams_above_bytes(tmp_path) == 48 << 20
    assert streams_above_bytes(tmp_path / "none") == 16 << 20


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
async def test_a_large_batch_is_whole_and_shown_in_order_whoever_copies_it(
    memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch, shown: bool, streaming: bool
) -> None:
    monkeypatch.setattr(shm, "streams_above_bytes", lambda: 0 if streaming else SIZE)
    engine, segment = ShmTransfer(host_identity(), threads=3), segment_of(memory)
    sizes = [9 << 20, 1, 23 << 20, (5 << 20) + 3, 4096, 30 << 20]
    source = memoryview(os.urandom(1 << 20) * (sum(sizes) // (1 << 20) + 1))
    target = memoryview(bytearray(len(source)))
    seen: list[bytearray] = [bytearray() for _ in sizes]
    threads = set()

    def show(index: int, part: memoryview) -> None:
        threads.add(threading.get_ident())
        seen[index] += part

    def ops(local: memoryview) -> list[TransferOp]:
        made, at = [], 0
        for index, size in enumerate(sizes):
            half = size // 2
            views = [local[at : at + half], local[at + half : at + size]]
            on_part = (lambda part, index=index: show(index, part)) if shown else None
            made.append(TransferOp(segment, at, views, on_part))
            at += size
        return made

    total = sum(sizes)
    assert await engine.write(ops(source), 10) == [None] * len(sizes)
    assert memory.view[:total] == source[:total]
    assert not shown or b"".join(seen) == source[:total]
    for one in seen:
        one.clear()
    assert await engine.read(ops(target), 10) == [None] * len(sizes)
    assert target[:total] == source[:total]
    assert not shown or (b"".join(seen) == source[:total] and threading.get_ident() not in threads)
    await engine.aclose()


async def test_threads_that_help_a_large_batch_leave_it_for_a_batch_that_waits(
    memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, segment = ShmTransfer(host_identity(), threads=2), segment_of(memory)
    warm = memoryview(bytearray(4096))
    assert await engine.read([TransferOp(segment, 0, [warm])], 10) == [None]  # mapped from here on
    both, gate = threading.Barrier(3), threading.Event()
    copied_by: list[int] = []

    def slow(target: memoryview, source: memoryview) -> None:
        copied_by.append(threading.get_ident())
        if len(copied_by) <= 2:
            both.wait(10)
            gate.wait(10)
        copy(target, source)

    monkeypatch.setattr(shm, "_copy_for", lambda direction, num_bytes: slow if num_bytes > (40 << 20) else copy)
    large = memoryview(bytearray(48 << 20))
    running = asyncio.create_task(engine.read([TransferOp(segment, 0, [large])], 10))
    await asyncio.to_thread(both.wait, 10)  # both threads copy for the large one
    small = memoryview(bytearray(2 << 20))
    waiting = asyncio.create_task(engine.read([TransferOp(segment, 0, [small])], 10))
    while not engine._pool.crowded:  # noqa: ASYNC110  (a turn of the loop and it is)
        await asyncio.sleep(0)
    gate.set()
    assert await waiting == [None] and await running == [None]
    counts = sorted(copied_by.count(thread) for thread in set(copied_by))
    assert counts == [1, 11], "the helper copied one piece of 4 MiB and left; the first did the others"
    await engine.aclose()


async def test_a_small_batch_that_is_stopped_while_its_segment_is_mapped_has_not_succeeded(
    memory: SegmentMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, segment = ShmTransfer(host_identity()), segment_of(memory)
    attach, begun, gate = shm.attach, threading.Event(), threading.Event()

    def slow(wanted: Segment) -> AttachedSegment:
        begun.set()
        gate.wait(10)
        return attach(wanted)

    monkeypatch.setattr(shm, "attach", slow)
    reading = asyncio.create_task(engine.read([TransferOp(segment, 0, [memoryview(bytearray(4096))])], 10))
    await asyncio.to_thread(begun.wait, 10)
    closing = asyncio.create_task(engine.aclose())
    await asyncio.sleep(0)
    gate.set()
    (error,) = await reading
    assert isinstance(error, PeerUnreachableError)
    await closing
