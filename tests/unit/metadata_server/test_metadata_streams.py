"""Event streams: snapshots made piece by piece while the index changes, and what subscribers share."""

import asyncio
import random
from collections.abc import AsyncGenerator

import msgspec
import pytest
from support.metadata_words import ids, keys, new_state, put, registration, stored

from kvcore.clock import ManualClock
from metadata_server.cache_messages import EvictRequest
from metadata_server.core import MetadataCore
from metadata_server.index import event_log
from metadata_server.messages import EventBatch, EventKind, LeaveRequest

NOW = ManualClock().now()
NAMES = ("a", "b", "c")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(event_log, "MAX_EVENT_KEYS", 16)
    monkeypatch.setattr(event_log, "MAX_BATCH_KEYS", 48)


def core(log: int = 100_000, chunks: int = 200) -> MetadataCore:
    """Three nodes with so many chunks each, some in each of a snapshot's batches."""
    state = new_state(event_log=log)
    for at, name in enumerate(NAMES):
        state.register(registration(name, units=512), NOW)
        put(state, name, list(range(at * 10_000, at * 10_000 + chunks)), NOW, prefer=f"{name}.1")
    return MetadataCore(state, ManualClock())


class Follower:
    """What a subscriber knows, by segment, after the batches that it took."""

    def __init__(self, served: MetadataCore) -> None:
        self.stream: AsyncGenerator[bytes, None] = served.events("", 0)
        self.frames: list[bytes] = []
        self.resets = 0
        self.ended = False
        """The snapshot."""
        self.next_seq = 0
        self.index: dict[str, set[bytes]] = {}

    async def take(self) -> EventBatch:
        self.frames.append(await anext(self.stream))
        batch = msgspec.msgpack.decode(self.frames[-1], type=EventBatch)
        if batch.reset:
            self.resets, self.index = self.resets + 1, {}
        for event in batch.events:
            if event.kind is EventKind.STORED:
                self.index.setdefault(event.segment_id, set()).update(event.keys)
            elif event.kind is EventKind.REMOVED:
                self.index.get(event.segment_id, set()).difference_update(event.keys)
            elif event.kind is EventKind.NODE_DOWN:
                self.index = {name: held for name, held in self.index.items() if name != f"{event.node_id}.1"}
        self.next_seq = batch.next_seq
        return batch

    async def catch_up(self, served: MetadataCore) -> None:
        ended = self.ended
        while not ended or self.next_seq != served.state.log.next_seq:
            batch = await self.take()
            ended = self.ended = ended or not batch.events


def truth(served: MetadataCore) -> dict[str, set[bytes]]:
    found: dict[str, set[bytes]] = {}
    for batch in served.snapshot():
        for event in batch.events:
            if event.keys:
                found.setdefault(event.segment_id, set()).update(event.keys)
    return found


@pytest.mark.parametrize("seed", range(8))
async def test_whatever_changes_while_a_snapshot_is_taken_the_subscriber_ends_up_right(seed: int) -> None:
    dice, served = random.Random(seed), core()
    state, follower = served.state, Follower(served)
    fresh = iter(range(50_000, 60_000))
    for _ in range(6):
        await follower.take()
        name = dice.choice(NAMES)
        match dice.randrange(4):
            case 0:
                state.leave(LeaveRequest(node_id=name, incarnation=1), NOW)
            case 1:
                state.register(registration(name, units=512), NOW)
            case 2:
                there = stored(state, [dice.randrange(3) * 10_000 + dice.randrange(200) for _ in range(50)], NOW)
                state.evict(EvictRequest(keys=keys(*there)), NOW)
            case _:
                put(state, name, [next(fresh) for _ in range(20)] + [dice.randrange(200)], NOW)
    await follower.catch_up(served)
    assert {name: held for name, held in follower.index.items() if held} == truth(served)
    assert follower.resets == 1


async def test_who_asks_while_a_snapshot_is_taken_shares_what_is_encoded() -> None:
    served = core()
    early, late = Follower(served), Follower(served)
    await early.take()
    await early.take()
    await late.take()
    await late.take()
    assert late.frames[1] is early.frames[1]
    await early.catch_up(served)
    await late.catch_up(served)
    assert all(theirs is ours for theirs, ours in zip(late.frames[1:-1], early.frames[1:-1], strict=True))
    assert early.index == late.index == truth(served)
    put(served.state, "a", [70_001], NOW)
    for follower in (early, late):
        await follower.catch_up(served)
    assert served._streams._snapshot is None, "nothing is kept for nobody"
    again = Follower(served)
    await again.take()
    assert served._streams._snapshot is not None
    await again.stream.aclose()
    assert (served._streams._snapshot, served.num_subscribers) == (None, 2)


async def test_events_are_encoded_once_for_all_subscribers() -> None:
    served = core(chunks=10)
    followers = [Follower(served) for _ in range(3)]
    for follower in followers:
        await follower.catch_up(served)
    put(served.state, "a", [70_001, 70_002], NOW)
    for follower in followers:
        while follower.next_seq != served.state.log.next_seq:
            await follower.take()
    first, *others = [follower.frames[-1] for follower in followers]
    assert msgspec.msgpack.decode(first, type=EventBatch).events
    assert all(frame is first for frame in others)


async def test_a_subscriber_that_is_too_slow_for_the_ring_is_told_to_begin_again() -> None:
    served = core(log=64)
    slow = Follower(served)
    await slow.take()
    for number in range(80):
        (replica,) = put(served.state, "a", [80_000 + number], NOW)
        served.state.abort(ids("a", [replica]), NOW)
    assert (await slow.take()).reset
    await slow.catch_up(served)
    assert slow.resets == 2 and {name: held for name, held in slow.index.items() if held} == truth(served)


async def test_a_subscriber_that_was_away_for_a_moment_gets_what_it_missed_at_once() -> None:
    served = core(chunks=10)
    follower = Follower(served)
    await follower.catch_up(served)
    await follower.stream.aclose()
    put(served.state, "b", [70_001], NOW)
    follower.stream = served.events(served.state.epoch, follower.next_seq)
    batch = await follower.take()
    assert not batch.reset and [event.kind for event in batch.events] == [EventKind.STORED]
    assert follower.index == truth(served)


async def test_other_work_is_done_between_the_batches_of_a_snapshot() -> None:
    served = core()
    turns = 0

    async def work() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    working = asyncio.create_task(work())
    follower = Follower(served)
    await follower.catch_up(served)
    assert turns >= len(follower.frames) - 1 >= 3
    before, batches = turns, [batch async for batch in served.encoded_snapshot(json=False)]
    working.cancel()
    assert turns - before >= len(batches) - 1 >= 3
