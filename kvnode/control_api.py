"""The node's control API: an engine's protocol over HTTP, msgpack in and out, for the router.

aiohttp rather than FastAPI: a delta goes out in one write without a task or a queue in between, a client that leaves
cancels its handler at once, and it needs no schema (its only clients are ours). Owns no engine: asks for the present
one at each request.
Invariant: every request ends with an answer or with its client gone; nothing it started is left.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from engines.base import Engine
from kvcore.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    KVFerryError,
    NodeUnavailableError,
)
from kvcore.process.aiohttp_gate import BoundedRunner, read_body
from kvcore.telemetry import METRICS_CONTENT_TYPE, log_fields
from kvnode.answers import (
    MSGPACK,
    CertifiedCalls,
    ProvenCalls,
    answer_errors,
    check_read,
    error_answer,
    frame_around,
    msgpack_answer,
)
from kvnode.limits import NodeLimits
from kvnode.request_check import parse_request
from kvnode.tiers.node_tiers import NodeTiers
from kvnode.upkeep import NodeUpkeep
from nodeapi.documents import CompareRequest
from nodeapi.messages import (
    GenerateRequest,
    NodeReport,
    PrefillRequest,
    ProbeReport,
    ProbeRequest,
    PromoteReply,
    PromoteRequest,
    StreamError,
    TokenDelta,
)
from nodeapi.upkeep import ChunksRequest, ClearRequest, GenerationsRequest, WeightsReply, WeightsRequest

MAX_BODY_BYTES = 16 << 20
_logger = logging.getLogger("kvnode")
_T = TypeVar("_T")
_Request = TypeVar("_Request", bound=msgspec.Struct)
_Leg = TypeVar("_Leg", PrefillRequest, GenerateRequest)


class ControlApi:
    """The application. `engine` gives the engine of now or raises NodeUnavailableError; `report`, `metrics` and `probe`
    answer /v1/info, /metrics and /v1/probe; `health` is None when the node serves, else why it does not."""

    def __init__(
        self,
        *,
        engine: Callable[[], Engine],
        report: Callable[[], Awaitable[NodeReport]],
        metrics: Callable[[], Awaitable[bytes]],
        health: Callable[[], str | None],
        probe: Callable[[ProbeRequest], Awaitable[ProbeReport]],
        tiers: NodeTiers | None = None,
        upkeep: NodeUpkeep | None = None,
        weights: Callable[[WeightsRequest], Awaitable[WeightsReply]] | None = None,
        max_body_bytes: int = MAX_BODY_BYTES,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        self._engine = engine
        self._report = report
        self._metrics = metrics
        self._health = health
        self._probe = probe
        self._tiers = tiers
        self._upkeep = upkeep
        self._weights = weights
        self._max_body_bytes = max_body_bytes
        self._limits = limits
        self._draining = self._quiet = False
        self._idle = asyncio.Event()
        self._idle.set()
        self.active: Counter[str] = Counter()
        self.ended: Counter[tuple[str, str]] = Counter()
        """(leg, outcome code) -> count."""

    @property
    def draining(self) -> bool:
        """Whether new legs are refused."""
        return self._draining or self._quiet

    def runner(self, proven: ProvenCalls | CertifiedCalls | None = None) -> BoundedRunner:
        """What serves it: a client that leaves ends its leg, and no body is unpacked. `proven`: who gets an answer."""
        app = self._application()
        if proven is not None:
            proven.add_to(app)
        return BoundedRunner(
            app,
            self._limits.http,
            handler_cancellation=True,
            auto_decompress=False,
            access_log=None,
            shutdown_timeout=self._limits.close_s,
        )

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[answer_errors], client_max_size=self._max_body_bytes)
        app.add_routes(
            [
                web.post("/v1/prefill", self._prefill),
                web.post("/v1/generate", self._generate),
                web.post("/v1/compare", self._compare),
                web.post("/v1/requests/{id}/end_handoff", self._end_handoff),
                web.delete("/v1/requests/{id}", self._abort),
                web.post("/v1/probe", self._call(ProbeRequest, self._probe)),
                web.post("/v1/promote", self._call(PromoteRequest, self._promote)),
                *self._upkeep_routes(),
                web.get("/v1/info", self._info),
                web.get("/health", self._get_health),
                web.get("/metrics", self._get_metrics),
            ]
        )
        return app

    async def drain(self, drain_s: float) -> None:
        """Refuse new legs from now on; returns when those under way have ended, or after `drain_s`."""
        self._draining = True
        if active := await self._until_idle(drain_s):
            log_fields(_logger, logging.WARNING, "drain_ended_early", active=active)

    @asynccontextmanager
    async def quiet(self, wait_s: float) -> AsyncIterator[int]:
        """While it is entered new legs are refused. Entering takes until those under way have ended, `wait_s` at most:
        how many have not."""
        assert not self._quiet, "one at a time"
        self._quiet = True
        try:
            yield await self._until_idle(wait_s)
        finally:
            self._quiet = False

    async def _until_idle(self, wait_s: float) -> int:
        """How many legs are still under way."""
        try:
            async with asyncio.timeout(wait_s):
                await self._idle.wait()
        except TimeoutError:
            pass
        return sum(self.active.values())

    async def _prefill(self, http: web.Request) -> web.StreamResponse:
        async with self._leg("prefill"):
            engine = self._engine()
            request = parse_request(await self._read(http), PrefillRequest, engine.info, self._limits)
            request, given = await self._promoted(request)
            result = await _bounded(engine.prefill(request), request.deadline_s + self._limits.late_s)
            if self._tiers is not None:
                self._tiers.after_leg(result)
        return msgpack_answer(msgspec.structs.replace(result, promoted=given.promoted, tier_choices=given.choices))

    async def _generate(self, http: web.Request) -> web.StreamResponse:
        async with self._leg("generate") as leg:
            engine = self._engine()
            request = parse_request(await self._read(http), GenerateRequest, engine.info, self._limits)
            request, given = await self._promoted(request)
            async with aclosing(engine.generate(request)) as deltas:
                stream = self._stream(http, deltas, leg, engine.info.kv_spec.fingerprint, given)
                return await _bounded(stream, request.deadline_s + self._limits.late_s)

    async def _stream(
        self,
        http: web.Request,
        deltas: AsyncGenerator[TokenDelta, None],
        leg: "_ActiveLeg",
        fingerprint: bytes,
        given: PromoteReply,
    ) -> web.StreamResponse:
        """Errors before the first delta become the status; later ones the last frame, or, where even that cannot be
        written, the end of the connection: another answer would land in the middle of this one."""
        first = await anext(deltas, None)
        if first is not None:
            first = said_by(first, fingerprint, given)
            if self._tiers is not None and first.info is not None:
                self._tiers.after_leg(first.info)
        response = web.StreamResponse(headers={"Content-Type": MSGPACK})
        await response.prepare(http)
        try:
            await _write_frames(http, response, first, deltas, leg)
            await response.write_eof()
        except BaseException:
            if http.transport is not None:
                http.transport.abort()
            raise
        return response

    async def _compare(self, http: web.Request) -> web.StreamResponse:
        async with self._leg("compare"):
            engine = self._engine()
            request = parse_request(await self._read(http), CompareRequest, engine.info, self._limits)
            reply = await _bounded(engine.compare(request), request.deadline_s + self._limits.late_s)
        return msgpack_answer(reply)

    async def _promoted(self, request: _Leg) -> tuple[_Leg, PromoteReply]:
        return await self._tiers.before_leg(request) if self._tiers is not None else (request, PromoteReply())

    def _upkeep_routes(self) -> list[web.RouteDef]:
        weights = [web.post("/v1/weights", self._call(WeightsRequest, self._weights))] if self._weights else []
        if (upkeep := self._upkeep) is None:
            return weights
        return [
            *weights,
            web.post("/v1/upkeep/generations", self._call(GenerationsRequest, upkeep.generations)),
            web.post("/v1/upkeep/chunks", self._call(ChunksRequest, upkeep.chunks)),
            web.post("/v1/upkeep/clear", self._call(ClearRequest, upkeep.clear)),
        ]

    def _call(self, kind: type[_Request], work: Callable[[_Request], Awaitable[msgspec.Struct]]) -> Handler:
        """A call that is no leg: it is not counted as one, and a drain does not wait for it."""

        async def handle(http: web.Request) -> web.StreamResponse:
            if self._draining:
                raise NodeUnavailableError("the node is draining")
            try:
                request = msgspec.msgpack.decode(await self._read(http), type=kind)
            except msgspec.MsgspecError as error:
                raise InvalidRequestError(f"the body is no {kind.__name__}: {error}") from error
            return msgpack_answer(await work(request))

        return handle

    async def _promote(self, request: PromoteRequest) -> PromoteReply:
        """Another node wants chunks of this node's tiers in this node's segment."""
        return await self._tiers.promote(request) if self._tiers is not None else PromoteReply()

    async def _end_handoff(self, http: web.Request) -> web.StreamResponse:
        await self._engine().end_handoff(http.match_info["id"])
        return web.Response(status=204)

    async def _abort(self, http: web.Request) -> web.StreamResponse:
        await self._engine().abort(http.match_info["id"])
        return web.Response(status=204)

    async def _info(self, http: web.Request) -> web.StreamResponse:
        report = await self._report()
        if "json" in http.headers.get("Accept", ""):
            return web.Response(body=msgspec.json.encode(report), content_type="application/json")
        return msgpack_answer(report)

    async def _get_health(self, http: web.Request) -> web.StreamResponse:
        reason = "draining" if self.draining else self._health()
        if reason is not None:
            return error_answer(http, NodeUnavailableError(reason))
        return web.Response(text="ready\n")

    async def _get_metrics(self, _: web.Request) -> web.StreamResponse:
        return web.Response(body=await self._metrics(), headers={"Content-Type": METRICS_CONTENT_TYPE})

    async def _read(self, http: web.Request) -> bytes:
        return check_read(http, await read_body(http, self._max_body_bytes, self._limits.body_s))

    @asynccontextmanager
    async def _leg(self, name: str) -> AsyncIterator["_ActiveLeg"]:
        """Counts a leg in and out. Raises NodeUnavailableError while draining."""
        if self.draining:
            raise NodeUnavailableError(f"the node {'is draining' if self._draining else 'takes other weights over'}")
        self.active[name] += 1
        self._idle.clear()
        leg = _ActiveLeg()
        try:
            yield leg
            leg.outcome = leg.outcome or "ok"
        except KVFerryError as error:
            leg.outcome = error.code
            raise
        finally:
            self.active[name] -= 1
            self.ended[name, leg.outcome or "cancelled"] += 1
            if not +self.active:
                self._idle.set()


@dataclass
class _ActiveLeg:
    outcome: str | None = None
    """`ok` or an error's code; None while it runs."""


