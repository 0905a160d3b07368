"""The nodes that the router knows: from the config, from the metadata server's events, and what they say of themselves.

Owns breakers, the count of this router's own work on each node, and the prefix index. Chooses nothing. With
the metadata server away the static nodes go on being probed and used; only knowledge of cache hits is lost.
"""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence

from msgspec.structs import replace

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import internal_url
from kvcore.errors import KVFerryError, ModelChangedError
from kvcore.identity import ClusterIdentity
from kvcore.partitions import Part, Partitions
from kvcore.peer_log import PeerLog
from kvcore.ports import why_no_node_url
from kvcore.telemetry import log_fields
from kvcore.types import NodeInfo, Role
from metadata_server.cache_messages import NodeOrder
from metadata_server.messages import Event, EventKind
from nodeapi.messages import EngineInfo, NodeReport
from nodeapi.sampling import lacking
from router.nodes.board import NodeBoard, NodeTable
from router.nodes.fit import RouterIdentity, has_worked, why_not_now, why_other, why_unsound
from router.nodes.health import Breaker, BreakerState, is_nodes_fault
from router.nodes.known import KnownNode
from router.nodes.leases import NodeLeases
from router.nodes.limits import NodeHealthLimits
from router.nodes.pace import NodePace
from router.nodes.stall_watch import StallWatch, works
from router.nodes.trust import NodeTrust
from router.nodes.work import NodeWork
from router.routing.decision import why_no_decoder
from router.routing.engine_caches import EngineCaches
from router.routing.index import KeptKeys, PrefixHits, PrefixIndex
from router.routing.parted_index import PartedIndex
from router.routing.rates import NodeRates
from router.routing.tier_index import TierIndex
from router.routing.views import ClusterView

_log = logging.getLogger("router")
__all__ = ["Cluster", "KnownNode", "NodeWork"]


