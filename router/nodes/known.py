"""One node as the router knows it: from the cluster file, from events, and from what it says of itself."""

from dataclasses import dataclass, field

from msgspec.structs import replace

from kvcore.types import NodeInfo, Role
from nodeapi.messages import EngineInfo, NodeReport
from router.nodes.health import Breaker
from router.nodes.limits import NodeHealthLimits
from router.nodes.pace import NodePace
from router.nodes.trust import NodeTrust, TrustState
from router.routing.limits import RateLimits
from router.routing.rates import NodeRates
from router.routing.views import NodeView, TierRates, ToldWork


@dataclass(slots=True)
class OwnLoad:
    """This router's own work on a node. It changes several times a request: whoever changes it says so when it is done
    (`KnownNode.touch`)."""

    legs: int = 0
    """Under way."""
    sequences: int = 0
    prefill_tokens: int = 0
    prefills: int = 0
    """Prompts that `prefill_tokens` are of."""
    computing_since: float = 0.0
    """When the node began with the first of those that are left of `prefill_tokens`, as far as that can be told from
    here."""


_Load = tuple[int, int, int, float, bool, ToldWork | None]


@dataclass(slots=True)
class _LastView:
    """A node as policies saw it last: `view`, which is `measured` under this `load`; and that is what it said in this
    report with what was measured by so many `changes` of these rates."""

    report: NodeReport
    rates: NodeRates
    changes: int
    measured: NodeView
    load: _Load
    view: NodeView


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
    own: OwnLoad = field(default_factory=OwnLoad)
    others_sequences: int = 0
    """What it reported beyond ours: of other routers."""
    told: ToldWork | None = None
    """By the other routers, of their work on it."""
    rates: NodeRates = field(default_factory=NodeRates)
    _seen: _LastView | None = None

    def __setattr__(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
        if name not in ("asked_at", "_seen"):
            self.touched.add(self)

    def touch(self) -> None:
        """Its load, breaker, trust or rates have changed, none of which is set anew."""
        self.touched.add(self)

    def count_leg(self, number: int) -> None:
        """So many legs more are under way on it."""
        self.own.legs += number
        self.touch()

    @property
    def sequences(self) -> int:
        """Of this router's."""
        return self.own.sequences

    @property
    def prefill_tokens(self) -> int:
        """Of prompts that this router has sent it and that it has not answered."""
        return self.own.prefill_tokens

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
        chosen = 1 if self.own.prefill_tokens else 0  # for a prefill that has not begun, at least
        return not self.trust.has_room(max(self.own.legs, self.own.sequences, chosen))

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
        if self.own.prefills != 1 or self.report is None or self.report.engine is None:
            return self.prefill_tokens
        return self.view().left_tokens(now)

    def view(self) -> NodeView:
        """What policies see of it, while it is without problem. The same one until something of it changes: with many
        nodes, making all of them anew for each request costs more than the choice."""
        report, rates, own, seen = self.report, self.rates, self.own, self._seen
        assert report is not None and report.engine is not None, "a node without problem has reported"
        load = (
            own.sequences + self.others_sequences,
            own.prefill_tokens,
            own.prefills,
            own.computing_since,
            self.doubtful,
            self.told,
        )
        if seen is None or seen.report is not report or seen.rates is not rates or seen.changes != rates.changes:
            if seen is not None and seen.report is report:
                measured = _measured(seen.measured, rates)
            else:
                measured = _measured(self._reported(report, report.engine), rates)
            seen = self._seen = _LastView(report, rates, rates.changes, measured, load, _under(measured, load))
        elif seen.load != load:
            seen.load, seen.view = load, _under(seen.measured, load)
        return seen.view

    def _reported(self, report: NodeReport, engine: EngineInfo) -> NodeView:
        """As it says itself."""
        return NodeView(
            id=self.id,
            role=self.role,
            fingerprint=self.fingerprint,
            chunk_tokens=engine.kv_spec.chunk_tokens,
            max_context=engine.max_context,
            kv_spec=engine.kv_spec,
            lacks=self.lacks,
            adapters=frozenset(engine.adapters),
            takes_documents=not engine.refuses_documents,
            max_sequences=engine.max_sequences,
            machine=self.machine,
            tiers=TierRates.of(report.tiers),
        )

    def reason(self, now: float) -> str | None:
        """Why it is not used; None: it is used."""
        if self.problem is not None:
            return self.problem
        if self.breaker.open_until is not None and not self.breaker.allows(now):
            return f"breaker {self.breaker.state(now)}"
        return f"suspected: {self.trust.why}" if self.trust.state is TrustState.SUSPECTED else None


def _measured(reported: NodeView, rates: NodeRates) -> NodeView:
    near, far, prefill, steps, stays = rates.near.per_s, rates.far.per_s, rates.prefill, rates.steps, rates.stays
    return replace(
        reported,
        prefill_rate=prefill.per_s,
        is_warm_up=prefill.is_warm_up,
        step_s=steps.each_s,
        stay_s=stays.each_s,
        near_rate=near or far,
        far_rate=far or near,
        read_rates=rates.read_rates(),
        put_rates=rates.put_rates(),
        doubts=rates.doubts(),
    )


def _under(measured: NodeView, load: _Load) -> NodeView:
    sequences, prefill_tokens, prefills, computing_since, doubtful, told = load
    return replace(
        measured,
        sequences=sequences,
        prefill_tokens=prefill_tokens,
        prefills=prefills,
        computing_since=computing_since,
        doubtful=doubtful,
        told=told,
    )
