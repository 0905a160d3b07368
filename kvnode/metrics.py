"""The node's /metrics: its own state, the engine's and its store's totals. Names are in kvcore.metric_names. Metrics
that the engine keeps by itself (vLLM's) follow unchanged.

Owns no state: everything is sampled when asked for.
"""

from collections.abc import Awaitable, Callable, Iterable

from engines.process.messages import Sample as EngineSample
from kvcore import metric_names as names
from kvcore.telemetry import Metrics, Sample
from kvnode.control_api import ControlApi
from kvnode.partitions.memberships import Memberships
from kvnode.segment_owner import SegmentOwner
from kvnode.supervisor import EngineSupervisor
from kvnode.tiers.node_tiers import NodeTiers

_GAUGES = ("running", "waiting", "loading", "used_blocks", "cached_blocks", "total_blocks", "pending_saves")


class NodeMetrics:
    """Renders one node."""

    def __init__(
        self,
        metrics: Metrics,
        membership: Memberships,
        owner: SegmentOwner,
        supervisor: Callable[[], EngineSupervisor | None],
        tiers: NodeTiers | None = None,
    ) -> None:
        self.metrics = metrics
        self._supervisor = supervisor
        self._api: ControlApi | None = None
        self._sample: EngineSample | None = None
        sampled = metrics.sampled
        sampled(names.NODE_READY, lambda: [((), float(self._ready() and not membership.refused))])
        sampled(names.NODE_REGISTERED, lambda: [((), float(membership.joined))])
        sampled(names.NODE_ACTIVE, lambda: [((leg,), n) for leg, n in (self._api.active if self._api else {}).items()])
        sampled(names.NODE_LEGS, lambda: [(key, n) for key, n in (self._api.ended if self._api else {}).items()])
        sampled(names.NODE_ENGINE_RESTARTS, lambda: [((), self._restarts())])
        sampled(names.NODE_HOST_RESTARTS, lambda: [((), owner.host_restarts)])
        sampled(names.NODE_TRANSFER_REFUSED, lambda: list(owner.refused.items()))
        sampled(names.NODE_REGISTRATIONS, lambda: [((), membership.registrations)])
        sampled(names.NODE_HEARTBEAT_FAILURES, lambda: [((), membership.heartbeat_failures)])
        sampled(names.NODE_SEGMENT_BYTES, lambda: [((), owner.segment.size_bytes)])
        sampled(names.ENGINE_STATE, self._engine_state)
        sampled(names.ENGINE_TOTALS, self._engine_totals)
        sampled(names.STORE_MOVED_BYTES, lambda: self._moved("bytes", 1.0))
        sampled(names.STORE_MOVED_SECONDS, lambda: self._moved("us", 1e-6))
        sampled(names.STORE_TOTALS, self._store_totals)
        sampled(names.NODE_PEER_TRANSPORT, self._peer_transports)
        if tiers is not None:
            reports, guards = tiers.reports, tiers.tiers
            sampled(names.TIER_CHUNKS, lambda: [((r.name, what), n) for r in reports() for what, n in r.counts.items()])
            sampled(names.TIER_BYTES, lambda: [((g.name, way), n) for g in guards for way, n in g.moved_bytes.items()])
            sampled(names.TIER_USED_BYTES, lambda: [((r.name,), r.used_bytes or 0) for r in reports()])
            sampled(names.TIER_PROBLEM, lambda: [((r.name,), float(bool(r.problem))) for r in reports()])

    async def render(self, api: ControlApi | None, sample: Callable[[], Awaitable[EngineSample | None]]) -> bytes:
        """The text of /metrics, with a fresh sample of the engine if it answers."""
        self._api = api
        self._sample = await sample()
        return self.metrics.render() + (self._sample.exposition if self._sample is not None else b"")

    def _ready(self) -> bool:
        supervisor = self._supervisor()
        return (supervisor is None or supervisor.ready) and not (self._api is not None and self._api.draining)

    def _restarts(self) -> int:
        supervisor = self._supervisor()
        return 0 if supervisor is None else supervisor.restarts

    def _engine_state(self) -> Iterable[Sample]:
        if self._sample is None:
            return []
        return [((name,), getattr(self._sample.stats, name)) for name in _GAUGES]

    def _engine_totals(self) -> Iterable[Sample]:
        return [] if self._sample is None else [((key,), n) for key, n in self._sample.stats.counters.items()]

    def _store_totals(self) -> Iterable[Sample]:
        store = {} if self._sample is None else self._sample.store
        return [((key,), n) for key, n in store.items() if not key.startswith("moved.")]

    def _moved(self, unit: str, factor: float) -> Iterable[Sample]:
        for key, value in ({} if self._sample is None else self._sample.store).items():
            if key.startswith("moved.") and key.endswith(f".{unit}"):
                _, transport, direction, _ = key.split(".")
                yield (transport, direction), value * factor

    def _peer_transports(self) -> Iterable[Sample]:
        return [] if self._sample is None else [(pair, 1.0) for pair in self._sample.transports.items()]
