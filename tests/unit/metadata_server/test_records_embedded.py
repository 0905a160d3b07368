"""Records over a journal that a test holds up or fails, and under a clock that it moves."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from support.metadata_rigs import end, until

from kvcore.clock import ManualClock
from kvcore.errors import OverloadedError, RecordsUnavailableError
from metadata_server.records.base import PutOutcome
from metadata_server.records.embedded import EmbeddedRecords
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import Batch, RecordsTable


class HeldJournal:
    """Keeps each batch until the test lets it go on, or fail."""

    def __init__(self) -> None:
        self.batches: list[Batch] = []
        self.answers: asyncio.Queue[bool] = asyncio.Queue()
        self.closed = False

    async def write(self, batch: Batch) -> None:
        self.batches.append(batch)
        if not await self.answers.get():
            raise RecordsUnavailableError("the disk is full")

    async def aclose(self) -> None:
        self.closed = True


@asynccontextmanager
async def held(
    limits: RecordsLimits = RecordsLimits(), leases: dict[int, float] | None = None
) -> AsyncIterator[tuple[EmbeddedRecords, HeldJournal, ManualClock]]:
    journal, clock = HeldJournal(), ManualClock()
    records = EmbeddedRecords(RecordsTable((), leases or {}, 0, limits), clock, journal, limits)
    task = asyncio.ensure_future(records.run())
    try:
        yield records, journal, clock
    finally:
        await records.aclose()
        await end(task)
        assert journal.closed


async def test_who_wrote_together_shares_a_flush_again_though_some_come_later_and_one_alone_waits_for_nobody():
    async with held(RecordsLimits(quiet_turns=8)) as (records, journal, _):

        async def write(key: str, after_turns: int = 0) -> None:
            for _ in range(after_turns):
                await asyncio.sleep(0)
            await records.put(key, b"x")

        for turns in ((0, 0, 0, 0), (0, 2, 4, 9)):
            journal.answers.put_nowait(True)
            await asyncio.gather(*(write(f"k{number}", after) for number, after in enumerate(turns)))
        assert [len(batch.records) for batch in journal.batches] == [4, 4]
        for _ in range(2):
            journal.answers.put_nowait(True)
        await asyncio.gather(write("late0"), write("late1", 30))
        assert [len(batch.records) for batch in journal.batches[2:]] == [1, 1], "no longer than so many quiet turns"
        journal.answers.put_nowait(True)
        alone = asyncio.ensure_future(write("alone"))
        for _ in range(8):
            await asyncio.sleep(0)
        assert alone.done(), "it does not wait for those who are gone"


async def test_nothing_is_answered_or_seen_before_it_is_flushed():
    async with held() as (records, journal, _):
        watch = records.watch("")
        assert (await anext(watch)).reset
        told = asyncio.ensure_future(anext(watch))
        writing = asyncio.ensure_future(records.put("a", b"1"))
        await until(lambda: journal.batches)
        refused = asyncio.ensure_future(records.put("a", b"2", expect=0))  # says that there is an `a`
        await asyncio.sleep(0)
        assert await records.get("a") is None and (await records.listing("")).records == ()
        assert not writing.done() and not told.done() and not refused.done()
        journal.answers.put_nowait(True)
        assert (await writing).outcome is PutOutcome.WRITTEN and (await records.get("a")).value == b"1"
        assert [record.value for record in (await told).records] == [b"1"]
        assert (await refused).record.value == b"1"


async def test_all_that_waits_is_flushed_together():
    async with held() as (records, journal, _):
        first = asyncio.ensure_future(records.put("a", b"0"))
        await until(lambda: journal.batches)
        rest = [asyncio.ensure_future(records.put(f"k{at % 50}", b"%d" % at)) for at in range(200)]
        await asyncio.sleep(0)
        journal.answers.put_nowait(True)
        await first
        await until(lambda: len(journal.batches) == 2)
        assert len(journal.batches[1].records) == 50
        journal.answers.put_nowait(True)
        await asyncio.gather(*rest)
        assert (await records.get("k3")).value == b"153"


async def test_what_stands_on_a_flush_that_failed_fails_with_it():
    async with held() as (records, journal, _):
        writing = asyncio.ensure_future(records.put("a", b"1"))
        await until(lambda: journal.batches)
        after = [asyncio.ensure_future(records.put("b", b"1")), asyncio.ensure_future(records.delete("a"))]
        await asyncio.sleep(0)
        journal.answers.put_nowait(False)
        for call in (writing, *after):
            with pytest.raises(RecordsUnavailableError, match="full"):
                await call
        again = asyncio.ensure_future(records.put("a", b"2", expect=0))
        journal.answers.put_nowait(True)
        assert (await again).outcome is PutOutcome.WRITTEN
        assert [record.key for record in (await records.listing("")).records] == ["a"]


async def test_a_cancelled_write_holds_up_nobody():
    async with held() as (records, journal, _):
        writing = asyncio.ensure_future(records.put("a", b"1"))
        await until(lambda: journal.batches)
        await end(writing)
        other = asyncio.ensure_future(records.put("b", b"2"))
        journal.answers.put_nowait(True)
        journal.answers.put_nowait(True)
        await other
        assert (await records.get("a")).value == b"1"


async def test_more_writes_than_may_wait_are_refused_and_the_others_are_not():
    async with held(RecordsLimits(max_waiting=3)) as (records, journal, _):
        writing = [asyncio.ensure_future(records.put(f"k{at}", b"")) for at in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(OverloadedError):
            await records.put("more", b"")
        journal.answers.put_nowait(True)
        await asyncio.gather(*writing)
        assert len((await records.listing("")).records) == 3


async def test_closing_refuses_what_waits():
    async with held() as (records, journal, _):
        writing = asyncio.ensure_future(records.put("a", b""))
        await until(lambda: journal.batches)
        later = asyncio.ensure_future(records.put("b", b""))
        await asyncio.sleep(0)
        await records.aclose()
        with pytest.raises(RecordsUnavailableError, match="closed"):
            await later
        journal.answers.put_nowait(True)  # the batch under way is answered as it ended
        assert (await writing).outcome is PutOutcome.WRITTEN


async def test_what_was_staged_and_not_begun_when_it_was_closed_reaches_no_journal():
    async with held() as (records, journal, _):
        first = asyncio.ensure_future(records.put("a", b"1"))
        await until(lambda: journal.batches)
        second = asyncio.ensure_future(records.put("b", b"2"))
        await asyncio.sleep(0)
        await records.aclose()
        journal.answers.put_nowait(True)
        await first
        with pytest.raises(RecordsUnavailableError):
            await second
        for _ in range(5):
            await asyncio.sleep(0)
        assert len(journal.batches) == 1


async def test_a_lease_whose_grant_was_cancelled_ends_all_the_same():
    limits = RecordsLimits(pulse_s=0.01, stall_s=1e9)
    async with held(limits) as (records, journal, clock):
        granting = asyncio.ensure_future(records.grant(5.0))
        await until(lambda: journal.batches)
        await end(granting)
        journal.answers.put_nowait(True)
        clock.advance(6.0)
        await until(lambda: len(journal.batches) == 2)
        assert list(journal.batches[1].leases.values()) == [None]
        journal.answers.put_nowait(True)


async def test_a_lease_ends_when_its_end_can_be_written():
    limits = RecordsLimits(pulse_s=0.01, stall_s=1e9)
    async with held(limits, leases={7: 5.0}) as (records, journal, clock):
        put = asyncio.ensure_future(records.put("a", b"", lease=7))
        journal.answers.put_nowait(True)
        await put
        clock.advance(6.0)
        await until(lambda: len(journal.batches) == 2)
        journal.answers.put_nowait(False)
        await until(lambda: 7 in records._leases)
        clock.advance(1.0)
        await until(lambda: len(journal.batches) == 3)
        assert (await records.get("a")) is not None
        journal.answers.put_nowait(True)
        await until(lambda: records._table.get("a") is None)
        assert not await records.renew(7)


async def test_a_process_that_stood_still_ends_no_lease_for_it():
    limits = RecordsLimits(pulse_s=0.01, stall_s=1.0)
    async with held(limits, leases={7: 5.0}) as (records, journal, clock):
        await until(lambda: records._leases[7].end == 1005.0)
        clock.advance(60.0)
        await until(lambda: records._leases[7].end == 1065.0)
        assert await records.renew(7) and not journal.batches


async def test_a_watcher_too_far_behind_is_given_everything_again():
    records = EmbeddedRecords(
        RecordsTable((), {}, 0, RecordsLimits()), ManualClock(), limits=RecordsLimits(watch_backlog=3)
    )
    task = asyncio.ensure_future(records.run())
    watch, other = records.watch("a"), records.watch("")
    assert (await anext(watch)).reset and (await anext(other)).reset
    for at in range(3):
        await records.put(f"a{at}", b"")
    await records.put("b", b"")
    update = await anext(watch)
    assert not update.reset and [record.key for record in update.records] == ["a0", "a1", "a2"]
    update = await anext(other)
    assert update.reset and len(update.records) == 4
    await records.put("c", b"")
    assert not (await anext(other)).reset
    await records.aclose()
    await end(task)
