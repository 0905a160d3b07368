"""The OpenAPI document of the HTTP shell, made from the table of endpoints and the message types.

Pure. Owns the description of what is no call: streams, health, metrics.
"""

from functools import cache

import msgspec

from metadata_server import messages as m
from metadata_server.endpoints import ENDPOINTS

JSON = "application/json"
MSGPACK = "application/msgpack"
FRAMES = "application/octet-stream"


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong; `param` is the path of the offending field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """Body of every answer with status 400 and above."""

    error: Fault


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """Body of /health."""

    status: str
    epoch: str


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


@cache
def document() -> _Schema:
    """The document, as FastAPI's `openapi` returns it."""
    kinds = [kind for endpoint in ENDPOINTS for kind in (endpoint.request, endpoint.reply) if kind is not None]
    kinds += [m.EventBatch, ErrorBody, Health]
    _, schemas = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
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
    return {
        "openapi": "3.1.0",
        "info": {"title": "kvferry metadata server", "version": "1"},
        "paths": paths,
        "components": {"schemas": schemas},
    }
