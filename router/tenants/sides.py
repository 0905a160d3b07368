"""Which requests a router answers on its public port and which on the port of its own for operators.

Invariant: what is not named here as a client's is answered on the operators' port alone, once there is one.
"""

from starlette.types import ASGIApp, Receive, Scope, Send

from kvcore.process.certified_app import PEER_NAMES
from router.api.http_errors import error_reply
from router.api.responses import JsonReply
from router.tenants.paths import OPEN, is_clients

_SIDE = "kvferry.operators_side"


class OperatorsSide:
    """What the operators' listener serves: the same application, told from where a request comes."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        scope[_SIDE] = True
        await self._app(scope, receive, send)


def is_operators(scope: Scope) -> bool:
    """Whether a request came in by the operators' listener."""
    return bool(scope.get(_SIDE))


def is_certified(scope: Scope) -> bool:
    """Whether it came there by a connection that has shown a certificate of the cluster."""
    return is_operators(scope) and scope.get(PEER_NAMES) is not None


class ClientsSide:
    """Passes on what comes in by the operators' listener, and by the other one what is a client's. `has_keys`: clients
    have API keys, so that each sees its own requests; without any nobody is shown requests there."""

    def __init__(self, app: ASGIApp, *, has_keys: bool) -> None:
        self._app, self._has_keys = app, has_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry."""
        path = scope.get("path", "")
        own = scope["type"] != "http" or path in OPEN or is_clients(path, records=self._has_keys)
        if own or is_operators(scope):
            await self._app(scope, receive, send)
            return
        text = f"{scope['method']} {path}: the router answers this on router.admin_port"
        await JsonReply(error_reply(404, text, code="unknown_route"), 404, {"Connection": "close"})(
            scope, receive, send
        )
