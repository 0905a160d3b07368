"""One UCX context and worker, and the one thread that owns them: it sleeps on UCX's event descriptor when idle.

All of UCX is called from that thread, but for opening, and for small batches while it sleeps (`move_now`). Others hand
it commands through a queue; it reports through callbacks. Before it ends, every endpoint, request, registration and
descriptor is given back.
"""

import logging
import os
import select
import struct
import threading
from collections import deque
from collections.abc import Callable

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError, TransferError
from kvcore.telemetry import log_fields
from transfer.ucx.binding import Pointer, UcxLibrary, ffi, open_context
from transfer.ucx.descriptor import UcxDescriptor
from transfer.ucx.devices import UcxPlan, check_opened, read_resources
from transfer.ucx.endpoint import Endpoint, Job, Window

_LOG = logging.getLogger("transfer")
_FEATURES = 1 << 1 | 1 << 4 | 1 << 6  # RMA, wakeup, active messages
_THREAD_MODE_SERIALIZED = 1
_HELLO, _WELCOME = 1, 2
_NONCE = struct.Struct("<Q")
_GREETED = struct.Struct("<QB")
_FLAGS_FIELD = 1 << 4
_AM_REPLY = 1
_AM_REPLY_EP_FIELD = 1
_SPIN_S = 60e-6
"""An answer, or a peer's next message, takes less than a sleep and a wake-up where batches are small."""
_SPIN_AGAIN = 8
"""Where nothing came in that time: so many sleeps before another try."""
_NOW_S = 200e-6
"""What a small batch may take of its caller's thread, before the worker's goes on with it."""
_STEPS = 16
"""Turns of UCX between two looks at the batches."""
_CLOSE_S = 2.0
_DRAIN_S = 0.5
"""For batches to end in order before connections are cut."""
_SETTLE_S = 2.0
"""For connections to be made before they are cut: UCX 1.13 aborts the *target's* process when its peer goes first."""
_QUIET_S = 0.03
"""A host that hears nothing for so long is closed."""
_CONNECT_S = 5.0
"""A connection that is older without an answer, and on which a batch ended, is given up for a fresh one."""
MAX_ENDPOINTS = 512
"""Connections of one process; the one that was longest idle goes first."""
MAX_ANSWERS = 1024
"""To greetings, in UCX's hands at once; one more is not answered: who asks so fast does not read either."""
_TICK_S = 0.05
"""While something must end by a time: how often to look."""


