"""Every way out of a hand-over, against a worker that moves nothing and ends what it is told to end."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from kvcore.errors import ConfigError, PeerUnreachableError, TransferError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import ended
from transfer.fragments import Fragment
from transfer.handover import Handover, HandoverLimits
from transfer.ranges import byte_views

SEGMENT = Segment(id="n.1", node_id="n", size_bytes=100, host_id="h", addresses={"fake": "there"})
OP = TransferOp(SEGMENT, 0, [memoryview(b"bytes")])


class FakeBatch:
    def __init__(
        self,
        direction: Direction,
        descriptor: str,
        fragments: Sequence[Fragment],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.done = done
        self.added = threading.Event()
        self.stopped: TransferError | None = None
        self.stopping = threading.Event()


class FakeWorker:
    """Batches stay until the test ends them; `stop_batch` only notes the reason."""

    def __init__(self) -> None:
        self.batches: list[FakeBatch] = []
        self.open = True
        self.regions: list[memoryview] = []
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def call(self, command: Callable[[], None]) -> bool:
        if self.open:
            self._commands.put(command)
        return self.open

    def stop(self) -> None:
        self._commands.put(None)

    def register(self, region: memoryview) -> None:
        if region.readonly:
            raise ConfigError("cannot register that")
        self.regions.append(region)

    def add(self, batch: FakeBatch, key: str) -> None:
        self.batches.append(batch)
        batch.added.set()

    def stop_batch(self, batch: FakeBatch, error: TransferError, grace_s: float) -> None:
        batch.stopped = error
        batch.stopping.set()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            command()
        self.open = False
        for batch in self.batches:
            batch.done(PeerUnreachableError("the transport is closed"))


class Made:
    def __init__(self, **options: Any) -> None:
        self.worker = FakeWorker()
        self.made: list[FakeBatch] = []
        self._handed_over = asyncio.Event()
        self.handover: Handover[str, FakeBatch] = Handover(
            "fake",
            self.worker,
            parse=lambda segment: segment.addresses["fake"],
            split=lambda ops: [[one for op in ops for one in Fragment.of(op.offset, byte_views(op))]],
            make=self._make,
            **options,
        )

    def _make(self, *args: Any) -> FakeBatch:
        self.made.append(FakeBatch(*args))
        self._handed_over.set()
        return self.made[-1]

    def write(self, timeout_s: float = 10) -> "asyncio.Task[list[TransferError | None]]":
        return asyncio.create_task(self.handover.transfer("write", [OP], timeout_s))

    async def batch(self) -> FakeBatch:
        """The last one, once the worker has it."""
        await self._handed_over.wait()
        self._handed_over.clear()
        await asyncio.to_thread(self.made[-1].added.wait, 10)
        return self.made[-1]

    def end(self, batch: FakeBatch, error: TransferError | None = None) -> None:
        self.worker.batches.remove(batch)
        self.worker.call(lambda: batch.done(error))


@pytest.fixture
async def fake() -> AsyncIterator[Made]:
    made = Made()
    yield made
    await made.handover.aclose()


@pytest.mark.parametrize("error", [None, PeerUnreachableError("gone")])
async def test_a_batch_that_ends_in_time_has_the_workers_result(fake: Made, error: TransferError | None) -> None:
    task = fake.write()
    fake.end(await fake.batch(), error)
    assert await task == [error]


async def test_a_late_batch_is_stopped_and_waited_for(fake: Made) -> None:
    task = fake.write(0.01)
    batch = await fake.batch()
    await asyncio.to_thread(batch.stopping.wait, 10)
    assert isinstance(batch.stopped, TransferTimeoutError) and not task.done()
    fake.end(batch, batch.stopped)
    assert await task == [batch.stopped]


async def test_a_late_batch_that_landed_while_it_was_told_to_stop_has_landed(fake: Made) -> None:
    task = fake.write(0.01)
    batch = await fake.batch()
    await asyncio.to_thread(batch.stopping.wait, 10)
    fake.end(batch)
    assert await task == [None]


@pytest.mark.parametrize("times", [1, 3])
async def test_cancelled_once_or_again_it_returns_only_after_the_worker_let_go(fake: Made, times: int) -> None:
    task = fake.write()
    batch = await fake.batch()
    for _ in range(times):
        task.cancel()
        await asyncio.to_thread(batch.stopping.wait, 10)
        assert not task.done()
    assert isinstance(batch.stopped, PeerUnreachableError) and "cancelled" in batch.stopped.message
    fake.end(batch, batch.stopped)
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_while_it_waits_for_a_place_it_gives_the_worker_nothing() -> None:
    fake = Made(limits=HandoverLimits(max_batches=1))
    first = fake.write()
    batch = await fake.batch()
    second, third = fake.write(), fake.write(0.01)
    (late,) = await third
    assert isinstance(late, TransferTimeoutError)
    second.cancel()
    await asyncio.wait({second})
    assert second.cancelled() and len(fake.made) == 1
    fake.end(batch)
    assert await first == [None]
    last = fake.write()
    fake.end(await fake.batch())
    assert await last == [None]
    await fake.handover.aclose()


async def test_moved_at_once_it_needs_no_thread() -> None:
    moved: list[FakeBatch] = []

    def move_now(batch: FakeBatch, key: str) -> bool:
        moved.append(batch)
        batch.done(None)
        return True

    fake = Made(move_now=move_now)
    assert await fake.write() == [None]
    assert moved == fake.made and not fake.worker.batches
    await fake.handover.aclose()


async def test_closing_ends_what_is_under_way_and_refuses_what_comes(fake: Made) -> None:
    task = fake.write()
    await fake.batch()
    await fake.handover.aclose()
    for results in (await task, await fake.write()):
        assert isinstance(results[0], PeerUnreachableError) and "closed" in results[0].message
    with pytest.raises(ConfigError, match="closed"):
        fake.handover.register(memoryview(bytearray(8)))


async def test_a_thread_that_has_ended_by_itself_is_an_error(fake: Made) -> None:
    fake.worker.stop()
    await ended(fake.worker.thread)
    (error,) = await fake.write()
    assert isinstance(error, PeerUnreachableError) and "ended" in error.message
    with pytest.raises(ConfigError, match="ended"):
        fake.handover.register(memoryview(bytearray(8)))


async def test_memory_is_registered_in_the_thread_or_said_why_not(fake: Made) -> None:
    region = memoryview(bytearray(8))
    fake.handover.register(region)
    assert fake.worker.regions == [region]
    with pytest.raises(ConfigError, match="cannot register"):
        fake.handover.register(memoryview(b"constant"))


async def test_it_shows_what_it_holds(fake: Made) -> None:
    task = fake.write()
    batch = await fake.batch()
    assert repr(fake.handover) == "<Handover fake open batches=1/64>"
    fake.end(batch)
    await task
    await fake.handover.aclose()
    assert repr(fake.handover) == "<Handover fake closed batches=0/64>"
