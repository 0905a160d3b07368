"""Fakes for the router's tests: nodes in memory behind NodeClient, the same nodes over real HTTP, a wired router.

The fake model is greedy and depends on all tokens before: `next_token`. A test can make any leg fail, hang or lie.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import httpx
import msgspec
from aiohttp import web
from fastapi import FastAPI
from starlette.types import ASGIApp
from support.delta_readers import give
from support.metadata_rigs import DirectTransport

from kvcore.clock import SystemClock
from kvcore.config.kv.settings import BlendConfig, KVConfig
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, RouterConfig, SimEngineConfig, StoreConfig
from kvcore.errors import InvalidRequestError, KVFerryError, NodeUnavailableError, OverloadedError
from kvcore.process.asgi import AsgiServer
from kvcore.types import KVSpec, NodeInfo, Role, Segment
from kvnode.upkeep import NodeUpkeep
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.index.state import MetadataState
from nodeapi.adapters import ServedAdapter
from nodeapi.documents import UNKNOWN, CompareReply, CompareRequest
from nodeapi.grammars.compiler import Grammars
from nodeapi.messages import (
    PROTOCOL,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    LegInfo,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    Promoted,
    PromoteReply,
    PromoteRequest,
    StreamError,
    StreamFrame,
    TierReport,
    TokenDelta,
    TokenLogprob,
)
from nodeapi.prompt_logprobs import PromptLogprobs, PromptRow
from nodeapi.protocol import DeltaReader
from nodeapi.upkeep import (
    ChunksReply,
    ChunksRequest,
    ClearReply,
    ClearRequest,
    GenerationsReply,
    GenerationsRequest,
    WeightsReply,
    WeightsRequest,
)
from router.admin.janitor import ClusterJanitor
from router.admin.nodes import NodeAdmin
from router.admin.rebalance import SegmentRebalance
from router.admin.routes import AdminRoutes
from router.admission.gate import Admission
from router.admission.limits import AdmissionLimits
from router.admission.no_node import NoNodeWait
from router.answering import Answerer
from router.api.app import make_app
from router.api.limits import ApiLimits
from router.api.openai_responses.kept import KeptResponses
from router.cache.limits import WatchLimits
from router.cache.replay import CacheReplay
from router.cache.watch import CacheWatch
from router.documents.gate import DocumentGate
from router.metrics import RouterMetrics
from router.nodes.cluster import Cluster
from router.nodes.limits import NodeHealthLimits
from router.nodes.prober import Prober
from router.nodes.problems import ClusterProblems
from router.parsing.dialects import find_dialect
from router.processes.view import RouterView
from router.requests.dispatch import Dispatcher
from router.requests.limits import RequestLimits
from router.requests.records import RequestLog
from router.requests.services import RequestServices
from router.routing.policy import RoutePolicy, make_policy
from router.shadow.comparing import ShadowComparisons
from router.shadow.gate import BlendGate
from router.shadow.limits import ShadowLimits
from router.shadow.quarantine import ChunkQuarantine
from router.shadow.routes import BlendRoutes
from router.shadow.wiring import show
from router.status import StatusView
from router.text.grammar_checks import GrammarChecks
from router.text.model_habits import ModelHabits, SamplingDefaults
from router.text.tokenizer import ByteTokenizer, Tokenizer
from router.upkeep.limits import UpkeepLimits
from router.upkeep.nodes import KeepingNodes
from router.upkeep.wiring import make_upkeep, tier_sight

CHUNK_TOKENS = 16
VOCAB = 512
_T = TypeVar("_T")
MAX_CONTEXT = 2048


def spec(weights: str = "w1", *, tokenizer: str = "", model: str = "fake-model", **others: Any) -> KVSpec:
    shape: dict[str, Any] = {
        "model_id": model,
        "weights_digest": weights,
        "tokenizer_digest": tokenizer,
        "num_layers": 1,
        "num_kv_heads": 1,
        "head_dim": 8,
        "dtype": "float32",
        "attention": "none",
        "layout_id": "fake",
        "chunk_tokens": CHUNK_TOKENS,
        "chunk_bytes": 1024,
    }
    return KVSpec(**shape | others)


def next_token(tokens: list[int], index: int) -> int:
    """The fake model: a printable ASCII byte."""
    return 97 + (sum(tokens) * 31 + len(tokens) * 7 + index) % 26


def expected(prompt: list[int], max_tokens: int, index: int = 0) -> list[int]:
    tokens: list[int] = []
    while len(tokens) < max_tokens:
        tokens.append(next_token(prompt + tokens, index))
    return tokens


def prompt_rows(prompt: list[int], top: int) -> list[PromptRow]:
    """What the fake model says of a prompt's tokens but the first; each third one is the likeliest itself."""
    rows = []
    for at, token in enumerate(prompt[1:]):
        others = [((token + rank + bool(at % 3)) % VOCAB, -0.5 - rank) for rank in range(top)]
        rows.append(PromptRow(token, -0.5 if not at % 3 else -8.0, 1 if not at % 3 else 9, others))
    return rows


