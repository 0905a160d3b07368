"""Pins on a node's disk: what is pinned is not evicted there, and takes no more than its share."""

import random
from pathlib import Path

import pytest
from support.tier_rigs import chunk_of, name_of

from kvcore.clock import ManualClock
from kvcore.eviction.evictor import POLICY_NAMES
from kvstore.tiers.base import ChunkName, TierOutcome
from kvstore.tiers.disk import DiskTier, open_disk
from kvstore.tiers.disk_batch import HeldChunk
from kvstore.tiers.disk_file import SlabEntry, SlabFile
from kvstore.tiers.disk_index import SlabIndex

OK, FULL = TierOutcome.OK, TierOutcome.FULL
CHUNK = 100_000
"""25 units of the slab."""


async def opened(path: Path, clock: ManualClock, *, chunks: int = 10, pin_share: float = 0.5) -> DiskTier:
    """With room for so many chunks."""
    data_bytes = size = chunks * 25 * 4096
    while SlabFile(path, -1, size, direct=False).data_bytes < data_bytes:
        size += 4096
    return await open_disk(path, size, clock, pin_share=pin_share)


async def save(tier: DiskTier, *numbers: int, ttl_s: float | None = None) -> list[TierOutcome]:
    return await tier.save([chunk_of(name_of(number), CHUNK) for number in numbers], ttl_s=ttl_s, timeout_s=20)


async def there(tier: DiskTier, *numbers: int) -> list[int]:
    found = await tier.find([name_of(number) for number in numbers], timeout_s=5)
    return [number for number, is_there in zip(numbers, found, strict=True) if is_there]


async def flood(tier: DiskTier, first: int, count: int) -> None:
    for number in range(first, first + count):
        assert await save(tier, number) == [OK]


async def test_a_pinned_chunk_outlives_all_others_until_it_is_unpinned(tmp_path):
    tier = await opened(tmp_path / "a.slab", ManualClock())
    names = [name_of(number) for number in (1, 2)]
    await save(tier, 1, 2, 3)
    assert tier.pin(names, None) == (2, 0)
    await flood(tier, 100, 30)
    assert await there(tier, 1, 2, 3) == [1, 2] and tier.pinned([*names, name_of(3)]) == [True, True, False]
    assert tier.unpin(names) == 2 and tier.unpin(names) == 0
    await flood(tier, 200, 10)
    assert await there(tier, 1, 2) == []
    await tier.aclose()


async def test_pins_take_their_share_in_order_and_the_rest_is_refused(tmp_path):
    tier = await opened(tmp_path / "a.slab", ManualClock(), pin_share=0.4)
    await save(tier, *range(1, 9))
    assert tier.pin([name_of(number) for number in range(1, 9)], None) == (4, 4)
    await flood(tier, 100, 20)
    assert await there(tier, *range(1, 9)) == [1, 2, 3, 4]
    assert tier.pin([name_of(1), name_of(119)], None) == (1, 1), "what is pinned already takes nothing more"
    await tier.aclose()


async def test_where_everything_is_pinned_nothing_is_saved(tmp_path):
    tier = await opened(tmp_path / "a.slab", ManualClock(), chunks=3, pin_share=1.0)
    await save(tier, 1, 2, 3)
    assert tier.pin([name_of(number) for number in (1, 2, 3)], None) == (3, 0)
    assert await save(tier, 4) == [FULL]
    await tier.aclose()


async def test_a_pin_ends_with_its_time(tmp_path):
    clock = ManualClock()
    tier = await opened(tmp_path / "a.slab", clock)
    await save(tier, 1, 2)
    tier.pin([name_of(1)], 10.0)
    tier.pin([name_of(2)], 10.0)
    tier.pin([name_of(2)], 30.0)  # a later order counts
    clock.advance(11.0)
    await flood(tier, 100, 20)
    assert await there(tier, 1, 2) == [2]
    clock.advance(20.0)
    assert tier.pinned([name_of(2)]) == [False]
    await flood(tier, 200, 20)
    assert await there(tier, 2) == []
    await tier.aclose()


async def test_what_is_to_come_is_pinned_too(tmp_path):
    tier = await opened(tmp_path / "a.slab", ManualClock(), pin_share=0.1)
    assert tier.pin([name_of(1), name_of(2)], None) == (0, 0)
    await save(tier, 2, 1)
    assert tier.pinned([name_of(1), name_of(2)]).count(True) == 1, "there is room for one"
    await tier.aclose()


async def test_a_pinned_chunk_has_no_end_before_its_pin(tmp_path):
    clock = ManualClock()
    tier = await opened(tmp_path / "a.slab", clock)
    await save(tier, 1, 2, ttl_s=5.0)
    tier.pin([name_of(1)], 60.0)
    clock.advance(6.0)
    assert await there(tier, 1, 2) == [1]
    tier.unpin([name_of(1)])
    assert await there(tier, 1) == []
    await tier.aclose()


async def test_a_pinned_chunk_that_is_removed_gives_its_share_back(tmp_path):
    tier = await opened(tmp_path / "a.slab", ManualClock(), pin_share=0.1)
    await save(tier, 1, 2)
    assert tier.pin([name_of(1)], None) == (1, 0)
    await tier.remove([name_of(1)], timeout_s=5)
    assert tier.pin([name_of(2)], None) == (1, 0)
    await tier.aclose()


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_in_whatever_order_no_pinned_chunk_is_evicted_and_the_share_is_kept(policy):
    dice, clock, units = random.Random(7), ManualClock(), 24
    index = SlabIndex(
        data_offset=0,
        data_bytes=units * 4096,
        num_entries=64,
        entries=[],
        clock=clock,
        eviction=policy,
        pin_share=0.5,
    )
    pinned: dict[ChunkName, float] = {}
    for _ in range(2000):
        name = name_of(dice.randrange(40))
        match dice.choice(["keep", "keep", "keep", "use", "pin", "unpin", "wait", "drop"]):
            case "keep" if name not in index.chunks:
                held_before, left = {one for one in index.chunks if index.pinned([one])[0]}, list[ChunkName]()
                num_bytes = 4096 * dice.randrange(1, 4)
                offset = index.make_room(num_bytes, None, left)
                assert not held_before & set(left)
                if offset is not None:
                    number = index.free_numbers.pop()
                    index.keep(name, HeldChunk(SlabEntry(number, b"", offset, num_bytes, 0.0, 0.0)))
            case "use" if name in index.chunks:
                index.touch(name, index.chunks[name])
            case "pin":
                index.pin([name], 5.0)
                pinned[name] = clock.now() + 5.0
            case "unpin":
                index.unpin([name])
                pinned.pop(name, None)
            case "drop" if name in index.chunks:
                index.drop(name)
            case "wait":
                clock.advance(0.5)
        places = [held.entry for held in index.chunks.values()]
        index.extents.check((entry.offset - index._data_offset, entry.num_bytes) for entry in places)
        kept = [one for one, is_pinned in zip(index.chunks, index.pinned(list(index.chunks)), strict=True) if is_pinned]
        assert index.pins.held_bytes == sum(index.chunks[one].entry.num_bytes for one in kept) <= units * 4096 // 2
        assert all(pinned.get(one, 0.0) > clock.now() for one in kept)
    assert index.evicted > 50
