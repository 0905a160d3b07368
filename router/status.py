"""What /v1/cluster shows, for people and for `kvferry status`."""

from collections.abc import Callable

import msgspec

from kvcore.clock import Clock
from kvcore.config.checks import open_line
from kvcore.config.schema import ClusterConfig, RouterConfig
from kvcore.errors import KVFerryError, NodeUnavailableError, StoppingError
from nodeapi.messages import TierReport
from router.cache.replay import CacheReplay
from router.nodes.cluster import Cluster, KnownNode
from router.nodes.problems import ClusterProblems
from router.requests.records import RequestLog


class SegmentStatus(msgspec.Struct):
    """Sizes in bytes. `used_bytes` None: not known here (the metadata server counts)."""

    id: str
    size_bytes: int
    used_bytes: int | None = None


class NodeStatus(msgspec.Struct, kw_only=True):
    """One node as the router sees it; numbers are of its last report, its load None while it does not answer."""

    id: str
    role: str
    url: str
    healthy: bool
    breaker: str
    reason: str | None
    running: int | None = None
    waiting: int | None = None
    used_blocks: int | None = None
    total_blocks: int | None = None
    segments: list[SegmentStatus] = []
    engine_restarts: int = 0
    tiers: list[TierReport] = []
    prefill_tokens_per_s: float | None = None
    """As measured; so with the next ones. None: not yet."""
    step_s: float | None = None
    load_bytes_per_s: float | None = None
    """Of KV, out of memory of its own machine, or of others where it was never seen to read its own."""
    held_chunks: int = 0
    """Of prompts that its engine is taken to have in its own blocks, having read them out of other nodes' memory."""


class RequestTotals(msgspec.Struct, kw_only=True):
    """Counts since start. `retried`: ended requests of which a leg was tried again; `in_need`: those that a prefiller
    decoded, all or the rest of them."""

    in_flight: int
    total: int
    ok: int
    failed: int
    cancelled: int
    retried: int
    in_need: int = 0


class ProcessStatus(msgspec.Struct, kw_only=True):
    """One of the processes of the router that is asked. `problem`: why it does not answer the one that was asked."""

    name: str
    in_flight: int = 0
    stopping: bool = False
    problem: str | None = None


class ClusterStatus(msgspec.Struct, kw_only=True):
    """The body of GET /v1/cluster."""

    cluster: str
    uptime_s: float
    policy: str
    model: str
    nodes: list[NodeStatus]
    requests: RequestTotals
    hit_rate: float
    handoff: str
    metadata_connected: bool | None
    """None: a cluster of servers that are not ours has no metadata server."""
    index_blocks: int
    stopping: bool = False
    """This router takes no new requests."""
    problems: list[str] = []
    """What is wrong between the nodes, why the hit rate is low, and whether the cluster is open; a sentence each."""
    processes: list[ProcessStatus] = []
    """Of this router; empty: it is one. `requests` and `hit_rate` are of those together that answer."""


class StatusView:
    """Puts the status together when asked."""

    def __init__(
        self,
        config: ClusterConfig,
        cluster: Cluster,
        log: RequestLog,
        clock: Clock,
        connected: Callable[[], bool] | None,
        *,
        problems: ClusterProblems,
        cache: CacheReplay,
        stopping: Callable[[], bool],
    ) -> None:
        self._config, self._policy = config, config.router.policy
        self._cluster = cluster
        self._log = log
        self._clock = clock
        self._connected = connected
        self._problems = problems
        self._stopping = stopping
        self.cache = cache
        self._started_at = clock.now()
        self._open = open_line(config)
        self.problems_beside: list[Callable[[], str | None]] = []
        """Each says what else is wrong, if anything is."""
        self.used_bytes: dict[str, int] = {}
        """By segment id, as the metadata server last counted."""

    def go_by(self, config: RouterConfig) -> None:
        """What it says of the policy from now on."""
        self._policy = config.policy

    def problem(self) -> KVFerryError | None:
        """Why no request can be served now; None: one can."""
        if self._stopping():
            return StoppingError("stopping: requests under way are answered, new ones are refused")
        view = self._cluster.view()
        return None if view.decoders or view.prefillers else NodeUnavailableError(self._cluster.why_no_decoder())

    def status(self) -> ClusterStatus:
        """As of now."""
        log, beside = self._log, [look() for look in self.problems_beside]
        return ClusterStatus(
            cluster=self._config.cluster,
            uptime_s=self._clock.now() - self._started_at,
            policy=self._policy.value,
            model=self._config.model.name,
            nodes=[self._node(node) for node in self._cluster.nodes.values()],
            requests=RequestTotals(
                in_flight=log.in_flight,
                total=log.total,
                ok=log.ok,
                failed=log.failed,
                cancelled=log.cancelled,
                retried=log.retried,
                in_need=log.in_need,
            ),
            hit_rate=log.hit_rate,
            handoff=self._config.handoff.value,
            metadata_connected=self._connected() if self._connected else None,
            index_blocks=len(self._cluster.index),
            stopping=self._stopping(),
            problems=[*self._problems.lines(), *filter(None, [self.cache.stats().problem, self._open, *beside])],
        )

    def _node(self, node: KnownNode) -> NodeStatus:
        reason = self._cluster.why_unused(node)
        report = node.report
        stats = report.stats if report and node.silent_since is None else None
        return NodeStatus(
            id=node.id,
            role=node.role.value,
            url=node.url,
            healthy=reason is None,
            breaker=self._cluster.breaker_state(node).value,
            reason=reason,
            running=stats.running if stats else None,
            waiting=stats.waiting if stats else None,
            used_blocks=stats.used_blocks if stats else None,
            total_blocks=stats.total_blocks if stats else None,
            segments=[
                SegmentStatus(s.id, s.size_bytes, self.used_bytes.get(s.id))
                for s in (report.segments if report else [])
            ],
            engine_restarts=report.engine_restarts if report else 0,
            prefill_tokens_per_s=node.rates.prefill.per_s or None,
            step_s=node.rates.steps.each_s or None,
            load_bytes_per_s=node.rates.near.per_s or node.rates.far.per_s or None,
            held_chunks=self._cluster.caches.held_chunks(node.id),
            tiers=report.tiers if report and node.silent_since is None else [],
        )
