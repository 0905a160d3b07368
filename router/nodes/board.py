"""All nodes as they are seen at one moment, kept up by what changes of them: with a thousand nodes, looking at each of
them for each request costs more than the choice.

Owns what was last seen of each node. A node that is used is looked at again when something was set of it (`KnownNode`);
one that is not used each time, as its reason may end with time alone.
"""

from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Callable, Iterator

from kvcore.types import Role
from nodeapi.messages import EngineInfo
from router.nodes.known import KnownNode
from router.routing.views import ClusterView, LeftOut, NodeKind, NodeView, NodeViews, same_kind


class NodeTable(dict[str, KnownNode]):
    """Nodes by their id. `version` grows when one comes, goes or is replaced; change it by item only."""

    version = 0

    def machine_of(self, name: str) -> str:
        """Where this node's memory lies; empty: not known."""
        node = self.get(name)
        return "" if node is None else node.machine

    def __setitem__(self, name: str, node: KnownNode) -> None:
        super().__setitem__(name, node)
        self.version += 1

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self.version += 1


class NodeBoard:
    """`reason(node, now)`: why it is not used; None: it is used."""

    def __init__(self, nodes: NodeTable, reason: Callable[[KnownNode, float], str | None]) -> None:
        self._nodes = nodes
        self._reason = reason
        self._version = -1
        self._touched: set[KnownNode] = set()
        self._unused: set[KnownNode] = set()
        self._places: dict[KnownNode, int] = {}
        """In the order of the table, stores left out."""
        self._seen: dict[Role, dict[int, NodeView]] = {Role.PREFILLER: {}, Role.DECODER: {}}
        self._kinds: dict[Role, Counter[NodeKind]] = {role: Counter() for role in self._seen}
        self._by_load: dict[Role, list[tuple[int, int, NodeView]]] = {role: [] for role in self._seen}
        """Load, place and view of each that is used, in order."""
        self._among: dict[Role, dict[str, int]] = {}
        """Of each of these by its name the place among them; made anew when one comes or goes, and so …"""
        self._rows: dict[Role, list[NodeView]] = {}
        """… are they in their order: a list is copied ten times as fast as a dict's values."""
        self._unordered: set[Role] = set()
        """Those of which a node came back to its place."""
        self._left_out: dict[int, LeftOut] = {}
        self._engines: dict[KnownNode, EngineInfo | None] = {}
        self._facts: tuple[int | None, int | None] | None = None
        self._view: ClusterView | None = None

    def __repr__(self) -> str:
        return f"<NodeBoard of {len(self._places)} nodes, {len(self._unused)} not used>"

    def touch_all(self) -> None:
        """Something else that reasons depend on has changed."""
        self._touched.update(self._places)

    def view(self, now: float) -> ClusterView:
        """The nodes with an engine: the usable ones, and why the others are not. The same one while nothing changes."""
        self._look(now)
        if self._view is None:
            seen = self._seen
            for role in self._unordered:
                seen[role] = dict(sorted(seen[role].items()))
            self._unordered.clear()
            left_out = tuple([self._left_out[place] for place in sorted(self._left_out)]) if self._left_out else ()
            self._view = ClusterView(self._views(Role.PREFILLER), self._views(Role.DECODER), left_out)
        return self._view

    def _views(self, role: Role) -> NodeViews:
        if role not in self._among:
            self._rows[role] = rows = list(self._seen[role].values())
            self._among[role] = {view.id: number for number, view in enumerate(rows)}
        among, rows = self._among[role], self._rows[role]
        return NodeViews.made(rows, self._kinds[role].keys(), tuple(self._by_load[role]), among)

    def engine_facts(self, now: float) -> tuple[int | None, int | None]:
        """(The longest context, the size of the vocabulary) among the decoders that fit and ever reported, or else
        among such prefillers; None: none has."""
        self._look(now)
        if self._facts is None:
            engines = list(self._fitting(Role.DECODER)) or list(self._fitting(Role.PREFILLER))
            longest = max((engine.max_context for engine in engines), default=None)
            self._facts = longest, engines[0].vocab_size if engines else None
        return self._facts

    def _fitting(self, role: Role) -> Iterator[EngineInfo]:
        return (engine for node, engine in self._engines.items() if engine is not None and node.role is role)

    def _look(self, now: float) -> None:
        if self._version != self._nodes.version:
            self._begin()
        if not (self._touched or self._unused):
            return
        looked_at = [*self._touched, *(self._unused - self._touched)]
        self._touched.clear()
        for node in looked_at:
            if (place := self._places.get(node)) is not None:
                self._look_at(node, place, now)

    def _look_at(self, node: KnownNode, place: int, now: float) -> None:
        engine = node.report.engine if node.report is not None and node.unfit is None else None
        if engine is not self._engines[node]:
            self._engines[node], self._facts = engine, None
        seen, reason = self._seen[node.role], self._reason(node, now)
        if reason is None:
            view = node.view()
            if (before := seen.get(place)) is not view:
                seen[place], self._view = view, None
                self._put(node.role, place, before, view)
                if before is None:
                    self._unordered.add(node.role)
                    self._left_out.pop(place, None)
                    self._unused.discard(node)
        elif (known := self._left_out.get(place)) is None or known.reason != reason:
            self._left_out[place], self._view = LeftOut(node.id, node.role, reason), None
            self._put(node.role, place, seen.pop(place, None), None)
            self._unused.add(node)

    def _put(self, role: Role, place: int, before: NodeView | None, now: NodeView | None) -> None:
        """In the order of load, and in the count of each kind."""
        by_load = self._by_load[role]
        if before is not None:
            del by_load[bisect_left(by_load, (before.load, place))]
        if now is not None:
            insort(by_load, (now.load, place, now))
        if now is not None and before is not None:
            if role in self._among:
                self._rows[role][self._among[role][now.id]] = now
            if same_kind(before, now):
                return
        was, kind = (None if view is None else NodeKind.of(view) for view in (before, now))
        if was == kind:
            return
        kinds = self._kinds[role]
        if kind is not None:
            kinds[kind] += 1
        if was is not None:
            kinds[was] -= 1
            if not kinds[was]:
                self._kinds[role] = kinds = Counter(kinds)  # the views of before keep theirs: one kind more is no harm
                del kinds[was]
        if was is None or kind is None:
            self._among.pop(role, None)

    def _begin(self) -> None:
        """Nodes came or went."""
        self._version = self._nodes.version
        nodes = [node for node in self._nodes.values() if node.role is not Role.STORE]
        self._places = {node: place for place, node in enumerate(nodes)}
        self._engines = dict.fromkeys(nodes)
        self._touched, self._unused = set(nodes), set()
        for node in nodes:
            node.touched = self._touched
        for role, seen in self._seen.items():
            seen.clear()
            self._kinds[role] = Counter()
            self._by_load[role] = []
        self._among.clear()
        self._left_out.clear()
        self._facts = self._view = None
