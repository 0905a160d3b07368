"""The HTTP shell of a MetadataCore: routes, body formats and bounds, error bodies, streams, metrics.

Decides nothing about the index. Handlers read the raw body and skip the framework's own parsing (hot path). Every
answer of status 400 and above is an ErrorBody; a request's failure never becomes a traceback on the wire.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from email.utils import formatdate
from functools import partial

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcore.clock import Clock
from kvcore.errors import KVFerryError, MetadataProtocolError, NotLeaderError
from kvcore.process.proven_app import FRAME_SEAL
from kvcore.telemetry import METRICS_CONTENT_TYPE, Metrics, log_fields
from kvcore.trust.http_proof import FrameSeal
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS
from metadata_server.limits import ServerLimits
from metadata_server.mooncake.http_shell import PATH
from metadata_server.protocol import encode
from metadata_server.shell import metrics as own_metrics
from metadata_server.shell.calls import Calls, wants_json
from metadata_server.shell.openapi import FRAMES, JSON, MSGPACK, ErrorBody, Fault, Health, document

_CODES = {404: "not_found", 405: "method_not_allowed", 415: "unsupported_media_type"}
_logger = logging.getLogger("metadata_server")
_Handler = Callable[[Request], Awaitable[Response]]


def create_app(
    core: MetadataCore,
    clock: Clock,
    metrics: Metrics,
    max_body_bytes: int,
    limits: ServerLimits = ServerLimits(),
    *,
    mooncake: ASGIApp | None = None,
) -> FastAPI:
    """The application. `core.run` and its end are the caller's. `mooncake`: what answers `/metadata`."""
    observe = own_metrics.register(core, clock, metrics)
    calls = Calls(
        core, clock, observe=observe, answer_error=_answer_error, max_body_bytes=max_body_bytes, limits=limits
    )
    app = _App(calls, mooncake)
    app.openapi = partial(document, mooncake=mooncake is not None)  # type: ignore[method-assign]
    for path in calls.paths:  # for what is wrong with the method; the calls themselves never get here
        app.router.routes.append(Route(path, calls, methods=["POST"]))
    for path, get in _gets(core, metrics, limits.send_s, clock, observe).items():
        app.router.add_route(path, get, methods=["GET"])
    for kind, handler in _ON_ERROR.items():
        app.add_exception_handler(kind, handler)
    return app


class _App(FastAPI):
    """FastAPI with a short way for the calls: its stack costs a third of a call's time and does nothing for them."""

    def __init__(self, calls: Calls, mooncake: ASGIApp | None) -> None:
        super().__init__(docs_url=None, redoc_url=None, openapi_url="/openapi.json", redirect_slashes=False)
        self._calls = calls
        self._mooncake = mooncake

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http" and scope["method"] == "POST" and scope["path"] in self._calls.paths:
            await self._calls(scope, receive, send)
        elif scope["type"] == "http" and self._mooncake is not None and scope["path"] == PATH:
            await self._mooncake(scope, receive, send)
        else:
            await super().__call__(scope, receive, send)


def _gets(
    core: MetadataCore,
    metrics: Metrics,
    send_s: float,
    clock: Clock,
    observe: Callable[[str], Callable[[float], None]],
) -> dict[str, _Handler]:
    def plain(path: str) -> _Handler:
        observe_call = observe(path)

        async def handle(request: Request) -> Response:
            json, started = _wants_json(request, True), clock.now()
            reply = await core.dispatch(path, b"", json=json)
            observe_call(clock.now() - started)
            return Response(reply, media_type=JSON if json else MSGPACK)

        return handle

    one_snapshot = asyncio.Lock()

    async def events(request: Request) -> Response:
        epoch, from_seq = request.query_params.get("epoch", ""), _from_seq(request, default=0)
        source = core.events(epoch, from_seq, request.client.host if request.client else "")
        return _Frames(source, await anext(source, None), send_s, request.scope.get(FRAME_SEAL))

    async def replay(request: Request) -> Response:
        json = _wants_json(request, True)
        batch = core.replay(_from_seq(request, default=None))
        return Response(encode(batch, json=json), media_type=JSON if json else MSGPACK)

    async def snapshot(request: Request) -> Response:
        json = _wants_json(request, True)
        async with one_snapshot:  # each is held whole, until its length is known
            batches = [batch async for batch in core.encoded_snapshot(json=json)]
        body = b"[" + b",".join(batches) + b"]" if json else b"\xdd" + len(batches).to_bytes(4) + b"".join(batches)
        return Response(body, media_type=JSON if json else MSGPACK)

    async def health(_: Request) -> Response:
        state = Health(status="ok", epoch=core.state.epoch, leads=core.leader.leads)
        date = {"Date": formatdate(usegmt=True)}  # by which the doctor compares clocks
        return Response(encode(state, json=True), media_type=JSON, headers=date)

    async def expose(_: Request) -> Response:
        return Response(metrics.render(), headers={"Content-Type": METRICS_CONTENT_TYPE})

    return {
        **{endpoint.path: plain(endpoint.path) for endpoint in ENDPOINTS if endpoint.request is None},
        "/v1/events": events,
        "/v1/replay": replay,
        "/v1/snapshot": snapshot,
        "/health": health,
        "/metrics": expose,
    }


