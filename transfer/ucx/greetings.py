"""The greeting with which each UCX connection begins: the messages of either end, and who has still to say what.

Owns the messages. All of it runs in the worker's thread, or before it starts. docs/wire-formats.md has the bytes.

    without a secret     HELLO -->  <-- WELCOME
    with one      PROVEN_HELLO -->  <-- CHALLENGE    PROOF -->  <-- PLACE

With a secret a host tells where its segment lies, and the remote key, to nobody who has not proved on this connection
that it knows the secret: UCX itself asks who has the two for nothing more.
"""

import logging
import secrets
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum

from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferProofError, TransferProtocolError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from transfer.base import refusal
from transfer.greeting import InitiatorGreeting, Keys, TargetGreeting, open_place, seal_place
from transfer.ucx.binding import Pointer, ffi
from transfer.ucx.context import UcxContext
from transfer.ucx.endpoint import UcxEndpoint
from transfer.ucx.limits import UcxLimits

_LOG = logging.getLogger("transfer")
_TRANSPORT = "ucx"
_NONCE = struct.Struct("<Q")
_FLAGS_FIELD = 1 << 4
_AM_REPLY = 1
_AM_REPLY_EP_FIELD = 1


class _GreetingMessage(IntEnum):
    """Ids of UCX's active messages. Each begins with the nonce that the initiator chose."""

    HELLO = 1
    WELCOME = 2
    PROVEN_HELLO = 3
    CHALLENGE = 4
    PROOF = 5
    PLACE = 6


_OF_INITIATORS = (_GreetingMessage.HELLO, _GreetingMessage.PROVEN_HELLO, _GreetingMessage.PROOF)


class _HelloReply(IntEnum):
    """What a WELCOME says of the segment."""

    UNKNOWN = 0
    HERE = 1
    REFUSED = 2


@dataclass(slots=True)
class HostedSegment:
    """What a host answers for."""

    segment_id: str
    place: bytes = b""
    """For `UcxEndpoint.take_place`, by those who have proved themselves; empty: it was told with the address."""


@dataclass(slots=True)
class _OpenQuestion:
    endpoint: UcxEndpoint
    greeting: InitiatorGreeting | None


