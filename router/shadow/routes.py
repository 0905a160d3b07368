"""The router's `/v1/blend` routes: what reuse costs, and documents turned on again. A thin shell."""

from dataclasses import dataclass

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import InvalidRequestError
from kvcore.process.audit import audited
from kvcore.process.http_body import read_body
from router.api import openapi
from router.api.limits import ApiLimits
from router.api.responses import JsonReply
from router.shadow.comparing import ShadowComparisons
from router.shadow.gate import BlendGate
from router.shadow.reports import BlendOrder, BlendTurned
from router.tenants.callers import asker

_ABOUT = "/v1/blend"
_REFUSED = "vLLM servers that run by themselves reuse no documents, and compare nothing"


@dataclass(frozen=True, slots=True)
class BlendRoutes:
    """Adds its routes to an application."""

    gate: BlendGate
    shadow: ShadowComparisons
    max_body_bytes: int
    limits: ApiLimits = ApiLimits()

    def add_to(self, app: FastAPI) -> None:
        """Both of them."""

        @app.get(_ABOUT, **openapi.plain("What the reuse of documents costs, and whether it is on"))
        async def look() -> Response:
            return JsonReply(self.shadow.report())

        @app.post(f"{_ABOUT}/on", **openapi.orders("Reuse documents again that were turned off", BlendOrder))
        async def turn_on(request: Request) -> Response:
            with audited(asker(request.scope), "blend on") as line:
                body = await read_body(request, self.max_body_bytes, timeout_s=self.limits.body_timeout_s)
                order = _order_in(body or b"{}")
                line.on = " ".join(order.kinds) if order.kinds is not None else "all"
                turned = self._turn_on(order)
                line.outcome = f"{len(turned)} turned on"
                return JsonReply(BlendTurned(kinds=turned))

    def _turn_on(self, order: BlendOrder) -> list[str]:
        if self.gate.mode == "off":
            raise InvalidRequestError("kv.blend.mode of the cluster file is off: set it to first_k, and restart")
        try:
            return self.gate.turn_on(order.kinds)
        except KeyError as error:
            known = ", ".join(kind.kind for kind in self.gate.report().kinds) or "none yet"
            raise InvalidRequestError(
                f"kinds: no documents of kind {error} were compared; known: {known}", param="kinds"
            ) from None


def _order_in(raw: bytes) -> BlendOrder:
    try:
        return msgspec.json.decode(raw, type=BlendOrder)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no order about documents: {error}") from error


def add_no_blend(app: FastAPI) -> None:
    """The routes of a router over vLLM servers that are not ours."""

    @app.api_route(_ABOUT, methods=["GET"], include_in_schema=False)
    @app.api_route(f"{_ABOUT}/on", methods=["POST"], include_in_schema=False)
    async def refused(request: Request) -> Response:
        raise InvalidRequestError(f"{request.url.path}: {_REFUSED}")
