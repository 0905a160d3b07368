"""The OpenAPI document of the HTTP shell, made from the message types so that it cannot drift from them.

Pure. `endpoints` is the one list of paths; `app` serves exactly these.
"""

from dataclasses import dataclass
from functools import cache

import msgspec

from metadata_server import messages as m

JSON = "application/json"
MSGPACK = "application/msgpack"
FRAMES = "application/octet-stream"


class ErrorDetail(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; `param` is the path of the offending field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with status 400 and above."""

    error: ErrorDetail


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /health."""

    status: str
    epoch: str


class Nothing(msgspec.Struct, frozen=True, kw_only=True):
    """An answer that says only: done."""


@dataclass(frozen=True, slots=True)
class Post:
    """A call: one message in, one out."""

    request: type[msgspec.Struct]
    reply: type[msgspec.Struct]
    summary: str


POSTS: dict[str, Post] = {
    "/v1/nodes/register": Post(m.RegisterRequest, m.RegisterReply, "Join, or join again with manifests"),
    "/v1/nodes/heartbeat": Post(m.HeartbeatRequest, m.HeartbeatReply, "Renew a node's lease"),
    "/v1/nodes/leave": Post(m.LeaveRequest, Nothing, "Leave in good order"),
    "/v1/nodes/release_writer": Post(m.ReleaseWriterRequest, Nothing, "Give back what a node's dead engine held"),
    "/v1/objects/match": Post(m.MatchRequest, m.MatchReply, "Longest complete prefix"),
    "/v1/objects/wait": Post(m.WaitRequest, m.MatchReply, "Longest complete prefix, once it has grown"),
    "/v1/objects/reserve": Post(m.ReserveRequest, m.ReserveReply, "Room for chunks to be written"),
    "/v1/objects/commit": Post(m.ReplicaIds, m.CommitReply, "Make written chunks visible"),
    "/v1/objects/abort": Post(m.ReplicaIds, Nothing, "Give reservations back"),
    "/v1/objects/quarantine": Post(m.QuarantineRequest, Nothing, "Drop replicas that failed verification"),
    "/v1/leases/release": Post(m.ReleaseRequest, Nothing, "End read leases"),
}

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
    for status in statuses:
        answers[str(status)] = {"description": "Refused", "content": _content(_reference("ErrorBody"))}
    return answers


def _parameter(name: str, schema: _Schema, *, required: bool) -> _Schema:
    return {"name": name, "in": "query", "required": required, "schema": schema}


_SEQ: _Schema = {"type": "integer", "minimum": 0, "maximum": (1 << 63) - 1}
_FRAMES: _Schema = {FRAMES: {"schema": {"type": "string", "format": "binary"}}}


def _gets() -> dict[str, _Schema]:
    listing: _Schema = {"type": "array", "items": _reference("EventBatch")}
    epoch = _parameter("epoch", {"type": "string", "maxLength": 256, "default": ""}, required=False)
    from_seq = _parameter("from_seq", {**_SEQ, "default": 0}, required=False)
    required_seq = _parameter("from_seq", _SEQ, required=True)
    return {
        "/v1/nodes": {
            "summary": "Live nodes and segments",
            "responses": _answers(_content(_reference("NodesReply")), ()),
        },
        "/v1/stats": {
            "summary": "What is held, and counters",
            "responses": _answers(_content(_reference("Stats")), ()),
        },
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


@cache
def document() -> _Schema:
    """The document, as FastAPI's `openapi` returns it."""
    kinds = [kind for post in POSTS.values() for kind in (post.request, post.reply)]
    kinds += [m.NodesReply, m.Stats, m.EventBatch, ErrorBody, Health]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    paths: _Schema = {}
    for path, post in POSTS.items():
        ok = _content(_reference(post.reply.__name__))
        paths[path] = {
            "post": {
                "operationId": path,
                "summary": post.summary,
                "requestBody": {"required": True, "content": _content(_reference(post.request.__name__))},
                "responses": _answers(ok, (400, 413, 415, 503)),
            }
        }
    for path, operation in _gets().items():
        paths[path] = {"get": {"operationId": path, **operation}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvferry metadata server", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
