"""Bodies of the metadata protocol: decoding with bounds, encoding. Checked here so that the state need not.

Owns what a request may say (lengths, ranges, names); a violation is a MetadataProtocolError whose `param` is the path
of the field. Msgpack and JSON are the same structures.
"""

import re
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

import msgspec

from kvcore.chunk_keys import KEY_BYTES
from kvcore.errors import MetadataProtocolError
from kvcore.types import ChunkKey, ReplicaRef
from metadata_server.messages import (
    HeartbeatRequest,
    LeaveRequest,
    ManifestEntry,
    MatchRequest,
    QuarantineRequest,
    RegisterRequest,
    ReleaseRequest,
    ReleaseWriterRequest,
    ReplicaIds,
    ReserveRequest,
    WaitRequest,
)

MAX_ITEMS = 65_536
"""Keys, items or ids in one request; manifest entries are bounded by the body's size."""
MAX_SECONDS = 3600.0
MAX_WAIT_S = 600.0
MAX_NAME = 256
MAX_TEXT = 4096
MAX_BYTES = 1 << 50
_MAX_GENERATION = 1 << 63
_MAX_ADDRESSES = 16
_FIELD = re.compile(r" - at `\$\.?([^`]*)`$")
_T = TypeVar("_T")

Request = (
    RegisterRequest
    | HeartbeatRequest
    | LeaveRequest
    | ReleaseWriterRequest
    | MatchRequest
    | WaitRequest
    | ReleaseRequest
    | ReserveRequest
    | ReplicaIds
    | QuarantineRequest
)


class Decoder:
    """Bodies of one type, in either format."""

    def __init__(self, kind: type[Request]) -> None:
        self._msgpack = msgspec.msgpack.Decoder(kind)
        self._json = msgspec.json.Decoder(kind)
        self._check = cast(Callable[[Request], None], _CHECKS[kind])

    def decode(self, body: bytes, *, json: bool) -> Request:
        """The checked request. Raises MetadataProtocolError."""
        try:
            request = self._json.decode(body) if json else self._msgpack.decode(body)
        except msgspec.ValidationError as error:
            found = _FIELD.search(str(error))
            raise MetadataProtocolError(str(error), param=found.group(1) if found else None) from error
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            kind = "JSON" if json else "msgpack"
            raise MetadataProtocolError(f"the body is not valid {kind}: {error}") from error
        self._check(request)
        return request


def encode(reply: object, *, json: bool) -> bytes:
    """A reply's bytes."""
    return msgspec.json.encode(reply) if json else msgspec.msgpack.encode(reply)


def _require(ok: bool, param: str, what: str) -> None:
    if not ok:
        raise MetadataProtocolError(f"{param}: {what}", param=param)


def _name(value: str, param: str, *, empty: bool = False) -> None:
    _require(len(value) <= MAX_NAME and (empty or bool(value)) and value.isprintable(), param, "not a usable name")


def _text(value: str, param: str) -> None:
    _require(len(value) <= MAX_TEXT and value.isprintable(), param, "too long or not printable")


def _seconds(value: float, param: str, *, zero: bool = False, most: float = MAX_SECONDS) -> None:
    _require((value >= 0 if zero else value > 0) and value <= most, param, f"not within 0 .. {most:g} seconds")


def _incarnation(value: int, param: str) -> None:
    _require(0 <= value < _MAX_GENERATION, param, "out of range")


def _items(values: Sequence[object], param: str) -> None:
    _require(len(values) <= MAX_ITEMS, param, f"more than {MAX_ITEMS} items")


def _key(key: ChunkKey, param: str) -> None:
    _require(len(key) == KEY_BYTES, param, f"a chunk key has {KEY_BYTES} bytes, got {len(key)}")


def _keys(keys: Sequence[ChunkKey]) -> None:
    _items(keys, "keys")
    for at, key in enumerate(keys):
        if len(key) != KEY_BYTES:
            _key(key, f"keys[{at}]")


def _extent(entry: ManifestEntry | ReplicaRef, param: str) -> None:
    _key(entry.key, f"{param}.key")
    _require(0 <= entry.offset < MAX_BYTES, f"{param}.offset", "out of range")
    _require(0 < entry.length < MAX_BYTES, f"{param}.length", "out of range")
    _require(0 <= entry.generation < _MAX_GENERATION, f"{param}.generation", "out of range")


def _node(request: HeartbeatRequest | LeaveRequest | ReleaseWriterRequest) -> None:
    _name(request.node_id, "node_id")
    _incarnation(request.incarnation, "incarnation")


def _register(request: RegisterRequest) -> None:
    node = request.node
    _name(node.id, "node.id")
    _incarnation(node.incarnation, "node.incarnation")
    _text(node.control_url, "node.control_url")
    _require(len(node.fingerprint) in (0, 16), "node.fingerprint", "has 16 bytes or none")
    _seconds(request.ttl_s, "ttl_s")
    _require(len(request.segments) <= MAX_NAME, "segments", "too many")
    for at, manifest in enumerate(request.segments):
        segment, path = manifest.segment, f"segments[{at}]"
        _name(segment.id, f"{path}.segment.id")
        _name(segment.host_id, f"{path}.segment.host_id", empty=True)
        _require(0 < segment.size_bytes < MAX_BYTES, f"{path}.segment.size_bytes", "out of range")
        _require(len(segment.addresses) <= _MAX_ADDRESSES, f"{path}.segment.addresses", "too many")
        for transport, address in segment.addresses.items():
            _name(transport, f"{path}.segment.addresses")
            _text(address, f"{path}.segment.addresses")
        for index, entry in enumerate(manifest.entries):
            _extent(entry, f"{path}.entries[{index}]")


def _match(request: MatchRequest | WaitRequest) -> None:
    _keys(request.keys)
    _seconds(request.lease_s, "lease_s", zero=True)
    _name(request.node_id, "node_id", empty=True)
    _incarnation(request.incarnation, "incarnation")


def _wait(request: WaitRequest) -> None:
    _match(request)
    _require(request.more_than >= 0, "more_than", "negative")
    _seconds(request.timeout_s, "timeout_s", zero=True, most=MAX_WAIT_S)


def _release(request: ReleaseRequest) -> None:
    _items(request.lease_ids, "lease_ids")


def _reserve(request: ReserveRequest) -> None:
    _name(request.node_id, "node_id")
    _incarnation(request.incarnation, "incarnation")
    _seconds(request.ttl_s, "ttl_s")
    _name(request.prefer_segment or "", "prefer_segment", empty=True)
    _items(request.items, "items")
    for at, item in enumerate(request.items):
        _key(item.key, f"items[{at}].key")
        _require(0 < item.length < MAX_BYTES, f"items[{at}].length", "out of range")


def _replica_ids(request: ReplicaIds) -> None:
    _name(request.node_id, "node_id")
    _incarnation(request.incarnation, "incarnation")
    _items(request.replica_ids, "replica_ids")


def _quarantine(request: QuarantineRequest) -> None:
    _items(request.items, "items")
    for at, item in enumerate(request.items):
        _extent(item.replica, f"items[{at}].replica")


_CHECKS: dict[type[Request], object] = {
    RegisterRequest: _register,
    HeartbeatRequest: _node,
    LeaveRequest: _node,
    ReleaseWriterRequest: _node,
    MatchRequest: _match,
    WaitRequest: _wait,
    ReleaseRequest: _release,
    ReserveRequest: _reserve,
    ReplicaIds: _replica_ids,
    QuarantineRequest: _quarantine,
}
