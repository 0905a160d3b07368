"""Of many nodes the few among which the best one is, so that a choice among a thousand looks at some dozens. Pure.

For rules that ask of a node no more than its load and what it has of the prompt (`Rules.by_load`): of all nodes that
have nothing of it only the least loaded can be the best. Two things are seen more coarsely than by a look at each node:
which of several equal ones is taken, and whose link to the KV or the decoder is slow, as links are compared among few.
"""

from bisect import bisect_right
from collections.abc import Sequence
from math import inf

from kvcore.types import Role
from router.routing.decision import MAX_EXPLAINED
from router.routing.views import NodeView, NodeViews, RouteRequest

FEW = MAX_EXPLAINED
"""So many that have nothing of the prompt are compared, so that a record explains as much as else."""
MANY = 4 * FEW
"""Up to so many nodes all are compared."""


def shortlist(request: RouteRequest, nodes: Sequence[NodeView]) -> Sequence[NodeView]:
    """All of them are compared in four cases:

    1. They are few, of several kinds, or not all that there are.
    2. The request names a session: each node has another number for it.
    3. Many have something of the prompt.
    4. No prefiller is idle: which of the busy ones has least to do changes from moment to moment.
    """
    if not isinstance(nodes, NodeViews) or len(nodes) <= MANY or len(nodes.kinds) != 1 or request.session:
        return nodes
    holders = dict.fromkeys(name for hits in request.hits.values() for name in (*hits.by_node, *hits.on_disk))
    holders |= dict.fromkeys(name for hits in request.documents.values() for name in hits.by_node)
    least, _, first = nodes.by_load[0]
    if len(holders) > FEW or (least and first.role is Role.PREFILLER):
        return nodes
    equal = bisect_right(nodes.by_load, (least, inf))
    begin = (request.turn - request.turn % FEW) % equal if equal > FEW else 0  # the next few in turn
    end = begin + FEW
    light = nodes.by_load[begin : end if equal <= FEW else min(end, equal)]
    if end > equal > FEW:
        light = (*light, *nodes.by_load[: end - equal])
    found = {node.id: node for _, _, node in light}
    found.update((name, nodes[place]) for name in holders if (place := nodes.places.get(name)) is not None)
    return list(found.values())
