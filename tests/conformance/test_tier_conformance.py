"""What every kind of tier does, one suite for all: `kvstore.tiers.base` in tests. A rig a kind is in `tier_rigs`."""

import asyncio
from contextlib import AsyncExitStack

import pytest
from support.tier_rigs import (
    CAPACITY_BYTES,
    FINGERPRINT,
    KINDS,
    TierRig,
    chunk_of,
    content,
    kinds_with,
    name_of,
    room_for,
)

from kvcore.extents import aligned
from kvstore.chunk_format import checksum, parse
from kvstore.codecs.frame import MORE_BYTES
from kvstore.tiers.base import Cleared, Generation, TierChunk, TierOutcome

OK, MISSING, AWAY = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.UNAVAILABLE
CALL_S = 20.0


@pytest.fixture
async def rig(request):
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(KINDS[request.param].open())


def every(*abilities: str) -> pytest.MarkDecorator:
    """For each kind of tier that a test can do this to."""
    return pytest.mark.parametrize("rig", kinds_with(*abilities), indirect=True)


async def save(rig: TierRig, *chunks: TierChunk, ttl_s: float | None = None) -> list[TierOutcome]:
    return await rig.tier.save(chunks, ttl_s=ttl_s, timeout_s=CALL_S)


async def load(rig: TierRig, *chunks: TierChunk) -> list[TierOutcome]:
    return await rig.tier.load(chunks, timeout_s=CALL_S)


def is_whole(chunk: TierChunk) -> bool:
    """As any reader verifies it."""
    raw = content(chunk)
    header = parse(raw)
    return (
        header is not None
        and (header.key, header.fingerprint) == (chunk.name.key, chunk.name.fingerprint)
        and header.payload_length == len(raw) - 128
        and header.checksum == checksum([memoryview(raw)[128:]])
    )


@every()
@pytest.mark.parametrize("size", [1, 127, 3968, 3969, 65_536, 1_000_003, 5 << 20])
@pytest.mark.parametrize("parts", [1, 3])
async def test_what_was_saved_is_loaded(rig, size, parts):
    chunk = chunk_of(name_of(size), size + parts, parts=parts)
    assert await save(rig, chunk) == [OK]
    assert await rig.tier.find([chunk.name, name_of(0)], timeout_s=CALL_S) == [True, False]
    back = room_for(chunk)
    assert await load(rig, back) == [OK] and content(back) == content(chunk)


@every()
async def test_how_long_a_chunk_is_there_can_be_told(rig):
    chunks = [chunk_of(name_of(number), size) for number, size in enumerate([100, 4000, 300_000])]
    assert await save(rig, *chunks) == [OK] * 3
    *sizes, missing = await rig.tier.sizes([*(chunk.name for chunk in chunks), name_of(9)], timeout_s=CALL_S)
    assert missing is MISSING
    assert all(0 < size <= chunk.num_bytes + MORE_BYTES for size, chunk in zip(sizes, chunks, strict=True))
    await rig.tier.aclose()
    assert await rig.tier.sizes([chunks[0].name], timeout_s=CALL_S) == [AWAY]


@every()
async def test_a_batch_has_an_outcome_a_chunk_whatever_the_others_meet(rig):
    chunks = [chunk_of(name_of(number), 1000 * number + 1) for number in range(8)]
    assert await save(rig, *chunks[::2]) == [OK] * 4
    backs = [room_for(chunk) for chunk in chunks]
    backs[2] = room_for(chunks[2], more_bytes=1)
    outcomes = await load(rig, *backs)
    assert outcomes == [OK, MISSING, TierOutcome.TOO_LARGE, MISSING, OK, MISSING, OK, MISSING]
    assert all(content(backs[n]) == content(chunks[n]) for n in (0, 4, 6))