class UcxWorker:
    """Endpoints and batches of one process towards others, or (with `hosted`) the target of theirs.

    Opening raises ConfigError. `start` starts the thread; without it, `close_unstarted` gives everything back.
    """

    def __init__(self, library: UcxLibrary, plan: UcxPlan, name: str, hosted: str | None = None) -> None:
        self.library = library
        self._lib = library.lib
        self._clock = SystemClock()
        self._hosted = None if hosted is None else hosted.encode()
        self._commands: deque[Callable[[], None]] = deque()
        self._endpoints: dict[str, Endpoint] = {}
        self._leaving: list[Endpoint] = []
        self._greetings: dict[int, Endpoint] = {}
        self._jobs: list[Job] = []
        self.window = Window()
        self._sent: list[tuple[Pointer, Pointer]] = []
        self._abandoned: list[Job] = []
        """UCX did not let go of these even with their connection: their buffers are kept alive, their callers told."""
        self._mapped: list[Pointer] = []
        self._next_nonce = 1
        self._stopping = False
        self._open = True
        self._wake_lock = threading.Lock()
        """The number of a closed descriptor may be another's at once: none is written to after it was closed."""
        self._turn_lock = threading.Lock()
        """Held by whoever calls UCX, but for opening: the thread, or a caller with a small batch."""
        self._progressed_at = 0.0
        self._sleeps_to_spin = 0
        self._param = ffi.new("ucp_request_param_t *")
        self._callbacks = [
            ffi.callback("void(void *, void *, ucs_status_t)", self._on_error),
            ffi.callback("ucp_am_recv_callback_t", self._on_hello),
            ffi.callback("ucp_am_recv_callback_t", self._on_welcome),
        ]
        self._context = open_context(library, plan.options(), _FEATURES)
        try:
            self.resources = read_resources(library.printed("ucp_context_print_info", self._context))
            check_opened(plan, self.resources, library.build)
            self._worker = self._open_worker()
            efd = ffi.new("int *")
            library.check(self._lib.ucp_worker_get_efd(self._worker, efd), "ucp_worker_get_efd")
        except ConfigError:
            self._lib.ucp_cleanup(self._context)
            raise
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._poll = select.epoll()
        self._event_fd = efd[0]
        for descriptor in (self._wake_fd, self._event_fd):
            self._poll.register(descriptor, select.EPOLLIN)
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)

    @property
    def address(self) -> bytes:
        """The worker's address, for a descriptor. Before `start` only."""
        found, size = ffi.new("void **"), ffi.new("size_t *")
        self.library.check(self._lib.ucp_worker_get_address(self._worker, found, size), "ucp_worker_get_address")
        try:
            return bytes(ffi.buffer(found[0], size[0]))
        finally:
            self._lib.ucp_worker_release_address(self._worker, found[0])

    def map_memory(self, region: memoryview) -> tuple[Pointer, int]:
        """Register (and for RDMA pin) memory until the end: handle and address. Before `start`, or in the thread."""
        buffer = ffi.from_buffer(region, require_writable=not region.readonly)
        params = ffi.new("ucp_mem_map_params_t *", {"field_mask": 0b11, "length": region.nbytes})
        params.address = ffi.cast("void *", buffer)
        handle = ffi.new("void **")
        self.library.check(
            self._lib.ucp_mem_map(self._context, params, handle),
            f"cannot register {region.nbytes} bytes (RDMA pins them: see `ulimit -l`)",
        )
        self._mapped.append(handle[0])
        return handle[0], int(ffi.cast("uintptr_t", buffer))

    def pack_rkey(self, handle: Pointer) -> bytes:
        """The remote key of registered memory."""
        packed, size = ffi.new("void **"), ffi.new("size_t *")
        self.library.check(self._lib.ucp_rkey_pack(self._context, handle, packed, size), "ucp_rkey_pack")
        try:
            return bytes(ffi.buffer(packed[0], size[0]))
        finally:
            self._lib.ucp_rkey_buffer_release(packed[0])

    # --- from other threads ---

    def start(self) -> None:
        """From now on UCX belongs to the thread."""
        self.thread.start()

    def close_unstarted(self) -> None:
        """Give everything back without a thread."""
        self._shut_down()

    def call(self, command: Callable[[], None]) -> bool:
        """Have the thread call `command`, soon. False once the thread has ended: then nothing is called."""
        with self._wake_lock:
            if self._open:
                self._commands.append(command)
                os.eventfd_write(self._wake_fd, 1)
            return self._open

    def move_now(self, job: Job, key: str) -> bool:
        """Move a small batch in the caller's thread, if the worker's sleeps and the endpoint for `key` is up.

        False: it was not begun. True: its `done` was called, or will be by the worker's thread. Takes at most about
        `_NOW_S`.
        """
        if not self._turn_lock.acquire(blocking=False):
            return False
        try:
            endpoint = self._endpoints.get(key)
            if self._stopping or self._jobs or self._commands:
                return False
            if endpoint is None or not endpoint.welcome or endpoint.error is not None:
                return False
            self._poll.modify(self._event_fd, 0)  # the thread sleeps on
            try:
                self.add(job, key)
                self._look_at_jobs()
                until = self._clock.now() + _NOW_S
                while self._jobs and self._clock.now() < until:
                    if self._lib.ucp_worker_progress(self._worker):
                        self._look_at_jobs()
            finally:
                self._poll.modify(self._event_fd, select.EPOLLIN)
            unfinished = bool(self._jobs) or endpoint.error is not None
        finally:
            self._turn_lock.release()
        if unfinished:
            self.call(lambda: None)
        return True

    def stop(self) -> None:
        """End the thread soon, within four seconds; every batch ends before. Call once, then join `thread`."""
        self.call(self._stop)

    def lanes(self, segment_id: str) -> str:
        """Transports and devices in use for a segment (`tcp/lo`), or empty before the first batch."""
        return next((one.lanes for one in list(self._endpoints.values()) if one.segment_id == segment_id), "")

    # --- in the thread ---

    def add(self, job: Job, key: str) -> None:
        """Begin a batch on the endpoint for `key`, which is made if need be."""
        try:
            if self._stopping:
                raise PeerUnreachableError("the transport is closed")
            job.endpoint = self._endpoint(job.descriptor, key)
        except TransferError as error:
            job.error = error
            job.finish()
            return
        job.endpoint.jobs += 1
        self._jobs.append(job)

    def stop_job(self, job: Job, error: TransferError, grace_s: float) -> None:
        """End a batch with `error`: in order if UCX lets go of it within `grace_s`, else with its connection."""
        job.stop(error, self._clock.now() + grace_s)

    def _endpoint(self, descriptor: UcxDescriptor, key: str) -> Endpoint:
        found = self._endpoints.get(key)
        now = self._clock.now()
        if found is not None and found.error is None:
            found.used_at = now
            return found
        if found is not None:
            self._drop(key)
        if len(self._endpoints) >= MAX_ENDPOINTS:
            self._make_room()
        endpoint = Endpoint(self.library, self._worker, descriptor, self._callbacks[0], now=now, window=self.window)
        self._endpoints[key] = endpoint
        if endpoint.error is None:
            nonce, self._next_nonce = self._next_nonce, self._next_nonce + 1
            self._greetings[nonce] = endpoint
            self._send(endpoint.handle, _HELLO, _NONCE.pack(nonce) + descriptor.segment_id.encode(), _AM_REPLY)
        return endpoint

    def _make_room(self) -> None:
        idle = [key for key, one in self._endpoints.items() if not one.jobs]
        if not idle:
            raise PeerUnreachableError(f"{MAX_ENDPOINTS} connections are in use, and none is left for another segment")
        self._drop(min(idle, key=lambda key: self._endpoints[key].used_at))

    def _run(self) -> None:
        try:
            while not self._stopping:
                with self._turn_lock:
                    sleep_s = self._turn()
                if sleep_s:
                    self._sleep(sleep_s)
        finally:
            with self._turn_lock:
                self._shut_down()

    def _turn(self) -> float | None:
        """Do all that can be done at once; for how long there is nothing to do then (-1: until something comes)."""
        busy = self._run_commands()
        for _ in range(_STEPS):
            if not self._lib.ucp_worker_progress(self._worker):
                break
            busy = True
        busy |= self._look_at_jobs()
        self._look_at_endpoints()
        now = self._clock.now()
        if busy:
            self._progressed_at = now
            return None
        expecting = self._jobs or self._hosted is not None
        if expecting and not self._sleeps_to_spin and now - self._progressed_at <= _SPIN_S:
            return None
        if self._lib.ucp_worker_arm(self._worker):  # UCS_ERR_BUSY: something has come meanwhile
            return None
        watched = self._leaving or any(job.give_up_at is not None for job in self._jobs)
        return _TICK_S if watched else -1

    def _sleep(self, at_most_s: float) -> None:
        self._sleeps_to_spin = (self._sleeps_to_spin or _SPIN_AGAIN) - 1
        for fd, _ in self._poll.poll(at_most_s):
            if fd == self._wake_fd:
                os.eventfd_read(self._wake_fd)

    def _run_commands(self) -> bool:
        busy = bool(self._commands)
        while self._commands:
            self._commands.popleft()()
        return busy

    def _look_at_jobs(self) -> bool:
        """Move every batch on; True if one ended."""
        over = []
        for job in self._jobs:
            if job.advance(self.library, self._param):
                over.append(job)
            elif job.give_up_at is not None and self._clock.now() >= job.give_up_at:
                assert job.endpoint is not None, "a batch needs an endpoint"
                job.endpoint.fail(PeerUnreachableError(f"segment {job.endpoint.segment_id}: a batch did not end"))
                if self._clock.now() >= job.give_up_at + _CLOSE_S:
                    self._abandoned.append(job)
                    job.abandon()
                    over.append(job)
        for job in over:
            self._jobs.remove(job)
            job.finish()
            if job.endpoint is not None:
                job.endpoint.jobs -= 1
                if not job.endpoint.welcome and self._clock.now() - job.endpoint.made_at > _CONNECT_S:
                    job.endpoint.fail(PeerUnreachableError(f"segment {job.endpoint.segment_id}: no answer"))
        return bool(over)

    def _look_at_endpoints(self) -> None:
        for key in [key for key, one in self._endpoints.items() if one.error is not None]:
            self._drop(key)
        for endpoint in [one for one in self._leaving if one.jobs == 0 and one.closed()]:
            endpoint.release()
            self._leaving.remove(endpoint)
        for sent in [sent for sent in self._sent if self.library.status_of(sent[0]) is not None]:
            self.library.free(sent[0])
            self._sent.remove(sent)

    def _drop(self, key: str) -> None:
        endpoint = self._endpoints.pop(key)
        endpoint.begin_close()
        self._leaving.append(endpoint)
        for nonce in [nonce for nonce, one in self._greetings.items() if one is endpoint]:
            del self._greetings[nonce]

    def _send(self, handle: Pointer, message: int, header: bytes, flags: int) -> None:
        kept = ffi.from_buffer(header)
        param = ffi.new("ucp_request_param_t *", {"op_attr_mask": _FLAGS_FIELD, "flags": flags})
        request = self._lib.ucp_am_send_nbx(handle, message, kept, len(header), ffi.NULL, 0, param)
        self._sent.append((request, kept))

    # --- called by UCX, in the thread ---

    def _on_error(self, _: Pointer, handle: Pointer, status: int) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.handle == handle:
                why = self.library.text(status)
                endpoint.fail(PeerUnreachableError(f"segment {endpoint.segment_id}: the connection broke: {why}"))

    def _on_hello(self, _: Pointer, header: Pointer, size: int, _data: Pointer, _size: int, param: Pointer) -> int:
        said = bytes(ffi.buffer(header, size))
        answers = len(self._sent) < MAX_ANSWERS
        if answers and size >= _NONCE.size and param.recv_attr & _AM_REPLY_EP_FIELD:
            known = said[_NONCE.size :] == self._hosted
            self._send(param.reply_ep, _WELCOME, said[: _NONCE.size] + bytes([known]), 0)
        return 0

    def _on_welcome(self, _: Pointer, header: Pointer, size: int, _data: Pointer, _size: int, _param: Pointer) -> int:
        if size != _GREETED.size:
            return 0
        nonce, known = _GREETED.unpack(bytes(ffi.buffer(header, size)))
        endpoint = self._greetings.pop(nonce, None)
        if endpoint is None:
            return 0
        if not known:
            endpoint.fail(SegmentUnknownError(f"segment {endpoint.segment_id} is not at its address any more"))
            return 0
        endpoint.welcome = True
        endpoint.read_lanes()
        log_fields(
            _LOG,
            logging.INFO,
            "transfer.ucx_connected",
            segment=endpoint.segment_id,
            lanes=endpoint.lanes,
            ucx=self.library.build,
        )
        return 0

    # --- opening and closing ---

    def _open_worker(self) -> Pointer:
        worker = ffi.new("void **")
        params = ffi.new("ucp_worker_params_t *", {"field_mask": 1, "thread_mode": _THREAD_MODE_SERIALIZED})
        self.library.check(self._lib.ucp_worker_create(self._context, params, worker), "ucp_worker_create")
        for message, callback in ((_HELLO, self._callbacks[1]), (_WELCOME, self._callbacks[2])):
            handler = ffi.new("ucp_am_handler_param_t *", {"field_mask": 0b101, "id": message, "cb": callback})
            self.library.check(self._lib.ucp_worker_set_am_recv_handler(worker[0], handler), "active messages")
        return worker[0]

    def _drive(self, unfinished: Callable[[], bool], until: float) -> None:
        """Work on, until all is finished or it is too late."""
        poll = select.poll()
        while unfinished() and self._clock.now() < until:
            while self._lib.ucp_worker_progress(self._worker):
                pass
            self._look_at_jobs()
            self._look_at_endpoints()
            poll.poll(1)

    def _quieten(self) -> None:
        """Let peers that are just connecting have their answers: UCX 1.13 aborts when it is closed with one unsent."""
        poll = select.poll()
        now = moved_at = self._clock.now()
        until = now + _SETTLE_S
        while now < until and now - moved_at < _QUIET_S:
            if self._lib.ucp_worker_progress(self._worker):
                moved_at = now
            else:
                poll.poll(1)
            now = self._clock.now()

    def _stop(self) -> None:
        self._stopping = True

    def _shut_down(self) -> None:
        self._stopping = True
        self._run_commands()
        closed = PeerUnreachableError("the transport is closed")
        now = self._clock.now()
        for job in self._jobs:
            job.stop(closed, now + _DRAIN_S)
        self._drive(
            lambda: bool(self._jobs) or any(one.connecting for one in self._endpoints.values()), now + _SETTLE_S
        )
        for endpoint in self._endpoints.values():
            endpoint.fail(closed)
        self._look_at_endpoints()
        self._drive(lambda: bool(self._jobs or self._leaving), self._clock.now() + _CLOSE_S)
        for job in self._jobs:
            job.error = job.error or PeerUnreachableError("the transport is closed")
            job.finish()
        if self._jobs or self._leaving:
            log_fields(_LOG, logging.ERROR, "transfer.ucx_close_late", batches=len(self._jobs))
        if self._hosted is not None:
            self._quieten()
        self._lib.ucp_worker_destroy(self._worker)
        for handle in self._mapped:
            self._lib.ucp_mem_unmap(self._context, handle)
        self._lib.ucp_cleanup(self._context)
        with self._wake_lock:
            self._open = False
            os.close(self._wake_fd)
            self._poll.close()
