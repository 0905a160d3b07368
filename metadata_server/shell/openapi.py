"""The OpenAPI document of the HTTP shell, made from the table of endpoints, the message types and their bounds.

Pure. Owns the description of what is no call: streams, health, metrics; and the bounds of fields as JSON Schema.
"""

from functools import cache

import msgspec

from kvcore.partitions import MAX_PARTITIONS
from metadata_server import messages as m
from metadata_server.bounds import (
    MAX_ADDRESSES,
    MAX_BYTES,
    MAX_GENERATION,
    MAX_ITEMS,
    MAX_KEEP_SECONDS,
    MAX_NAME,
    MAX_SECONDS,
    MAX_SWITCHES,
    MAX_TEXT,
    MAX_WAIT_SECONDS,
)
from metadata_server.endpoints import ENDPOINTS

JSON = "application/json"
MSGPACK = "application/msgpack"
FRAMES = "application/octet-stream"
TEXT = "text/plain"


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What went wrong; `param` is the path of the offending field, `leader` the URL of who leads, where we do not."""

    message: str
    type: str
    param: str | None
    code: str
    leader: str = ""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with status 400 and above."""

    error: Fault


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /health."""

    status: str
    epoch: str
    leads: bool = True
    """False: one of several metadata servers, which sends callers to another."""


_Schema = dict[str, object]


def _reference(name: str) -> _Schema:
    return {"$ref": f"#/components/schemas/{name}"}


def _content(schema: _Schema, *, binary: bool = True) -> _Schema:
    content: _Schema = {JSON: {"schema": schema}}
    if binary:
        content[MSGPACK] = {"schema": {"type": "string", "format": "binary"}}
    return content


def _answers(ok: _Schema, statuses: tuple[int, ...]) -> _Schema:
    answers: _Schema = {"200": {"description": "Done", "content": ok}}
    for status in (*statuses, 500):
        answers[str(status)] = {"description": _ERRORS[status], "content": _content(_reference("ErrorBody"))}
    return answers


_ERRORS = {
    400: "Malformed or out of bounds; `param` is the path of the field",
    409: "The node is not taken in: another cluster's or model's, or its name is a living process's",
    413: "The body is too long",
    415: "Not a format that is spoken here",
    500: "A fault of the server; its log says more",
    503: "Not now: too many streams are open, or what must be written down cannot be",
}


def _parameter(name: str, schema: _Schema, *, required: bool) -> _Schema:
    return {"name": name, "in": "query", "required": required, "schema": schema}


_SEQ: _Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
_FRAMES: _Schema = {FRAMES: {"schema": {"type": "string", "format": "binary"}}}


def _queries() -> dict[str, _Schema]:
    listing: _Schema = {"type": "array", "items": _reference("EventBatch")}
    epoch = _parameter("epoch", {"type": "string", "maxLength": 256, "default": ""}, required=False)
    from_seq = _parameter("from_seq", {**_SEQ, "default": 0}, required=False)
    required_seq = _parameter("from_seq", _SEQ, required=True)
    return {
        "/v1/events": {
            "summary": "Endless stream of frames: u32le length, msgpack EventBatch",
            "parameters": [epoch, from_seq],
            "responses": _answers(_FRAMES, (400, 503)),
        },
        "/v1/replay": {
            "summary": "One batch of events from a position on",
            "parameters": [required_seq],
            "responses": _answers(_content(_reference("EventBatch")), (400,)),
        },
        "/v1/snapshot": {"summary": "The whole index as batches", "responses": _answers(_content(listing), ())},
        "/health": {
            "summary": "Whether it serves",
            "responses": _answers(_content(_reference("Health"), binary=False), ()),
        },
        "/metrics": {
            "summary": "Prometheus metrics",
            "responses": _answers({"text/plain": {"schema": {"type": "string"}}}, ()),
        },
    }


def _mooncake() -> _Schema:
    """Of `/metadata`, whose answers are text but for the value."""

    def call(name: str, summary: str, ok: str, statuses: tuple[int, ...], **more: object) -> _Schema:
        answers: _Schema = {"200": {"description": "Done", "content": {ok: {}}}}
        for status in (400, 401, *statuses, 503):
            answers[str(status)] = {"description": "Refused", "content": {TEXT: {"schema": {"type": "string"}}}}
        return {"operationId": f"/metadata {name}", "summary": summary, "responses": answers, **more}

    return {
        "parameters": [_parameter("key", {"type": "string", "minLength": 1}, required=True)],
        "get": call("get", "A value of Mooncake's clients", JSON, (404,)),
        "put": call(
            "put",
            "Write a value, unless a live client holds the name",
            TEXT,
            (408, 413, 415),
            requestBody={"required": True, "content": {JSON: {}}},
        ),
        "delete": call("delete", "Remove a value", TEXT, (404,)),
    }


# --- bounds of requests' fields; `endpoints` holds requests to them ---------------------------------------------------


def _whole(least: int, beyond: int) -> _Schema:
    return {"minimum": least, "maximum": beyond - 1}


_PRINTABLE: _Schema = {"description": "printable characters"}
_NAME: _Schema = {"minLength": 1, "maxLength": MAX_NAME, **_PRINTABLE}
_NAME_OR_NONE: _Schema = {"maxLength": MAX_NAME, **_PRINTABLE}
_TEXT: _Schema = {"maxLength": MAX_TEXT, **_PRINTABLE}
_KEY: _Schema = {"minLength": 24, "maxLength": 24, "description": "16 bytes"}
_OWNER: _Schema = {"minLength": 12, "maxLength": 12, "description": "8 bytes"}
_ITEMS: _Schema = {"maxItems": MAX_ITEMS}
_SECONDS: _Schema = {"exclusiveMinimum": 0, "maximum": MAX_SECONDS}
_KEEP_SECONDS: _Schema = {"exclusiveMinimum": 0, "maximum": MAX_KEEP_SECONDS}
_AGE: _Schema = {"minimum": 0, "maximum": MAX_KEEP_SECONDS}
_SECONDS_OR_NONE: _Schema = {"minimum": 0, "maximum": MAX_SECONDS}
_LENGTH = _whole(1, MAX_BYTES)
_EXTENT = {"key": _KEY, "offset": _whole(0, MAX_BYTES), "length": _LENGTH, "generation": _whole(0, MAX_GENERATION)}
_VERSION = _whole(1, MAX_ITEMS)
_NODE = {"node_id": _NAME, "incarnation": _whole(0, MAX_GENERATION)}
_KEYS = {**_ITEMS, "items": {"type": "string", "contentEncoding": "base64", **_KEY}}
_MATCH = {
    "keys": _KEYS,
    "lease_s": _SECONDS_OR_NONE,
    "node_id": _NAME_OR_NONE,
    "incarnation": _whole(0, MAX_GENERATION),
    "lease_name": _whole(1, MAX_GENERATION),
    "owner": _OWNER,
}

_FIELD_BOUNDS: dict[str, dict[str, _Schema]] = {
    "RegisterRequest": {
        "protocol": _VERSION,
        "oldest_protocol": _VERSION,
        "partitions": {"maxItems": MAX_PARTITIONS, "items": {"type": "string", **_NAME}},
        "partition": _whole(0, MAX_PARTITIONS),
        "segments": {"maxItems": MAX_NAME},
        "ttl_s": _SECONDS,
    },
    "NodeInfo": {
        "id": _NAME,
        "control_url": {
            "maxLength": MAX_TEXT,
            "pattern": "^(https?://[^/]+)?$",
            "description": "http://HOST:PORT or https, or nothing",
        },
        "incarnation": _whole(0, MAX_GENERATION),
        "fingerprint": {"pattern": "^(.{24})?$", "description": "16 bytes or none"},
        "cluster": _TEXT,
        "model": _TEXT,
        "tokenizer_digest": _NAME_OR_NONE,
        "protocol": _VERSION,
    },
    "Segment": {
        "id": _NAME,
        "host_id": _NAME_OR_NONE,
        "size_bytes": _LENGTH,
        "addresses": {"maxProperties": MAX_ADDRESSES, "additionalProperties": {"type": "string", **_TEXT}},
    },
    "Room": {"start": _whole(0, MAX_BYTES), "length": _LENGTH},
    "ManifestEntry": {**_EXTENT, "owner": _OWNER},
    "ReplicaRef": _EXTENT,
    "ImportRequest": {**_NODE, "segment_id": _NAME, "number": _whole(0, MAX_GENERATION), "entries": _ITEMS},
    "HeartbeatRequest": _NODE,
    "LeaveRequest": _NODE,
    "ReleaseWriterRequest": _NODE,
    "NodeOrderRequest": _NODE,
    "MoveChunksRequest": {**_NODE, "copied": _KEYS, "most_bytes": _LENGTH, "ttl_s": _SECONDS},
    "MatchRequest": _MATCH,
    "WaitRequest": {
        **_MATCH,
        "more_than": {"minimum": 0},
        "timeout_s": {"minimum": 0, "maximum": MAX_WAIT_SECONDS},
    },
    "ReserveRequest": {
        **_NODE,
        "items": _ITEMS,
        "prefer_segment": _NAME_OR_NONE,
        "ttl_s": _SECONDS,
        "owner": _OWNER,
        "write_name": _whole(1, MAX_GENERATION),
    },
    "TellHoldingsRequest": {**_NODE, "added": _KEYS, "removed": _KEYS},
    "FindHoldersRequest": {"keys": _KEYS},
    "PinRequest": {"keys": _KEYS, "ttl_s": _KEEP_SECONDS},
    "UnpinRequest": {"keys": _KEYS},
    "EvictRequest": {"keys": _KEYS},
    "ExpireRequest": {"keys": _KEYS, "ttl_s": _KEEP_SECONDS},
    "RebalanceRequest": {"most_bytes": _whole(0, MAX_BYTES)},
    "BlendSwitchesRequest": {"switches": {"maxItems": MAX_SWITCHES}},
    "KindSwitch": {
        "model": _TEXT,
        "kind": _NAME,
        "number": _whole(0, MAX_GENERATION),
        "off": _TEXT,
        "at": {"minimum": 0},
    },
    "OrphansRequest": {"known": _ITEMS, "older_s": _AGE},
    "RemoveOrphansRequest": {"known": _ITEMS, "ids": _ITEMS, "older_s": _AGE},
    "ReserveItem": {"key": _KEY, "length": _LENGTH},
    "ReplicaIds": {**_NODE, "replica_ids": _ITEMS},
    "ReleaseRequest": {"lease_ids": _ITEMS, "lease_names": _ITEMS},
    "RenewRequest": {**_NODE, "lease_ids": _ITEMS, "lease_s": _SECONDS},
    "QuarantineRequest": {"items": _ITEMS},
}
"""By message and field: what is added to the schema that the field's type gives."""


@cache
def document(*, mooncake: bool = False) -> _Schema:
    """The document, as FastAPI's `openapi` returns it; with `/metadata`, if that is served."""
    kinds = [kind for endpoint in ENDPOINTS for kind in (endpoint.request, endpoint.reply) if kind is not None]
    kinds += [m.EventBatch, ErrorBody, Health]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    for name, fields in _FIELD_BOUNDS.items():
        for field, bounds in fields.items():
            schemas[name]["properties"][field] |= bounds
    paths: _Schema = {}
    for endpoint in ENDPOINTS:
        operation: _Schema = {"operationId": endpoint.path, "summary": endpoint.summary}
        ok = _content(_reference(endpoint.reply.__name__))
        if endpoint.request is None:
            paths[endpoint.path] = {"get": {**operation, "responses": _answers(ok, ())}}
        else:
            body = {"required": True, "content": _content(_reference(endpoint.request.__name__))}
            operation |= {"requestBody": body, "responses": _answers(ok, endpoint.statuses)}
            paths[endpoint.path] = {"post": operation}
    for path, query in _queries().items():
        paths[path] = {"get": {"operationId": path, **query}}
    if mooncake:
        paths["/metadata"] = _mooncake()
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvferry metadata server", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
