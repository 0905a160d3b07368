"""The disk tier beyond what all tiers are held to: writers that die, full and read-only disks, restarts."""

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.tier_rigs import chunk_of, content, name_of, room_for

from kvcore.clock import ManualClock
from kvcore.errors import ConfigError
from kvcore.eviction.evictor import POLICY_NAMES
from kvstore.chunk_format import HEADER_BYTES, checksum, parse
from kvstore.tiers.base import TierChunk, TierOutcome
from kvstore.tiers.disk import DiskTier, open_disk
from kvstore.tiers.disk_file import SlabEntry, SlabFile

MIB = 1 << 20
OK, MISSING = TierOutcome.OK, TierOutcome.MISSING


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tier.slab"


async def opened(path: Path, size: int = 8 * MIB, clock: ManualClock | None = None) -> DiskTier:
    return await open_disk(path, size, clock or ManualClock())


async def save(tier: DiskTier, *chunks: TierChunk) -> list[TierOutcome]:
    return await tier.save(chunks, timeout_s=20)


async def load(tier: DiskTier, *chunks: TierChunk) -> list[TierOutcome]:
    return await tier.load(chunks, timeout_s=20)


def whole(raw: bytes) -> bool:
    header = parse(raw)
    return header is not None and header.checksum == checksum([memoryview(raw)[128:]])


WRITER = """
import asyncio, sys
from pathlib import Path
sys.path[:0] = [{root!r}, {tests!r}]
from support.tier_rigs import chunk_of, name_of
from kvcore.clock import ManualClock
from kvstore.tiers.disk import open_disk

async def main():
    tier = await open_disk(Path({path!r}), 4 << 20, ManualClock())
    print("writing", flush=True)
    number = {start}
    while True:
        await tier.save([chunk_of(name_of(number + at), 300_000 + at) for at in range(4)], timeout_s=20)
        number += 4

asyncio.run(main())
"""


def write_until_killed(root: str, path: Path, start: int, life_s: float) -> None:
    code = WRITER.format(root=root, tests=f"{root}/tests", path=str(path), start=start)
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"writing\n"
        try:
            writer.wait(life_s)
        except subprocess.TimeoutExpired:
            writer.send_signal(signal.SIGKILL)


@pytest.mark.slow
async def test_of_writers_that_are_killed_no_torn_chunk_is_believed(path, request):
    dice = random.Random(1)
    seen = 0
    for start in range(0, 8000, 1000):
        write_until_killed(str(request.config.rootpath), path, start, dice.random() * 0.1)
        tier = await opened(path, 4 * MIB)
        for name in tier.names():
            back = TierChunk(name, [memoryview(bytearray(tier._index.chunks[name].entry.num_bytes))])
            assert await load(tier, back) == [OK]
            raw = content(back)
            header = parse(raw)
            assert header is not None and header.key == name.key
            seen += whole(raw)
        await tier.aclose()
    assert seen > 10


@pytest.mark.parametrize("how", ["torn", "flipped"])
async def test_damaged_at_any_block_a_chunk_is_not_whole(path, how):
    for at in range(0, 5 * 4096, 4096):
        tier = await opened(path)
        chunk = chunk_of(name_of(at), 5 * 4096 - 200)
        assert await save(tier, chunk) == [OK]
        offset = tier._index.chunks[chunk.name].entry.offset
        await tier.aclose()
        with path.open("r+b") as file:
            file.seek(offset + at)
            worse = b"\xee" * 4096 if how == "torn" else bytes([file.read(1)[0] ^ 1])
            file.seek(offset + at)
            file.write(worse)
        tier = await opened(path)
        back = room_for(chunk)
        assert await load(tier, back) == [OK] and not whole(content(back)), "found, and refused by its reader"
        await tier.aclose()


@pytest.mark.parametrize("how", ["zeroed", "cut", "cut_in_use"])
async def test_cut_or_zeroed_from_any_block_on_no_chunk_is_believed_and_all_of_it_is_used_again(path, how):
    before, torn = chunk_of(name_of(1), 3000), chunk_of(name_of(2), 5 * 4096 - 200)
    for block in range(1 + 4 + 1 + 5):  # the head, the table, a chunk, and the one that is torn
        tier = await opened(path, MIB)
        assert await save(tier, before) == [OK] and await save(tier, torn) == [OK]
        offset = tier._index.chunks[torn.name].entry.offset
        assert offset == 6 * 4096 and tier._index.chunks[before.name].entry.offset == 5 * 4096
        if how != "cut_in_use":
            await tier.aclose()
        os.truncate(path, block * 4096)
        if how == "zeroed":
            os.truncate(path, MIB)
        if how != "cut_in_use":
            tier = await opened(path, MIB)
        backs = [room_for(before), room_for(torn)]
        outcomes = await load(tier, *backs)
        assert [got is OK and whole(content(back)) for got, back in zip(outcomes, backs, strict=True)] == [
            block >= 6 and how != "cut",
            False,
        ]
        assert MISSING in outcomes or TierOutcome.DAMAGED in outcomes or how == "zeroed"
        await tier.remove([before.name, torn.name], timeout_s=20)
        assert await save(tier, before) == [OK] and await save(tier, torn) == [OK]
        assert await load(tier, *backs) == [OK, OK] and all(whole(content(back)) for back in backs)
        await tier.aclose()


