"""What a request passes before its route: paths and methods as clients write them, and CORS for web pages."""

import re
from collections.abc import Collection
from functools import partial

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvcore.process.http_exchange import Headers, straight
from router.api.anthropic.errors import ANTHROPIC_PATHS
from router.api.http_errors import error_reply
from router.api.new_ids import new_id
from router.api.responses import JsonReply
from router.metrics import RouterMetrics

_GOOD_ID = re.compile(r"[A-Za-z0-9._:\-]{1,128}")
_LOOPBACK = re.compile(r"https?://(localhost|[\w-]+\.localhost|127\.\d+\.\d+\.\d+|\[::1\])(:\d+)?")
_EXPOSED = b"X-Request-Id, Retry-After, X-KVFerry-Approximate"
_MAX_AGE = b"600"


class RequestIds:
    """Gives each request an id (the client's X-Request-Id where it is a sane one), has it echoed, counts the answer."""

    def __init__(self, metrics: RouterMetrics) -> None:
        self._metrics = metrics

    def name(self, scope: Scope) -> None:
        """The request has its id from here on, as `request_id`."""
        for name, value in scope["headers"]:
            if name == b"x-request-id":
                if _GOOD_ID.fullmatch(given := value.decode("latin-1")):
                    scope["request_id"] = given
                    return
                break
        scope["request_id"] = new_id()

    def answered(self, scope: Scope, status: int) -> Headers:
        """The request has an answer, with these headers."""
        self._metrics.answered(getattr(scope.get("route"), "path", "other"), status)
        return [(b"x-request-id", scope["request_id"].encode())]


class StraightWay:
    """Posts to `paths` that no web page sends, which are nearly all, go straight to what guards the routes: of all that
    others pass they need an id alone. So nothing stands between what answers them and their connection, into which it
    can be written. Others go the `other` way."""

    def __init__(self, ids: RequestIds, guarded: ASGIApp, paths: Collection[str], *, other: ASGIApp) -> None:
        """`paths`: Anthropic's among them go the other way, as their errors have another form."""
        self._ids, self._guarded, self._app = ids, guarded, other
        self._paths = frozenset(paths) - frozenset(ANTHROPIC_PATHS)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] == "http" and scope["path"] in self._paths and scope["method"] == "POST":
            exchange = straight(scope, send)
            if exchange is not None and b"origin" not in [name for name, _ in scope["headers"]]:
                self._ids.name(scope)
                exchange.on_head += (partial(self._ids.answered, scope),)
                await self._guarded(scope, receive, send)
                return
        await self._app(scope, receive, send)


class IdentifiedApp:
    """An application whose requests have ids."""

    def __init__(self, app: ASGIApp, ids: RequestIds) -> None:
        self._app, self._ids = app, ids

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._ids.name(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *self._ids.answered(scope, message["status"])]
            await send(message)

        await self._app(scope, receive, send_with_id)


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