class Cluster:
    """Nodes, loads and index. Also the sink of the metadata server's event stream (`on_reset`, `on_events`)."""

    def __init__(
        self,
        config: ClusterConfig,
        clock: Clock,
        limits: NodeHealthLimits = NodeHealthLimits(),
        *,
        tokenizer_digest: str = "",
    ) -> None:
        self._config = config
        self._identity = RouterIdentity(ClusterIdentity(config.cluster, config.model.name), tokenizer_digest)
        self._clock = clock
        self._limits = limits
        self.probe_asked = asyncio.Event()
        """Set when what is known of some node may be out of date."""
        names = tuple(partition.name for partition in config.metadata_server.partitions)
        self.index: PrefixIndex | PartedIndex = PartedIndex(Partitions(names)) if names else PrefixIndex()
        self._indexes = self.index.parts if isinstance(self.index, PartedIndex) else [self.index]
        self.tiers = TierIndex(config.tiers, names)
        self.leases = NodeLeases(names or [""])
        self.nodes = NodeTable()
        self._board = NodeBoard(self.nodes, self._reason)
        self.stalls = StallWatch(config.router, limits, clock.now)
        self._drained: set[str] = set()
        telling = [name for name, node in config.nodes.items() if node.events is not None]
        has_store = config.handoff.traits.has_store
        self.caches = EngineCaches(self.index, self.tiers, self.nodes.machine_of, has_store=has_store, telling=telling)
        self.on_less_load: Callable[[], None] = lambda: None  # some node has less to do
        self._said = PeerLog(_log, clock=clock)
        self.on_orders([])

    def __repr__(self) -> str:
        usable = sum(self.why_unused(node) is None for node in self.nodes.values())
        return f"<Cluster {usable} of {len(self.nodes)} nodes usable, {len(self.index)} keys>"

    def on_orders(self, orders: Sequence[NodeOrder], roles: Mapping[str, Role] = {}) -> None:
        """All that was ordered: drained nodes get no new legs, removed ones are forgotten; `roles` beat the file's."""
        self._drained = {order.node_id for order in orders if order.kind == "drained"}
        self._board.touch_all()
        removed = {order.node_id for order in orders} - self._drained
        for name in [name for name in removed if name in self.nodes and self.nodes[name].lease is None]:
            self.index.drop_node(name)
            del self.nodes[name]
        for name, node in self._config.nodes.items():
            known, role = self.nodes.get(name), node.role if node.role is Role.STORE else roles.get(name, node.role)
            if name not in removed and (known is None or (known.static and known.role is not role)):
                url = internal_url(self._config, node.host, node.port) if node.url is None else node.url.rstrip("/")
                self.nodes[name] = self._new(name, role, url, static=True)
                self.nodes[name].lease = self.leases.of(name)
                self.probe_asked.set()

    def _new(self, name: str, role: Role, url: str, *, static: bool) -> KnownNode:
        breaker, pace, trust = Breaker(self._limits), NodePace(self._limits), NodeTrust(self._limits)
        return KnownNode(name, role, url, static=static, breaker=breaker, pace=pace, trust=trust)

    # --- what the prober tells ---

    def reported(self, node: KnownNode, report: NodeReport) -> None:
        """The node answered a probe. One that has started anew has breaker, trust and pace as new; one that was lost
        has to earn its trust. The report of the last time, the same object, costs next to nothing: most nodes of a
        large cluster have nothing new to say."""
        self.index.sweep()
        if report is node.report and node.problem is None and node.silent_since is None and not node.misses:
            self._count_others(node, report)
            return
        lost = node.silent_since is not None and node.problem is not None
        node.silent_since, node.misses = None, 0
        if (why := why_unsound(report, self._limits)) is not None:
            node.report, node.problem = None, why
            return
        before = node.report
        if before is not None and before.engine == report.engine:
            report = replace(report, engine=before.engine)  # who knows it by identity need not look again
        node.report = report
        if before is None or report.engine_restarts != before.engine_restarts:
            self.caches.forget(node.id)
        if before is None or report.node.incarnation != before.node.incarnation:
            node.breaker, node.trust, node.rates = Breaker(self._limits), NodeTrust(self._limits), NodeRates()
            node.pace = NodePace(self._limits)
            self.caches.forget(node.id)
        elif lost or has_worked(before, report):
            node.pace.quiet_s = 0.0
            works(node, self._clock.now(), lost=lost)
        engine = report.engine
        node.fingerprint = engine.kv_spec.fingerprint if engine is not None else b""
        node.lacks = lacking(report.protocol, engine.lacks if engine is not None else ())
        self._count_others(node, report)
        node.unfit = self._identity.why_unfit(report)
        node.problem = why_other(report, node.id, node.role, node.url) or node.unfit or why_not_now(report)

    def _count_others(self, node: KnownNode, report: NodeReport) -> None:
        stats = report.stats
        node.reported_others(max(0, stats.running + stats.waiting - node.sequences) if stats else 0)

    def probed(self, node: KnownNode, before: str | None) -> None:
        """A probe has ended, one way or the other; `before`: the node's problem when it began. A node that is there and
        cannot be used is told of as one that was lost."""
        if node.is_gone and self.nodes.get(node.id) is node:
            del self.nodes[node.id]
        if before is not None and node.problem is not None:  # not for one late answer
            self.caches.forget(node.id)
        if node.problem is not None:
            node.problem = node.problem[: self._limits.max_problem_chars]
        usable = node.problem is None
        if before != node.problem and (node.static or self._said.allows(f"{usable}", node.id) is not None):
            alarm = before is None or node.problem == node.unfit
            level = logging.WARNING if alarm and node.problem else logging.INFO  # one that is still starting is none
            log_fields(_log, level, "node", node=node.id, role=node.role, usable=usable, why=node.problem)

    def renewed(self, node_id: str) -> None:
        """Its engine was started anew on purpose: that legs failed meanwhile says nothing of it."""
        if (node := self.nodes.get(node_id)) is not None:
            node.breaker = Breaker(self._limits)

    # --- what the dispatcher tells ---

    def work_chosen(self, node_id: str, *, sequences: int, prefill_tokens: int) -> NodeWork:
        """The node was chosen for this: whoever is routed next sees it. Hand the result back: `leg_ended`."""
        work = NodeWork(self.nodes.get(node_id))
        self._count(work, sequences, prefill_tokens)
        return work

    def add_prefill(self, work: NodeWork, tokens: int) -> None:
        """It is to compute so many tokens of the prompt, too."""
        self._count(work, 0, tokens)

    def leg_started(self, work: NodeWork, *, sequences: int) -> NodeWork:
        """A leg of this router starts on the chosen node. Returns what it takes of the work, at most `sequences`."""
        assert not work.begun, "what a leg took is its own"
        taken = work.taken(sequences)
        if (node := work.node) is not None:
            node.breaker.started(self._clock.now())
            node.count_leg(1)
        return taken

    def leg_spoke(self, work: NodeWork) -> None:
        """Its first token is here: its prompt is computed."""
        if work.prefill_tokens:
            self._count(work, 0, -work.prefill_tokens)

    def leg_ended(self, work: NodeWork, *, ok: bool = False, error: KVFerryError | None = None) -> None:
        """It ended: well (`ok`), by `error`, or (neither) by our own hand, also before a leg took it. Only the first
        end of a work counts."""
        begun, work.begun = work.begun, False
        if work.sequences or work.prefill_tokens:
            self._count(work, -work.sequences, -work.prefill_tokens)
        node = work.node
        if node is None or not begun:
            return
        node.count_leg(-1)
        if ok:
            node.breaker.succeeded()
            node.trust.succeeded()
        elif error is not None and is_nodes_fault(error):
            node.breaker.failed(self._clock.now())
            self.probe_asked.set()
        else:
            node.breaker.undecided()
            if isinstance(error, ModelChangedError):  # what the node last reported is out of date
                self.probe_asked.set()

    def chosen(self, node_id: str, prompt_token_ids: Sequence[int], salt: bytes) -> None:
        """The node is to have the KV of this prompt in its own cache. Nodes of ours tell what lies in their memory."""
        self.caches.chosen(node_id, prompt_token_ids, salt)

    def computed(self, node_id: str, kept: KeptKeys) -> None:
        """The node has the KV of the prompt with these keys in its own cache now. Nodes of ours tell what lies in their
        memory, not what their engines have read out of others'. `kept`: as for `hits`."""
        if kept and (engine := self._engine(node_id)) is not None:
            self.caches.computed(node_id, engine, self.nodes[node_id].fingerprint, kept)

    def _count(self, work: NodeWork, sequences: int, prefill_tokens: int) -> None:
        work.count(sequences, prefill_tokens, self._clock.now())
        if sequences + prefill_tokens < 0:
            self.on_less_load()

    # --- what the metadata server tells ---

    def sink_of(self, part: Part | None) -> "Cluster | _ClusterOfPart":
        """For the events of one partition of the index, which say nothing of the others' keys; None: of all."""
        return self if part is None else _ClusterOfPart(self, part.number)

    def on_reset(self, part: int = 0) -> None:
        """Forget what was learnt from a partition's events; a snapshot follows."""
        self._indexes[part].reset()
        self.tiers.reset(part)
        self.leases.reset(part)
        for node in self.nodes.values():
            node.lease, node.lapsed = self.leases.of(node.id), False

    def on_events(self, events: Sequence[Event], part: int = 0) -> None:
        """Apply changes in order."""
        index = self._indexes[part]
        for event in events:
            self.tiers.on_event(event, part)
            match event.kind:
                case EventKind.STORED:
                    index.store(event.node_id, event.keys, event.segment_id)
                case EventKind.REMOVED:
                    index.remove(event.node_id, event.keys, event.segment_id)
                case EventKind.NODE_UP if event.node is not None:
                    self.leases.up(part, event.node)
                    self._node_up(event.node)
                case EventKind.NODE_DOWN:
                    index.drop_node(event.node_id)
                    self._node_down(event.node_id, self.leases.down(part, event.node_id))

    def _node_up(self, info: NodeInfo) -> None:
        known = self.nodes.get(info.id)
        if (known is None or not known.static) and (why := why_no_node_url(info.control_url)) is not None:
            if self._said.allows("url", info.id) is not None:
                log_fields(_log, logging.WARNING, "node", node=info.id, usable=False, why=f"its URL {why}")
            return
        if known is None or not (known.static or (known.url, known.role) == (info.control_url, info.role)):
            known = self.nodes[info.id] = self._new(info.id, info.role, info.control_url, static=False)
        known.lease, known.lapsed = info, False
        self.probe_asked.set()

    def _node_down(self, node_id: str, elsewhere: NodeInfo | None) -> None:
        """`elsewhere`: how another partition knows it."""
        node = self.nodes.get(node_id)
        if node is None:
            return
        node.lease, node.lapsed = elsewhere, elsewhere is None
        if not node.static and elsewhere is None:
            node.problem = "the metadata server has given it up"
        self.probe_asked.set()

    # --- what the others ask ---

    def view(self) -> ClusterView:
        """The nodes with an engine as of now: the usable ones, and why the others are not."""
        return self._board.view(self._clock.now())

    def hits(
        self, view: ClusterView, prompt_token_ids: Sequence[int], salt: bytes, kept: KeptKeys | None = None
    ) -> dict[bytes, PrefixHits]:
        """Where the prompt's usable chunks are, for each kind of KV among those who may decode. `kept`: its keys, of
        this prompt and salt, for the next time."""
        return self.caches.hits(view, prompt_token_ids, salt, {} if kept is None else kept)

    def why_no_decoder(self) -> str:
        """One sentence for an error: what is wrong with each node that could decode and is not usable."""
        return why_no_decoder(self.view().unusable)

    def max_context(self) -> int | None:
        """The longest context among the decoders that fit and ever reported, or else among such prefillers, capped by
        the config; None: none has."""
        longest, _ = self._board.engine_facts(self._clock.now())
        limit = self._config.model.max_context
        return longest if longest is None or limit is None else min(longest, limit)

    def vocab_size(self) -> int | None:
        """Of the decoders that fit, or else of the prefillers; None while none has reported."""
        return self._board.engine_facts(self._clock.now())[1]

    def eos_token_ids(self, node_id: str) -> frozenset[int]:
        """Of this node's model; empty while unknown."""
        engine = self._engine(node_id)
        return frozenset(engine.eos_token_ids) if engine is not None else frozenset()

    def _engine(self, node_id: str) -> EngineInfo | None:
        node = self.nodes.get(node_id)
        return node.report.engine if node is not None and node.report is not None else None

    def breaker_state(self, node: KnownNode) -> BreakerState:
        """As of now."""
        return node.breaker.state(self._clock.now())

    def why_unused(self, node: KnownNode) -> str | None:
        """As of now; None: it is used."""
        return self._reason(node, self._clock.now())

    def is_drained(self, node_id: str) -> bool:
        """Whether it gets no new legs, by order."""
        return node_id in self._drained

    def _reason(self, node: KnownNode, now: float) -> str | None:
        return node.reason(now) or (f"drained by `kvferry drain {node.id}`" if node.id in self._drained else None)

    def stands_in(self, node_id: str) -> bool:
        """Whether this node, if it decodes, does so in a decoder's place."""
        node = self.nodes.get(node_id)
        return node is not None and node.role is Role.PREFILLER


class _ClusterOfPart:
    """Its sink for one partition of the index."""

    def __init__(self, cluster: Cluster, number: int) -> None:
        self._cluster, self._number = cluster, number

    def on_reset(self) -> None:
        self._cluster.on_reset(self._number)

    def on_events(self, events: Sequence[Event]) -> None:
        self._cluster.on_events(events, self._number)
