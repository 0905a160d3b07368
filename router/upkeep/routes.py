"""The router's `/v1/cache` routes that ask and order. A thin shell: bodies in, reports out, errors as OpenAI's.

They are open to whoever reaches the router; where it has API keys, to an admin's alone. What one waits for ends when
its client leaves.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from fastapi import FastAPI, Request
from starlette.responses import Response

from kvcore.errors import CancelledByPeerError, InvalidRequestError
from kvcore.process.audit import AuditLine, audited
from kvcore.process.http_body import read_body
from router.admin.looks import SharedLooks
from router.answering import Answerer
from router.api import openapi
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.limits import ApiLimits
from router.api.responses import JsonReply
from router.requests.spec import RequestSpec
from router.tenants.callers import asker, caller_of
from router.upkeep.generations import ClusterGenerations
from router.upkeep.lookup import PromptsLookup
from router.upkeep.memory import OrderKind
from router.upkeep.orders import ChunkOrders
from router.upkeep.prefetching import PromptPrefetcher
from router.upkeep.prompts import prompts_in
from router.upkeep.reports import ClearOrder, WeightsOrder
from router.upkeep.warming import PromptWarmer
from router.upkeep.weights import ClusterWeights, failure, with_error

_OrderBody = TypeVar("_OrderBody", bound=msgspec.Struct)


@dataclass(frozen=True, slots=True)
class UpkeepRoutes:
    """Adds its routes to an application."""

    answerer: Answerer
    lookup: PromptsLookup
    orders: ChunkOrders
    warmer: PromptWarmer
    prefetcher: PromptPrefetcher
    generations: ClusterGenerations
    weights: ClusterWeights
    max_body_bytes: int
    limits: ApiLimits = ApiLimits()
    looks: SharedLooks = field(default_factory=SharedLooks)

    def add_to(self, app: FastAPI) -> None:
        """All of them."""

        @app.get("/v1/cache/generations", **openapi.plain("Which generations of KV lie where", unavailable=True))
        async def generations(request: Request) -> Response:
            return JsonReply(await _while_there(request, self.looks.of("generations", self.generations.report)))

        @app.post("/v1/cache/clear", **openapi.orders("Remove generations from all tiers", ClearOrder))
        async def clear(request: Request) -> Response:
            with audited(asker(request.scope), "cache clear") as line:
                order = _order_in(await self._body(request) or b"{}", ClearOrder, "order to clear")
                line.on = _said(order)
                return JsonReply(await _while_there(request, self.generations.clear(order)))

        @app.post("/v1/weights", **openapi.orders("Start every engine anew on other weights", WeightsOrder))
        async def weights(request: Request) -> Response:
            with audited(asker(request.scope), "weights") as line:
                order = _order_in(await self._body(request), WeightsOrder, "change of weights")
                line.on = order.version
                report = await self.weights.change(order)  # to its end, though the client leave
                error = failure(report)
                line.outcome = "ok" if error is None else error.code
            return JsonReply(report) if error is None else JsonReply(with_error(report, error), error.http_status)

        look = lambda specs, _: self.lookup.look(specs)  # noqa: E731
        self._of_prompts(app, "lookup", "Where the KV of prompts lies", look, changes=False)
        self._of_prompts(app, "warm", "Compute prompts into the store", lambda specs, _: self.warmer.warm(specs))
        bring = lambda specs, _: self.prefetcher.prefetch(specs)  # noqa: E731
        self._of_prompts(app, "prefetch", "Bring the chunks of prompts from tiers into memory", bring)
        texts: dict[OrderKind, str] = {
            "evict": "Remove the chunks of prompts from segments and tiers",
            "expire": "Give the chunks of prompts an end: ttl_s seconds from now, or none",
            "pin": "Keep the chunks of prompts from being evicted",
            "unpin": "Let the chunks of prompts be evicted again",
        }
        for kind, text in texts.items():
            self._of_prompts(app, kind, text, self._order(kind))

    def _order(self, kind: OrderKind) -> Callable[[list[RequestSpec], Request], Awaitable[msgspec.Struct]]:
        async def carry_out(specs: list[RequestSpec], request: Request) -> msgspec.Struct:
            return await self.orders.carry_out(kind, specs, _ttl_s(request))

        return carry_out

    def _of_prompts(
        self,
        app: FastAPI,
        name: str,
        text: str,
        work: Callable[[list[RequestSpec], Request], Awaitable[msgspec.Struct]],
        *,
        changes: bool = True,
    ) -> None:
        @app.post(f"/v1/cache/{name}", name=f"cache_{name}", **openapi.orders(text, ChatRequest, CompletionRequest))
        async def endpoint(request: Request) -> Response:
            with audited(asker(request.scope), f"cache {name}") if changes else nullcontext(AuditLine()) as line:
                specs = await prompts_in(
                    await self._body(request), self.answerer, self.limits, caller_of(request.scope)
                )
                line.on = f"{len(specs)} prompts"
                return JsonReply(await _while_there(request, work(specs, request)))

    async def _body(self, request: Request) -> bytes:
        return await read_body(request, self.max_body_bytes, timeout_s=self.limits.body_timeout_s)


def add_refusals(app: FastAPI) -> None:
    """The routes of a router over vLLM servers that are not ours."""

    @app.post("/v1/weights", include_in_schema=False)
    @app.api_route("/v1/cache/{what:path}", methods=["GET", "POST"], include_in_schema=False)
    async def refused(request: Request) -> Response:
        raise InvalidRequestError(f"{request.url.path}: vLLM servers that run by themselves have no store")


def _order_in(raw: bytes, kind: type[_OrderBody], name: str) -> _OrderBody:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequestError(f"the body is no {name}: {error}") from error


def _said(order: ClearOrder) -> str:
    chosen = order.fingerprints if order.fingerprints is not None else ["stale" if order.stale else "all"]
    return ",".join(chosen) + (" force" if order.force else "")


def _ttl_s(request: Request) -> float | None:
    """Of the query; None: none is given, or `none`."""
    given = request.query_params.get("ttl_s", "none")
    if given == "none":
        return None
    try:
        ttl_s = float(given)
    except ValueError:
        ttl_s = math.nan
    if not 0 < ttl_s < math.inf:
        raise InvalidRequestError("ttl_s must be a number of seconds above 0, or none", param="ttl_s")
    return ttl_s


async def _while_there(request: Request, work: Awaitable[msgspec.Struct]) -> msgspec.Struct:
    """What the work gives. It is cancelled when the client leaves."""
    working = asyncio.ensure_future(work)
    gone = asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise CancelledByPeerError("the client has gone")
        return working.result()
    finally:
        for task in (working, gone):
            task.cancel()
        await asyncio.gather(working, gone, return_exceptions=True)


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
