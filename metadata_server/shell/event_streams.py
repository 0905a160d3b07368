"""The event streams of subscribers: a snapshot where they cannot go on by replay, then the tail, without end.

Owns their number and what was encoded for them: each batch once, however many subscribers take it. Invariants: a
snapshot is made batch by batch, as the first subscriber that asks for it takes it, with other work between any two;
all who ask while it is taken share it; with the events since it began it is the state of now (`IndexReport.snapshot`).
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator

from kvcore.errors import OverloadedError
from metadata_server.index.event_log import EventLog
from metadata_server.limits import ServerLimits
from metadata_server.messages import EventBatch
from metadata_server.protocol import encode


class SharedSnapshot:
    """One snapshot, for all who take it at the same time; some may be farther than others."""

    def __init__(self, batches: Iterator[EventBatch]) -> None:
        """`batches` are made when they are asked for."""
        self.first = next(batches)
        self.users = 0
        self._batches = batches
        self._frames = [encode(self.first, json=False)]

    def __repr__(self) -> str:
        return f"<SharedSnapshot at {self.first.next_seq}, {len(self._frames)} batches made, {self.users} users>"

    def frame(self, number: int) -> bytes | None:
        """The batch of that number, encoded, of those made already or the next one; None: there are no more."""
        if number == len(self._frames):
            batch = next(self._batches, None)
            if batch is None:
                return None
            self._frames.append(encode(batch, json=False))
        return self._frames[number]


class EventStreams:
    """All subscribers of one server, on its event loop."""

    def __init__(
        self,
        log: EventLog,
        snapshot: Callable[[], Iterator[EventBatch]],
        greet: Callable[[EventBatch], EventBatch],
        limits: ServerLimits,
    ) -> None:
        """`greet` has a stream's first batch say what the server speaks."""
        self._log = log
        self._new_snapshot = snapshot
        self._greet = greet
        self._limits = limits
        self._snapshot: SharedSnapshot | None = None
        self._tail: dict[int, tuple[bytes, int]] = {}
        """Batches of events by the seq that they begin with, and the seq behind them; the latest ones."""
        self._news = asyncio.Event()  # replaced each time it is set: whoever holds it has missed nothing
        self._stopping = False
        self._sent: dict[object, int] = {}
        """Each open stream's position: events before it were sent."""
        self._clients: Counter[str] = Counter()
        """Open streams by address."""

    def __repr__(self) -> str:
        return f"<EventStreams {len(self)} open, {self._snapshot or 'no snapshot'}>"

    def __len__(self) -> int:
        """Open now."""
        return len(self._sent)

    @property
    def lag(self) -> int:
        """Events that the slowest of them was not sent yet."""
        return max(map(self._log.behind, self._sent.values()), default=0)

    def wake(self) -> None:
        """There are new events."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def stop(self) -> None:
        """End all of them."""
        self._stopping = True
        self._news.set()

    async def follow(self, epoch: str, from_seq: int, client: str = "") -> AsyncGenerator[bytes, None]:
        """One subscriber's stream of msgpack batches, without end; a keep-alive at least each second. The first says
        what the server speaks.

        A subscriber too slow for the ring gets a reset. Raises OverloadedError at the first step if too many are there,
        or too many of one `client`, by its address.
        """
        if len(self) >= self._limits.max_subscribers:
            raise OverloadedError(f"{self._limits.max_subscribers} event streams are open")
        if client and self._clients[client] >= self._limits.max_subscribers_per_client:
            raise OverloadedError(f"{self._limits.max_subscribers_per_client} event streams of this client are open")
        log, position, greeted, stream = self._log, from_seq, False, object()
        self._clients[client] += 1
        self._sent[stream] = position if log.has(epoch, position) else 0
        try:
            while not self._stopping:
                news = self._news
                if not log.has(epoch, position):
                    shared = self._begin_snapshot()
                    try:
                        epoch, position, number = log.epoch, shared.first.next_seq, 0
                        frame: bytes | None = shared.frame(0)
                        if not greeted:
                            frame, greeted = encode(self._greet(shared.first), json=False), True
                        while frame is not None and log.has(epoch, position) and not self._stopping:
                            yield frame
                            await asyncio.sleep(0)
                            number += 1
                            frame = shared.frame(number)
                    finally:
                        self._end_snapshot(shared)
                    self._sent[stream] = position
                    continue
                if greeted:
                    frame, position = self._encoded(position)
                else:
                    batch, greeted = log.replay(position), True
                    frame, position = encode(self._greet(batch), json=False), batch.next_seq
                yield frame
                self._sent[stream] = position
                if position == log.next_seq:
                    await wait_for(news, self._limits.keep_alive_s)
        finally:
            del self._sent[stream]
            self._clients[client] -= 1
            if not self._clients[client]:
                del self._clients[client]

    def _encoded(self, position: int) -> tuple[bytes, int]:
        """The batch that begins there, and the position behind it."""
        found = self._tail.get(position)
        if found is None:
            batch = self._log.replay(position)
            found = encode(batch, json=False), batch.next_seq
            if batch.events:
                self._tail[position] = found
                if len(self._tail) > self._limits.max_encoded_batches:
                    del self._tail[next(iter(self._tail))]
        return found

    def _begin_snapshot(self) -> SharedSnapshot:
        shared = self._snapshot
        if shared is None or not self._log.has(self._log.epoch, shared.first.next_seq):
            shared = self._snapshot = SharedSnapshot(self._new_snapshot())
        shared.users += 1
        return shared

    def _end_snapshot(self, shared: SharedSnapshot) -> None:
        shared.users -= 1
        if not shared.users and self._snapshot is shared:
            self._snapshot = None


async def wait_for(event: asyncio.Event, timeout_s: float) -> None:
    """Until the event is set or time is up, whichever is first."""
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        pass
