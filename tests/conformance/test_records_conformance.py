"""What every kind of records does: a new kind adds a row to KINDS and an opener, and passes all of this."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest
from support.etcd_server import EtcdServer, etcd_server
from support.records_rigs import ALL_KINDS, KINDS, Open, RecordsKind, opener, running

from kvcore.errors import InvalidRequestError, NotLeaderError, PayloadTooLargeError, RecordsUnavailableError
from metadata_server.records.base import ABSENT, Guard, PutOutcome, Records, RecordsUpdate


@pytest.fixture(scope="module")
def etcd() -> Iterator[Callable[[], EtcdServer]]:
    """One for all tests, started by the first that wants it."""
    with ExitStack() as stack:
        yield cache(lambda: stack.enter_context(etcd_server()))


@pytest.fixture(params=ALL_KINDS)
def kind_name(request):
    return request.param


@pytest.fixture
def kind(kind_name) -> RecordsKind:
    return KINDS[kind_name]


@pytest.fixture
def open_again(kind_name, tmp_path, etcd) -> Open:
    return opener(kind_name, tmp_path, etcd)


@pytest.fixture
async def records(open_again) -> AsyncIterator[Records]:
    async with running(await open_again()) as records:
        yield records


durable = pytest.mark.parametrize("kind_name", [kind for kind in ALL_KINDS if kind != "memory"], indirect=True)


async def put(records: Records, key: str, value: bytes = b"v", **how: int) -> int:
    """The revision at which it was written."""
    reply = await records.put(key, value, **how)
    assert reply.outcome is PutOutcome.WRITTEN and reply.record is not None
    return reply.record.revision


def shown(update: RecordsUpdate) -> tuple[bool, list[tuple[str, bytes]], list[str]]:
    return update.reset, [(record.key, record.value) for record in update.records], list(update.gone)


async def soon(until, timeout_s: float = 60.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not await until():  # noqa: ASYNC110 - a lease's end: nobody could set an event for it
            await asyncio.sleep(0.01)


async def test_a_record_is_read_as_it_was_written(records):
    assert await records.get("a") is None
    revision = await put(records, "a", b"\x00\xff one")
    found = await records.get("a")
    assert (found.key, found.value, found.revision) == ("a", b"\x00\xff one", revision)
    assert await put(records, "a", b"two") > revision
    assert (await records.get("a")).value == b"two"
    assert await put(records, "empty", b"") and (await records.get("empty")).value == b""


async def test_every_change_has_a_later_revision_of_its_own(records):
    revisions = [await put(records, "a"), await put(records, "b"), await put(records, "a")]
    revisions += await asyncio.gather(*(put(records, f"c{at}") for at in range(20)))
    assert len(set(revisions)) == 23 and revisions[:3] == sorted(revisions[:3])
    assert (await records.listing("")).revision >= max(revisions)


async def test_a_write_that_expects_another_revision_changes_nothing(records):
    first = await put(records, "a", b"1", expect=ABSENT)
    again = await records.put("a", b"2", expect=ABSENT)
    assert again.outcome is PutOutcome.CONFLICT and again.record.value == b"1"
    second = await put(records, "a", b"2", expect=first)
    late = await records.put("a", b"3", expect=first)
    assert late.outcome is PutOutcome.CONFLICT and late.record.revision == second
    missing = await records.put("b", b"3", expect=second)
    assert missing.outcome is PutOutcome.CONFLICT and missing.record is None
    assert (await records.get("a")).value == b"2" and await records.get("b") is None


async def test_of_many_that_make_one_record_exactly_one_does(records):
    replies = await asyncio.gather(*(records.put("a", b"%d" % at, expect=ABSENT) for at in range(50)))
    (made,) = (reply for reply in replies if reply.outcome is PutOutcome.WRITTEN)
    assert await records.get("a") == made.record
    assert all(reply.record == made.record for reply in replies)


async def test_what_is_counted_by_many_at_once_is_counted_right(records):
    await put(records, "count", b"0")

    async def add() -> None:
        while True:
            now = await records.get("count")
            reply = await records.put("count", b"%d" % (int(now.value) + 1), expect=now.revision)
            if reply.outcome is PutOutcome.WRITTEN:
                return

    await asyncio.gather(*(add() for _ in range(12)))
    assert (await records.get("count")).value == b"12"


async def test_a_removal_says_whether_there_was_something_to_remove(records):
    revision = await put(records, "a")
    assert not await records.delete("b")
    assert not await records.delete("a", expect=revision + 1)
    assert await records.get("a") is not None
    assert await records.delete("a", expect=revision)
    assert not await records.delete("a")
    assert await records.get("a") is None
    assert await put(records, "a", expect=ABSENT) > revision


async def test_a_guarded_write_happens_only_while_the_guard_is_as_it_was(records):
    lease = await records.grant(600.0)
    guard = Guard("leader", await put(records, "leader", b"me", lease=lease))
    assert await put(records, "a", b"1", guard=guard)
    first = await put(records, "b", b"1", expect=ABSENT, guard=guard)
    assert await records.delete("b", expect=first, guard=guard)
    await records.revoke(lease)
    for _ in range(2):  # nobody leads; then, another does
        for expect in (None, ABSENT, first):
            with pytest.raises(NotLeaderError):
                await records.put("a", b"late", expect=expect, guard=guard)
            with pytest.raises(NotLeaderError):
                await records.delete("a", expect=expect, guard=guard)
        with pytest.raises(NotLeaderError):
            await records.delete("not there", guard=guard)
        await put(records, "leader", b"another", expect=ABSENT if await records.get("leader") is None else None)
    assert (await records.get("a")).value == b"1" and await records.get("b") is None


async def test_a_guarded_write_that_expects_another_revision_is_a_conflict(records):
    guard = Guard("leader", await put(records, "leader"))
    revision = await put(records, "a", b"1", guard=guard)
    reply = await records.put("a", b"2", expect=ABSENT, guard=guard)
    assert reply.outcome is PutOutcome.CONFLICT and reply.record.revision == revision
    assert not await records.delete("a", expect=guard.revision, guard=guard)


async def test_a_listing_has_all_below_a_prefix_in_order_and_nothing_else(records):
    for key in ("b/2", "b/1", "a", "b", "b/10", "c/1", "b0", "b/ü"):
        await put(records, key)
    assert [record.key for record in (await records.listing("b/")).records] == ["b/1", "b/10", "b/2", "b/ü"]
    assert len((await records.listing("")).records) == 8
    assert (await records.listing("d")).records == ()


@pytest.mark.parametrize("key", ["", "x" * 513, "line\nbreak", "\0"])
async def test_a_key_out_of_bounds_is_refused(records, key):
    with pytest.raises(InvalidRequestError):
        await records.put(key, b"v")


async def test_a_value_out_of_bounds_is_refused_and_the_largest_is_not(records):
    assert await put(records, "large", b"x" * (1 << 20))
    with pytest.raises(PayloadTooLargeError):
        await records.put("larger", b"x" * ((1 << 20) + 1))
    assert len((await records.get("large")).value) == 1 << 20 and await records.get("larger") is None


async def test_a_lease_that_nobody_renews_ends_with_its_records_and_no_others(records, kind):
    short, long = await records.grant(kind.lease_s), await records.grant(600.0)
    while not all([await written(records, key, short) for key in ("short/1", "short/2")]):
        short = await records.grant(kind.lease_s)  # it ended before both were written: a busy machine has its pauses
    await put(records, "long", lease=long)
    await put(records, "free")
    await soon(lambda: gone(records, "short/1", "short/2"))
    assert [record.key for record in (await records.listing("")).records] == ["free", "long"]
    assert not await records.renew(short) and await records.renew(long)
    assert (await records.put("short/1", b"late", lease=short)).outcome is PutOutcome.LEASE_ENDED
    assert await records.get("short/1") is None


async def written(records: Records, key: str, lease: int) -> bool:
    return (await records.put(key, b"v", lease=lease)).outcome is PutOutcome.WRITTEN


async def gone(records: Records, *keys: str) -> bool:
    return all([await records.get(key) is None for key in keys])


async def test_a_record_that_was_written_without_its_lease_outlives_it(records):
    lease = await records.grant(600.0)
    await put(records, "kept", lease=lease)
    await put(records, "kept", b"free now")
    await put(records, "goes", lease=lease)
    await records.revoke(lease)
    await records.revoke(lease)
    assert [record.key for record in (await records.listing("")).records] == ["kept"]
    assert not await records.renew(lease)


async def test_a_watch_has_all_records_first_and_then_each_change_of_its_own(records):
    await put(records, "a/1", b"old")
    watch = records.watch("a/")
    assert shown(await anext(watch)) == (True, [("a/1", b"old")], [])
    await put(records, "b/1")
    await put(records, "a/2", b"new")
    update = await anext(watch)
    assert shown(update) == (False, [("a/2", b"new")], [])
    assert update.revision >= update.records[0].revision
    await records.delete("a/1")
    assert shown(await anext(watch)) == (False, [], ["a/1"])
    await watch.aclose()


async def test_a_watch_hears_that_a_lease_has_ended(records, kind):
    watch = records.watch("leader")
    assert shown(await anext(watch)) == (True, [], [])
    while not await written(records, "leader", await records.grant(kind.lease_s)):
        pass  # it ended before: a busy machine has its pauses
    async with asyncio.timeout(60):
        while "leader" not in (update := await anext(watch)).gone:
            assert shown(update) == (False, [("leader", b"v")], [])
    await watch.aclose()


async def test_who_follows_a_watch_ends_with_what_is_there(records):
    """Whatever is put together or left out on the way."""
    known: dict[str, bytes] = {}

    async def follow() -> None:
        async for update in records.watch("k"):
            if update.reset:
                known.clear()
            known.update({record.key: record.value for record in update.records})
            for key in update.gone:
                known.pop(key, None)  # it may have come and gone since the last update
            if "k-last" in known:
                return

    following = asyncio.ensure_future(follow())
    for turn in range(5):
        await asyncio.gather(*(put(records, f"k{at}", b"%d" % turn) for at in range(10)))
        await records.delete(f"k{turn}")
    await put(records, "k-last")
    await asyncio.wait_for(following, 60)
    assert known == {record.key: record.value for record in (await records.listing("k")).records}


@durable
async def test_all_is_there_when_they_are_opened_again(open_again):
    async with running(await open_again()) as records:
        lease = await records.grant(600.0)
        for at in range(30):
            last = await put(records, f"k{at}", b"%d" % at)
        await put(records, "leased", lease=lease)
        await records.delete("k7")
        before = await records.listing("")
    async with running(await open_again()) as records:
        after = await records.listing("")
        assert after.records == before.records and after.revision >= before.revision > last
        assert await put(records, "next") > before.revision
        assert await records.renew(lease)
        await records.revoke(lease)
        assert await records.get("leased") is None


@durable
async def test_a_lease_has_its_whole_time_again_after_a_restart_and_then_ends(kind, open_again):
    lease_s = max(1.0, kind.lease_s)  # a busy machine has its pauses before it is written, and before it is renewed
    async with running(await open_again()) as records:
        lease = await records.grant(lease_s)
        await put(records, "a", lease=lease)
    async with running(await open_again()) as records:
        assert await records.renew(lease)
        await soon(lambda: gone(records, "a"))


async def test_what_is_closed_refuses_every_call_and_ends_its_watches(records):
    watch = records.watch("")
    assert shown(await anext(watch))[0]
    waiting = asyncio.ensure_future(anext(watch, None))
    await records.aclose()
    assert await asyncio.wait_for(waiting, 60) is None
    for call in (records.get("a"), records.put("a", b""), records.grant(1.0), records.listing("")):
        with pytest.raises(RecordsUnavailableError):
            await call
    await records.aclose()
