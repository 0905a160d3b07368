"""The one thread of an initiator that owns its NIXL agent: batches in, results out, through queues and callbacks.

It sleeps while there is nothing to do, and naps between two looks while something moves: NIXL has nothing to wait for.
"""

import logging
import queue
import threading
from collections.abc import Callable

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.telemetry import log_fields
from transfer.greeting import Keys
from transfer.nixl.batch import NixlBatch
from transfer.nixl.binding import NixlLibrary, has_nvidia_gpu, nixl_options
from transfer.nixl.limits import NixlLimits
from transfer.nixl.peer import Peer
from transfer.nixl.port import Port
from transfer.ucx.devices import UcxPlan

_LOG = logging.getLogger("transfer")


class NixlWorker:
    """BatchWorker of one process towards others.

    `keys`: what is proved to each peer. Opening raises ConfigError. `start` starts the thread; without it,
    `close_unstarted` gives everything back.
    """

    def __init__(
        self,
        library: NixlLibrary,
        plan: UcxPlan,
        name: str,
        limits: NixlLimits = NixlLimits(),
        *,
        keys: Keys = lambda: (),
    ) -> None:
        self._keys = keys
        self.library = library
        self._limits = limits
        self._options = nixl_options(plan.options(), has_nvidia_gpu())
        self._one_at_a_time = self._over_tcp(plan)
        self._clock = SystemClock()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._regions: list[memoryview] = []
        self._batches: list[NixlBatch] = []
        self._retiring: list[Port] = []
        self._stopping = False
        self._open = True
        self._lock = threading.Lock()
        """Between `call` and the thread's end: a command is called or refused, never lost."""
        self._moved_at = self._listened_at = 0.0
        self._port: Port | None = self._open_port()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    def __repr__(self) -> str:
        state = "stopping" if self._stopping else "open" if self._open else "closed"
        ports = [*self._retiring, *([self._port] if self._port is not None else [])]
        return f"<NixlWorker {self.thread.name} {state} batches={len(self._batches)} ports={ports}>"

    # --- from other threads ---

    def start(self) -> None:
        """From now on NIXL belongs to the thread."""
        self.thread.start()

    def close_unstarted(self) -> None:
        """Give everything back without a thread."""
        self._shut_down()

    def call(self, command: Callable[[], None]) -> bool:
        """As BatchWorker.call."""
        with self._lock:
            if self._open:
                self._commands.put(command)
            return self._open

    def stop(self) -> None:
        """As BatchWorker.stop: within a second."""
        self.call(self._stop)

    # --- in the thread ---

    def register(self, region: memoryview) -> None:
        """As BatchWorker.register."""
        if self._port is not None:
            self._port.register(region)
        self._regions.append(region)

    def add(self, batch: NixlBatch, key: str) -> None:
        """As BatchWorker.add."""
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
        peer.num_batches += 1
        self._batches.append(batch)

    def stop_batch(self, batch: NixlBatch, error: TransferError, grace_s: float) -> None:
        """As BatchWorker.stop_batch: in order if its peer answers within `grace_s`, else with the agent."""
        batch.stop(error, self._clock.now() + grace_s)

    @staticmethod
    def _over_tcp(plan: UcxPlan) -> bool:
        """Whether TCP may be what moves bytes: NIXL does not say."""
        return "tcp" in plan.tls.split(",")

    def _open_port(self) -> Port:
        return Port(
            self.library,
            self._options,
            self._regions,
            one_at_a_time=self._one_at_a_time,
            limits=self._limits,
            keys=self._keys,
        )

    def _current_port(self) -> Port:
        if self._port is None:
            while len(self._retiring) >= self._limits.max_retiring:
                self._close(self._retiring[0])
            try:
                self._port = self._open_port()
            except ConfigError as error:
                raise PeerUnreachableError(error.message) from error
        return self._port

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._run_commands(self._wait_s())
                self._step()
        finally:
            self._shut_down()

    def _wait_s(self) -> float:
        """How long to wait for a command."""
        if not self._batches:
            return self._limits.idle_s
        return 0.0 if self._clock.now() - self._moved_at < self._limits.spin_s else self._limits.nap_s

    def _run_commands(self, wait_s: float) -> None:
        try:
            command = self._commands.get(timeout=wait_s) if wait_s else self._commands.get_nowait()
            while True:
                command()
                command = self._commands.get_nowait()
        except queue.Empty:
            return

    def _step(self) -> None:
        """Look at everything once: messages (now and then), abandoned requests, batches, agents to be closed.

        A retiring agent is closed in one of two cases: nothing but late batches is left on it; or its time is up, and
        then the other batches on it fail too.
        """
        now = self._clock.now()
        ports = [*self._retiring, *([self._port] if self._port is not None else [])]
        if now - self._listened_at > self._limits.listen_s or any(port.waiting for port in ports):
            self._listened_at = now
            for port in ports:
                port.listen(now)
        for port in ports:
            port.reap()
        if self._advance_batches(now):
            self._moved_at = now
        for port in self._retiring[:]:
            others = [batch for batch in self._batches if batch.port is port and not _late(batch, now)]
            if not others or (port.close_by is not None and now >= port.close_by):
                self._close(port)

    def _advance_batches(self, now: float) -> bool:
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

    def _end(self, batch: NixlBatch, peer: Peer, now: float) -> None:
        self._batches.remove(batch)
        batch.finish()
        peer.num_batches -= 1
        if not peer.confirmed and now - peer.made_at > self._limits.connect_s:
            peer.fail(PeerUnreachableError(f"segment {peer.descriptor.segment_id}: no answer"))

    def _retire(self, port: Port, now: float) -> None:
        """Give an agent no new batches; `_step` closes it, as soon as only late ones are left on it."""
        if port.close_by is None:
            port.close_by = now + self._limits.others_s
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
        until = self._clock.now() + self._limits.drain_s
        for batch in self._batches:
            batch.stop(closed, until)
        while self._batches and self._clock.now() < until:
            self._advance_batches(self._clock.now())
            self._run_commands(self._limits.nap_s)
        if self._port is not None:
            self._retiring.append(self._port)
            self._port = None
        for port in self._retiring[:]:
            self._close(port)


def _late(batch: NixlBatch, now: float) -> bool:
    return batch.give_up_at is not None and now >= batch.give_up_at
