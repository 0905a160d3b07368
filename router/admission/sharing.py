"""What this router's admission knows of the others: their work on the nodes, whose turn it is there, what flows had.

Each tells the others of itself, at once while somebody waits and else now and then. Invariants: whoever waits for a
turn goes before those of other routers that come after; a flow that has fewer sequences than its share of the places
waits for none; what a router said counts for `told_lasts_s`. While one of the others is not heard this router counts
on its own share of the places, whatever the nodes say of others. Pure.
"""

import secrets
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from kvcore.clock import Clock
from kvcore.errors import InvalidRequestError
from metadata_server.cache_messages import KindSwitch
from router.admission.fair_queue import FairQueue
from router.admission.limits import AdmissionLimits

Order = tuple[int, float]
"""(rank, start) of who waits: the least goes first."""


class FlowUse(msgspec.Struct, array_like=True):
    """Of one flow at one router: what it was charged since the router began, sequences that run and that wait."""

    charged: float = 0.0
    running: int = 0
    waiting: int = 0


class NodeUse(msgspec.Struct, array_like=True):
    """Of one node by one router: sequences, and tokens that it has to compute."""

    sequences: int = 0
    prefill_tokens: int = 0


class AdmissionReport(msgspec.Struct):
    """What one router tells. `router` is drawn at its start. `now`: its queue's time. `first`: of all that wait there;
    None: nobody does. `flows`: those that were there lately. `nodes`: those that have work of it. `switches`: whether
    documents of a kind are reused."""

    router: str
    now: float
    first: Order | None
    flows: dict[str, FlowUse]
    nodes: dict[str, NodeUse]
    switches: list[KindSwitch] = []


@dataclass(slots=True)
class _Heard:
    """`first_at`: since when it says that this one is first there."""

    told_at: float
    report: AdmissionReport
    first_at: float
    charged: OrderedDict[str, float] = field(default_factory=OrderedDict)

    def charge(self, flow: str, charged: float, most: int) -> float:
        """How much more it was charged there than was known; 0 for what is heard for the first time."""
        more = charged - self.charged.get(flow, charged)
        self.charged[flow] = charged
        self.charged.move_to_end(flow)
        if len(self.charged) > most:
            self.charged.popitem(last=False)
        return more


