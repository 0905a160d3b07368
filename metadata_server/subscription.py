"""Follows the metadata server's event stream so that a reader can keep an index of its own without asking.

Owns sequence numbers, gaps, epochs, reconnects. The sink sees every change exactly in order, or `on_reset` and then the
whole state again. Between a lost connection and the next batch the sink keeps what it has, which may be stale.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

import msgspec

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from metadata_server.limits import ClientLimits
from metadata_server.messages import Event, EventBatch, EventKind
from metadata_server.versions import SPOKEN, Protocols

_logger = logging.getLogger("metadata_server")


class IndexSink(Protocol):
    """Where the changes go. Both methods are called on the loop, must not block and must not raise."""

    def on_reset(self) -> None:
        """Forget all: nodes, segments, keys."""
        ...

    def on_events(self, events: list[Event]) -> None:
        """Apply in order. Applying the last ones again changes nothing."""
        ...


class EventSource(Protocol):
    """Carries the stream."""

    def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        """Msgpack EventBatches from `from_seq` on, or from a reset where `epoch` or the log no longer allows it.

        Ends or raises MetadataUnavailableError when the connection breaks or stays silent longer than the server's
        keep-alives allow; MetadataProtocolError for what is no frame.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Idempotent."""
        ...


class _GapError(Exception):
    """Events are missing between what was applied and what came."""


class IndexSubscription:
    """One subscriber. `run` it in a task; cancel the task to end it."""

    def __init__(
        self,
        source: EventSource,
        sink: IndexSink,
        clock: Clock,
        *,
        speaks: Protocols = SPOKEN,
        limits: ClientLimits = ClientLimits(),
    ) -> None:
        self._source = source
        self._sink = sink
        self._clock = clock
        self._speaks = speaks
        self._limits = limits
        self._epoch = ""
        self._token = 0
        self._next_seq = 0
        self._in_snapshot = False
        self._connected = False
        self._heard_at: float | None = None
        self.resets = 0
        self.gaps = 0
        self.reconnects = 0
        self.unknown_events = 0
        """Left out: of kinds that only a newer server knows."""

    def __repr__(self) -> str:
        state = "connected" if self._connected else "in a snapshot" if self._in_snapshot else "not connected"
        return f"<IndexSubscription epoch {self._epoch or 'none'}, next {self._next_seq}, {state}>"

    @property
    def connected(self) -> bool:
        """Whether the stream is up and the sink holds a complete state."""
        return self._connected

    @property
    def lag(self) -> float:
        """Seconds since the server was last heard (it speaks at least once a keep-alive); infinite before the first."""
        return float("inf") if self._heard_at is None else self._clock.now() - self._heard_at

    @property
    def epoch(self) -> str:
        """The life of the server that the sink's state belongs to; empty: none."""
        return self._epoch

    async def aclose(self) -> None:
        """Release the source's connection; `run` must have ended. Idempotent."""
        await self._source.aclose()

    async def run(self) -> None:
        """Follow until cancelled; reconnects by itself, pausing between failures (`limits`)."""
        pause_s = self._limits.first_pause_s
        while True:
            try:
                greeted = False
                async with aclosing(self._source.batches(self._epoch, self._next_seq)) as batches:
                    async for raw in batches:
                        batch = msgspec.msgpack.decode(raw, type=EventBatch)
                        if not greeted:
                            self._speaks.common(batch.spoken, us="this subscriber", them="the metadata server")
                            self._check_term(batch)
                            greeted = True
                        self._apply(batch)
                        pause_s = self._limits.first_pause_s
                reason = "the stream ended"
            except (MetadataUnavailableError, MetadataProtocolError) as error:
                reason = error.message
            except msgspec.MsgspecError as error:
                reason = f"malformed batch: {error}"
            except _GapError as error:
                self.gaps += 1
                reason = str(error)
            finally:
                self._connected = False
            if self._in_snapshot:  # half a snapshot is no state to go on from
                self._epoch, self._next_seq = "", 0
            self.reconnects += 1
            _logger.info("event=index_stream_lost reason=%r retry_s=%.1f", reason, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(self._limits.longest_pause_s, pause_s * 2)

    def _check_term(self, batch: EventBatch) -> None:
        """Raises MetadataUnavailableError for the stream of a leader that was replaced since."""
        if batch.token and batch.token < self._token:
            raise MetadataUnavailableError("the stream of a leader that was replaced since")
        self._token = max(self._token, batch.token)

    def _apply(self, batch: EventBatch) -> None:
        # Four cases:
        # 1. a reset: the sink forgets all, and a snapshot begins, whose batches all have the same next_seq;
        # 2. another life of the server without a reset: nothing that was applied holds any more. A gap;
        # 3. inside a snapshot, its next part: events without an order of their own, and no new position;
        # 4. else, the snapshot's end (no events, or a later next_seq) included: events must follow the last one seen.
        self._heard_at = self._clock.now()
        if batch.reset:
            self.resets += 1
            self._sink.on_reset()
            self._epoch, self._next_seq, self._in_snapshot = batch.epoch, batch.next_seq, True
        elif batch.epoch != self._epoch:
            raise _GapError(f"epoch changed to {batch.epoch} without a reset")
        elif not self._in_snapshot or batch.next_seq != self._next_seq or not batch.events:
            self._in_snapshot = False
            self._check_order(batch)
            self._next_seq = batch.next_seq
            self._connected = True
        known = [event for event in batch.events if event.kind is not EventKind.UNKNOWN]
        self.unknown_events += len(batch.events) - len(known)
        if known:
            self._sink.on_events(known)

    def _check_order(self, batch: EventBatch) -> None:
        expected = self._next_seq
        for event in batch.events:
            if event.seq != expected:
                raise _GapError(f"expected event {expected}, got {event.seq}")
            expected += 1
        if batch.next_seq != expected:
            raise _GapError(f"expected event {expected} next, server says {batch.next_seq}")