@every()
async def test_empty_batches_need_nothing(rig):
    assert await save(rig) == [] and await load(rig) == []
    assert await rig.tier.find([], timeout_s=CALL_S) == []
    await rig.tier.remove([], timeout_s=CALL_S)


@every()
async def test_the_same_chunk_twice_is_kept_once(rig):
    chunk = chunk_of(name_of(1), 100_000)
    assert await save(rig, chunk) == [OK]
    used = rig.tier.stats().used_bytes
    again = chunk_of(name_of(1), 100_000, generation=7)
    assert await save(rig, again) == [OK] and rig.tier.stats().used_bytes == used
    back = room_for(chunk)
    assert await load(rig, back) == [OK] and is_whole(back)


@every()
async def test_the_same_key_under_another_fingerprint_is_another_chunk(rig):
    ours, theirs = chunk_of(name_of(1), 500), chunk_of(name_of(1, b"\xff" * 16), 700)
    assert await save(rig, ours) == [OK]
    assert await load(rig, room_for(theirs)) == [MISSING]
    assert await save(rig, theirs) == [OK]
    backs = [room_for(ours), room_for(theirs)]
    assert await load(rig, *backs) == [OK, OK]
    assert [content(back) for back in backs] == [content(ours), content(theirs)]


@every()
async def test_what_is_removed_is_gone_and_may_be_saved_again(rig):
    chunks = [chunk_of(name_of(number), 10_000) for number in range(3)]
    await save(rig, *chunks)
    await rig.tier.remove([chunks[0].name, chunks[2].name, name_of(99)], timeout_s=CALL_S)
    assert await load(rig, *map(room_for, chunks)) == [MISSING, OK, MISSING]
    assert await save(rig, chunks[0]) == [OK] and await load(rig, room_for(chunks[0])) == [OK]


