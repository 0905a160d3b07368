"""What a request passes before its route: paths and methods as clients write them, and CORS for web pages."""

import re
from collections.abc import Collection

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from router.api.http_errors import error_reply
from router.api.responses import JsonReply

_LOOPBACK = re.compile(r"https?://(localhost|[\w-]+\.localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_EXPOSED = b"X-Request-Id, Retry-After, X-KVFerry-Approximate"
_MAX_AGE = b"600"


class PlainPaths:
    """Serves a path with a slash at its end as the one without, and HEAD as GET without a body. A redirect instead
    would cost a client its body, or name a host that it does not see."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http":
            path = scope["path"]
            if len(path) > 1 and path.endswith("/"):
                scope = {**scope, "path": path[:-1]}
            if scope["method"] == "HEAD":  # of the copy alone: the server leaves the body out by its own
                scope = {**scope, "method": "GET"}
        await self._app(scope, receive, send)


class Cors:
    """Lets the scripts of web pages read answers, where the page's origin is one of `origins`.

    An item of `origins` is an origin, or `loopback` for each page of the browser's own machine, or `*` for every page.
    Any other page's browser gets answers without the headers, and keeps them from its scripts; where it asks first, or
    should have, the refusal says which setting it is.
    """

    def __init__(self, app: ASGIApp, origins: Collection[str]) -> None:
        self._app = app
        self._origins = frozenset(origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        sent = {name: value for name, value in scope["headers"] if name == b"origin"} if scope["type"] == "http" else {}
        if not sent:
            await self._app(scope, receive, send)
            return
        origin, allowed = sent[b"origin"], self._allows(sent[b"origin"])
        own = [(b"access-control-allow-origin", b"*" if "*" in self._origins else origin), (b"vary", b"Origin")]
        wanted = {name: value for name, value in scope["headers"] if name.startswith(b"access-control-request-")}
        if scope["method"] == "OPTIONS" and b"access-control-request-method" in wanted:
            answer = _permission([*own, *_permitted(wanted)]) if allowed else _refusal(origin)
            await answer(scope, receive, send)
            return
        if not allowed:
            # Only JSON makes a browser ask first; what it sends without asking must not be worked on either.
            asks = scope["method"] != "POST" or _is_json(scope)
            await (self._app if asks else _refusal(origin))(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start":
                exposed = (b"access-control-expose-headers", _EXPOSED)
                message["headers"] = [*message["headers"], *own, exposed]
            await send(message)

        await self._app(scope, receive, send_with_cors)

    def _allows(self, origin: bytes) -> bool:
        text = origin.decode("latin-1")
        if "*" in self._origins or text in self._origins:
            return True
        return "loopback" in self._origins and _LOOPBACK.fullmatch(text) is not None


def _permission(headers: list[tuple[bytes, bytes]]) -> Response:
    return Response(headers={name.decode("latin-1"): value.decode("latin-1") for name, value in headers})


def _refusal(origin: bytes) -> Response:
    text = f"router.cors of the cluster file does not allow pages of {origin.decode('latin-1')!r} to use this router"
    return JsonReply(error_reply(403, text, code="origin_not_allowed"), 403)


def _permitted(wanted: dict[bytes, bytes]) -> list[tuple[bytes, bytes]]:
    """The answer to a preflight: any header may be sent, `Authorization` included, which `*` would not cover."""
    allowed = [(b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"), (b"access-control-max-age", _MAX_AGE)]
    if headers := wanted.get(b"access-control-request-headers"):
        allowed.append((b"access-control-allow-headers", headers))
    if b"access-control-request-private-network" in wanted:  # browsers ask before a public page reaches a private one
        allowed.append((b"access-control-allow-private-network", b"true"))
    return allowed


def _is_json(scope: Scope) -> bool:
    kinds = [value.partition(b";")[0].strip().lower() for name, value in scope["headers"] if name == b"content-type"]
    return kinds == [b"application/json"]
