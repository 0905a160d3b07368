"""The board of nodes beside a look at every node: whatever happens to nodes, both see the same."""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st
from support.router_fakes import FakeNode

from kvcore.types import Role
from router.nodes.board import NodeBoard, NodeTable
from router.nodes.health import Breaker
from router.nodes.known import KnownNode
from router.nodes.limits import NodeHealthLimits
from router.nodes.trust import NodeTrust
from router.nodes.work import NodeWork
from router.routing.rates import NodeRates
from router.routing.views import ClusterView, LeftOut, NodeKind, NodeView, NodeViews, ToldWork

ROLES = (Role.PREFILLER, Role.DECODER, Role.DECODER, Role.STORE)
drained: set[str] = set()


def reason(node: KnownNode, now: float) -> str | None:
    return node.reason(now) or ("drained" if node.id in drained else None)


def seen_anew(node: KnownNode) -> NodeView:
    before, node._seen = node._seen, None
    view, node._seen = node.view(), before
    return view


def looked_at(nodes: NodeTable, now: float) -> ClusterView:
    """Every one of them, as if none had been seen before."""
    by_role = {role: [node for node in nodes.values() if node.role is role] for role in ROLES}
    used = {role: [seen_anew(node) for node in by_role[role] if reason(node, now) is None] for role in by_role}
    left_out = [
        LeftOut(node.id, node.role, why)
        for node in nodes.values()
        if node.role is not Role.STORE and (why := reason(node, now)) is not None
    ]
    return ClusterView(tuple(used[Role.PREFILLER]), tuple(used[Role.DECODER]), tuple(left_out))


def facts(nodes: NodeTable) -> tuple[int | None, int | None]:
    fit = [node for node in nodes.values() if node.unfit is None and node.report is not None and node.report.engine]
    for role in (Role.DECODER, Role.PREFILLER):
        engines = [node.report.engine for node in fit if node.role is role and node.report is not None]
        if found := [engine for engine in engines if engine is not None]:
            return max(engine.max_context for engine in found), found[0].vocab_size
    return None, None


def report(node: KnownNode, number: int) -> None:
    node.report = FakeNode(node.id, node.role, max_context=100 + number).report()
    node.problem, node.unfit = None, None


def work(node: KnownNode, number: int) -> None:
    NodeWork(node).count(number - node.sequences, 10 * number - node.prefill_tokens, float(number))


def fail(node: KnownNode, number: int) -> None:
    node.breaker.failed(float(number))
    node.touch()


def tell(node: KnownNode, number: int) -> None:
    node.told_others(ToldWork(number, 10.0 * number, 0.0) if number else None)
    node.reported_others(number // 2)


def measure(node: KnownNode, number: int) -> None:
    node.rates.prefilled(100 * number, 0.1, float(number))
    node.rates.decoded(8, number, 0.1, float(number))
    node.touch()


def start_anew(node: KnownNode, number: int) -> None:
    node.rates, node.trust = NodeRates(), NodeTrust(NodeHealthLimits())


def renew(node: KnownNode, number: int) -> None:
    node.breaker = Breaker()


def lose(node: KnownNode, number: int) -> None:
    node.problem = f"problem {number}"


def refuse(node: KnownNode, number: int) -> None:
    node.unfit = node.problem = "another model"


CHANGES: list[Callable[[KnownNode, int], None]] = [
    *(report, report, work, work, fail, fail, renew, lose, refuse, tell, measure, start_anew)
]
change = st.tuples(st.integers(0, 7), st.sampled_from(CHANGES), st.integers(0, 4))
comes_or_goes = st.tuples(st.integers(0, 7), st.sampled_from(["new", "gone", "drain"]), st.just(0))


@given(st.lists(st.lists(st.one_of(change, change, comes_or_goes), max_size=6), max_size=12))
def test_the_board_sees_what_a_look_at_every_node_sees(steps):
    drained.clear()
    nodes = NodeTable()
    board = NodeBoard(nodes, reason)
    for now, changes in enumerate(steps):
        for number, what, value in changes:
            name = f"n{number}"
            if what == "new":
                nodes[name] = KnownNode(name, ROLES[number % 4], "http://there", static=True)
            elif what == "drain":
                drained.symmetric_difference_update({name})
                board.touch_all()
            elif name in nodes and what == "gone":
                del nodes[name]
            elif name in nodes:
                what(nodes[name], value)
        assert board.view(float(now)) == looked_at(nodes, float(now))
        assert board.engine_facts(float(now)) == facts(nodes)
        assert board.view(float(now)) is board.view(float(now))
        for seen in (board.view(float(now)).prefillers, board.view(float(now)).decoders):
            assert isinstance(seen, NodeViews) and set(seen.kinds) == {NodeKind.of(view) for view in seen}
            assert [view for _, _, view in seen.by_load] == sorted(seen, key=lambda view: view.load)
            assert [seen[place].id for place in seen.places.values()] == list(seen.places)
            assert len(seen.places) == len(seen)