async def test_a_damaged_table_forgets_what_it_says_and_nothing_else(path):
    tier = await opened(path)
    chunks = [chunk_of(name_of(number), 5000) for number in range(40)]
    await save(tier, *chunks)
    number = tier._index.chunks[chunks[7].name].entry.number
    await tier.aclose()
    with path.open("r+b") as file:
        file.seek(4096 + number * 256 + 40)
        file.write(b"\xff")
    tier = await opened(path)
    assert await load(tier, *map(room_for, chunks)) == [MISSING if at == 7 else OK for at in range(40)]
    assert await save(tier, chunks[7]) == [OK]
    await tier.aclose()


async def test_after_a_restart_what_was_used_last_stays_longest(path):
    clock = ManualClock()
    tier = await opened(path, clock=clock)
    chunks = [chunk_of(name_of(number), 1_000_000) for number in range(8)]
    for chunk in chunks:
        clock.advance(1)
        await save(tier, chunk)
    clock.advance(1)
    await load(tier, room_for(chunks[0]))
    await tier.aclose()
    tier = await opened(path, clock=clock)
    assert tier.names()[0] == chunks[0].name and tier.names()[-1] == chunks[1].name
    await save(tier, chunk_of(name_of(100), 1_000_000))
    assert (await load(tier, room_for(chunks[0]), room_for(chunks[1]))) == [OK, MISSING]
    await tier.aclose()


async def test_of_chunks_saved_together_the_first_outlives_the_others(path):
    tier = await opened(path)
    chunks = [chunk_of(name_of(number), 1_000_000) for number in range(6)]
    await save(tier, *chunks)
    for number in range(100, 104):
        await save(tier, chunk_of(name_of(number), 1_000_000))
    got = await load(tier, *map(room_for, chunks))
    assert got == sorted(got, key=lambda outcome: outcome is not OK) and OK in got and MISSING in got
    await tier.aclose()


@pytest.mark.parametrize("policy", POLICY_NAMES)
@pytest.mark.parametrize("when", ["before", "after"])
async def test_what_continues_a_chunk_goes_first_however_late_it_was_saved(path, policy, when):
    """Two prompts of six chunks, saved two at a time, in a slab for sixteen; and then twelve others come."""
    tier = await open_disk(path, MIB, ManualClock(), eviction=policy)
    prompts = [[chunk_of(name_of(start + at), 60_000) for at in range(6)] for start in (0, 10)]
    names = [[chunk.name for chunk in prompt] for prompt in prompts]
    if when == "before":
        tier.link(names[0])
        tier.link(names[1])
    for at in (0, 2, 4):
        for prompt in prompts:
            assert await save(tier, *prompt[at : at + 2]) == [OK, OK]
    if when == "after":
        tier.link(names[0])
        tier.link(names[1])
    for number in range(100, 112):
        await save(tier, chunk_of(name_of(number), 60_000))
        for prompt in names:
            found = await tier.find(prompt, timeout_s=1)
            assert found == sorted(found, reverse=True), "a prefix went before its continuation"
    assert tier.stats().evicted >= 8
    await tier.aclose()


async def test_another_process_cannot_have_the_same_file(path):
    tier = await opened(path)
    with pytest.raises(ConfigError, match="is another process's"):
        await opened(path)
    await tier.aclose()
    await (await opened(path)).aclose()


async def test_a_file_of_another_size_or_kind_is_made_anew(path):
    tier = await opened(path)
    await save(tier, chunk_of(name_of(1), 100))
    await tier.aclose()
    tier = await opened(path, 4 * MIB)
    assert tier.names() == [] and path.stat().st_size == 4 * MIB
    await tier.aclose()
    path.write_bytes(b"something else entirely" * 1000)
    await (await opened(path, 4 * MIB)).aclose()


async def test_what_cannot_be_opened_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"tiers\.disk: .*(No space left|File too large)"):
        await opened(tmp_path / "x.slab", 1 << 60)
    with pytest.raises(ConfigError, match=r"tiers\.disk\.size: too small"):
        await opened(tmp_path / "y.slab", 4096)
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"tiers\.disk: "):
        await opened(tmp_path / "file" / "z.slab")