class SharedAdmission:
    """`expected`: how many other routers there are. `running`: this router's sequences by flow; `nodes`: its work.
    `places`: sequences that the decoders take together; 0: not known. `tell_nodes`: is told the others' work, and how
    it was counted. `wake`: some may get in."""

    def __init__(
        self,
        clock: Clock,
        *,
        expected: int,
        running: Callable[[], Mapping[str, int]],
        nodes: Callable[[], Mapping[str, NodeUse]],
        places: Callable[[], int],
        tell_nodes: Callable[[Mapping[str, NodeUse] | None], None],
        limits: AdmissionLimits = AdmissionLimits(),
    ) -> None:
        self.name = secrets.token_hex(8)
        self.expected = expected
        self._clock, self._limits = clock, limits
        self._running, self._nodes, self._places, self._tell_nodes = running, nodes, places, tell_nodes
        self._queue: FairQueue | None = None
        self.wake: Callable[[], None] = lambda: None
        self.on_change: list[Callable[[], None]] = []
        """Called when the others should be told at once."""
        self.switches: Callable[[], list[KindSwitch]] = list
        self.told_switches: Callable[[Sequence[KindSwitch]], None] = lambda _switches: None
        """Of documents (`router.shadow.gate`): what is told of them, and who is told what others say."""
        self._heard: dict[str, _Heard] = {}
        self._counted = False
        self._said_first: Order | None = None

    def __repr__(self) -> str:
        return f"<SharedAdmission, {self.heard} of {self.expected} others heard>"

    def serve(self, queue: FairQueue, wake: Callable[[], None]) -> None:
        """The queue that it is about, once."""
        self._queue, self.wake = queue, wake

    @property
    def heard(self) -> int:
        """Other routers that spoke lately."""
        return len(self._lately())

    @property
    def is_busy(self) -> bool:
        """Whether somebody waits, here or there: then it is told more often."""
        assert self._queue is not None
        return bool(self._queue) or any(one.report.first is not None for one in self._lately())

    def changed(self) -> None:
        """Who waits here or what this router has on the nodes is another: somebody who waits may go now."""
        if self.is_busy or self._said_first is not None:
            self.tell_all()

    def tell_all(self) -> None:
        """Something is to be told soon."""
        for tell in self.on_change:
            tell()

    def problem(self) -> str | None:
        """A sentence for people, while others are not heard; None: all are."""
        if (missing := self.expected - self.heard) <= 0:
            return None
        return (
            f"{missing} of {self.expected} other routers and processes say nothing of their load: "
            f"this one counts on 1/{self.expected + 1} of the places"
        )

    # --- the exchange ---

    def report(self) -> AdmissionReport:
        """All that this router tells."""
        queue = self._queue
        assert queue is not None
        self._forget()
        running, waiting = self._running(), queue.waiting_sequences()
        lately = islice(reversed(queue.charged), self._limits.told_flows)
        flows = {
            name: FlowUse(queue.charged.get(name, 0.0), running.get(name, 0), waiting.get(name, 0))
            for name in {*lately, *running, *waiting}
        }
        first = queue.next()
        order = None if first is None else first.order[:2]
        self._said_first = order
        return AdmissionReport(self.name, queue.now, order, flows, dict(self._nodes()), self.switches())

    def told(self, report: AdmissionReport) -> None:
        """Another router told this. Raises InvalidRequestError: there are too many."""
        queue, now = self._queue, self._clock.now()
        if report.router == self.name or queue is None:
            return
        known = self._heard.get(report.router)
        if known is None:
            self._heard = {name: one for name, one in self._heard.items() if self._lasts(one, now)}
            if len(self._heard) >= self._limits.max_routers:
                raise InvalidRequestError(f"more than {self._limits.max_routers} routers say what they do")
            known = self._heard[report.router] = _Heard(now, report, now)
        self.told_switches(report.switches)
        for name, use in report.flows.items():
            queue.charged_elsewhere(name, known.charge(name, use.charged, self._limits.max_flows))
        queue.reach(report.now)
        before = known.report
        if before.first != report.first:
            known.first_at = now
        known.told_at, known.report = now, report
        self._count_nodes()
        # Who hears nothing new tells nothing: else two that both have somebody wait would answer each other for ever.
        if before is report or before != report:
            self.wake()

    # --- what admission asks ---

    def comes_first(self, order: Order) -> bool:
        """Whether nobody waits at another router whose turn is before. One whose turn does not come although it is
        first, as it waits for something else, is not waited for."""
        since = self._clock.now() - self._limits.yield_s
        return not any(
            one.report.first is not None and one.report.first < order and one.first_at >= since
            for one in self._lately()
        )

    def has_share(self, flow: str, sequences: int) -> bool:
        """Whether these sequences of a flow are within its share of the places, so that they wait for nobody's end."""
        places = self._places()
        if not self.expected or not places:
            return False
        if (lately := self._lately()) and len(lately) >= self.expected:
            return self._within(flow, sequences, places, lately)
        return sum(self._running().values()) + sequences <= places / (self.expected + 1)

    def _within(self, flow: str, sequences: int, places: int, lately: list[_Heard]) -> bool:
        wanted, mine = Counter[str](self._running()), self._running().get(flow, 0)
        assert self._queue is not None
        wanted.update(self._queue.waiting_sequences())
        wanted[flow] = max(wanted[flow], mine + sequences)
        for one in lately:
            for name, use in one.report.flows.items():
                wanted[name] += use.running + use.waiting
                mine += use.running if name == flow else 0
        return mine + sequences <= fair_level(list(wanted.values()), places)

    # --- who was heard ---

    def _lately(self) -> list[_Heard]:
        now = self._clock.now()
        return [one for one in self._heard.values() if self._lasts(one, now)]

    def _lasts(self, one: _Heard, now: float) -> bool:
        return now - one.told_at <= self._limits.told_lasts_s

    def _forget(self) -> None:
        """What was said too long ago counts no more: then the nodes' own words do."""
        if self._counted and self.heard < self.expected:
            self._counted = False
            self._tell_nodes(None)
            self.wake()

    def _count_nodes(self) -> None:
        if self.heard < self.expected:
            return
        self._counted = True
        uses: dict[str, NodeUse] = {}
        for one in self._lately():
            for name, use in one.report.nodes.items():
                found = uses.setdefault(name, NodeUse())
                found.sequences += use.sequences
                found.prefill_tokens += use.prefill_tokens
        self._tell_nodes(uses)


def fair_level(wanted: list[int], places: int) -> float:
    """Up to how much each may have of `places`, where who wants less leaves the rest to the others (max-min)."""
    left = places
    for number, want in enumerate(sorted(wanted)):
        level = left / (len(wanted) - number)
        if want >= level:
            return level
        left -= want
    return float("inf")
