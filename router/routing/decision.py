"""What was decided and why: the route, each candidate's scores, and who was left out. Values only.

Owns the explanation of a choice, worked out when it is asked for: a choice itself only keeps what it has computed.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice

import msgspec
from msgspec.structs import replace

from kvcore.types import Role, Route
from router.routing.costs import Way, WayChoice, worth_waiting_s
from router.routing.views import LeftOut, NodeView

MAX_EXPLAINED = 16
"""Candidates, and nodes left out, of each role in a record: with many nodes the others explain nothing more."""


class Candidate(msgspec.Struct, frozen=True):
    """A node that could have been chosen. `scores`: what each scorer gave it, weighted; `total` is their sum. The lower
    the better."""

    node: str
    role: Role
    total: float
    scores: dict[str, float]


class Cut(msgspec.Struct, frozen=True):
    """A filter that left nodes out: those before it, and those that it kept. `detail(node)`: more than the reason."""

    reason: str
    before: Sequence[NodeView]
    kept: Sequence[NodeView]
    detail: Callable[[NodeView], str] | None = None

    def why(self, node: NodeView) -> str:
        """Why this one was left out."""
        more = self.detail(node) if self.detail is not None else ""
        return f"{self.reason}: {more}" if more else self.reason


class Ranking(msgspec.Struct, frozen=True):
    """How one role's node was chosen. `columns[s][i]`: the weighted score that scorer `scorers[s]` gave `nodes[i]`;
    `totals[i]`: their sum. `chosen`: the place of the chosen one in `nodes`; None where there are none. `usable`: all
    that it could have been, of which `nodes` were compared."""

    role: Role
    nodes: Sequence[NodeView]
    totals: Sequence[float]
    scorers: tuple[str, ...]
    columns: tuple[Sequence[float], ...]
    cuts: tuple[Cut, ...]
    chosen: int | None
    usable: Sequence[NodeView]

    @property
    def node(self) -> NodeView | None:
        """The chosen one."""
        return None if self.chosen is None else self.nodes[self.chosen]

    def candidates(self, limit: int) -> list[Candidate]:
        """The chosen one first, then the others, best first; at most `limit`."""
        if self.chosen is None:
            return []
        best = _least(self.totals, limit)
        order = [self.chosen, *[place for place in best if place != self.chosen]][:limit]
        named = list(zip(self.scorers, self.columns, strict=True))
        return [
            Candidate(
                self.nodes[place].id, self.role, self.totals[place], {name: column[place] for name, column in named}
            )
            for place in order
        ]

    def left_out(self) -> list[LeftOut]:
        """Whom the filters left out, each with the reason of the first that did."""
        return [
            LeftOut(node.id, self.role, cut.why(node))
            for cut in self.cuts
            for kept in [{node.id for node in cut.kept}]
            for node in cut.before
            if node.id not in kept
        ]


def _least(totals: Sequence[float], limit: int) -> list[int]:
    """Places of the least, in their order; of equal ones the first come first. For many more than `limit` a sort of
    the numbers alone is the cheapest way to leave most of them out."""
    places: Iterable[int] = range(len(totals))
    if len(totals) > limit:
        most = sorted(totals)[limit - 1]
        less = [place for place, total in enumerate(totals) if total < most]
        equal = (place for place, total in enumerate(totals) if total == most)
        places = [*less, *islice(equal, limit - len(less))]
    return sorted(places, key=totals.__getitem__)


class Decision(msgspec.Struct, frozen=True):
    """`route` None: no node can take the request. `prefillers` None: none was wanted (`route.reason` says why). In
    need, and without route, they are those that might have decoded. `unusable`: nodes that no request could use."""

    route: Route | None
    decoders: Ranking
    prefillers: Ranking | None
    unusable: tuple[LeftOut, ...]
    ways: tuple[Way, ...] = ()
    """What the decoder's and the prefiller's way would take, as far as it is known, …"""
    way: WayChoice = WayChoice()
    """… and which one was chosen by that."""
    other_ways: tuple[Way, ...] = ()
    """What these would take without the tier that they load from, or with one that they do not."""

    def best_ways(self) -> list[Way]:
        """The chosen one first, and last those that were no choice."""
        chosen = self.route and (self.route.prefiller or self.route.decoder)
        return [*sorted(self.ways, key=lambda way: way.node != chosen), *self.other_ways]

    @property
    def expected_s(self) -> float | None:
        """From the choice to the first token; None: not known."""
        route = self.route
        way = None if route is None else self._way_of(route.prefiller or route.decoder)
        return None if way is None else way.expected_s

    @property
    def worth_waiting_s(self) -> float | None:
        """See the function of this name. None also where nothing is weighed."""
        return worth_waiting_s(self.ways, tries=self.way.tries) if self.way.weighed else None

    @property
    def before_handoff_s(self) -> float | None:
        """What the prefiller should take until nothing is left but to hand over; None: not known, or there is none."""
        way = None if self.route is None else self._way_of(self.route.prefiller)
        return None if way is None else max(way.queue_s, way.promote_s) + way.load_s + way.compute_s

    def _way_of(self, node: str | None) -> Way | None:
        for way in self.ways:
            if way.node == node:
                return way
        return None

    def to_explain(self, most: int) -> "Decision | None":
        """As much of it as its explanation needs. None: that would hold on to more than `most` nodes of a role."""
        prefillers, are_many = self.prefillers, False
        for ranking in self._rankings():
            if len(ranking.nodes) > most or (ranking.cuts and len(ranking.cuts[0].before) > most):
                return None
            are_many = are_many or len(ranking.usable) > most
        if not are_many:
            return self
        decoders = replace(self.decoders, usable=())
        return replace(self, decoders=decoders, prefillers=prefillers and replace(prefillers, usable=()))

    def candidates(self, limit: int = MAX_EXPLAINED) -> list[Candidate]:
        """Decoders, then prefillers if one was wanted; at most `limit` of each, best first."""
        return [candidate for ranking in self._rankings() for candidate in ranking.candidates(limit)]

    def left_out(self, limit: int = MAX_EXPLAINED) -> list[LeftOut]:
        """Who could not be chosen and why, at most `limit` of each role that was chosen from."""
        return [item for ranking in self._rankings() for item in self._left_out(ranking)[:limit]]

    def why_no_decoder(self) -> str:
        """See the function of this name."""
        return why_no_decoder([item for ranking in self._rankings() for item in self._left_out(ranking)])

    def _rankings(self) -> list[Ranking]:
        return [self.decoders] if self.prefillers is None else [self.decoders, self.prefillers]

    def _left_out(self, ranking: Ranking) -> list[LeftOut]:
        return [item for item in self.unusable if item.role is ranking.role] + ranking.left_out()


def why_no_decoder(left_out: Iterable[LeftOut]) -> str:
    """One sentence for an error: what is wrong with each decoder, and with each prefiller, which could stand in."""
    wrong = [f"{item.node}: {item.reason}" for item in left_out]
    return "no node can decode (" + ("; ".join(wrong) or "none is known") + ")"
