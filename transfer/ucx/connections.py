"""Endpoints of one worker by their key, the greeting with which each begins, and how each ends.

Owns the endpoints and the messages of greetings. All of it runs in the worker's thread, or before it starts.

A greeting: the initiator sends HELLO (a nonce and the segment's id), the host answers WELCOME (the nonce, and whether
it hosts that segment). docs/wire-formats.md has the bytes.
"""

import logging
import struct

from kvcore.clock import Clock
from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferError
from kvcore.telemetry import log_fields
from transfer.ucx.binding import Pointer, ffi
from transfer.ucx.context import UcxContext
from transfer.ucx.descriptor import UcxDescriptor
from transfer.ucx.endpoint import UcxEndpoint, Window
from transfer.ucx.limits import UcxLimits

_LOG = logging.getLogger("transfer")
_HELLO, _WELCOME = 1, 2
_NONCE = struct.Struct("<Q")
_GREETED = struct.Struct("<QB")
_FLAGS_FIELD = 1 << 4
_AM_REPLY = 1
_AM_REPLY_EP_FIELD = 1


class Connections:
    """Endpoints towards others, and (with `hosted`, a segment's id) the answers to those who connect to us.

    Making it raises ConfigError.
    """

    def __init__(self, context: UcxContext, hosted: bytes | None, clock: Clock, limits: UcxLimits) -> None:
        self._context = context
        self._library = context.library
        self._hosted = hosted
        self._clock = clock
        self._limits = limits
        self.window = Window(limits)
        self._endpoints: dict[str, UcxEndpoint] = {}
        self._closing: list[UcxEndpoint] = []
        self._greetings: dict[int, UcxEndpoint] = {}
        """Endpoints whose peer has still to answer, by the nonce that they sent."""
        self._next_nonce = 1
        self._sent: list[tuple[Pointer, Pointer]] = []
        """Messages in UCX's hands: request, and the bytes that it may still read."""
        self._on_error_callback = ffi.callback("void(void *, void *, ucs_status_t)", self._on_error)
        self._message_callbacks = {
            _HELLO: ffi.callback("ucp_am_recv_callback_t", self._on_hello),
            _WELCOME: ffi.callback("ucp_am_recv_callback_t", self._on_welcome),
        }
        for message, callback in self._message_callbacks.items():
            context.on_message(message, callback)

    def __repr__(self) -> str:
        return (
            f"<Connections endpoints={len(self._endpoints)} greeting={len(self._greetings)} "
            f"closing={len(self._closing)} sent={len(self._sent)}>"
        )

    @property
    def connecting(self) -> bool:
        """Whether a peer has still to answer."""
        return any(endpoint.connecting for endpoint in self._endpoints.values())

    @property
    def closing(self) -> bool:
        """Whether UCX has still to let go of an endpoint."""
        return bool(self._closing)

    def lanes(self, segment_id: str) -> str:
        """Transports and devices in use for a segment (`tcp/lo`), or empty before the first batch. From any thread."""
        return next((one.lanes for one in list(self._endpoints.values()) if one.segment_id == segment_id), "")

    def ready(self, key: str) -> UcxEndpoint | None:
        """The endpoint for `key`, if its peer has confirmed the segment and nothing is wrong with it."""
        found = self._endpoints.get(key)
        return found if found is not None and found.confirmed and found.error is None else None

    def get(self, descriptor: UcxDescriptor, key: str) -> UcxEndpoint:
        """The endpoint for `key`, made and greeted if need be. Raises PeerUnreachableError."""
        found = self._endpoints.get(key)
        now = self._clock.now()
        if found is not None and found.error is None:
            found.used_at = now
            return found
        if found is not None:
            self._drop(key)
        if len(self._endpoints) >= self._limits.max_endpoints:
            self._make_room()
        endpoint = UcxEndpoint(self._context, descriptor, self._on_error_callback, now=now, window=self.window)
        self._endpoints[key] = endpoint
        if endpoint.error is None:
            nonce, self._next_nonce = self._next_nonce, self._next_nonce + 1
            self._greetings[nonce] = endpoint
            self._send(endpoint.handle, _HELLO, _NONCE.pack(nonce) + descriptor.segment_id.encode(), _AM_REPLY)
        return endpoint

    def fail_all(self, error: TransferError) -> None:
        """Give every endpoint up."""
        for endpoint in self._endpoints.values():
            endpoint.fail(error)

    def clean_up(self) -> None:
        """Close endpoints that failed, free those that UCX let go of, and messages that were sent."""
        for key in [key for key, one in self._endpoints.items() if one.error is not None]:
            self._drop(key)
        for endpoint in [one for one in self._closing if one.num_batches == 0 and one.closed()]:
            endpoint.release()
            self._closing.remove(endpoint)
        for sent in [sent for sent in self._sent if self._library.status_of(sent[0]) is not None]:
            self._library.free(sent[0])
            self._sent.remove(sent)

    def _make_room(self) -> None:
        idle = [key for key, one in self._endpoints.items() if not one.num_batches]
        if not idle:
            raise PeerUnreachableError(
                f"{self._limits.max_endpoints} connections are in use, and none is left for another segment"
            )
        self._drop(min(idle, key=lambda key: self._endpoints[key].used_at))

    def _drop(self, key: str) -> None:
        """Close an endpoint; `clean_up` frees it later. The greeting that it waits for is of no interest any more."""
        endpoint = self._endpoints.pop(key)
        endpoint.begin_close()
        self._closing.append(endpoint)
        for nonce in [nonce for nonce, one in self._greetings.items() if one is endpoint]:
            del self._greetings[nonce]

    def _send(self, handle: Pointer, message: int, header: bytes, flags: int) -> None:
        kept = ffi.from_buffer(header)
        param = ffi.new("ucp_request_param_t *", {"op_attr_mask": _FLAGS_FIELD, "flags": flags})
        request = self._library.lib.ucp_am_send_nbx(handle, message, kept, len(header), ffi.NULL, 0, param)
        self._sent.append((request, kept))

    # --- called by UCX, from within `progress` ---

    def _on_error(self, _: Pointer, handle: Pointer, status: int) -> None:
        for endpoint in self._endpoints.values():
            if endpoint.handle == handle:
                why = self._library.text(status)
                endpoint.fail(PeerUnreachableError(f"segment {endpoint.segment_id}: the connection broke: {why}"))

    def _on_hello(self, _: Pointer, header: Pointer, size: int, _data: Pointer, _size: int, param: Pointer) -> int:
        hello = bytes(ffi.buffer(header, size))
        answers = len(self._sent) < self._limits.max_answers
        if answers and size >= _NONCE.size and param.recv_attr & _AM_REPLY_EP_FIELD:
            known = hello[_NONCE.size :] == self._hosted
            self._send(param.reply_ep, _WELCOME, hello[: _NONCE.size] + bytes([known]), 0)
        return 0

    def _on_welcome(self, _: Pointer, header: Pointer, size: int, _data: Pointer, _size: int, _param: Pointer) -> int:
        """Four cases: not of our making; to a greeting that nobody waits for; another segment is there; confirmed."""
        if size != _GREETED.size:
            return 0
        nonce, known = _GREETED.unpack(bytes(ffi.buffer(header, size)))
        endpoint = self._greetings.pop(nonce, None)
        if endpoint is None:
            return 0
        if not known:
            endpoint.fail(SegmentUnknownError(f"segment {endpoint.segment_id} is not at its address any more"))
            return 0
        endpoint.confirmed = True
        endpoint.read_lanes()
        log_fields(
            _LOG,
            logging.INFO,
            "transfer.ucx_connected",
            segment=endpoint.segment_id,
            lanes=endpoint.lanes,
            ucx=self._library.build,
        )
        return 0
