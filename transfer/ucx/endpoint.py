"""One endpoint: a connection to a peer's segment. All of it runs in the worker's thread, or before it starts.

An endpoint carries no batch before its peer has said that it holds the segment: over TCP UCX writes wherever it is told
to, in whatever process listens at the address by then. An endpoint that failed is closed, never reused.
"""

from kvcore.errors import PeerUnreachableError, TransferError
from transfer.ucx.binding import Pointer, ffi
from transfer.ucx.context import UcxContext
from transfer.ucx.descriptor import UcxDescriptor, parse_place
from transfer.ucx.limits import UcxLimits

_FLAGS_FIELD = 1 << 4
_CLOSE_FORCE = 1
_ADDRESS_ERRMODE_HANDLER = 0b111
_ERRMODE_PEER = 1


class Window:
    """What UCX has in its hands of all batches of a worker."""

    def __init__(self, limits: UcxLimits) -> None:
        self.limits = limits
        self.num_bytes = 0
        self.num_requests = 0

    def __repr__(self) -> str:
        return f"<Window bytes={self.num_bytes} requests={self.num_requests}>"

    @property
    def has_room(self) -> bool:
        """Whether another fragment may be handed over."""
        return self.num_bytes < self.limits.all_bytes and self.num_requests < self.limits.all_requests

    def add(self, num_bytes: int, num_requests: int) -> None:
        """Count what was handed over, or (negative) what UCX let go of."""
        self.num_bytes += num_bytes
        self.num_requests += num_requests


class UcxEndpoint:
    """A connection to one segment. `error` is set once it is of no further use."""

    def __init__(
        self,
        context: UcxContext,
        descriptor: UcxDescriptor,
        on_error: Pointer,
        *,
        now: float,
        window: Window,
    ) -> None:
        """Connects, without waiting for it. Raises PeerUnreachableError."""
        self._library = library = context.library
        self.made_at = self.used_at = now
        self.window = window
        self.segment_id = descriptor.segment_id
        self.base = descriptor.base
        self.lanes = ""
        self.confirmed = False
        """Its peer has said that it holds the segment."""
        self.error: TransferError | None = None
        self.num_batches = 0
        self.one_at_a_time = True
        """Over TCP: one message at a time is on its way (see `UcxBatch`)."""
        self.sender: object | None = None
        """With one at a time: the batch whose message is on its way."""
        self.closing: Pointer | None = None
        self.rkey: Pointer = None
        """With `base`, where the segment lies: with the address, or told by its peer (`take_place`)."""
        lib, handle = library.lib, ffi.new("void **")
        params = ffi.new("ucp_ep_params_t *", {"field_mask": _ADDRESS_ERRMODE_HANDLER, "err_mode": _ERRMODE_PEER})
        address = ffi.from_buffer(descriptor.worker_address)
        params.address, params.err_cb = address, on_error
        library.check_peer(lib.ucp_ep_create(context.worker, params, handle), f"segment {self.segment_id}: connecting")
        self.handle = handle[0]
        if not descriptor.withheld:
            try:
                self._unpack(descriptor.rkey)
            except PeerUnreachableError as error:
                self.error = error

    def __repr__(self) -> str:
        state = f"failed: {self.error.message}" if self.error else "confirmed" if self.confirmed else "connecting"
        state = "closing" if self.closing is not None else state
        return f"<UcxEndpoint {self.segment_id} lanes={self.lanes or 'unknown'} batches={self.num_batches} {state}>"

    @property
    def connecting(self) -> bool:
        """Whether its peer has still to answer."""
        return not self.confirmed and self.error is None

    def take_place(self, place: bytes) -> None:
        """What its host told, as `pack_place` made it. Raises TransferProtocolError, PeerUnreachableError."""
        self.base, rkey = parse_place(place)
        self._unpack(rkey)

    def _unpack(self, packed: bytes) -> None:
        rkey = ffi.new("void **")
        status = self._library.lib.ucp_ep_rkey_unpack(self.handle, ffi.from_buffer(packed), rkey)
        self._library.check_peer(status, f"segment {self.segment_id}: no transport of ours can use its remote key")
        self.rkey = rkey[0]

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