class Greetings:
    """Those of one worker, as initiator and (with `hosted`) as host. Making it raises ConfigError.

    `refused`: as SegmentHost.refused.
    """

    def __init__(self, context: UcxContext, hosted: HostedSegment | None, keys: Keys, limits: UcxLimits) -> None:
        self._library = context.library
        self._hosted = hosted
        self._keys = keys
        self._limits = limits
        self.refused: Counter[str] = Counter()
        self._log = PeerLog(_LOG)
        self._asked: dict[int, _OpenQuestion] = {}
        """As initiator: endpoints whose peer has still to answer, by the nonce that they sent."""
        self._challenged: dict[tuple[int, int], TargetGreeting] = {}
        """As host: connections that have still to prove themselves, the oldest first."""
        self._sent: list[tuple[Pointer, Pointer]] = []
        """Messages in UCX's hands: request, and the bytes that it may still read."""
        handlers: dict[_GreetingMessage, Callable[[int, bytes, Pointer], None]] = {
            _GreetingMessage.HELLO: self._on_hello,
            _GreetingMessage.WELCOME: self._on_welcome,
            _GreetingMessage.PROVEN_HELLO: self._on_proven_hello,
            _GreetingMessage.CHALLENGE: self._on_challenge,
            _GreetingMessage.PROOF: self._on_proof,
            _GreetingMessage.PLACE: self._on_place,
        }
        self._callbacks = {message: self._callback(handler) for message, handler in handlers.items()}
        for message, callback in self._callbacks.items():
            context.on_message(message, callback)

    def __repr__(self) -> str:
        return f"<Greetings asked={len(self._asked)} challenged={len(self._challenged)} sent={len(self._sent)}>"

    def begin(self, endpoint: UcxEndpoint) -> None:
        """Ask the endpoint's peer for its segment."""
        nonce = secrets.randbits(63)
        keys = self._keys()
        if not keys:
            self._asked[nonce] = _OpenQuestion(endpoint, None)
            self._send(endpoint.handle, _GreetingMessage.HELLO, nonce, endpoint.segment_id.encode())
            return
        greeting = InitiatorGreeting(keys, _TRANSPORT, endpoint.segment_id)
        self._asked[nonce] = _OpenQuestion(endpoint, greeting)
        self._send(endpoint.handle, _GreetingMessage.PROVEN_HELLO, nonce, greeting.hello())

    def forget(self, endpoint: UcxEndpoint) -> None:
        """What its peer answers is of no interest any more."""
        for nonce in [nonce for nonce, asked in self._asked.items() if asked.endpoint is endpoint]:
            del self._asked[nonce]

    def clean_up(self) -> None:
        """Free messages that were sent."""
        for sent in [sent for sent in self._sent if self._library.status_of(sent[0]) is not None]:
            self._library.free(sent[0])
            self._sent.remove(sent)

    def _send(self, handle: Pointer, message: _GreetingMessage, nonce: int, body: bytes) -> None:
        kept = ffi.from_buffer(_NONCE.pack(nonce) + body)
        flags = (
            _AM_REPLY
            if message in (_GreetingMessage.HELLO, _GreetingMessage.PROVEN_HELLO, _GreetingMessage.PROOF)
            else 0
        )
        param = ffi.new("ucp_request_param_t *", {"op_attr_mask": _FLAGS_FIELD, "flags": flags})
        request = self._library.lib.ucp_am_send_nbx(handle, message, kept, len(kept), ffi.NULL, 0, param)
        self._sent.append((request, kept))

    # --- called by UCX, from within `progress` ---

    def _callback(self, handler: Callable[[int, bytes, Pointer], None]) -> Pointer:
        """What UCX calls: `handler` gets nonce, rest, and the endpoint to answer on (None: there is none)."""

        def receive(_: Pointer, header: Pointer, size: int, _data: Pointer, _size: int, param: Pointer) -> int:
            raw = bytes(ffi.buffer(header, size))
            if len(raw) >= _NONCE.size:
                reply = param.reply_ep if param.recv_attr & _AM_REPLY_EP_FIELD else None
                try:
                    handler(_NONCE.unpack_from(raw)[0], raw[_NONCE.size :], reply)
                except TransferProtocolError as error:
                    self._refuse(error)
            return 0

        return ffi.callback("ucp_am_recv_callback_t", receive)

    def _refuse(self, error: TransferProtocolError) -> None:
        reason = refusal(error)
        self.refused[reason] += 1
        self._log.say(
            logging.WARNING, "transfer.peer_broke_protocol", reason, None, transport=_TRANSPORT, error=error.message
        )

    def _may_answer(self, reply: Pointer) -> bool:
        """Who asks faster than answers leave does not read either."""
        return self._hosted is not None and reply is not None and len(self._sent) < self._limits.max_answers

    def _on_hello(self, nonce: int, body: bytes, reply: Pointer) -> None:
        if self._hosted is None or not self._may_answer(reply):
            return
        if self._keys():
            self._send(reply, _GreetingMessage.WELCOME, nonce, bytes([_HelloReply.REFUSED]))
            raise TransferProofError("this cluster has a secret, and the initiator gives no proof of it")
        answer = _HelloReply.HERE if body == self._hosted.segment_id.encode() else _HelloReply.UNKNOWN
        self._send(reply, _GreetingMessage.WELCOME, nonce, bytes([answer]))

    def _on_proven_hello(self, nonce: int, body: bytes, reply: Pointer) -> None:
        """Proves nothing for another segment, as over TCP."""
        if self._hosted is None or not self._may_answer(reply):
            return
        try:
            if not (keys := self._keys()):
                raise TransferProofError("this node has no secret, and the initiator wants a proof of one")
            greeting = TargetGreeting(keys, _TRANSPORT)
            wanted, challenge = greeting.challenge(body)
        except TransferProofError:
            self._send(reply, _GreetingMessage.WELCOME, nonce, bytes([_HelloReply.REFUSED]))
            raise
        if wanted != self._hosted.segment_id:
            self._send(reply, _GreetingMessage.WELCOME, nonce, bytes([_HelloReply.UNKNOWN]))
            return
        while len(self._challenged) >= self._limits.max_answers:
            del self._challenged[next(iter(self._challenged))]
        self._challenged[_number(reply), nonce] = greeting
        self._send(reply, _GreetingMessage.CHALLENGE, nonce, challenge)

    def _on_proof(self, nonce: int, body: bytes, reply: Pointer) -> None:
        if self._hosted is None or not self._may_answer(reply):
            return
        greeting = self._challenged.pop((_number(reply), nonce), None)
        try:
            if greeting is None:
                raise TransferProofError("a proof that nobody was asked for on this connection")
            greeting.check(body)
        except TransferProofError:
            self._send(reply, _GreetingMessage.WELCOME, nonce, bytes([_HelloReply.REFUSED]))
            raise
        self._send(reply, _GreetingMessage.PLACE, nonce, seal_place(greeting.direction_keys, self._hosted.place))

    def _on_welcome(self, nonce: int, body: bytes, _: Pointer) -> None:
        """Four cases, if somebody waits for it: another segment is there; no proof of ours is taken; it is there, and
        gives no proof though we have a secret; it is there."""
        asked = self._asked.get(nonce)
        if asked is None or len(body) != 1:
            return
        del self._asked[nonce]
        endpoint = asked.endpoint
        if body[0] == _HelloReply.UNKNOWN:
            endpoint.fail(SegmentUnknownError(f"segment {endpoint.segment_id} is not at its address any more"))
        elif body[0] != _HelloReply.HERE:
            endpoint.fail(TransferProofError(f"what serves segment {endpoint.segment_id} takes no proof of ours"))
        elif asked.greeting is not None:
            endpoint.fail(TransferProofError(f"what serves segment {endpoint.segment_id} gives no proof of its own"))
        else:
            self._confirm(endpoint)

    def _on_challenge(self, nonce: int, body: bytes, _: Pointer) -> None:
        asked = self._asked.get(nonce)
        if asked is None or asked.greeting is None:
            return
        try:
            proof = asked.greeting.answer(body)
        except TransferProofError as error:
            del self._asked[nonce]
            asked.endpoint.fail(error)
            raise
        self._send(asked.endpoint.handle, _GreetingMessage.PROOF, nonce, proof)

    def _on_place(self, nonce: int, body: bytes, _: Pointer) -> None:
        asked = self._asked.get(nonce)
        if asked is None or asked.greeting is None or not asked.greeting.answered:
            return
        del self._asked[nonce]
        try:
            asked.endpoint.take_place(open_place(asked.greeting.direction_keys, body))
        except (TransferProtocolError, PeerUnreachableError) as error:
            asked.endpoint.fail(error)
            return
        self._confirm(asked.endpoint)

    def _confirm(self, endpoint: UcxEndpoint) -> None:
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


def _number(handle: Pointer) -> int:
    return int(ffi.cast("uintptr_t", handle))