@dataclass
class FakeNode:
    """One node's behaviour. Counters say what reached it."""

    id: str
    role: Role
    weights: str = "w1"
    """As it reports them."""
    weights_said: str | None = None
    """As its legs say, which may know better; None: they say nothing."""
    cluster: str = ""
    model: str = "fake-model"
    tokenizer: str = ""
    """Digest of it; it says none by default."""
    spec: dict[str, Any] = field(default_factory=dict)
    """Further fields of its KVSpec."""
    protocol: int = PROTOCOL
    lacks: list[str] = field(default_factory=list)
    adapters: list[ServedAdapter] = field(default_factory=list)
    takes_documents: bool = False
    max_context: int = MAX_CONTEXT
    segment_bytes: int = 1 << 20
    refused: str = ""
    incarnation: int = 1
    cached_tokens: int = 0
    down: bool = False
    draining: bool = False
    prefill_error: KVFerryError | None = None
    no_room: bool = False
    """Its prefills end before they compute."""
    generate_error: KVFerryError | None = None
    die_after: int | None = None
    """Tokens after which a stream breaks off."""
    die_in_prompt: int | None = None
    """Pieces of the prompt's logprobs after which a stream breaks off, once."""
    stays_dead: bool = False
    """Then nobody can reach it any more."""
    prefill_gate: asyncio.Event | None = None
    generate_gate: asyncio.Event | None = None
    token_gate: asyncio.Event | None = None
    """Waited for after a stream's first token."""
    wait_for_handoff: bool = False
    deaf_to_handoffs: int = 0
    """So many ends of a handoff arrive before their leg, and are ignored."""
    script: list[TokenDelta] | None = None
    tokens: Callable[[list[int], int], int] = next_token
    eos: int | None = None
    """The token that ends what it says; None: only the request's own do."""
    prefills: list[PrefillRequest] = field(default_factory=list)
    generates: list[GenerateRequest] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    handoffs_ended: list[str] = field(default_factory=list)
    running: int = 0
    tiers: list[TierReport] = field(default_factory=list)
    weights_error: KVFerryError | None = None
    promotions: list[list[Promoted]] = field(default_factory=list)
    """What the next calls of `promote` bring; then nothing."""
    promote_requests: list[PromoteRequest] = field(default_factory=list)
    """Why it takes no other weights over."""
    compared: list[CompareReply | KVFerryError] = field(default_factory=list)
    """What the next comparisons come to; then it is overloaded."""
    compares: list[CompareRequest] = field(default_factory=list)
    upkeep: NodeUpkeep | None = None
    """Its segment and tiers, for those who ask; None: it is older than such calls."""
    handoff_ends: dict[str, asyncio.Event] = field(default_factory=dict)

    def kv_spec(self, weights: str) -> KVSpec:
        return spec(weights, tokenizer=self.tokenizer, model=self.model, **self.spec)

    def report(self) -> NodeReport:
        kv_spec = self.kv_spec(self.weights)
        return NodeReport(
            protocol=self.protocol,
            node=NodeInfo(
                id=self.id,
                role=self.role,
                control_url="http://there",
                incarnation=self.incarnation,
                cluster=self.cluster,
                model=self.model if self.cluster else "",
            ),
            engine=EngineInfo(
                kind="fake",
                kv_spec=kv_spec,
                max_context=self.max_context,
                vocab_size=VOCAB,
                eos_token_ids=[0],
                block_size=16,
                num_blocks=64,
                lacks=self.lacks,
                adapters=self.adapters,
                refuses_documents="" if self.takes_documents else UNKNOWN,
            ),
            stats=EngineStats(running=self.running, total_blocks=64),
            segments=[
                Segment(id=f"{self.id}.1", node_id=self.id, size_bytes=self.segment_bytes, host_id="h", addresses={})
            ],
            draining=self.draining,
            refused=self.refused,
            tiers=self.tiers,
        )

    def compare(self, request: CompareRequest) -> CompareReply:
        self._check()
        self.compares.append(request)
        reply = self.compared.pop(0) if self.compared else OverloadedError("the engine has other work")
        if isinstance(reply, KVFerryError):
            raise reply
        return reply

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        self._check()
        self.prefills.append(request)
        self.running += 1
        try:
            if self.prefill_gate is not None:
                await self.prefill_gate.wait()
            if self.prefill_error is not None:
                raise self.prefill_error
        finally:
            self.running -= 1
        if self.no_room:
            return PrefillResult(
                request_id=request.request_id, cached_tokens=0, computed_tokens=0, stored_chunks=0, no_room=True
            )
        total = len(request.prompt_token_ids)
        return PrefillResult(
            request_id=request.request_id,
            cached_tokens=self.cached_tokens,
            computed_tokens=total - self.cached_tokens,
            stored_chunks=(total - 1) // CHUNK_TOKENS,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        self._check()
        self.generates.append(request)
        self.running += 1
        try:
            async for delta in self._deltas(request):
                yield delta
        finally:
            self.running -= 1

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        if self.wait_for_handoff and request.handoff is not None:
            await self.handoff_ends.setdefault(request.request_id, asyncio.Event()).wait()
        if self.generate_gate is not None:
            await self.generate_gate.wait()
        if self.generate_error is not None:
            raise self.generate_error
        for delta in self.script or ():
            yield delta
        if self.script is not None:
            return
        sampling = request.sampling
        outputs = [list(request.output_token_ids) for _ in range(sampling.n)]
        said = self.kv_spec(self.weights_said).fingerprint if self.weights_said is not None else b""
        named = request.documents
        turned = sum(stop - start - named.k for start, stop in named.spans if start > named.header) if named else 0
        info: LegInfo | None = LegInfo(
            cached_tokens=self.cached_tokens, computed_tokens=1, approximate_tokens=turned, fingerprint=said
        )
        sent = 0
        if sampling.prompt_logprobs is not None:
            for start in range(0, len(request.prompt_token_ids) - 1, 3):
                if self.die_in_prompt == start // 3:
                    self.die_in_prompt = None
                    raise NodeUnavailableError(f"{self.id} died")
                rows = prompt_rows(request.prompt_token_ids, sampling.prompt_logprobs)[start : start + 3]
                piece = PromptLogprobs.pack(start + 1, sampling.prompt_logprobs, rows)
                yield TokenDelta(prompt_logprobs=piece, info=info)
                info = None
        while len(outputs[0]) < sampling.max_tokens:
            for index, output in enumerate(outputs):
                if self.die_after is not None and sent >= self.die_after:
                    self.down = self.stays_dead
                    raise NodeUnavailableError(f"{self.id} died")
                output.append(self.tokens(request.prompt_token_ids + output, index))
                stop = output[-1] if output[-1] in (*sampling.stop_token_ids, self.eos) else None
                done = FinishReason.LENGTH if len(output) >= sampling.max_tokens else None
                done = FinishReason.STOP if stop is not None else done
                logprobs = None
                if sampling.logprobs is not None:
                    ids = sampling.logprob_token_ids or [output[-1] + at for at in range(sampling.logprobs)]
                    others = [(other, -0.5 - at) for at, other in enumerate(ids)]
                    logprobs = [TokenLogprob(logprob=-0.5, top=others)]
                sent += 1
                yield TokenDelta(
                    index=index,
                    token_ids=[output[-1]],
                    finish_reason=done,
                    stop_token_id=stop,
                    info=info,
                    logprobs=logprobs,
                )
                info = None
                if stop is not None and sampling.n == 1:
                    return
            await asyncio.sleep(0)
            if self.token_gate is not None:
                await self.token_gate.wait()

    def promote(self, request: PromoteRequest) -> PromoteReply:
        self._check()
        self.promote_requests.append(request)
        return PromoteReply(promoted=self.promotions.pop(0) if self.promotions else [])

    def take_weights(self, request: WeightsRequest) -> WeightsReply:
        self._check()
        if self.weights_error is not None:
            raise self.weights_error
        self.weights = request.version
        return WeightsReply(fingerprint=self.kv_spec(self.weights).fingerprint, version=request.version, cut=1)

    def _check(self) -> None:
        if self.down:
            raise NodeUnavailableError(f"{self.id} refused the connection")


class FakeNodes:
    """NodeClient over FakeNodes, by url `http://127.0.0.1:<number>`."""

    def __init__(self, nodes: list[FakeNode]) -> None:
        self.nodes = nodes
        self.by_url = {f"http://127.0.0.1:{port}": node for port, node in enumerate(nodes, 1)}

    def __getitem__(self, node_id: str) -> FakeNode:
        return next(node for node in self.nodes if node.id == node_id)

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        return await self.by_url[url].prefill(request)

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        await give(self.by_url[url].generate(request), reader, first_s=first_s, gap_s=gap_s)

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None:
        node = self.by_url[url]
        node.handoffs_ended.append(request_id)
        if len(node.handoffs_ended) <= node.deaf_to_handoffs:
            return
        node.handoff_ends.setdefault(request_id, asyncio.Event()).set()

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None:
        self.by_url[url].aborted.append(request_id)

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        node = self.by_url[url]
        node._check()
        return node.report()

    async def compare(self, url: str, request: CompareRequest, *, timeout_s: float) -> CompareReply:
        return self.by_url[url].compare(request)

    async def generations(self, url: str, request: GenerationsRequest, *, timeout_s: float) -> GenerationsReply:
        return await self._upkeep(url).generations(request)

    async def chunks(self, url: str, request: ChunksRequest, *, timeout_s: float) -> ChunksReply:
        return await self._upkeep(url).chunks(request)

    async def clear(self, url: str, request: ClearRequest, *, timeout_s: float) -> ClearReply:
        return await self._upkeep(url).clear(request)

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        return self.by_url[url].promote(request)

    async def weights(self, url: str, request: WeightsRequest, *, timeout_s: float) -> WeightsReply:
        return self.by_url[url].take_weights(request)

    def _upkeep(self, url: str) -> NodeUpkeep:
        node = self.by_url[url]
        node._check()
        if node.upkeep is None:
            raise InvalidRequestError("POST /v1/upkeep: Not Found")
        return node.upkeep

    async def aclose(self) -> None:
        pass


def two_and_two(max_context: int = MAX_CONTEXT) -> FakeNodes:
    """Two prefillers p0, p1 and two decoders d0, d1."""
    names = [("p0", Role.PREFILLER), ("p1", Role.PREFILLER), ("d0", Role.DECODER), ("d1", Role.DECODER)]
    return FakeNodes([FakeNode(name, role, max_context=max_context) for name, role in names])


def cluster_config(nodes: list[FakeNode], ports: list[int] | None = None, **router: object) -> ClusterConfig:
    where = ports or list(range(1, len(nodes) + 1))
    return ClusterConfig(
        cluster="test",
        model=ModelConfig(path="fake", name="fake-model"),
        engine=SimEngineConfig(),
        nodes={node.id: NodeConfig(role=node.role, port=port) for node, port in zip(nodes, where, strict=True)},
        router=RouterConfig(**router),  # type: ignore[arg-type]
    )


@dataclass
class Rig:
    """A wired router over fake nodes, without its background tasks."""

    nodes: FakeNodes
    cluster: Cluster
    prober: Prober
    dispatcher: Dispatcher
    services: RequestServices
    log: RequestLog
    answerer: Answerer
    app: web.Application | object
    metrics: RouterMetrics
    cache: CacheReplay
    metadata: MetadataState
    config: ClusterConfig
    admin: NodeAdmin
    core: MetadataCore
    admission: Admission
    view: RouterView
    gate: BlendGate
    shadow: ShadowComparisons


async def make_rig(
    nodes: FakeNodes | None = None,
    tokenizer: Tokenizer | None = None,
    policy: RoutePolicy | None = None,
    *,
    limits: RequestLimits = RequestLimits(),
    node_limits: NodeHealthLimits = NodeHealthLimits(),
    api_limits: ApiLimits = ApiLimits(),
    watch_limits: WatchLimits = WatchLimits(),
    connected: bool = False,
    wait_s: float | None = None,
    parser: str = "none",
    aliases: Sequence[str] = (),
    adapters: Mapping[str, str] = {},
    sampling: SamplingDefaults = SamplingDefaults(),
    guard: Callable[[RequestLog, ASGIApp], ASGIApp] = lambda _, app: app,
    kept: KeptResponses | None = None,
    blend: BlendConfig = BlendConfig(),
    shadow: float = 0.0,
    shadow_limits: ShadowLimits = ShadowLimits(),
    **router: object,
) -> Rig:
    """Probed once. `wait_s`: requests wait so long for a node, two at a time; None: they are refused. `parser`: as
    `model.parser`. `guard`: as in `make_app`, told where requests are logged."""
    nodes = nodes or two_and_two()
    config = msgspec.structs.replace(
        cluster_config(nodes.nodes, None, **router), kv=KVConfig(blend=blend, shadow=shadow)
    )
    clock, log = SystemClock(), RequestLog()
    cluster = Cluster(config, clock, tokenizer_digest=tokenizer.digest if tokenizer else "")
    prober = Prober(config.router, cluster, nodes, clock, node_limits)
    problems = ClusterProblems(cluster, clock, lambda: connected, node_limits)
    prober.on_round.append(problems.say)
    await prober.probe()
    services = RequestServices(config.router, cluster, nodes, clock, log, limits=limits)
    dispatcher = Dispatcher(services, policy or make_policy(config.router.policy))
    prober.on_lost.append(dispatcher.node_lost)
    prober.on_silent.append(dispatcher.node_silent)

    async def run(work: Callable[[], _T]) -> _T:
        return work()

    gate = BlendGate(blend, clock.wall)
    admission = Admission(dispatcher.route, clock, config.router)
    no_node: NoNodeWait | None = None
    if wait_s is not None:
        stops, admit = (lambda: dispatcher.stopping), AdmissionLimits(tell_s=wait_s / 4)
        no_node = NoNodeWait(cluster, clock, patience_s=wait_s, max_waiting=2, stopping=stops, limits=admit)
        prober.on_round.append(no_node.look)
    cluster.on_less_load = admission.wake
    prober.on_round.append(admission.wake)
    log.prompt_observers.append(admission.ended)
    answerer = Answerer(
        aliases=aliases,
        adapters=adapters,
        model="fake-model",
        tokenizer=tokenizer or ByteTokenizer(VOCAB),
        dispatcher=dispatcher,
        cluster=cluster,
        run=run,
        admission=admission,
        blend=blend,
        gate=DocumentGate(blend, gate),
        grammars=GrammarChecks(Grammars((tokenizer or ByteTokenizer(VOCAB)).vocabulary, (), beside=run)),
    )
    watch = CacheWatch(cluster, log, clock, limits=watch_limits)
    cache = CacheReplay(watch, cluster, config, clock, limits=watch_limits)
    metrics = RouterMetrics(cluster, log, lambda: True, watch)
    metrics.watch_admission(admission)
    stopping = lambda: dispatcher.stopping  # noqa: E731
    status = StatusView(config, cluster, log, clock, lambda: True, problems=problems, cache=cache, stopping=stopping)
    bounds, view = config.router, RouterView(status, log, metrics)
    state = MetadataState(StoreConfig(), 3600.0, "1", 1)
    core = MetadataCore(state, clock)
    index = MetadataClient(DirectTransport(core), clock, 5.0)
    admin = NodeAdmin(cluster, index, clock, probe=prober.probe, trial=prober.trial, connected=lambda: connected)
    prober.on_round.append(admin.note_states)
    sight = tier_sight(cluster, nodes, index)
    upkeep = make_upkeep(config, cluster, nodes, metadata=index, answerer=answerer, probe=prober.probe, clock=clock)
    quarantine = ChunkQuarantine(index, KeepingNodes(cluster, nodes, UpkeepLimits()))
    shares = shadow, blend.shadow
    comparisons = ShadowComparisons(
        cluster,
        nodes,
        clock,
        gate,
        quarantine.drop,
        model="fake-model",
        shares=shares,
        draw=lambda: 0.5,
        limits=shadow_limits,
    )
    log.prompt_observers.append(comparisons.ended)
    status.problems_beside += [gate.problem, comparisons.problem]
    show(gate, comparisons, metrics.metrics)

    def add_routes(app: FastAPI) -> None:
        upkeep.add_to(app)
        BlendRoutes(gate, comparisons, int(bounds.max_body)).add_to(app)
        AdminRoutes(admin, SegmentRebalance(index), ClusterJanitor(cluster, index, sight), int(bounds.max_body)).add_to(
            app
        )

    app = make_app(
        answerer,
        view,
        metrics,
        max_body_bytes=bounds.max_body,
        cors=bounds.cors,
        limits=api_limits,
        more=add_routes,
        guard=partial(guard, log),
        no_node=no_node,
        habits=ModelHabits(find_dialect(parser, ""), sampling),
        kept=kept,
    )
    return Rig(
        nodes,
        cluster,
        prober,
        dispatcher,
        services,
        log,
        answerer,
        app,
        metrics,
        cache,
        state,
        config,
        admin,
        core,
        admission,
        view,
        gate,
        comparisons,
    )


async def until(condition: Callable[[], bool], limit_s: float = 30.0) -> None:
    """Give the loop turns until `condition` holds; TimeoutError after `limit_s`."""
    async with asyncio.timeout(limit_s):
        while not condition():  # noqa: ASYNC110 - the conditions are plain attributes of fakes
            await asyncio.sleep(0)


# --- the same nodes over HTTP ---------------------------------------------------------------------------------------


def _frame(frame: StreamFrame) -> bytes:
    raw = msgspec.msgpack.encode(frame)
    return len(raw).to_bytes(4, "little") + raw


def _refusal(error: KVFerryError) -> web.Response:
    detail = {"code": error.code, "message": error.message, "retryable": error.retryable}
    return web.Response(status=error.http_status, body=msgspec.msgpack.encode({"error": detail}))


def node_app(node: FakeNode) -> web.Application:
    """The control API of one fake node."""

    async def prefill(request: web.Request) -> web.Response:
        body = msgspec.msgpack.decode(await request.read(), type=PrefillRequest)
        try:
            return web.Response(body=msgspec.msgpack.encode(await node.prefill(body)))
        except KVFerryError as error:
            return _refusal(error)

    async def generate(request: web.Request) -> web.StreamResponse:
        body = msgspec.msgpack.decode(await request.read(), type=GenerateRequest)
        if node.down:
            return _refusal(NodeUnavailableError("down"))
        response = web.StreamResponse()
        await response.prepare(request)
        try:
            async for delta in node.generate(body):
                await response.write(_frame(delta))
        except NodeUnavailableError:
            assert request.transport is not None
            request.transport.close()
        except KVFerryError as error:
            await response.write(_frame(StreamError(code=error.code, message=error.message, retryable=error.retryable)))
        return response

    async def end_handoff(request: web.Request) -> web.Response:
        node.handoffs_ended.append(request.match_info["id"])
        return web.Response()

    async def abort(request: web.Request) -> web.Response:
        node.aborted.append(request.match_info["id"])
        return web.Response()

    async def info(request: web.Request) -> web.Response:
        return web.Response(body=msgspec.msgpack.encode(node.report()))

    app = web.Application()
    app.router.add_post("/v1/prefill", prefill)
    app.router.add_post("/v1/generate", generate)
    app.router.add_post("/v1/requests/{id}/end_handoff", end_handoff)
    app.router.add_delete("/v1/requests/{id}", abort)
    app.router.add_get("/v1/info", info)
    return app


@asynccontextmanager
async def serve(app: web.Application) -> AsyncIterator[str]:
    """`http://127.0.0.1:port` of the app, while entered. A handler ends when its client goes."""
    runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


MARK = b"<assistant>"
"""How the byte tokenizer's chats end."""


def writes(text: str) -> Callable[[list[int], int], int]:
    """A model that answers a chat so, whatever it is asked, and then says 0."""
    answer = [*text.encode(), 0]
    return lambda tokens, _: answer[len(tokens) - bytes(tokens).rfind(MARK) - len(MARK)]


def calls_then(calls: str, answer: str) -> Callable[[list[int], int], int]:
    """A model that calls tools where there is no result of one yet, and answers where there is."""
    first, last = writes(calls), writes(answer)
    return lambda tokens, index: (last if b"<tool>" in bytes(tokens) else first)(tokens, index)


async def writing_rig(tokens: Callable[[list[int], int], int], parser: str, kept: KeptResponses | None = None) -> Rig:
    """Whose nodes write `tokens`, and end at 0."""
    nodes = two_and_two()
    for node in nodes.nodes:
        node.tokens, node.eos = tokens, 0
    return await make_rig(nodes, parser=parser, kept=kept)


@asynccontextmanager
async def client_of(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    """A client of this router, without sockets."""
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        yield http


@asynccontextmanager
async def asking(text: str, parser: str) -> AsyncIterator[tuple[httpx.AsyncClient, Rig]]:
    """A client of a router whose nodes write `text`, and that router."""
    rig = await writing_rig(writes(text), parser)
    async with client_of(rig) as http:
        yield http, rig


@asynccontextmanager
async def serving(tokens: Callable[[list[int], int], int], parser: str) -> AsyncIterator[str]:
    """The address of such a router, over a real socket."""
    server = AsgiServer((await writing_rig(tokens, parser, KeptResponses(SystemClock()))).app, "127.0.0.1", 0)
    await server.start()
    try:
        yield server.url
    finally:
        await server.aclose()