def said_by(delta: TokenDelta, fingerprint: bytes, given: PromoteReply) -> TokenDelta:
    """The delta with the engine's fingerprint in its info, if it has one, and what was brought from tiers. An engine
    may have been replaced by another one since the node last reported: whoever puts streams together must know whose
    tokens these are."""
    if delta.info is None:
        return delta
    info = msgspec.structs.replace(
        delta.info, fingerprint=fingerprint, promoted=given.promoted, tier_choices=given.choices
    )
    return msgspec.structs.replace(delta, info=info)


async def _write_frames(
    http: web.Request,
    response: web.StreamResponse,
    first: TokenDelta | None,
    deltas: AsyncGenerator[TokenDelta, None],
    leg: _ActiveLeg,
) -> None:
    try:
        if first is not None:
            await response.write(frame_around(http, msgspec.msgpack.encode(first)))
        async for delta in deltas:
            await response.write(frame_around(http, msgspec.msgpack.encode(delta)))
    except KVFerryError as error:
        leg.outcome = error.code
        last = StreamError(code=error.code, message=error.message, retryable=error.retryable)
        await response.write(frame_around(http, msgspec.msgpack.encode(last)))


async def _bounded(work: Awaitable[_T], seconds: float) -> _T:
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise DeadlineExceededError("the node did not finish in time") from error
