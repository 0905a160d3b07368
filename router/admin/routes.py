"""The router's `/v1/nodes` routes. A thin shell: bodies in, reports out, errors as OpenAI's.

As all of the router's, they are open to whoever reaches it; each order leaves a line in the log.
"""

from dataclasses import dataclass
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import InvalidRequestError
from kvcore.process.audit import audited, caller
from kvcore.process.http_body import read_body
from metadata_server.cache_messages import NodeAction
from router.admin.nodes import NodeAdmin
from router.admin.reports import NodeOrderBody
from router.api import openapi
from router.api.limits import ApiLimits
from router.api.responses import JsonReply

_Body = TypeVar("_Body", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class AdminRoutes:
    """Adds its routes to an application."""

    nodes: NodeAdmin
    max_body_bytes: int
    limits: ApiLimits = ApiLimits()

    def add_to(self, app: FastAPI) -> None:
        """All of them."""

        @app.get("/v1/nodes", **openapi.plain("What each node does, and since when"))
        async def nodes() -> Response:
            return JsonReply(await self.nodes.report())

        texts: dict[NodeAction, str] = {
            "drain": "Give a node no new requests and no new chunks",
            "undrain": "Use a drained node again, or take a removed one back",
            "remove": "Forget a node that is gone for good",
        }
        for action, text in texts.items():
            self._order(app, action, text)

    def _order(self, app: FastAPI, action: NodeAction, text: str) -> None:
        @app.post(f"/v1/nodes/{action}", name=f"nodes_{action}", **openapi.orders(text, NodeOrderBody))
        async def endpoint(request: Request) -> Response:
            with audited(caller(request.client), f"nodes {action}") as line:
                body = _body_of(await self._read(request), NodeOrderBody)
                line.on = body.node + " move" * body.move + " force" * body.force
                return JsonReply(await self.nodes.order(action, body))

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self.max_body_bytes, timeout_s=self.limits.body_timeout_s)


def _body_of(raw: bytes, kind: type[_Body]) -> _Body:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no order about a node: {error}") from error


def add_no_nodes(app: FastAPI) -> None:
    """The routes of a router over vLLM servers that are not ours."""

    @app.api_route("/v1/nodes", methods=["GET"], include_in_schema=False)
    @app.api_route("/v1/nodes/{what}", methods=["POST"], include_in_schema=False)
    async def refused(request: Request) -> Response:
        raise InvalidRequestError(f"{request.url.path}: vLLM servers that run by themselves take no orders")
