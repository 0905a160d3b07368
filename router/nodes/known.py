"""One node as the router knows it: from the cluster file, from events, and from what it says of itself."""

from dataclasses import dataclass, field

from kvcore.types import NodeInfo, Role
from nodeapi.messages import NodeReport
from router.nodes.health import Breaker
from router.nodes.limits import NodeHealthLimits
from router.nodes.pace import NodePace
from router.nodes.trust import NodeTrust, TrustState
from router.routing.limits import RateLimits
from router.routing.rates import NodeRates
from router.routing.views import NodeView, TierRates, ToldWork


@dataclass(slots=True, repr=False, eq=False)
class KnownNode:
    """One node. `problem` None: it answers its probes and is what it should be."""

    touched: set["KnownNode"] = field(default_factory=set, init=False)
    """Where it puts itself when anything of it is set that others see, for whoever keeps up with it."""

    id: str
    role: Role
    url: str
    static: bool
    lease: NodeInfo | None = None
    """The node as the metadata server knows it; None: it does not, or has said nothing."""
    lapsed: bool = False
    """The metadata server has said that it is gone, and not that it is back. False while that has said nothing."""
    report: NodeReport | None = None
    fingerprint: bytes = b""
    """Of its engine's KV, as last reported."""
    lacks: frozenset[str] = frozenset()
    """Fields of SamplingParams that it cannot be sent, as last reported."""
    unfit: str | None = None
    """Why it is no node of this router's, as last reported; None: it is one."""
    problem: str | None = "not probed yet"
    silent_since: float | None = None
    """When the first of the probes was sent that have had no answer since the last one that had."""
    asked_at: float = float("-inf")
    """When it was last probed."""
    misses: int = 0
    """Probes in a row that came too late."""
    breaker: Breaker = field(default_factory=Breaker)
    pace: NodePace = field(default_factory=lambda: NodePace(NodeHealthLimits()))
    trust: NodeTrust = field(default_factory=lambda: NodeTrust(NodeHealthLimits()))
    legs: int = 0
    """Of ours, under way."""
    sequences: int = 0
    prefill_tokens: int = 0
    prefills: int = 0
    """Prompts that `prefill_tokens` are of."""
    computing_since: float = 0.0
    """When it began with the first of those that are left of `prefill_tokens`, as far as that can be told from here."""
    others_sequences: int = 0
    """What it reported beyond ours: of other routers."""
    told: ToldWork | None = None
    """By the other routers, of their work on it."""
    rates: NodeRates = field(default_factory=NodeRates)
    _viewed: tuple[NodeReport, int, NodeView] | None = None

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name != "asked_at":
            self.touched.add(self)

    def touch(self) -> None:
        """Its breaker, trust or rates have changed, none of which is set anew."""
        self.touched.add(self)

    def __repr__(self) -> str:
        load = f"{self.sequences} sequences, {self.prefill_tokens} to prefill"
        return f"<KnownNode {self.role} {self.id} {self.problem or 'usable'}: {load}>"

    @property
    def segment_id(self) -> str | None:
        """Its (first) segment, once known."""
        return self.report.segments[0].id if self.report and self.report.segments else None

    @property
    def machine(self) -> str:
        """Where its (first) segment lies; empty: not known."""
        return self.report.segments[0].host_id if self.report and self.report.segments else ""

    def was_late_for(self, reader: "KnownNode", tokens: int, seconds: float, before_s: float, now: float) -> None:
        """So many tokens that this node was to compute in `before_s` and to hand over were given up after `seconds`:
        the link between the two is too slow, if it had much more time than that."""
        engine, limits = reader.report.engine if reader.report else None, RateLimits()
        if engine is None or not reader.machine or reader.machine == self.machine:
            return
        num_bytes = tokens // engine.kv_spec.chunk_tokens * engine.kv_spec.chunk_bytes
        self.rates.gave_up(num_bytes, seconds - limits.late * before_s, reader.machine, now)
        self.touch()

    @property
    def is_stranger(self) -> bool:
        """Whether nothing but an event says that there is such a node: it is silent, or was not asked yet."""
        return not self.static and (self.report is None or self.silent_since is not None)

    @property
    def is_gone(self) -> bool:
        """Nobody speaks of it, not even itself, and no leg of ours is on it."""
        idle = self.sequences == 0 and self.prefill_tokens == 0
        return self.problem is not None and idle and not (self.static or self.lease)

    @property
    def doubtful(self) -> bool:
        """Whether others are to be preferred: it was late, or may not have more legs for now."""
        if self.trust.state is TrustState.TRUSTED:
            return self.misses > 0
        chosen = 1 if self.prefill_tokens else 0  # for a prefill that has not begun, at least
        return not self.trust.has_room(max(self.legs, self.sequences, chosen))

    def reported_others(self, sequences: int) -> None:
        """It has so many beyond ours. Others have told of some of them."""
        self._set_others(max(sequences, 0 if self.told is None else self.told.sequences))

    def told_others(self, told: ToldWork | None) -> None:
        """Other routers have so much of it; what it reported beyond that stays. None: they say nothing any more."""
        if told is None and self.told is None:
            return
        before, now = (0 if one is None else one.sequences for one in (self.told, told))
        self.told = told
        if told is not None:
            self._set_others(max(0, self.others_sequences - before) + now)

    def _set_others(self, sequences: int) -> None:
        if sequences != self.others_sequences:
            self.others_sequences = sequences

    def told_left_s(self, now: float) -> float:
        """Until it has done what other routers told of."""
        rate = self.rates.prefill.per_s
        return self.told.left_tokens(rate, now) / rate if self.told is not None and rate else 0.0

    def left_tokens(self, now: float) -> float:
        """That it has to compute of ours, as far as time tells."""
        if self.prefills != 1 or self.report is None or self.report.engine is None:
            return self.prefill_tokens
        return self.view().left_tokens(now)

    def view(self) -> NodeView:
        """What policies see of it, while it is without problem. The same one until something of it changes: with many
        nodes, making all of them anew for each request costs more than the choice."""
        report, sequences, doubtful = self.report, self.sequences + self.others_sequences, self.doubtful
        assert report is not None and report.engine is not None, "a node without problem has reported"
        rates, before = self.rates, self._viewed
        same = before is not None and before[0] is report and before[1] == rates.changes
        known = before[2] if before is not None and same else None
        if known is not None:
            view = known
            same_load = view.sequences == sequences and view.prefill_tokens == self.prefill_tokens
            if same_load and view.doubtful == doubtful and view.told is self.told:
                return view
        view = NodeView(
            id=self.id,
            role=self.role,
            fingerprint=self.fingerprint,
            chunk_tokens=report.engine.kv_spec.chunk_tokens,
            max_context=report.engine.max_context,
            sequences=sequences,
            prefill_tokens=self.prefill_tokens,
            kv_spec=report.engine.kv_spec,
            doubtful=doubtful,
            lacks=self.lacks,
            adapters=known.adapters if known is not None else frozenset(report.engine.adapters),
            takes_documents=not report.engine.refuses_documents,
            prefills=self.prefills,
            told=self.told,
            computing_since=self.computing_since,
            max_sequences=report.engine.max_sequences,
            prefill_rate=rates.prefill.per_s,
            is_warm_up=rates.prefill.is_warm_up,
            step_s=rates.steps.each_s,
            stay_s=rates.stays.each_s,
            near_rate=rates.near.per_s or rates.far.per_s,
            far_rate=rates.far.per_s or rates.near.per_s,
            read_rates=known.read_rates if known is not None else rates.read_rates(),
            machine=self.machine,
            put_rates=known.put_rates if known is not None else rates.put_rates(),
            doubts=known.doubts if known is not None else rates.doubts(),
            tiers=known.tiers if known is not None else TierRates.of(report.tiers),
        )
        object.__setattr__(self, "_viewed", (report, rates.changes, view))  # nothing that anybody sees has changed
        return view

    def reason(self, now: float) -> str | None:
        """Why it is not used; None: it is used."""
        if self.problem is not None:
            return self.problem
        if self.breaker.open_until is not None and not self.breaker.allows(now):
            return f"breaker {self.breaker.state(now)}"
        return f"suspected: {self.trust.why}" if self.trust.state is TrustState.SUSPECTED else None
