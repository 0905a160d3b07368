"""What a node and its engine's process say to each other, version 1. Tagged msgpack structs, one a frame.

The node speaks first (EngineHello); the child answers Ready or Refused. After that calls are multiplexed by `id`, which
the node counts up and never uses twice. A stream's child sends at most STREAM_WINDOW deltas that the node has not
taken.
"""

import msgspec

from kvcore.config.fields import ByteSize
from kvcore.config.schema import ClusterConfig
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import EngineInfo, EngineStats, GenerateRequest, PrefillRequest, PrefillResult, TokenDelta

PROTOCOL_VERSION = 1
STREAM_WINDOW = 256


class _Frame(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """To the child: it refuses what it does not know."""


class _FromChild(msgspec.Struct, frozen=True, kw_only=True):
    """From the child: the node ignores fields that it does not know."""


class EngineHello(_Frame, frozen=True, kw_only=True, tag="hello"):
    """All that the child needs to build its engine and its own access to the store."""

    version: int = PROTOCOL_VERSION
    config: ClusterConfig
    node_name: str
    incarnation: int


class PrefillCall(_Frame, frozen=True, kw_only=True, tag="prefill"):
    """Answered by Prefilled or Failure."""

    id: int
    request: PrefillRequest


class GenerateCall(_Frame, frozen=True, kw_only=True, tag="generate"):
    """Answered by StreamedDelta frames, then Done or Failure."""

    id: int
    request: GenerateRequest


class CompareCall(_Frame, frozen=True, kw_only=True, tag="compare"):
    """Answered by Compared or Failure."""

    id: int
    request: CompareRequest


class EndHandoffCall(_Frame, frozen=True, kw_only=True, tag="end_handoff"):
    """Answered by Done or Failure."""

    id: int
    request_id: str


class AbortCall(_Frame, frozen=True, kw_only=True, tag="abort"):
    """Answered by Done or Failure. Names a request as its client does, not a call."""

    id: int
    request_id: str


class StatsCall(_Frame, frozen=True, kw_only=True, tag="ask_stats"):
    """Answered by Sample or Failure."""

    id: int
    exposition: bool = False
    """Whether `Sample.exposition` is wanted."""


class Ping(_Frame, frozen=True, kw_only=True, tag="ping"):
    """Answered by Pong, at once, whatever else is going on."""


class Cancel(_Frame, frozen=True, kw_only=True, tag="cancel"):
    """Nobody waits for call `id` any more. Answered by that call's Done or Failure, if it had not ended already."""

    id: int


class Credit(_Frame, frozen=True, kw_only=True, tag="credit"):
    """`count` more deltas of stream `id` were taken."""

    id: int
    count: int


class Shutdown(_Frame, frozen=True, kw_only=True, tag="shutdown"):
    """Leave the engine in good order and exit with status 0."""


ToChild = (
    EngineHello
    | PrefillCall
    | GenerateCall
    | CompareCall
    | EndHandoffCall
    | AbortCall
    | StatsCall
    | Ping
    | Cancel
    | Credit
    | Shutdown
)


class Ready(_FromChild, frozen=True, kw_only=True, tag="ready"):
    """The engine is entered: calls may come."""

    version: int = PROTOCOL_VERSION
    info: EngineInfo


class Refused(_FromChild, frozen=True, kw_only=True, tag="refused"):
    """The engine cannot start; the child exits. `code` names a class of kvcore.errors."""

    code: str
    message: str


class Prefilled(_FromChild, frozen=True, kw_only=True, tag="prefilled"):
    """Ends a PrefillCall."""

    id: int
    result: PrefillResult


class Compared(_FromChild, frozen=True, kw_only=True, tag="compared"):
    """Ends a CompareCall."""

    id: int
    reply: CompareReply


class StreamedDelta(_FromChild, frozen=True, kw_only=True, tag="delta"):
    """One more delta of a stream."""

    id: int
    delta: TokenDelta


class Done(_FromChild, frozen=True, kw_only=True, tag="done"):
    """Ends a call that has no other result."""

    id: int


class Failure(_FromChild, frozen=True, kw_only=True, tag="failure"):
    """Ends a call. `code` names a class of kvcore.errors."""

    id: int
    code: str
    message: str


class Sample(_FromChild, frozen=True, kw_only=True, tag="sample"):
    """Ends an StatsCall."""

    id: int
    stats: EngineStats
    store: dict[str, int] = {}
    """Totals that the child's KVStore counts."""
    transports: dict[str, str] = {}
    """Segment id of a peer -> transport that its last transfer took."""
    exposition: bytes = b""
    """Metrics that the engine itself keeps (vLLM's), as Prometheus text, labelled with the node."""


class Pong(_FromChild, frozen=True, kw_only=True, tag="pong"):
    """The child's loop turns."""


FromChild = Ready | Refused | Prefilled | Compared | StreamedDelta | Done | Failure | Sample | Pong


def _encode_custom(value: object) -> int:
    if isinstance(value, ByteSize):
        return int(value)
    raise NotImplementedError(f"{type(value).__name__} does not go on the wire")


def _decode_custom(kind: type, value: object) -> object:
    if kind is ByteSize and isinstance(value, int):
        return ByteSize(value)
    raise NotImplementedError(f"{kind.__name__} does not come from the wire")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_custom)
_to_child: msgspec.msgpack.Decoder[ToChild] = msgspec.msgpack.Decoder(ToChild, dec_hook=_decode_custom)
_from_child: msgspec.msgpack.Decoder[FromChild] = msgspec.msgpack.Decoder(FromChild)


def encode(frame: ToChild | FromChild) -> bytes:
    """The frame's payload."""
    return _encoder.encode(frame)


def decode_to_child(payload: bytes) -> ToChild:
    """Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _to_child.decode(payload)


def decode_from_child(payload: bytes) -> FromChild:
    """Raises msgspec.ValidationError or msgspec.DecodeError."""
    return _from_child.decode(payload)
