"""Wires the router of one cluster file, and runs it until told to stop. The only place that knows all parts."""

import asyncio
import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import closing
from functools import partial

from fastapi import FastAPI

from kvcore.clock import SystemClock
from kvcore.config.schema import ClusterConfig, RouterConfig
from kvcore.config.servers import other_urls
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.process.service import Lifecycle
from kvcore.telemetry import log_fields
from kvcore.trust.opening import ClusterTrust, open_trust, trust_source
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, connect_subscription, endpoints_of
from nodeapi.client import HttpNodeClient
from nodeapi.protocol import NodeClient
from router.admin.janitor import ClusterJanitor
from router.admin.nodes import NodeAdmin
from router.admin.rebalance import SegmentRebalance
from router.admin.routes import AdminRoutes, add_no_nodes
from router.admission.gate import Admission
from router.admission.no_node import NoNodeWait, none_is_up_yet
from router.admission.sharing import SharedAdmission
from router.answering import Answerer
from router.api.app import make_app
from router.api.openai_responses.kept import keep_responses
from router.cache.hints import HintPins
from router.cache.replay import CacheReplay
from router.cache.watch import CacheWatch
from router.client_answer import AnswerLimits
from router.descriptors import LEGS_PER_REQUEST
from router.documents.gate import DocumentGate
from router.kv_events.feed import event_feeds
from router.listeners import RouterListeners
from router.metrics import RouterMetrics
from router.nodes.cluster import Cluster
from router.nodes.prober import Prober
from router.nodes.problems import ClusterProblems
from router.nodes.vllm_client import VllmClient, server_key
from router.nodes.vllm_model import read_model_facts
from router.pooling import PlainPooling
from router.processes.exchange import add_load, share_load
from router.processes.reports import ProcessPlace
from router.processes.shared_work import SharedWork
from router.processes.siblings import open_siblings
from router.processes.view import RouterView
from router.reload import LiveRouter
from router.requests.dispatch import Dispatcher
from router.requests.services import RequestServices, make_services
from router.routing.policy import make_policy
from router.shadow.wiring import open_shadow
from router.status import StatusView
from router.tenants.wiring import open_guard
from router.text.grammar_checks import open_checks
from router.text.model_habits import ModelHabits, model_habits
from router.text.tokenizer import FolderTokenizer, TextThreads, Tokenizer, make_tokenizer
from router.upkeep.wiring import tier_sight, upkeep_routes

_log = logging.getLogger("router")


async def run_router(config: ClusterConfig, lifecycle: Lifecycle, place: ProcessPlace = ProcessPlace()) -> None:
    """Serve until `lifecycle.stopping`, then drain. Neither nodes nor metadata server need be up. `place`: which of the
    router's processes this is.

    Raises ModelLoadError (no tokenizer) or ConfigError (the port is in use).
    """
    tokenizer, habits = await _read_model(config)
    clock, bounds, trust = SystemClock(), config.router, await _open_trust(config, lifecycle)
    client = await _make_client(config, trust)
    lifecycle.stack.push_async_callback(client.aclose)
    cluster = Cluster(config, clock, tokenizer_digest=tokenizer.digest)
    prober = Prober(bounds, cluster, client, clock)
    services = make_services(config, cluster, client, clock, place.name)
    log = services.log
    dispatcher = Dispatcher(services, make_policy(bounds.policy))
    live = _live(services, dispatcher, prober, lifecycle)
    lifecycle.stack.push_async_callback(dispatcher.aclose)
    prober.on_lost.append(dispatcher.node_lost)
    prober.on_silent.append(dispatcher.node_silent)
    lifecycle.describe.append(dispatcher.describe)
    endpoints = endpoints_of(config.metadata_server)
    keeps_store = config.handoff.traits.has_store  # servers that are not ours keep none
    subscription = connect_subscription(endpoints, cluster.sink_of, clock, trust) if keeps_store else None
    metadata = connect_client(endpoints, clock, trust) if keeps_store else None
    connected = None if subscription is None else lambda: subscription.connected
    problems = ClusterProblems(cluster, clock, connected)
    prober.on_round.append(problems.say)
    watch, cache = _watch_cache(config, services, metadata)
    stopping = lambda: dispatcher.stopping  # noqa: E731
    status = StatusView(config, cluster, log, clock, connected, problems=problems, cache=cache, stopping=stopping)
    live.told.append(status.go_by)
    metrics = RouterMetrics(cluster, log, connected, watch)
    load = _share_admission(config, lifecycle, services, dispatcher, status, trust=trust, place=place)
    answerer = _answerer(
        config, tokenizer, dispatcher, services, lifecycle, prober=prober, metrics=metrics, live=live, load=load
    )
    add_routes = _operators_routes(
        config, cluster, client, prober, lifecycle, metadata=metadata, answerer=answerer, connected=connected
    )
    add_blend = open_shadow(
        config, services, lifecycle, metadata=metadata, status=status, metrics=metrics.metrics, shared=load
    )
    app = make_app(
        answerer,
        RouterView(status, log, metrics, await open_siblings(config, lifecycle.stack, trust, place), name=place.name),
        metrics,
        max_body_bytes=bounds.max_body,
        cors=bounds.cors,
        more=partial(_add_all, (add_routes, add_blend), load),
        guard=await open_guard(config, log, clock, lifecycle, trust=trust, tokenizer=tokenizer, process=place.number),
        no_node=_no_node(services, prober, stopping, live),
        habits=habits,
        pooling=PlainPooling(client, cluster, bounds.request_timeout_s) if isinstance(client, VllmClient) else None,
        kept=keep_responses(other_urls(config, place.number), clock, lifecycle),
    )
    server = RouterListeners(app, config, trust, metrics.metrics, lifecycle, process=place.number)
    always = {"node probes": prober.run(), "stall watch": cluster.stalls.run(), "cache replay": cache.run()}
    always |= {repr(feed): feed.run() for feed in event_feeds(config, cluster.caches.told, clock)}
    for name, work in always.items():
        lifecycle.tasks.create_task(work, name=name)
    if subscription is not None and metadata is not None:
        lifecycle.stack.push_async_callback(subscription.aclose)
        lifecycle.stack.push_async_callback(metadata.aclose)
        lifecycle.tasks.create_task(subscription.run(), name="index subscription")
        lifecycle.tasks.create_task(_follow_stats(metadata, status, watch), name="segment use")
    await _serve(server, lifecycle)
    lifecycle.ready(**server.urls, policy=bounds.policy, nodes=len(config.nodes), handoff=config.handoff)
    await _until_drained(lifecycle, server, dispatcher, services)
    await server.drain(config.service.drain_s)


