"""This router's work on the nodes, as it is told to other routers, and theirs. Values and counts only."""

from collections.abc import Mapping

from kvcore.clock import Clock
from router.admission.sharing import NodeUse
from router.nodes.cluster import Cluster
from router.routing.views import ToldWork


class SharedWork:
    """Of one cluster."""

    def __init__(self, cluster: Cluster, clock: Clock) -> None:
        self._cluster, self._clock = cluster, clock

    def own(self) -> dict[str, NodeUse]:
        """By node; of those that have any."""
        now = self._clock.now()
        return {
            name: NodeUse(node.sequences, round(node.left_tokens(now)))
            for name, node in self._cluster.nodes.items()
            if node.sequences or node.prefill_tokens
        }

    def places(self) -> int:
        """Sequences that the decoders in use take together; 0: some do not say."""
        each = [node.max_sequences for node in self._cluster.view().decoders]
        return sum(each) if all(each) else 0

    def told(self, uses: Mapping[str, NodeUse] | None) -> None:
        """By the others together. None: not all of them speak, and the nodes' reports alone say what there is."""
        now = self._clock.now()
        for name, node in self._cluster.nodes.items():
            if uses is None:
                node.told_others(None)
            elif (use := uses.get(name)) is not None:
                node.told_others(ToldWork(use.sequences, use.prefill_tokens, now))
            elif node.told is not None and node.told.sequences + node.told.prefill_tokens:
                node.told_others(ToldWork(at=now))
