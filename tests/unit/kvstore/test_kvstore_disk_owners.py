"""What a tenant may have of a disk's slab: it pushes out its own chunks and no other's, also after a restart."""

import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from support.tier_rigs import FINGERPRINT, chunk_of, name_of

from kvcore.chunk_keys import owner_of
from kvcore.clock import ManualClock
from kvcore.eviction.evictor import POLICY_NAMES
from kvcore.eviction.quotas import TenantShares
from kvcore.extents import aligned
from kvcore.types import OwnerTag
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, pack, parse
from kvstore.tiers.base import ChunkName, TierChunk, TierOutcome
from kvstore.tiers.disk import DiskTier, open_disk
from kvstore.tiers.disk_batch import HeldChunk
from kvstore.tiers.disk_file import SlabEntry
from kvstore.tiers.disk_index import SlabIndex

A, B = owner_of(b"a"), owner_of(b"b")
MIB = 1 << 20
OK, FULL = TierOutcome.OK, TierOutcome.FULL


def owned(number: int, owner: OwnerTag | None, payload_bytes: int = 60_000) -> TierChunk:
    chunk = chunk_of(name_of(number), payload_bytes)
    header = parse(chunk.header())
    assert header is not None
    chunk.memory[0][:HEADER_BYTES] = pack(replace(header, owner=owner))
    return chunk


async def a_disk(path: Path, share: float | None = 0.25, eviction="lru") -> DiskTier:
    """With room for sixteen chunks of 60,000 bytes, of which a tenant may have four by default."""
    return await open_disk(path / "a.slab", MIB, ManualClock(), eviction=eviction, shares=TenantShares(share))


async def save(tier: DiskTier, *chunks: TierChunk) -> list[TierOutcome]:
    outcomes = await tier.save(chunks, timeout_s=20)
    tier._index.check()
    return outcomes


def there(tier: DiskTier, *numbers: int) -> list[int]:
    return [number for number in numbers if name_of(number) in tier._index.chunks]


@pytest.mark.parametrize("eviction", POLICY_NAMES)
async def test_a_tenant_at_its_share_pushes_out_its_own_chunks_alone(tmp_path, eviction):
    tier = await a_disk(tmp_path, eviction=eviction)
    assert await save(tier, *(owned(number, B) for number in (1, 2, 3))) == [OK] * 3
    for number in range(100, 130):
        assert await save(tier, owned(number, A)) == [OK]
    assert there(tier, 1, 2, 3) == [1, 2, 3]
    assert len(there(tier, *range(100, 130))) == 4 and there(tier, 129)
    assert tier.stats().evicted == 26
    await tier.aclose()


async def test_one_batch_of_more_than_its_share_takes_its_share_and_leaves_the_others(tmp_path):
    tier = await a_disk(tmp_path)
    await save(tier, owned(1, B))
    outcomes = await save(tier, *(owned(number, A) for number in range(100, 108)))
    assert Counter(outcomes) == {OK: 4, FULL: 4}
    assert there(tier, 1, *range(100, 108)) == [1, 104, 105, 106, 107], "a batch is taken from its end"
    await tier.aclose()


async def test_without_a_share_or_an_owner_nothing_is_limited(tmp_path):
    tier = await a_disk(tmp_path, share=None)
    assert await save(tier, *(owned(number, A) for number in range(16))) == [OK] * 16
    await tier.aclose()
    (tmp_path / "other").mkdir()
    tier = await a_disk(tmp_path / "other")
    assert await save(tier, *(owned(number, None) for number in range(16))) == [OK] * 16
    await tier.aclose()


async def test_whose_each_chunk_is_is_known_after_a_restart_and_counts(tmp_path):
    tier = await a_disk(tmp_path)
    await save(tier, owned(1, B), owned(2, None), *(owned(number, A) for number in (11, 12, 13)))
    await tier.aclose()
    tier = await a_disk(tmp_path)
    assert tier.owners([name_of(number) for number in (1, 2, 11, 99)]) == [B, None, A, None]
    tier._index.check()
    for number in (14, 15, 16):
        assert await save(tier, owned(number, A)) == [OK]
    assert len(there(tier, 11, 12, 13, 14, 15, 16)) == 4 and there(tier, 1, 2) == [1, 2]
    await tier.aclose()


async def test_what_was_saved_before_the_share_was_lowered_goes_with_the_tenants_next_chunk(tmp_path):
    tier = await a_disk(tmp_path, share=1.0)
    await save(tier, owned(1, B), *(owned(number, A) for number in range(10, 20)))
    await tier.aclose()
    tier = await a_disk(tmp_path, share=0.25)
    assert len(there(tier, *range(10, 20))) == 10
    await save(tier, owned(20, A))
    assert len(there(tier, *range(10, 21))) == 4 and there(tier, 1, 20) == [1, 20]
    await tier.aclose()