async def _serve(server: RouterListeners, lifecycle: Lifecycle) -> None:
    await server.start()
    lifecycle.stack.push_async_callback(server.aclose)
    lifecycle.tasks.create_task(server.wait_failed(), name="http server")


async def _until_drained(
    lifecycle: Lifecycle, server: RouterListeners, dispatcher: Dispatcher, services: RequestServices
) -> None:
    """Until it was told to stop, and what runs has ended, or its time has."""
    await lifecycle.stopping.wait()
    await server.leave()
    bounds = services.config
    log_fields(_log, logging.INFO, "draining", requests=services.log.in_flight, at_most_s=bounds.drain_s)
    if cut := await dispatcher.drain(bounds.drain_s):
        log_fields(_log, logging.WARNING, "requests_cut", num=len(cut), ids=",".join(cut))


async def _open_trust(config: ClusterConfig, lifecycle: Lifecycle) -> ClusterTrust:
    """The certificate is followed from now on."""
    trust = await asyncio.to_thread(open_trust, trust_source(config, "router"))
    if trust.certificate is not None:
        lifecycle.tasks.create_task(trust.certificate.follow(), name="process's certificate")
    return trust


async def _read_model(config: ClusterConfig) -> tuple[Tokenizer, ModelHabits]:
    tokenizer = await asyncio.to_thread(make_tokenizer, config)
    if isinstance(tokenizer, FolderTokenizer) and tokenizer.chat_problem is not None:
        log_fields(_log, logging.WARNING, "no_chats", problem=tokenizer.chat_problem)
    habits = await asyncio.to_thread(model_habits, config, tokenizer)
    if wanted := habits.sampling.others():
        log_fields(_log, logging.INFO, "sampling_defaults", source="generation_config.json", **wanted)
    return tokenizer, habits


def _answerer(
    config: ClusterConfig,
    tokenizer: Tokenizer,
    dispatcher: Dispatcher,
    services: RequestServices,
    lifecycle: Lifecycle,
    *,
    prober: Prober,
    metrics: RouterMetrics,
    live: LiveRouter,
    load: SharedAdmission | None,
) -> Answerer:
    """With what lets requests in, told of all that may make room."""
    threads = lifecycle.stack.enter_context(closing(TextThreads(AnswerLimits().text_threads)))
    admission = Admission(
        dispatcher.route,
        services.clock,
        services.config,
        none_is_up=partial(none_is_up_yet, services.cluster),
        stopping=lambda: dispatcher.stopping,
    )
    live.told.append(admission.go_by)
    if load is not None:
        admission.share(load)
    services.cluster.on_less_load = admission.wake
    prober.on_round.append(admission.wake)  # a node may have come, or another router's load have gone
    services.log.prompt_observers.append(admission.ended)
    metrics.watch_admission(admission)
    return Answerer(
        model=config.model.name,
        aliases=config.model.aliases,
        adapters=config.model.adapters,
        tokenizer=tokenizer,
        dispatcher=dispatcher,
        cluster=services.cluster,
        run=threads.run,
        admission=admission,
        grammars=lifecycle.stack.enter_context(closing(open_checks(config, tokenizer))),
        blend=config.kv.blend,
        gate=DocumentGate(config.kv.blend, services.gate),
    )


