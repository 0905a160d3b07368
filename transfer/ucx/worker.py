"""The one thread that owns a UCX context: it moves batches on, and sleeps on UCX's event descriptor when idle.

All of UCX is called from that thread, but for opening, and for small batches while it sleeps (`move_now`). Others hand
it commands through a queue; it reports through callbacks. Before it ends, every endpoint, request, registration and
descriptor is given back.
"""

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.telemetry import log_fields
from transfer.greeting import Keys
from transfer.ucx.batch import UcxBatch
from transfer.ucx.binding import UcxLibrary, ffi
from transfer.ucx.connections import Connections
from transfer.ucx.context import UcxContext
from transfer.ucx.devices import UcxPlan
from transfer.ucx.greetings import Greetings, HostedSegment
from transfer.ucx.limits import UcxLimits

_LOG = logging.getLogger("transfer")
_STEPS = 16
"""Steps of UCX between two looks at the batches."""


class UcxWorker:
    """BatchWorker of one process towards others, or (with `hosted`) the target of theirs. `keys`: what both prove.

    Opening raises ConfigError. `start` starts the thread; without it, `close_unstarted` gives everything back.
    """

    def __init__(
        self,
        library: UcxLibrary,
        plan: UcxPlan,
        name: str,
        hosted: HostedSegment | None = None,
        limits: UcxLimits = UcxLimits(),
        *,
        keys: Keys = lambda: (),
    ) -> None:
        self.library = library
        self._limits = limits
        self._clock = SystemClock()
        self._hosts = hosted is not None
        self._commands: deque[Callable[[], None]] = deque()
        self._batches: list[UcxBatch] = []
        self._abandoned: list[UcxBatch] = []
        """UCX did not let go of these even with their connection: their buffers are kept alive, their callers told."""
        self._stopping = False
        self._open = True
        self._wake_lock = threading.Lock()
        """The number of a closed descriptor may be another's at once: none is written to after it was closed."""
        self._ucx_lock = threading.Lock()
        """Held by whoever calls UCX, but for opening: the thread, or a caller with a small batch."""
        self._progressed_at = 0.0
        self._sleeps_to_spin = 0
        self._param = ffi.new("ucp_request_param_t *")
        self.context = UcxContext(library, plan)
        """Before `start` the caller's, then the thread's."""
        try:
            self.greetings = Greetings(self.context, hosted, keys, limits)
        except ConfigError:
            self.context.close()
            raise
        self._connections = Connections(self.context, self.greetings, self._clock, limits)
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        for descriptor in (self._wake_fd, self.context.event_fd):
            self._poll.register(descriptor, select.EPOLLIN)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else "open" if self._open else "closed"
        return f"<UcxWorker {self.thread.name} {state} batches={len(self._batches)} {self._connections!r}>"

    # --- from other threads ---

    def start(self) -> None:
        """From now on UCX belongs to the thread."""
        self.thread.start()

    def close_unstarted(self) -> None:
        """Give everything back without a thread."""
        self._shut_down()

    def call(self, command: Callable[[], None]) -> bool:
        """As BatchWorker.call."""
        with self._wake_lock:
            if self._open:
                self._commands.append(command)
                os.eventfd_write(self._wake_fd, 1)
            return self._open

    def move_now(self, batch: UcxBatch, key: str) -> bool:
        """Move a small batch in the caller's thread. Takes at most about `move_now_s`.

        Four cases; in the first two the batch was not begun, and False is returned:
        1. the thread calls UCX itself, or has batches or commands to see to;
        2. the endpoint for `key` is not there yet, or has failed;
        3. the batch ends in time: its `done` was called in this thread;
        4. it does not, or its endpoint fails meanwhile: the thread is woken and goes on with it.
        """
        if not self._ucx_lock.acquire(blocking=False):  # case 1
            return False
        try:
            if self._stopping or self._batches or self._commands:  # case 1
                return False
            endpoint = self._connections.ready(key)
            if endpoint is None:  # case 2
                return False
            self._poll.modify(self.context.event_fd, 0)  # the thread sleeps on
            try:
                self.add(batch, key)
                self._advance_batches()
                until = self._clock.now() + self._limits.move_now_s
                while self._batches and self._clock.now() < until:
                    if self.context.progress():
                        self._advance_batches()
            finally:
                self._poll.modify(self.context.event_fd, select.EPOLLIN)
            unfinished = bool(self._batches) or endpoint.error is not None
        finally:
            self._ucx_lock.release()
        if unfinished:  # case 4
            self.call(lambda: None)
        return True

    def stop(self) -> None:
        """As BatchWorker.stop: within four seconds."""
        self.call(self._stop)

    def lanes(self, segment_id: str) -> str:
        """Transports and devices in use for a segment (`tcp/lo`), or empty before the first batch."""
        return self._connections.lanes(segment_id)

    # --- in the thread ---

    def register(self, region: memoryview) -> None:
        """As BatchWorker.register."""
        self.context.map_memory(region)

    def add(self, batch: UcxBatch, key: str) -> None:
        """As BatchWorker.add."""
        try:
            if self._stopping:
                raise PeerUnreachableError("the transport is closed")
            batch.endpoint = self._connections.get(batch.descriptor, key)
        except TransferError as error:
            batch.error = error
            batch.finish()
            return
        batch.endpoint.num_batches += 1
        self._batches.append(batch)

    def stop_batch(self, batch: UcxBatch, error: TransferError, grace_s: float) -> None:
        """As BatchWorker.stop_batch: in order if UCX lets go of it within `grace_s`, else with its connection."""
        batch.stop(error, self._clock.now() + grace_s)

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._ucx_lock:
                    sleep_s = self._step()
                if sleep_s:
                    self._sleep(sleep_s)
        finally:
            with self._ucx_lock:
                self._shut_down()

    def _step(self) -> float | None:
        """Do all that can be done at once; for how long there is nothing to do then (-1: until something comes)."""
        busy = self._run_commands()
        for _ in range(_STEPS):
            if not self.context.progress():
                break
            busy = True
        busy |= self._advance_batches()
        self._connections.clean_up()
        now = self._clock.now()
        if busy:
            self._progressed_at = now
            return None
        expecting = self._batches or self._hosts
        if expecting and not self._sleeps_to_spin and now - self._progressed_at <= self._limits.spin_s:
            return None
        if not self.context.arm():
            return None
        watched = self._connections.closing or any(batch.give_up_at is not None for batch in self._batches)
        return self._limits.tick_s if watched else -1

    def _sleep(self, at_most_s: float) -> None:
        self._sleeps_to_spin = (self._sleeps_to_spin or self._limits.sleeps_without_spin) - 1
        for fd, _ in self._poll.poll(at_most_s):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)

    def _run_commands(self) -> bool:
        busy = bool(self._commands)
        while self._commands:
            self._commands.popleft()()
        return busy

    def _advance_batches(self) -> bool:
        """Move every batch on; True if one ended.

        A batch ends in one of three ways:
        1. UCX holds nothing of it any more;
        2. it was stopped and its time is up: its endpoint fails, which is closed by force, and then case 1 follows;
        3. UCX does not even let go with the endpoint: after `close_s` its caller is told all the same, and the batch is
           kept for good, so that its buffers are not freed under UCX.
        """
        over = []
        for batch in self._batches:
            if batch.advance(self.library, self._param):  # case 1
                over.append(batch)
            elif batch.give_up_at is not None and self._clock.now() >= batch.give_up_at:  # case 2
                assert batch.endpoint is not None, "a batch needs an endpoint"
                batch.endpoint.fail(PeerUnreachableError(f"segment {batch.endpoint.segment_id}: a batch did not end"))
                if self._clock.now() >= batch.give_up_at + self._limits.close_s:  # case 3
                    self._abandoned.append(batch)
                    batch.abandon()
                    over.append(batch)
        for batch in over:
            self._batches.remove(batch)
            batch.finish()
            endpoint = batch.endpoint
            if endpoint is not None:
                endpoint.num_batches -= 1
                if not endpoint.confirmed and self._clock.now() - endpoint.made_at > self._limits.connect_s:
                    endpoint.fail(PeerUnreachableError(f"segment {endpoint.segment_id}: no answer"))
        return bool(over)

    # --- closing ---

    def _stop(self) -> None:
        self._stopping = True

    def _drive(self, unfinished: Callable[[], bool], until: float) -> None:
        """Work on, until all is finished or it is too late."""
        poll = select.poll()
        while unfinished() and self._clock.now() < until:
            while self.context.progress():
                pass
            self._advance_batches()
            self._connections.clean_up()
            poll.poll(1)

    def _wait_for_quiet(self) -> None:
        """Let peers that are just connecting have their answers: UCX 1.13 aborts when it is closed with one unsent."""
        poll = select.poll()
        now = moved_at = self._clock.now()
        until = now + self._limits.settle_s
        while now < until and now - moved_at < self._limits.quiet_s:
            if self.context.progress():
                moved_at = now
            else:
                poll.poll(1)
            now = self._clock.now()

    def _shut_down(self) -> None:
        """Four steps, each bounded: let batches end in order and connections be made; cut the connections; tell those
        whose batch UCX still holds; a host waits until nobody is connecting. Then give everything back."""
        self._stopping = True
        self._run_commands()
        closed = PeerUnreachableError("the transport is closed")
        now = self._clock.now()
        for batch in self._batches:
            batch.stop(closed, now + self._limits.drain_s)
        self._drive(lambda: bool(self._batches) or self._connections.connecting, now + self._limits.settle_s)
        self._connections.fail_all(closed)
        self._connections.clean_up()
        self._drive(lambda: bool(self._batches) or self._connections.closing, self._clock.now() + self._limits.close_s)
        for batch in self._batches:
            batch.error = batch.error or PeerUnreachableError("the transport is closed")
            batch.finish()
        if self._batches or self._connections.closing:
            log_fields(_LOG, logging.ERROR, "transfer.ucx_close_late", batches=len(self._batches))
        if self._hosts:
            self._wait_for_quiet()
        self.context.close()
        with self._wake_lock:
            self._open = False
            os.close(self._wake_fd)
            self._poll.close()
