"""The parts of the OpenAPI document that the framework cannot see, as bodies are decoded by msgspec."""

from functools import cache
from typing import Any

import msgspec

from router.api.body import documented_body
from router.api.http_errors import ErrorReply

_REFUSALS = {
    400: "The request is wrong; `param` names the field",
    404: "There is no such model",
    408: "The body did not arrive in time",
    413: "The body is over the bound",
    415: "The body is packed (Content-Encoding)",
    503: "Overloaded, or no node can decode: try again after Retry-After seconds",
    504: "The request's time ran out",
}


@cache
def _schemas(*kinds: type) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    own, shared = msgspec.json.schema_components(
        kinds, schema_hook=lambda kind: {"description": "any JSON value"}, ref_template="#/components/schemas/{name}"
    )
    return list(own), shared


def _inline(schema: Any, shared: dict[str, Any]) -> Any:
    """`schema` with its references replaced: the document's components are the framework's."""
    if isinstance(schema, list):
        return [_inline(item, shared) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inline(shared[schema["$ref"].rpartition("/")[2]], shared)
    return {key: _inline(value, shared) for key, value in schema.items()}


@cache
def _schema(kind: type) -> Any:
    """Shared by all routes, and by all applications of a process: nobody changes it."""
    (own,), shared = _schemas(kind)
    return _inline(own, shared)


def _json(kind: type | None) -> dict[str, Any]:
    return {"application/json": {"schema": _schema(kind) if kind else {"type": "object"}}}


def answers(kind: type[msgspec.Struct], error: type[msgspec.Struct] = ErrorReply) -> dict[str, Any]:
    """Keyword arguments of a route whose body is `kind` and which answers with JSON or a stream. `error`: the body of
    its refusals."""
    responses: dict[int | str, dict[str, Any]] = {
        200: {
            "description": "The answer; with `stream` server-sent events that end with `[DONE]`",
            "content": {**_json(None), "text/event-stream": {"schema": {"description": "server-sent events"}}},
        }
    }
    for status, text in _REFUSALS.items():
        responses[status] = {"description": text, "content": _json(error)}
    body = {"required": True, "content": _json(documented_body(kind))}
    return {"responses": responses, "openapi_extra": {"requestBody": body}, "response_model": None}


def handed_on(summary: str) -> dict[str, Any]:
    """Keyword arguments of a POST route whose body and answer are JSON of others."""
    responses: dict[int | str, dict[str, Any]] = {200: {"description": summary, "content": _json(None)}}
    for status, text in (_REFUSALS | {502: "A server failed"}).items():
        responses[status] = {"description": text, "content": _json(ErrorReply)}
    body = {"required": True, "content": _json(None)}
    extra = {"requestBody": body}
    return {"summary": summary, "responses": responses, "openapi_extra": extra, "response_model": None}


def plain(summary: str, *, not_found: bool = False, unavailable: bool = False) -> dict[str, Any]:
    """Keyword arguments of a GET route that answers with JSON."""
    responses: dict[int | str, dict[str, Any]] = {200: {"description": summary, "content": _json(None)}}
    if not_found:
        responses[404] = {"description": "There is none", "content": _json(ErrorReply)}
    if unavailable:
        responses[503] = {"description": "Not now; the message says why", "content": _json(ErrorReply)}
    return {"summary": summary, "responses": responses, "response_model": None}


def orders(summary: str, *kinds: type[msgspec.Struct], error: type[msgspec.Struct] = ErrorReply) -> dict[str, Any]:
    """Keyword arguments of a POST route whose body is one of `kinds` and which answers with JSON."""
    responses: dict[int | str, dict[str, Any]] = {200: {"description": summary, "content": _json(None)}}
    for status, text in _REFUSALS.items():
        responses[status] = {"description": text, "content": _json(error)}
    bodies: list[type] = [documented_body(kind) if len(kinds) > 1 else kind for kind in kinds]
    schemas = [_schema(body) for body in bodies]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
    return {"summary": summary, "responses": responses, "openapi_extra": extra, "response_model": None}