def _live(services: RequestServices, dispatcher: Dispatcher, prober: Prober, lifecycle: Lifecycle) -> LiveRouter:
    live, policy = LiveRouter(services), services.config.policy

    def choose_by(config: RouterConfig) -> None:
        nonlocal policy
        if config.policy is not policy:
            policy = config.policy
            dispatcher.go_by(make_policy(policy))

    live.told += [choose_by, prober.go_by, services.cluster.stalls.go_by]
    live.follow(lifecycle)
    return live


def _share_admission(
    config: ClusterConfig,
    lifecycle: Lifecycle,
    services: RequestServices,
    dispatcher: Dispatcher,
    status: StatusView,
    *,
    trust: ClusterTrust,
    place: ProcessPlace,
) -> SharedAdmission | None:
    """With the other routers and processes, which are told from now on. None: there are none."""
    others, work = other_urls(config, place.number), SharedWork(services.cluster, services.clock)
    if not others:
        return None
    shared = SharedAdmission(
        services.clock,
        expected=len(others),
        running=dispatcher.sequences_by_flow,
        nodes=work.own,
        places=work.places,
        tell_nodes=work.told,
    )
    status.problems_beside.append(shared.problem)
    lifecycle.describe.append(lambda: [repr(shared)])
    telling = share_load(shared, others, trust, apart=config.router.processes > 1)
    lifecycle.tasks.create_task(telling, name="load of other routers")
    return shared


def _no_node(services: RequestServices, prober: Prober, stopping: Callable[[], bool], live: LiveRouter) -> NoNodeWait:
    """Requests wait for a node as long as running ones do for another."""
    patience_s, most = services.limits.patience_s, services.config.max_waiting
    wait = NoNodeWait(services.cluster, services.clock, patience_s=patience_s, max_waiting=most, stopping=stopping)
    prober.on_round.append(wait.look)
    live.told.append(wait.go_by)
    return wait


def _operators_routes(
    config: ClusterConfig,
    cluster: Cluster,
    client: NodeClient,
    prober: Prober,
    lifecycle: Lifecycle,
    *,
    metadata: MetadataClient | None,
    answerer: Answerer,
    connected: Callable[[], bool] | None,
) -> Callable[[FastAPI], None]:
    """Follows operators' orders from now on; what adds the routes by which they are given."""
    clock = SystemClock()
    add = [
        upkeep_routes(config, cluster, client, metadata=metadata, answerer=answerer, probe=prober.probe, clock=clock)
    ]
    if metadata is None or connected is None or not isinstance(client, HttpNodeClient):
        add.append(add_no_nodes)
    else:
        admin = NodeAdmin(cluster, metadata, clock, probe=prober.probe, trial=prober.trial, connected=connected)
        prober.on_round.append(admin.note_states)
        lifecycle.describe.append(lambda: [repr(admin)])
        lifecycle.tasks.create_task(admin.follow(), name="node orders")
        janitor = ClusterJanitor(cluster, metadata, tier_sight(cluster, client, metadata))
        add.append(AdminRoutes(admin, SegmentRebalance(metadata), janitor, int(config.router.max_body)).add_to)

    def add_all(app: FastAPI) -> None:
        for one in add:
            one(app)

    return add_all


def _add_all(routes: Sequence[Callable[[FastAPI], None]], shared: SharedAdmission | None, app: FastAPI) -> None:
    for add in routes:
        add(app)
    if shared is not None:
        add_load(app, shared)


def _watch_cache(
    config: ClusterConfig, services: RequestServices, metadata: MetadataClient | None
) -> tuple[CacheWatch, CacheReplay]:
    """Also keeps what clients' hints ask to have kept, from now on."""
    cluster, log, clock = services.cluster, services.log, services.clock
    HintPins(cluster, log, clock, config, services.control, store=metadata)
    saves_output = config.engine is None or config.engine.save_output
    watch = CacheWatch(cluster, log, clock, seed=secrets.randbits(64), saves_output=saves_output)
    return watch, CacheReplay(watch, cluster, config, clock)


async def _make_client(config: ClusterConfig, trust: ClusterTrust) -> NodeClient:
    max_connections = LEGS_PER_REQUEST * config.router.max_requests + len(config.nodes)
    if config.handoff.traits.has_store:
        connect_s = config.router.connect_timeout_s
        return HttpNodeClient(connect_timeout_s=connect_s, max_connections=max_connections, trust=trust)
    facts = await asyncio.to_thread(read_model_facts, config)
    return VllmClient(config, facts, max_connections=max_connections, api_key=server_key())


async def _follow_stats(
    metadata: MetadataClient, status: StatusView, watch: CacheWatch, interval_s: float = 1.0
) -> None:
    """Keep the segments' use at hand for /v1/cluster. Away: what was last known is forgotten."""
    while True:
        try:
            stats = await metadata.stats()
            watch.rebuilding = stats.rebuilding > 0
            status.used_bytes = {item.segment.id: item.used_bytes for item in stats.segments}
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            status.used_bytes = {}
            watch.rebuilding = True
            log_fields(_log, logging.DEBUG, "no_segment_stats", error=error.message)
        await asyncio.sleep(interval_s)
