"""One endpoint (a peer's segment) and the batches on it. All of it runs in the worker's thread, or before it starts.

An endpoint carries no batch before its peer has said that it holds the segment: over TCP UCX writes wherever it is told
to, in whatever process listens at the address by then. An endpoint that failed is closed, never reused. Over TCP
one message at a time is on its way: UCX (1.13 and 1.22 alike) aborts the *target's* process when an initiator dies with
several, for it finds no way to answer the second. Seen in a quarter of such deaths; with one at a time never.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvcore.errors import PeerUnreachableError, TransferError
from transfer.base import Direction
from transfer.pieces import Piece, cut
from transfer.ucx.binding import Pointer, UcxLibrary, ffi
from transfer.ucx.descriptor import UcxDescriptor

_WINDOW_BYTES = 32 << 20
_WINDOW_REQUESTS = 256
"""Of one batch, in UCX's hands at once: what a batch that must end waits for."""
ALL_BYTES = 256 << 20
ALL_REQUESTS = 4096
"""Of all batches: what UCX may come to hold of this process's memory, and of its own for requests."""
_FLAGS_FIELD = 1 << 4
_CLOSE_FORCE = 1
_ADDRESS_ERRMODE_HANDLER = 0b111
_ERRMODE_PEER = 1


class Window:
    """What UCX has in its hands of all batches of a worker."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.num_requests = 0

    @property
    def has_room(self) -> bool:
        """Whether another piece may be handed over."""
        return self.num_bytes < ALL_BYTES and self.num_requests < ALL_REQUESTS

    def add(self, num_bytes: int, num_requests: int) -> None:
        """Count what was handed over, or (negative) what UCX let go of."""
        self.num_bytes += num_bytes
        self.num_requests += num_requests


class Endpoint:
    """A connection to one segment. `error` is set once it is of no further use."""

    def __init__(
        self,
        library: UcxLibrary,
        worker: Pointer,
        descriptor: UcxDescriptor,
        on_error: Pointer,
        *,
        now: float,
        window: Window,
    ) -> None:
        """Connects, without waiting for it. Raises PeerUnreachableError."""
        self._library = library
        self.made_at = self.used_at = now
        self.window = window
        self.segment_id = descriptor.segment_id
        self.base = descriptor.base
        self.lanes = ""
        self.welcome = False
        self.error: TransferError | None = None
        self.jobs = 0
        self.one_at_a_time = True
        self.turn: Job | None = None
        """With one at a time: the batch that has a message on its way."""
        self.closing: Pointer | None = None
        self.rkey: Pointer = None
        lib, handle = library.lib, ffi.new("void **")
        params = ffi.new("ucp_ep_params_t *", {"field_mask": _ADDRESS_ERRMODE_HANDLER, "err_mode": _ERRMODE_PEER})
        address = ffi.from_buffer(descriptor.worker_address)
        params.address, params.err_cb = address, on_error
        library.check_peer(lib.ucp_ep_create(worker, params, handle), f"segment {self.segment_id}: connecting")
        self.handle = handle[0]
        try:
            rkey = ffi.new("void **")
            status = lib.ucp_ep_rkey_unpack(self.handle, ffi.from_buffer(descriptor.rkey), rkey)
            library.check_peer(status, f"segment {self.segment_id}: no transport of ours can use its remote key")
            self.rkey = rkey[0]
        except PeerUnreachableError as error:
            self.error = error

    @property
    def connecting(self) -> bool:
        """Whether its peer has still to answer."""
        return not self.welcome and self.error is None

    def fail(self, error: TransferError) -> None:
        """Give it up: everything on it ends with an error. The first reason stays."""
        self.error = self.error or error

    def begin_close(self) -> None:
        """Let go of the connection and of all that is under way on it. Once; `closed` tells when that is done."""
        if self.closing is None:
            flags = {"op_attr_mask": _FLAGS_FIELD, "flags": _CLOSE_FORCE}
            self.closing = self._library.lib.ucp_ep_close_nbx(self.handle, ffi.new("ucp_request_param_t *", flags))

    def closed(self) -> bool:
        """Whether UCX has let go of it."""
        return self.closing is not None and self._library.status_of(self.closing) is not None

    def release(self) -> None:
        """Free what is left, once closed and without batches."""
        assert self.closing is not None, "close it first"
        self._library.free(self.closing)
        if self.rkey is not None:
            self._library.lib.ucp_rkey_destroy(self.rkey)
            self.rkey = None

    def read_lanes(self) -> None:
        """Learn which transports and devices UCX uses for it, as `tcp/lo`."""
        names: dict[str, None] = {}
        for line in self._library.printed("ucp_ep_print_info", self.handle).splitlines():
            head, _, rest = line.partition("lane[")
            _, found, lane = rest.partition(":")
            words = lane.replace(":", " ").split()
            if found and head.strip("# ") == "" and len(words) > 1:
                names[words[1].rpartition(".")[0] or words[1]] = None
        self.lanes = ",".join(names)
        self.one_at_a_time = any(name.startswith("tcp/") for name in names) or not names


class Job:
    """One batch on one segment, in one direction. `done` is called once, when UCX has let go of every buffer."""

    def __init__(
        self,
        direction: Direction,
        descriptor: UcxDescriptor,
        pieces: Sequence[Piece],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.descriptor = descriptor
        self.endpoint: Endpoint | None = None
        self.error: TransferError | None = None
        self.give_up_at: float | None = None
        self._reading = direction == "read"
        self._done = done
        self._uncut = pieces
        self._pieces: Iterator[Piece] | None = None
        self._issued_all = False
        self._held: deque[tuple[Pointer, Piece | None]] = deque()
        self._held_bytes = 0
        self._flush: Pointer | None = None

    def stop(self, error: TransferError, give_up_at: float) -> None:
        """Issue nothing more and end with `error`; what UCX still holds at `give_up_at` costs the endpoint."""
        self.error = self.error or error
        self.give_up_at = give_up_at if self.give_up_at is None else self.give_up_at

    def finish(self) -> None:
        """Tell the caller. The batch is over."""
        self._done(self.error or (self.endpoint.error if self.endpoint else None))

    def abandon(self) -> None:
        """UCX does not let go of it: count it no longer, or all others would wait for it."""
        if self.endpoint is not None:
            self.endpoint.window.add(-self._held_bytes, -len(self._held))

    def advance(self, library: UcxLibrary, param: Pointer) -> bool:
        """Collect what is done and issue what has room; True when UCX holds nothing of it any more."""
        endpoint = self.endpoint
        assert endpoint is not None, "a batch needs an endpoint"
        self._collect(library)
        if self.error is not None or endpoint.error is not None:
            self._issued_all = True
        elif endpoint.welcome and not self._issued_all:
            self._issue(library, endpoint, param)
            self._collect(library)
        if not self._issued_all or self._held:
            return False
        if self._reading or endpoint.error is not None or not endpoint.welcome or endpoint.one_at_a_time:
            return self._flush is None or self._flushed(library, endpoint)
        if self._flush is None:
            self._flush = library.lib.ucp_ep_flush_nbx(endpoint.handle, param)
        return self._flushed(library, endpoint)

    def _issue(self, library: UcxLibrary, endpoint: Endpoint, param: Pointer) -> None:
        lib, handle, base, rkey = library.lib, endpoint.handle, endpoint.base, endpoint.rkey
        move = lib.ucp_get_nbx if self._reading else lib.ucp_put_nbx
        single = endpoint.one_at_a_time
        if self._pieces is None:
            self._pieces = cut(self._uncut, reading=self._reading, one_at_a_time=single)
        while self._may_issue(endpoint):
            piece = next(self._pieces, None)
            if piece is None:
                self._issued_all = True
                return
            local = ffi.from_buffer(piece.view, require_writable=self._reading)
            self._held.append((move(handle, local, piece.view.nbytes, base + piece.offset, rkey, param), piece))
            self._held_bytes += piece.view.nbytes
            endpoint.window.add(piece.view.nbytes, 1)
            if single:
                endpoint.turn = self
                if not self._reading:
                    self._held.append((lib.ucp_ep_flush_nbx(handle, param), None))
                    endpoint.window.add(0, 1)

    def _may_issue(self, endpoint: Endpoint) -> bool:
        if endpoint.one_at_a_time:
            return endpoint.turn is None
        mine = self._held_bytes < _WINDOW_BYTES and len(self._held) < _WINDOW_REQUESTS
        return mine and endpoint.window.has_room

    def _collect(self, library: UcxLibrary) -> None:
        """Requests of one endpoint end about in order, so only the oldest is asked."""
        while self._held:
            request, piece = self._held[0]
            status = library.status_of(request)
            if status is None:
                return
            self._held.popleft()
            library.free(request)
            self._note(library, status)
            size = piece.view.nbytes if piece is not None else 0
            self._held_bytes -= size
            if self.endpoint is not None:
                self.endpoint.window.add(-size, -1)
            if piece is not None and status == 0:
                piece.scatter()
        if self.endpoint is not None and self.endpoint.turn is self:
            self.endpoint.turn = None

    def _flushed(self, library: UcxLibrary, endpoint: Endpoint) -> bool:
        status = library.status_of(self._flush)
        if status is None:
            return False
        library.free(self._flush)
        self._flush = ffi.NULL  # done; never asked for again
        self._note(library, status)
        return True

    def _note(self, library: UcxLibrary, status: int) -> None:
        if status and self.endpoint is not None:
            self.endpoint.fail(PeerUnreachableError(f"segment {self.endpoint.segment_id}: {library.text(status)}"))
