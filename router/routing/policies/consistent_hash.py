"""Consistent hash: requests of one session, or with one beginning, go to one node as long as it is there and not much
fuller than the others. A node that comes or goes moves only its own share. Sources: rendezvous hashing (Thaler and
Ravishankar 1998), bounded loads (Mirrokni et al., "Consistent Hashing with Bounded Loads", 2018).
"""

import array
from collections.abc import Callable, Sequence

from router.routing.policy import Filter, Policy, Rules, Scorer
from router.routing.scorers import session_name, spread
from router.routing.views import NodeView, RouteRequest

BEGINNING_TOKENS = 256
"""So much of the prompt stands for it where the client names no session."""
FULLER = 1.25
"""A node with more than this many times the mean load is passed over."""


def _hashes(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[float]:
    return spread(
        session_name(request) or array.array("Q", request.prompt_token_ids[:BEGINNING_TOKENS]).tobytes(), nodes
    )


def _not_much_fuller(load: Callable[[NodeView], int], unit: int) -> Filter:
    """`unit`: the load of one request, which no mean may be under: else nobody would be left on an idle cluster."""

    def keep(request: RouteRequest, nodes: Sequence[NodeView], decoder: NodeView | None) -> Sequence[NodeView]:
        loads = [load(node) for node in nodes]
        most = FULLER * (sum(loads) + unit) / len(nodes) if nodes else 0.0
        return [node for node, own in zip(nodes, loads, strict=True) if own <= most]

    return Filter("much fuller than the others", keep)


HASH = Scorer("hash", _hashes)
"""By the session or the beginning of the prompt; between 0 and 1."""


def make() -> Policy:
    """See router.routing.policy."""
    return Policy(
        decoder=Rules(((HASH, 1.0),), (_not_much_fuller(lambda node: node.sequences, 1),)),
        prefiller=Rules(((HASH, 1.0),), (_not_much_fuller(lambda node: node.prefill_tokens, BEGINNING_TOKENS),)),
    )
