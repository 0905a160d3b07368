"""The one thread of an initiator that owns its NIXL agent: batches in, results out, through queues and callbacks.

It sleeps while there is nothing to do, and naps between two looks while something moves: NIXL has nothing to wait for.
"""

import logging
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.telemetry import log_fields
from transfer.base import Direction
from transfer.nixl_binding import NixlLibrary, has_nvidia_gpu, nixl_options
from transfer.nixl_descriptor import NixlDescriptor
from transfer.nixl_port import REQUEST_BYTES, REQUEST_PIECES, Peer, Port, Request
from transfer.ucx_devices import UcxPlan
from transfer.ucx_pieces import Piece, cut

_LOG = logging.getLogger("transfer")
_SPIN_S = 50e-6
"""An answer over a fast network takes less than a nap."""
_NAP_S = 30e-6
_IDLE_S = 0.5
_LISTEN_S = 0.2
_DRAIN_S = 0.5
"""For batches to end in order before everything is cut."""
_OTHERS_S = 1.0
"""What the other batches of an agent that must be closed may still take."""
_CONNECT_S = 5.0
"""A connection that is older without an answer, and on which a batch ended, is given up for a fresh one."""
_MAX_RETIRING = 4


class Batch:
    """One batch on one segment, in one direction. `done` is called once, when NIXL has let go of every buffer."""

    def __init__(
        self,
        direction: Direction,
        descriptor: NixlDescriptor,
        pieces: Sequence[Piece],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.descriptor = descriptor
        self.port: Port | None = None
        self.peer: Peer | None = None
        self.error: TransferError | None = None
        self.give_up_at: float | None = None
        self._direction = direction
        self._done = done
        self._uncut = pieces
        self._pieces: Iterator[Piece] | None = None
        self._next: Piece | None = None
        self._issued_all = False
        self._requests: deque[Request] = deque()

    def stop(self, error: TransferError, give_up_at: float) -> None:
        """Hand over nothing more and end with `error`; what NIXL still holds at `give_up_at` costs the agent."""
        self.error = self.error or error
        self.give_up_at = give_up_at if self.give_up_at is None else self.give_up_at

    def finish(self) -> None:
        """Tell the caller. The batch is over."""
        self._done(self.error or (self.peer.error if self.peer else None))

    def advance(self, port: Port, peer: Peer) -> tuple[bool, bool]:
        """Collect what is done, hand over what has room: whether the batch is over, and whether anything moved."""
        moved = self._collect(port, peer)
        if self.error is not None or peer.error is not None:
            self._issued_all = True
        elif peer.welcome and not self._issued_all:
            moved |= self._issue(port, peer)
        return self._issued_all and not self._requests, moved

    def _collect(self, port: Port, peer: Peer) -> bool:
        """Requests of one peer end about in order, so only the oldest is asked."""
        moved = False
        while self._requests:
            request = self._requests[0]
            try:
                if not port.over(request):
                    return moved
            except PeerUnreachableError as error:
                peer.fail(PeerUnreachableError(f"segment {self.descriptor.segment_id}: {error.message}"))
            else:
                for piece in request.pieces if self._direction == "read" else ():
                    piece.scatter()
            self._requests.popleft()
            moved = True
            if peer.turn is self:
                peer.turn = None
        return moved

    def _issue(self, port: Port, peer: Peer) -> bool:
        moved = False
        while not self._issued_all and port.may_post(peer, len(self._requests)):
            pieces = self._take(1 if port.one_at_a_time else REQUEST_PIECES, port.one_at_a_time)
            if not pieces:
                self._issued_all = True
                break
            try:
                self._requests.append(port.post(self._direction, peer, pieces))
            except PeerUnreachableError as error:
                peer.fail(error)
                break
            except TransferError as error:
                self.error = self.error or error
                self._issued_all = True
                break
            moved = True
            if port.one_at_a_time:
                peer.turn = self
        return moved

    def _take(self, most: int, one_at_a_time: bool) -> list[Piece]:
        """The next pieces, as many as one request may have."""
        if self._pieces is None:
            self._pieces = cut(self._uncut, reading=self._direction == "read", one_at_a_time=one_at_a_time)
        taken: list[Piece] = []
        size = 0
        while len(taken) < most:
            piece = self._next or next(self._pieces, None)
            self._next = None
            if piece is None:
                break
            size += piece.view.nbytes
            if taken and size > REQUEST_BYTES:
                self._next = piece
                break
            taken.append(piece)
        return taken


class NixlWorker:
    """Batches of one process towards others.

    Opening raises ConfigError. `start` starts the thread; without it, `close_unstarted` gives everything back.
    """

    def __init__(self, library: NixlLibrary, plan: UcxPlan, name: str) -> None:
        self.library = library
        self._options = nixl_options(plan.options(), has_nvidia_gpu())
        self._one_at_a_time = "tcp" in plan.tls.split(",")
        self._clock = SystemClock()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._regions: list[memoryview] = []
        self._batches: list[Batch] = []
        self._retiring: list[Port] = []
        self._stopping = False
        self._open = True
        self._lock = threading.Lock()
        """Between `call` and the thread's end: a command is called or refused, never lost."""
        self._moved_at = self._listened_at = 0.0
        self._port: Port | None = self._open_port()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    # --- from other threads ---

    def start(self) -> None:
        """From now on NIXL belongs to the thread."""
        self.thread.start()

    def close_unstarted(self) -> None:
        """Give everything back without a thread."""
        self._shut_down()

    def call(self, command: Callable[[], None]) -> bool:
        """Have the thread call `command`, soon. False once the thread has ended: then nothing is called."""
        with self._lock:
            if self._open:
                self._commands.put(command)
            return self._open

    def stop(self) -> None:
        """End the thread soon, within a second; every batch ends before. Call once, then join `thread`."""
        self.call(self._stop)

    # --- in the thread ---

    def register(self, region: memoryview) -> None:
        """Register memory until the end. Raises ConfigError."""
        if self._port is not None:
            self._port.register(region)
        self._regions.append(region)

    def add(self, batch: Batch, key: str) -> None:
        """Begin a batch on the segment with the address `key`."""
        try:
            if self._stopping:
                raise PeerUnreachableError("the transport is closed")
            port = self._current_port()
            peer = port.peer(key, batch.descriptor, self._clock.now())
        except TransferError as error:
            batch.error = error
            batch.finish()
            return
        batch.port, batch.peer = port, peer
        peer.jobs += 1
        self._batches.append(batch)

    def stop_batch(self, batch: Batch, error: TransferError, grace_s: float) -> None:
        """End a batch with `error`: in order if its peer answers within `grace_s`, else with the agent."""
        batch.stop(error, self._clock.now() + grace_s)

    def _open_port(self) -> Port:
        return Port(self.library, self._options, self._regions, one_at_a_time=self._one_at_a_time)

    def _current_port(self) -> Port:
        if self._port is None:
            while len(self._retiring) >= _MAX_RETIRING:
                self._close(self._retiring[0])
            try:
                self._port = self._open_port()
            except ConfigError as error:
                raise PeerUnreachableError(error.message) from error
        return self._port

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(self._rest())
                self._turn()
        finally:
            self._shut_down()

    def _rest(self) -> float:
        """How long to wait for a command."""
        if not self._batches:
            return _IDLE_S
        return 0.0 if self._clock.now() - self._moved_at < _SPIN_S else _NAP_S

    def _run_commands(self, wait_s: float) -> None:
        try:
            command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _turn(self) -> None:
        now = self._clock.now()
        ports = [*self._retiring, *([self._port] if self._port is not None else [])]
        if now - self._listened_at > _LISTEN_S or any(port.waiting for port in ports):
            self._listened_at = now
            for port in ports:
                port.listen(now)
        if self._look_at_batches(now):
            self._moved_at = now
        for port in self._retiring[:]:
            others = [batch for batch in self._batches if batch.port is port and not _late(batch, now)]
            if not others or (port.close_by is not None and now >= port.close_by):
                self._close(port)

    def _look_at_batches(self, now: float) -> bool:
        """Move every batch on; True if something moved."""
        moved_any = False
        for batch in self._batches[:]:
            assert batch.port is not None and batch.peer is not None, "a batch under way has both"
            over, moved = batch.advance(batch.port, batch.peer)
            moved_any |= moved or over
            if over:
                self._end(batch, batch.peer, now)
            elif _late(batch, now):
                self._retire(batch.port, now)
        return moved_any

    def _end(self, batch: Batch, peer: Peer, now: float) -> None:
        self._batches.remove(batch)
        batch.finish()
        peer.jobs -= 1
        if not peer.welcome and now - peer.made_at > _CONNECT_S:
            peer.fail(PeerUnreachableError(f"segment {peer.descriptor.segment_id}: no answer"))

    def _retire(self, port: Port, now: float) -> None:
        """Give an agent no new batches; `_turn` closes it, as soon as only late ones are left on it."""
        if port.close_by is None:
            port.close_by = now + _OTHERS_S
            self._retiring.append(port)
            self._port = None
            log_fields(_LOG, logging.WARNING, "transfer.nixl_cut", reason="a peer does not answer")

    def _close(self, port: Port) -> None:
        """Cut an agent off, and end the batches on it."""
        self._retiring.remove(port)
        port.close()
        for batch in [batch for batch in self._batches if batch.port is port]:
            self._batches.remove(batch)
            batch.error = batch.error or PeerUnreachableError("cut off: another peer did not answer")
            batch.finish()

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        self._stopping = True
        with self._lock:
            self._open = False
        self._run_commands(0)
        closed = PeerUnreachableError("the transport is closed")
        until = self._clock.now() + _DRAIN_S
        for batch in self._batches:
            batch.stop(closed, until)
        while self._batches and self._clock.now() < until:
            self._look_at_batches(self._clock.now())
            self._run_commands(_NAP_S)
        if self._port is not None:
            self._retiring.append(self._port)
            self._port = None
        for port in self._retiring[:]:
            self._close(port)


def _late(batch: Batch, now: float) -> bool:
    return batch.give_up_at is not None and now >= batch.give_up_at