@pytest.mark.parametrize("number", [errno.EIO, errno.EROFS, errno.ENOSPC])
async def test_a_disk_that_fails_is_unavailable_says_so_and_recovers(path, monkeypatch, number):
    tier = await opened(path)
    old, new = chunk_of(name_of(1), 50_000), chunk_of(name_of(2), 50_000)
    await save(tier, old)

    def fails(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as broken:
        broken.setattr(os, "pwritev", fails)
        assert await save(tier, new) == [TierOutcome.UNAVAILABLE] and os.strerror(number) in str(tier.stats().problem)
        broken.setattr(os, "preadv", fails)
        assert await load(tier, room_for(old)) == [TierOutcome.UNAVAILABLE]
    used = tier.stats().used_bytes
    assert await save(tier, new) == [OK] and tier.stats().problem is None
    assert tier.stats().used_bytes == (used or 0) + 53_248, "and no room was lost"
    assert await load(tier, room_for(old), room_for(new)) == [OK, OK]
    await tier.aclose()


async def test_no_room_is_lost_whatever_happens(path):
    dice, clock = random.Random(5), ManualClock()
    tier = await opened(path, 2 * MIB, clock)
    for turn in range(300):
        chunks = [chunk_of(name_of(dice.randrange(60)), dice.choice([100, 5000, 60_000])) for _ in range(3)]
        if dice.random() < 0.6:
            await tier.save(chunks, ttl_s=dice.choice([None, 5.0]), timeout_s=dice.choice([0.0, 20]))
        elif dice.random() < 0.5:
            await tier.remove([chunk.name for chunk in chunks], timeout_s=20)
        else:
            await load(tier, *map(room_for, chunks))
        clock.advance(dice.random())
        if turn % 50 == 49:
            await tier.aclose()
            tier = await opened(path, 2 * MIB, clock)
        index = tier._index
        places = [(held.entry.offset, held.entry.num_bytes) for held in index.chunks.values()]
        index.extents.check((offset - tier._slab.data_offset, length) for offset, length in places)
        held = [one.entry for one in tier._index.chunks.values()]
        assert tier._index.extents.used == sum(-(-entry.num_bytes // 4096) * 4096 for entry in held)
        assert len(tier._index.free_numbers) + len(held) == tier._slab.num_entries
    await tier.aclose()


@pytest.mark.slow
def test_a_hundred_thousand_chunks_are_known_again_in_about_a_second(path):
    """Best of three: the machine does other work."""
    slab, _ = SlabFile.open(path, 2 << 30, buffered=True)
    entries = []
    for number in range(100_000):
        name = name_of(number)
        raw = chunk_of(name, 100).header()
        entries.append(SlabEntry(number, raw, slab.data_offset + number * 4096, 228, float(number), 0.0))
    slab.put_entries(entries)
    slab.close()
    taken = []
    for _ in range(3):
        slab, _ = SlabFile.open(path, 2 << 30, buffered=True)
        began = time.perf_counter()
        assert len(list(slab.entries())) == 100_000
        taken.append(time.perf_counter() - began)
        slab.close()
    print(f"100,000 entries in {min(taken):.2f} s")
    assert min(taken) < 3, taken


@pytest.mark.parametrize(
    ("policy", "left"), [("lru", [1, 3]), ("fifo", [3, 4]), ("lfu", [1, 3]), ("arc", [1, 3]), ("s3fifo", [3, 4])]
)
async def test_the_setting_says_which_chunks_stay(path, policy, left):
    """Room for four; the first is used once, the third twice. Then two come."""
    tier = await open_disk(path, MIB, ManualClock(), eviction=policy)
    capacity = tier.stats().capacity_bytes
    assert capacity is not None
    chunks = [chunk_of(name_of(number), capacity // 4 // 4096 * 4096 - HEADER_BYTES) for number in range(7)]
    for chunk in chunks[1:5]:
        assert await save(tier, chunk) == [OK]
    for number in (3, 3, 1):
        assert await load(tier, room_for(chunks[number])) == [OK]
    for chunk in chunks[5:]:
        assert await save(tier, chunk) == [OK]
    found = await tier.find([chunk.name for chunk in chunks[1:5]], timeout_s=1)
    assert [number for number, there in enumerate(found, 1) if there] == left
    await tier.aclose()


@pytest.mark.parametrize("policy", POLICY_NAMES)
async def test_with_every_policy_all_but_what_is_in_use_can_go_and_nothing_is_lost_of_the_room(path, policy):
    tier = await open_disk(path, MIB, ManualClock(), eviction=policy)
    dice = random.Random(1)
    for _ in range(60):
        batch = [chunk_of(name_of(dice.randrange(40)), dice.randrange(1, 100_000)) for _ in range(3)]
        if dice.random() < 0.5:
            await load(tier, *map(room_for, batch))
        elif dice.random() < 0.2:
            await tier.remove([chunk.name for chunk in batch], timeout_s=1)
        else:
            await save(tier, *batch)
    await tier.remove(tier.names(), timeout_s=1)
    assert (tier.stats().used_bytes, tier.stats().num_chunks) == (0, 0)
    assert await save(tier, chunk_of(name_of(1), tier.max_chunk_bytes - HEADER_BYTES)) == [OK]
    await tier.aclose()
