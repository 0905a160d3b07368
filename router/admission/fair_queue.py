"""Whose turn is next: tenants' priorities strictly, within one fair shares of all flows, within a flow the requests'
own priorities, and among equal ones first come, first served.

Start-time fair queueing (Goyal et al., SIGCOMM 1996): what a request costs moves its flow's own time on, and the
request whose time is least goes first. It shares as deficit round robin does; beyond that a flow that asks for less
than its share never stands behind the queue of one that asks for more. Pure.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(slots=True, eq=False)
class Waiter:
    """One request. `rank`: of its priority, the least first. `cost`: what its flow's share is charged. `tokens` of its
    prompts are to be computed, by its decoder (`stays`) or by a prefiller, and `sequences` will be decoded. `order`: by
    which waiters are compared."""

    flow: str
    rank: int
    cost: float
    tokens: int
    sequences: int
    stays: bool = False
    context: int = 0
    """Tokens that its nodes must have room for."""
    prompt_tokens: int = 0
    priority: int = 0
    """Among those of its flow and rank: lower is sooner."""
    order: tuple[int, float, int] = (0, 0.0, 0)


@dataclass(slots=True)
class _Flow:
    """`until`: the flow's own time, up to which it has been charged. `output`: mean tokens of its answers."""

    until: float = 0.0
    output: float | None = None


class FairQueue:
    """All that wait."""

    def __init__(self, max_flows: int, saved: float = 8.0, unknown_output: float = 256.0) -> None:
        """`saved`: what a flow that asks for little saves up, in requests of the usual cost. `unknown_output`: tokens
        of an answer before there was any."""
        self._max_flows, self._saved = max_flows, saved
        self._usual_cost = 0.0
        self._usual_output = unknown_output
        self._flows: OrderedDict[str, _Flow] = OrderedDict()
        self._waiting: dict[Waiter, None] = {}
        self._now = 0.0
        self._count = 0
        self.charged: OrderedDict[str, float] = OrderedDict()
        """Of each flow what it was charged here in all; those that were charged last at the end."""

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"<FairQueue of {len(self)}, {len(self._flows)} flows known>"

    def add(self, waiter: Waiter) -> None:
        """It waits from here on: in the place of the first of its flow that has a higher priority, if there is one;
        what it costs, that one and those behind it stand further back."""
        self._count += 1
        start = self._charge(waiter.flow, waiter.cost)
        waiter.order = (waiter.rank, start, self._count)
        behind = [
            other
            for other in self._waiting
            if other.flow == waiter.flow and other.rank == waiter.rank and other.priority > waiter.priority
        ]
        if behind:
            behind.sort(key=_order)
            starts = [behind[0].order[1], *(other.order[1] + waiter.cost for other in behind)]
            places = [*(other.order[2] for other in behind), self._count]
            for one, first, place in zip([waiter, *behind], starts, places, strict=True):
                one.order = (one.rank, first, place)
        self._waiting[waiter] = None

    def next(self, *, stays: bool = False, context: int | None = None) -> Waiter | None:
        """Whose turn it is, of all, or of those that need no prefiller, or no longer `context`."""
        waiting: Iterable[Waiter] = self._waiting
        if stays or context is not None:
            waiting = [
                waiter
                for waiter in self._waiting
                if (waiter.stays or not stays) and (context is None or waiter.context <= context)
            ]
        return min(waiting, key=_order, default=None)

    def take(self, waiter: Waiter) -> None:
        """It has had its turn."""
        del self._waiting[waiter]
        self._now = max(self._now, waiter.order[1])

    def leave(self, waiter: Waiter) -> None:
        """It waits no longer, if it did, and had no turn: its flow is not charged for it."""
        if waiter not in self._waiting:
            return
        del self._waiting[waiter]
        self._flow(waiter.flow).until -= waiter.cost
        self._note(waiter.flow, -waiter.cost)
        for other in self._waiting:
            if other.flow == waiter.flow and other.order > waiter.order:
                other.order = (other.rank, other.order[1] - waiter.cost, other.order[2])

    def passed(self, flow: str, cost: float) -> None:
        """One got in without waiting: it counts for its flow's share all the same."""
        self._now = max(self._now, self._charge(flow, cost))

    @property
    def now(self) -> float:
        """The queue's own time."""
        return self._now

    def reach(self, now: float) -> None:
        """Another queue over the same nodes is there already."""
        self._now = max(self._now, now)

    def charged_elsewhere(self, flow: str, cost: float) -> None:
        """So much counts for its share at another queue; below 0: so much less than was said."""
        if cost:
            known = self._flow(flow)
            known.until = max(self._floor, known.until) + cost if cost > 0 else known.until + cost

    def start_of(self, flow: str) -> float:
        """Where its next request would stand."""
        known = self._flows.get(flow)
        return max(self._floor, 0.0 if known is None else known.until)

    def waiting_sequences(self) -> Counter[str]:
        """By flow."""
        found = Counter[str]()
        for waiter in self._waiting:
            found[waiter.flow] += waiter.sequences
        return found

    def ahead_of(self, waiter: Waiter) -> tuple[int, int]:
        """(tokens that the same nodes compute, sequences) of those whose turn comes before."""
        before = [other for other in self._waiting if other.order < waiter.order]
        tokens = sum(other.tokens for other in before if other.stays == waiter.stays)
        return tokens, sum(other.sequences for other in before)

    @property
    def total(self) -> tuple[int, int]:
        """(tokens to compute, sequences) of all that wait."""
        return sum(other.tokens for other in self._waiting), sum(other.sequences for other in self._waiting)

    @property
    def prompt_tokens(self) -> int:
        """Of all that wait, cached ones too: what they hold in memory."""
        return sum(other.prompt_tokens for other in self._waiting)

    def answered(self, flow: str, tokens: float) -> None:
        """An answer of this flow had so many tokens."""
        known = self._flow(flow)
        self._usual_output += (tokens - self._usual_output) / 32
        known.output = tokens if known.output is None else known.output + (tokens - known.output) / 8

    def output_of(self, flow: str, most: int) -> float:
        """How many tokens its next answer may have, as far as its last ones tell, or where there were none those of
        all flows. `most`: that it was asked for, which says little: all that a context holds is asked for by default.
        """
        known = self._flows.get(flow)
        return min(most, self._usual_output if known is None or known.output is None else known.output)

    def _charge(self, name: str, cost: float) -> float:
        """Moves the flow's time on. Returns where it was, which is at most what may be saved up behind that of all."""
        flow = self._flow(name)
        self._usual_cost += (cost - self._usual_cost) / 32
        start = max(self._floor, flow.until)
        flow.until = start + cost
        self._note(name, cost)
        return start

    @property
    def _floor(self) -> float:
        return self._now - self._saved * self._usual_cost

    def _note(self, name: str, cost: float) -> None:
        self.charged[name] = self.charged.get(name, 0.0) + cost
        self.charged.move_to_end(name)
        if len(self.charged) > self._max_flows:
            self.charged.popitem(last=False)

    def _flow(self, name: str) -> _Flow:
        flow = self._flows.get(name)
        if flow is None:
            flow = self._flows[name] = _Flow()
            if len(self._flows) > self._max_flows:
                self._flows.popitem(last=False)
        self._flows.move_to_end(name)
        return flow


def _order(waiter: Waiter) -> tuple[int, float, int]:
    return waiter.order