async def test_what_is_pinned_stays_and_a_chunk_larger_than_the_share_is_declined(tmp_path):
    tier = await a_disk(tmp_path)
    await save(tier, owned(1, B), *(owned(number, A) for number in (11, 12, 13, 14)))
    tier.pin([name_of(number) for number in (11, 12, 13, 14)], None)
    assert await save(tier, owned(15, A)) == [FULL]
    tier.unpin([name_of(12)])
    assert await save(tier, owned(15, A)) == [OK]
    assert there(tier, 1, 11, 12, 13, 14, 15) == [1, 11, 13, 14, 15]
    assert await save(tier, owned(16, A, payload_bytes=300_000)) == [FULL]
    assert there(tier, 1, 11, 13, 14, 15) == [1, 11, 13, 14, 15]
    await tier.aclose()


async def test_of_its_own_a_prefix_goes_after_what_continues_it(tmp_path):
    tier = await a_disk(tmp_path)
    tier.link([name_of(number) for number in (11, 12, 13, 14)])
    await save(tier, *(owned(number, A) for number in (11, 12, 13, 14)))
    for number, left in ((21, [11, 12, 13]), (22, [11, 12]), (23, [11])):
        tier.pin([name_of(number)], None)
        await save(tier, owned(number, A))
        assert there(tier, 11, 12, 13, 14) == left
    await tier.aclose()


async def test_a_tenants_own_share_is_of_the_disk_too(tmp_path):
    shares = TenantShares(None, {A: 0.25})
    tier = await open_disk(tmp_path / "a.slab", MIB, ManualClock(), shares=shares)
    for number in range(100, 108):
        assert await save(tier, owned(number, A)) == [OK]
    assert await save(tier, *(owned(number, B) for number in range(8))) == [OK] * 8
    assert len(there(tier, *range(100, 108))) == 4 and len(there(tier, *range(8))) == 8
    shares.own = {A: 0.125}
    await save(tier, owned(110, A))
    assert len(there(tier, *range(100, 111))) == 2 and there(tier, 110)
    await tier.aclose()


STEPS = ["save", "save", "save", "written", "written", "lost", "use", "read", "drop", "pin", "unpin", "link", "again"]


def entry_of(number: int, at: int, num_bytes: int, name: ChunkName, owner: OwnerTag | None) -> SlabEntry:
    header = ChunkHeader(name.key, FINGERPRINT, 64, num_bytes - HEADER_BYTES, 0, 1, owner)
    return SlabEntry(number, pack(header), at, num_bytes, 0.0, 0.0)


def new_index(entries: list[SlabEntry], eviction, units: int) -> SlabIndex:
    return SlabIndex(
        data_offset=0,
        data_bytes=units * 4096,
        num_entries=64,
        entries=entries,
        clock=ManualClock(),
        eviction=eviction,
        pin_share=0.25,
        shares=TenantShares(0.5),
    )


@pytest.mark.parametrize("eviction", POLICY_NAMES)
def test_in_whatever_order_none_has_more_than_its_share_or_loses_a_chunk_to_one_that_has(eviction):
    dice, units = random.Random(11), 24
    index, writing = new_index([], eviction, units), list[tuple[ChunkName, HeldChunk]]()
    owners = {number: [A, B, None][number % 3] for number in range(48)}
    by_name = {name_of(number): owner for number, owner in owners.items()}
    seen = Counter[str]()
    for _ in range(3000):
        number = dice.randrange(48)
        name, owner = name_of(number), owners[number]
        used = Counter[OwnerTag | None]()
        for one, held in (*index.chunks.items(), *writing):
            used[by_name[one]] += aligned(held.entry.num_bytes)
        busy = {one for one, _ in writing}
        match dice.choice(STEPS):
            case "save" if name not in index.chunks and name not in busy:
                left, num_bytes = list[ChunkName](), 4096 * dice.randrange(1, 4)
                over = owner is not None and used[owner] + num_bytes > units * 4096 // 2
                if (offset := index.make_room(num_bytes, owner, left)) is not None:
                    held = HeldChunk(entry_of(index.free_numbers.pop(), offset, num_bytes, name, owner), busy=1)
                    index.claim(held)
                    writing.append((name, held))
                seen["over" if over else "within"] += offset is not None
                assert not over or {by_name[one] for one in left} <= {owner}, "another's went for it"
            case "written" if writing:
                one, held = writing.pop(0)
                index.keep(one, held)
                index.done(one, held)
            case "lost" if writing:
                one, held = writing.pop(0)
                index.give_back(held)
            case "use" if name in index.chunks:
                index.touch(name, index.chunks[name])
            case "read" if name in index.chunks:
                held = index.chunks[name]
                held.busy += 1
                index.drop(name)
                index.done(name, held)
            case "drop" if name in index.chunks:
                index.drop(name)
            case "pin":
                index.pin([name], None)
            case "unpin":
                index.unpin([name])
            case "link":
                index.link([name_of(other) for other in range(number % 3, number + 1, 3)])
            case "again" if not writing and dice.random() < 0.25:  # the node starts again
                index = new_index([held.entry for held in index.chunks.values()], eviction, units)
                seen["again"] += 1
        if not writing:
            index.check()
        for one in (A, B):
            assert index._quotas.used_bytes[one] <= units * 4096 // 2
    assert min(seen[what] for what in ("over", "within", "again")) > 5