@every("bound")
async def test_more_than_it_holds_makes_room_or_is_refused_and_never_breaks_what_is_there(rig):
    chunks = [chunk_of(name_of(number), 1_000_000) for number in range(3 * CAPACITY_BYTES // 1_000_000)]
    outcomes = [(await save(rig, chunk))[0] for chunk in chunks]
    assert set(outcomes) <= {OK, TierOutcome.FULL}
    stats = rig.tier.stats()
    assert stats.used_bytes is not None and stats.capacity_bytes is not None
    assert 0 < stats.used_bytes <= stats.capacity_bytes
    backs = [room_for(chunk) for chunk in chunks]
    got = await load(rig, *backs)
    assert set(got) <= {OK, MISSING} and 3 <= got.count(OK) < len(chunks)
    assert all(is_whole(back) for back, outcome in zip(backs, got, strict=True) if outcome is OK)
    if outcomes[-1] is OK:
        assert got[-1] is OK, "what was saved last is there"


@every()
async def test_one_that_is_too_large_is_refused(rig):
    assert await save(rig, chunk_of(name_of(1), rig.tier.max_chunk_bytes)) == [TierOutcome.TOO_LARGE]
    assert await load(rig, room_for(chunk_of(name_of(1), 100))) == [MISSING]


@every("advance")
async def test_a_ttl_ends_it(rig):
    short, long = chunk_of(name_of(1), 100), chunk_of(name_of(2), 100)
    assert await save(rig, short, ttl_s=1.0) == [OK] and await save(rig, long, ttl_s=1000.0) == [OK]
    rig.advance(1.5)
    assert await load(rig, room_for(short), room_for(long)) == [MISSING, OK]
    assert await rig.tier.find([short.name, long.name], timeout_s=CALL_S) == [False, True]
    assert await save(rig, short) == [OK] and await load(rig, room_for(short)) == [OK]


@every("damage")
async def test_a_flipped_bit_is_found_by_its_reader_at_the_latest(rig):
    chunk = chunk_of(name_of(1), 70_000)
    await save(rig, chunk)
    rig.damage(chunk.name)
    back = room_for(chunk)
    (outcome,) = await load(rig, back)
    assert outcome in (TierOutcome.DAMAGED, MISSING) or not is_whole(back)


@every("tear")
async def test_a_torn_chunk_is_never_whole(rig):
    chunk, other = chunk_of(name_of(1), 300_000), chunk_of(name_of(2), 300_000)
    await save(rig, chunk, other)
    rig.tear(chunk.name)
    back = room_for(chunk)
    (outcome,) = await load(rig, back)
    assert outcome in (TierOutcome.DAMAGED, MISSING) or not is_whole(back)
    assert await load(rig, room_for(other)) == [OK]


@every("stop", "start")
async def test_a_server_that_ends_and_returns(rig):
    chunk = chunk_of(name_of(1), 10_000)
    await save(rig, chunk)
    rig.stop()
    assert await load(rig, room_for(chunk)) == [AWAY] and await save(rig, chunk) == [AWAY]
    assert await rig.tier.find([chunk.name], timeout_s=CALL_S) == [False]
    assert rig.tier.stats().problem
    await rig.tier.remove([chunk.name], timeout_s=CALL_S)
    rig.start()
    async with asyncio.timeout(CALL_S):
        while await save(rig, chunk) != [OK]:  # noqa: ASYNC110  (a server tells nobody that it is back)
            await asyncio.sleep(0.05)
    assert await load(rig, room_for(chunk)) == [OK] and rig.tier.stats().problem is None


@every("freeze", "thaw")
async def test_a_server_that_stands_still_costs_the_deadline_and_no_more(rig):
    chunk = chunk_of(name_of(1), 200_000)
    await save(rig, chunk)
    rig.freeze()
    try:
        async with asyncio.timeout(20):
            assert await rig.tier.load([room_for(chunk)], timeout_s=0.3) == [AWAY]
            assert await rig.tier.save([chunk_of(name_of(2), 200_000)], timeout_s=0.3) == [AWAY]
            assert await rig.tier.find([chunk.name], timeout_s=0.3) == [False]
    finally:
        rig.thaw()
    back = room_for(chunk)
    async with asyncio.timeout(CALL_S):
        while await load(rig, back) != [OK]:  # noqa: ASYNC110  (a server tells nobody that it goes on)
            await asyncio.sleep(0.05)
    assert content(back) == content(chunk)


@every()
async def test_a_cancelled_load_lets_go_of_its_memory(rig):
    chunk = chunk_of(name_of(1), 4 << 20)
    await save(rig, chunk)
    for turns in (0, 1, 2, 5, 20):
        back = room_for(chunk)
        task = asyncio.create_task(load(rig, back))
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        before = content(back)
        assert await load(rig, room_for(chunk)) == [OK]
        assert content(back) == before
    back = room_for(chunk)
    assert await load(rig, back) == [OK] and content(back) == content(chunk)


@every()
async def test_many_at_once_do_not_mix(rig):
    chunks = [chunk_of(name_of(number), 50_000 + number) for number in range(24)]
    saved = await asyncio.gather(*(save(rig, chunk) for chunk in chunks))
    assert saved == [[OK]] * len(chunks)
    backs = [room_for(chunk) for chunk in chunks]
    assert await asyncio.gather(*(load(rig, back) for back in backs)) == [[OK]] * len(chunks)
    assert [content(back) for back in backs] == [content(chunk) for chunk in chunks]


@every()
async def test_no_time_is_unavailable_and_spoils_nothing(rig):
    chunk = chunk_of(name_of(1), 1 << 20)
    await save(rig, chunk)
    for timeout_s in (0.0, 1e-6):
        outcomes = await rig.tier.load([room_for(chunk)], timeout_s=timeout_s)
        assert outcomes in ([AWAY], [OK])
    back = room_for(chunk)
    assert await load(rig, back) == [OK] and content(back) == content(chunk)


@every("reopen")
async def test_another_process_finds_what_this_one_saved(rig):
    chunks = [chunk_of(name_of(number), 30_000 * number + 1) for number in range(6)]
    await save(rig, *chunks)
    async with rig.reopen() as other:
        backs = [room_for(chunk) for chunk in chunks]
        assert await other.load(backs, timeout_s=CALL_S) == [OK] * len(chunks)
        assert [content(back) for back in backs] == [content(chunk) for chunk in chunks]


OLD, NEW = bytes(16), b"\xff" * 16


async def generations(rig: TierRig) -> dict[bytes, Generation]:
    listed = await rig.tier.generations(timeout_s=CALL_S)
    assert listed is not None and listed.incomplete == ""
    return {one.fingerprint: one for one in listed.found}


async def two_generations(rig: TierRig) -> tuple[list[TierChunk], list[TierChunk]]:
    old = [chunk_of(name_of(number, OLD), 300_000) for number in range(5)]
    new = [chunk_of(name_of(number, NEW), 1000) for number in range(3)]
    assert await save(rig, *old, *new) == [OK] * 8
    return old, new


@every("lists")
async def test_what_lies_there_is_listed_by_fingerprint(rig):
    assert await generations(rig) == {}
    old, new = await two_generations(rig)
    found = await generations(rig)
    assert {one: found[one].num_chunks for one in found} == {OLD: 5, NEW: 3}
    for chunks, one in ((old, found[OLD]), (new, found[NEW])):
        total = sum(chunk.num_bytes for chunk in chunks)
        assert total <= one.num_bytes < total + 64 * len(chunks)


@every("lists")
async def test_a_cleared_generation_is_gone_and_frees_its_room_and_the_others_stay(rig):
    old, new = await two_generations(rig)
    used = rig.tier.stats().used_bytes
    assert await rig.tier.clear([OLD, b"?" * 16], timeout_s=CALL_S) == Cleared(5)
    assert set(await generations(rig)) == {NEW}
    assert await load(rig, *map(room_for, old)) == [MISSING] * 5
    assert await load(rig, *map(room_for, new)) == [OK] * 3
    if used is not None:
        assert rig.tier.stats().used_bytes == used - 5 * aligned_as(rig, old[0].num_bytes)
    assert await save(rig, *old) == [OK] * 5 and await load(rig, *map(room_for, old)) == [OK] * 5
    assert await rig.tier.clear([OLD, NEW], timeout_s=CALL_S) == Cleared(8) and await generations(rig) == {}


def aligned_as(rig: TierRig, num_bytes: int) -> int:
    return num_bytes if rig.tier.name == "memory" else aligned(num_bytes)


@every("lists", "reopen")
async def test_what_was_cleared_is_not_there_for_another_process(rig):
    await two_generations(rig)
    await rig.tier.clear([OLD], timeout_s=CALL_S)
    async with rig.reopen() as other:
        listed = await other.generations(timeout_s=CALL_S)
        assert listed is not None and [one.fingerprint for one in listed.found] == [NEW]


@every("marks")
async def test_what_others_use_is_spared_unless_all_is_to_go(rig):
    await two_generations(rig)
    await rig.tier.mark(OLD, "theirs/d0", "old of theirs", ttl_s=900, timeout_s=CALL_S)
    await rig.tier.mark(OLD, "ours/d0", "old of ours", ttl_s=900, timeout_s=CALL_S)
    found = await generations(rig)
    assert found[OLD].note == "old of ours" and [one.owner for one in found[OLD].marks] == ["ours/d0", "theirs/d0"]
    assert (found[NEW].note, found[NEW].marks) == ("", ())
    assert await rig.tier.clear([OLD, NEW], own=["ours/d0"], timeout_s=CALL_S) == Cleared(3)
    assert await rig.tier.clear([OLD], own=[], timeout_s=CALL_S) == Cleared(0)
    await rig.tier.mark(OLD, "theirs/d0", "old of theirs", ttl_s=0, timeout_s=CALL_S)
    found = await generations(rig)
    assert found[OLD].note == "old of ours" and [one.owner for one in found[OLD].marks] == ["ours/d0"]
    assert await rig.tier.clear([OLD], own=["ours/d0"], timeout_s=CALL_S) == Cleared(5)
    again, _ = await two_generations(rig)
    found = await generations(rig)
    assert (found[OLD].num_chunks, found[OLD].note, found[OLD].marks) == (len(again), "", ()), "nothing is noted of it"
    await rig.tier.mark(OLD, "theirs/d0", "old of theirs", ttl_s=900, timeout_s=CALL_S)
    assert await rig.tier.clear([OLD], timeout_s=CALL_S) == Cleared(5), "no own: nothing is spared"


@every("marks", "advance")
async def test_a_mark_ends_by_itself(rig):
    await two_generations(rig)
    await rig.tier.mark(OLD, "theirs/d0", "old", ttl_s=10, timeout_s=CALL_S)
    rig.advance(11)
    found = (await generations(rig))[OLD]
    assert (found.note, found.marks) == ("old", ())
    assert await rig.tier.clear([OLD], own=[], timeout_s=CALL_S) == Cleared(5)


@every("expires")
async def test_an_end_that_is_given_later_and_taken_back(rig):
    chunks = [chunk_of(name_of(number), 300_000) for number in range(3)]
    assert await save(rig, chunks[0], chunks[1], ttl_s=1.0) == [OK, OK] and await save(rig, chunks[2]) == [OK]
    names = [chunk.name for chunk in chunks]
    assert await rig.tier.expire([names[0], name_of(99)], None, timeout_s=CALL_S) == 1
    assert await rig.tier.expire(names[2:], 0.001, timeout_s=CALL_S) == 1
    assert await rig.tier.expire([], None, timeout_s=CALL_S) == 0
    if rig.advance is not None:
        rig.advance(1.1)
    async with asyncio.timeout(CALL_S):
        while await rig.tier.find(names, timeout_s=CALL_S) != [True, False, False]:  # noqa: ASYNC110  (its own clock)
            await asyncio.sleep(0.05)
    assert await load(rig, *map(room_for, chunks)) == [OK, MISSING, MISSING]


@every("lists", "stop")
async def test_a_server_that_is_away_lists_nothing_and_says_why(rig):
    await two_generations(rig)
    rig.stop()
    listed = await rig.tier.generations(timeout_s=CALL_S)
    assert listed is not None and listed.found == () and listed.incomplete
    cleared = await rig.tier.clear([OLD], timeout_s=CALL_S)
    assert cleared.num_chunks == 0 and cleared.incomplete
    await rig.tier.mark(OLD, "ours/d0", "", ttl_s=9, timeout_s=CALL_S)
    assert await rig.tier.expire([name_of(1, OLD)], 1.0, timeout_s=CALL_S) == 0


@every()
async def test_closed_twice_and_asked_afterwards(rig):
    chunk = chunk_of(name_of(1), 100)
    await save(rig, chunk)
    await rig.tier.aclose()
    await rig.tier.aclose()
    assert await load(rig, room_for(chunk)) == [AWAY] and await save(rig, chunk) == [AWAY]
    assert await rig.tier.find([chunk.name], timeout_s=CALL_S) == [False]
    await rig.tier.remove([chunk.name], timeout_s=CALL_S)
    listed = await rig.tier.generations(timeout_s=CALL_S)
    assert listed is None or (listed.found == () and listed.incomplete)
    cleared = await rig.tier.clear([FINGERPRINT], timeout_s=CALL_S)
    assert cleared.num_chunks == 0 and cleared.incomplete
    assert await rig.tier.expire([chunk.name], 1.0, timeout_s=CALL_S) == 0
    await rig.tier.mark(FINGERPRINT, "ours/d0", "", ttl_s=9, timeout_s=CALL_S)
