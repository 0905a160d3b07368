"""The state of a node, as operators see it. Pure."""

from kvcore.types import Role
from router.nodes.cluster import KnownNode

READY = "ready"
STARTING = "starting"
REGISTERING = "registering"
DRAINING = "draining"
DRAINED = "drained"
LOST = "lost"
REFUSED = "refused"


def node_state(node: KnownNode, *, drained: bool, move: bool, index_known: bool) -> tuple[str, str]:
    """The state, and why. `drained`: by order; `move`: to be emptied; `index_known`: it is known who has a lease."""
    # The first of these that holds:
    # 1. it does not answer, or never has;
    # 2. it is not this cluster's, or the metadata server does not take it in;
    # 3. it is drained, or it ends: requests under way go on;
    # 4. its engine is not running yet, or not at the moment;
    # 5. the metadata server does not know it yet: what it computes goes into no store;
    # 6. it serves.
    report = node.report
    if report is None or node.silent_since is not None:
        return LOST, "" if node.problem is None else node.problem
    if node.unfit is not None or report.refused:
        return REFUSED, node.unfit or report.refused
    if drained:
        left = _left(node) if move else ""
        return (DRAINING if num_requests(node) or left else DRAINED), left
    if report.draining:
        return DRAINING, "it ends"
    if report.engine is None and node.role is not Role.STORE:
        return STARTING, node.problem or ""
    if node.problem is not None:
        return LOST, node.problem
    if index_known and (node.lease is None or node.lease.incarnation != report.node.incarnation):
        return REGISTERING, "the metadata server does not know it yet: nothing that it computes is stored"
    return READY, ""


def serves(node: KnownNode, *, index_known: bool) -> bool:
    """Whether it would be used if nobody had drained it. Without the metadata server: as far as can be told."""
    report = node.report
    if report is None or node.silent_since is not None or node.unfit is not None or report.refused:
        return False
    if report.node.role is not node.role:
        return False  # it has not heard of its new role
    known = not index_known or (node.lease is not None and node.lease.incarnation == report.node.incarnation)
    return known and (report.engine is not None or node.role is Role.STORE)


def _left(node: KnownNode) -> str:
    """What a node that is to be emptied has not copied elsewhere yet."""
    left = node.report.left_to_move if node.report is not None else None
    if left is None:
        return "it has not begun to copy its chunks yet"
    return f"{left} chunks lie nowhere else yet" if left else ""


def num_requests(node: KnownNode) -> int:
    """Requests under way on the node: of all routers, as it last said, and of this one since."""
    stats = node.report.stats if node.report is not None else None
    return max(node.sequences, stats.running + stats.waiting + stats.loading if stats is not None else 0)
