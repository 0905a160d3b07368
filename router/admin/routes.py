"""The router's `/v1/nodes` and `/v1/janitor` routes. A thin shell: bodies in, reports out, errors as OpenAI's.

They are open to whoever reaches the router; in a cluster with a secret they need its proof. What is asked of others is
asked once at a time. Each order leaves a line in the log.
"""

from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import InvalidRequestError
from kvcore.process.audit import audited
from kvcore.process.http_body import read_body
from metadata_server.cache_messages import NodeAction, RebalanceRequest
from router.admin.janitor import ClusterJanitor
from router.admin.looks import SharedLooks
from router.admin.nodes import NodeAdmin
from router.admin.rebalance import SegmentRebalance
from router.admin.reports import JanitorOrder, NodeOrderBody, NodeTrialBody
from router.api import openapi
from router.api.limits import ApiLimits
from router.api.responses import JsonReply
from router.tenants.callers import asker

_Body = TypeVar("_Body", bound=msgspec.Struct)
A_DAY = 86_400.0
OLDER = {"minimum": 0, "maximum": 366 * A_DAY}


@dataclass(frozen=True, slots=True)
class AdminRoutes:
    """Adds its routes to an application."""

    nodes: NodeAdmin
    rebalance: SegmentRebalance
    janitor: ClusterJanitor
    max_body_bytes: int
    limits: ApiLimits = ApiLimits()
    looks: SharedLooks = field(default_factory=SharedLooks)

    def add_to(self, app: FastAPI) -> None:
        """All of them."""

        @app.get("/v1/nodes", **openapi.plain("What each node does, and since when", unavailable=True))
        async def nodes() -> Response:
            return JsonReply(await self.looks.of("nodes", self.nodes.report))

        texts: dict[NodeAction, str] = {
            "drain": "Give a node no new requests and no new chunks",
            "undrain": "Use a drained node again, or take a removed one back",
            "remove": "Forget a node that is gone for good",
            "role": "Have a node serve as a prefiller or a decoder, whatever its file says",
        }
        for action, text in texts.items():
            self._order(app, action, text)
        self._add_trial(app)
        self._add_rebalance(app)
        self._add_janitor(app)

    def _add_trial(self, app: FastAPI) -> None:
        @app.post("/v1/nodes/try", **openapi.orders("Have a node make one token, drained or not", NodeTrialBody))
        async def trial(request: Request) -> Response:
            with audited(asker(request.scope), "nodes try") as line:
                body = _body_of(await self._read(request), NodeTrialBody, "about a node")
                line.on = body.node
                tried = await self.nodes.try_out(body)
                line.outcome = "failed" if tried.problem else "ok"
                return JsonReply(tried)

    def _add_rebalance(self, app: FastAPI) -> None:
        @app.get("/v1/nodes/rebalance", **openapi.plain("How full segments are", unavailable=True))
        async def look() -> Response:
            return JsonReply(await self.looks.of("rebalance", self.rebalance.look))

        @app.post("/v1/nodes/rebalance", **openapi.orders("Even out how full segments are", RebalanceRequest))
        async def order(request: Request) -> Response:
            with audited(asker(request.scope), "nodes rebalance") as line:
                body = _body_of(await self._read(request), RebalanceRequest, "to even segments out")
                line.on = f"{body.action} {body.most_bytes or ''}".rstrip()
                return JsonReply(await self.rebalance.order(body))

    def _add_janitor(self, app: FastAPI) -> None:
        parameter = {"name": "older_s", "in": "query", "schema": {"type": "number", "default": A_DAY, **OLDER}}
        shown = openapi.plain("What is orphaned; changes nothing", unavailable=True)

        @app.get("/v1/janitor", **shown, openapi_extra={"parameters": [parameter]})
        async def orphans(request: Request) -> Response:
            older_s = _older_s(request)
            return JsonReply(await self.looks.of(f"janitor {older_s}", lambda: self.janitor.look(older_s)))

        @app.post("/v1/janitor", **openapi.orders("Remove what was listed and is orphaned still", JanitorOrder))
        async def remove(request: Request) -> Response:
            with audited(asker(request.scope), "janitor") as line:
                body = _body_of(await self._read(request), JanitorOrder, "to remove what is orphaned")
                line.on = f"{len(body.ids)} {body.kind}"
                done = await self.janitor.remove(body)
                line.outcome = "unknown" if done.problems else f"{len(done.removed)} removed"
                return JsonReply(done)

    def _order(self, app: FastAPI, action: NodeAction, text: str) -> None:
        @app.post(f"/v1/nodes/{action}", name=f"nodes_{action}", **openapi.orders(text, NodeOrderBody))
        async def endpoint(request: Request) -> Response:
            with audited(asker(request.scope), f"nodes {action}") as line:
                body = _body_of(await self._read(request), NodeOrderBody, "about a node")
                line.on = " ".join(filter(None, [body.node, "move" * body.move, "force" * body.force, body.role or ""]))
                return JsonReply(await self.nodes.order(action, body))

    async def _read(self, request: Request) -> bytes:
        return await read_body(request, self.max_body_bytes, timeout_s=self.limits.body_timeout_s)


def _older_s(request: Request) -> float:
    text = request.query_params.get("older_s", str(A_DAY))
    try:
        older_s = float(text)
    except ValueError:
        older_s = -1.0
    if not OLDER["minimum"] <= older_s <= OLDER["maximum"]:
        raise InvalidRequestError(f"older_s: {text[:40]!r} is no number of seconds up to a year", param="older_s")
    return older_s


def _body_of(raw: bytes, kind: type[_Body], about: str) -> _Body:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no order {about}: {error}") from error


def add_no_nodes(app: FastAPI) -> None:
    """The routes of a router over vLLM servers that are not ours."""

    @app.api_route("/v1/nodes", methods=["GET"], include_in_schema=False)
    @app.api_route("/v1/nodes/{what}", methods=["GET", "POST"], include_in_schema=False)
    @app.api_route("/v1/janitor", methods=["GET", "POST"], include_in_schema=False)
    async def refused(request: Request) -> Response:
        raise InvalidRequestError(f"{request.url.path}: vLLM servers that run by themselves take no orders")
