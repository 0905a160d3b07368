"""Requests that ask what none of the nodes can do: refused with the field's name, before any token.

Owns the refusal. That a request which some nodes can do goes to one of them is the policies' (`router.routing.policy`).
"""

from collections.abc import Callable

from kvcore.errors import InvalidRequestError
from nodeapi.messages import PROTOCOL
from nodeapi.sampling import SINCE
from router.routing.views import ClusterView


def refuse_if_all_lack(asks: frozenset[str], view: ClusterView, client_name: Callable[[str], str]) -> None:
    """Raises InvalidRequestError if nodes are up and each lacks a field of `asks`. None up: another one may come.
    `client_name`: of a field of SamplingParams."""
    nodes = [*view.decoders, *view.prefillers]
    if not nodes or any(asks.isdisjoint(node.lacks) for node in nodes):
        return
    lacked = min(asks & frozenset().union(*(node.lacks for node in nodes)))
    name = client_name(lacked)
    raise InvalidRequestError(
        f"{name} is obeyed by none of the nodes that are up: it takes an engine that does, on a node that "
        f"speaks version {SINCE[lacked]} of the nodes' API (this router speaks {PROTOCOL})",
        param=name,
    )