def _wants_json(request: Request, default: bool) -> bool:
    return wants_json(request.headers.get("accept", ""), default=default)


def _from_seq(request: Request, *, default: int | None) -> int:
    text = request.query_params.get("from_seq")
    if text is None and default is not None:
        return default
    if text is None or not (text.isascii() and text.isdecimal() and len(text) <= 19 and int(text) < 1 << 63):
        raise MetadataProtocolError("from_seq: not an integer >= 0", param="from_seq")
    return int(text)


class _Frames(StreamingResponse):
    """u32le length and batch, each sent within a deadline; whatever ends it ends the source too."""

    def __init__(
        self, source: AsyncGenerator[bytes, None], first: bytes | None, send_s: float, seal: FrameSeal | None
    ) -> None:
        super().__init__(self._frames(first), media_type=FRAMES)
        self._source = source
        self._sealed = seal.seal if seal is not None else bytes
        self._send_s = send_s

    async def _frames(self, first: bytes | None) -> AsyncGenerator[bytes, None]:
        if first is not None:
            yield self._frame(first)
        async for batch in self._source:
            yield self._frame(batch)

    def _frame(self, batch: bytes) -> bytes:
        payload = self._sealed(batch)
        return len(payload).to_bytes(4, "little") + payload

    async def stream_response(self, send: Send) -> None:
        """Send until the source ends, the client leaves or stops reading."""

        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._send_s):
                await send(message)

        async with aclosing(self._source):
            try:
                await super().stream_response(send_in_time)
            except TimeoutError:
                log_fields(_logger, logging.WARNING, "subscriber_cut", stalled_s=self._send_s)
                raise ClientDisconnect from None


# --- errors ------------------------------------------------------------------------------------------------------


def _error(request: Request, status: int, detail: Fault, headers: dict[str, str] | None = None) -> Response:
    json = _wants_json(request, "msgpack" not in request.headers.get("content-type", ""))
    body = encode(ErrorBody(error=detail), json=json)
    return Response(body, status, headers=headers, media_type=JSON if json else MSGPACK)


async def _on_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, KVFerryError)
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    leader = error.leader if isinstance(error, NotLeaderError) else ""
    detail = Fault(message=error.message, type=kind, param=error.param, code=error.code, leader=leader)
    return _error(request, error.http_status, detail, {"Retry-After": "1"} if error.http_status == 503 else None)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    code = _CODES.get(error.status_code, "invalid_request")
    text = f"{request.method} {request.url.path[:200]}: {error.detail}"
    detail = Fault(message=text, type="invalid_request_error", param=None, code=code)
    return _error(request, error.status_code, detail, dict(error.headers or {}))


async def _on_disconnect(request: Request, _: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it


async def _on_failure(request: Request, error: Exception) -> Response:
    log_fields(_logger, logging.ERROR, "request_failed", path=request.url.path, error=repr(error))
    detail = Fault(message="internal error; see the log", type="server_error", param=None, code="internal_error")
    return _error(request, 500, detail)


async def _answer_error(request: Request, error: Exception) -> Response:
    handler = next(handler for kind, handler in _ON_ERROR.items() if isinstance(error, kind))
    return await handler(request, error)


_ON_ERROR: dict[type[Exception], Callable[[Request, Exception], Awaitable[Response]]] = {
    KVFerryError: _on_error,
    HTTPException: _on_http_error,
    ClientDisconnect: _on_disconnect,
    Exception: _on_failure,
}
"""Who answers for what: the framework asks it, and the short way; the first that fits, the general one last."""
