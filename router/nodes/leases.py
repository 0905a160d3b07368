"""Which nodes the metadata server knows, as its events say; of several partitions each knows them by itself. Pure."""

from collections.abc import Sequence

from kvcore.types import NodeInfo


class NodeLeases:
    """A node is known as long as any partition knows it, as it registered last."""

    def __init__(self, names: Sequence[str]) -> None:
        """`names`: of the partitions."""
        self._names = names
        self._known: list[dict[str, NodeInfo]] = [{} for _ in names]

    def __repr__(self) -> str:
        return f"<NodeLeases {', '.join(str(len(known)) for known in self._known)}>"

    def up(self, part: int, info: NodeInfo) -> None:
        """The partition knows it."""
        self._known[part][info.id] = info

    def down(self, part: int, node_id: str) -> NodeInfo | None:
        """The partition knows it no more. Returns how another one does, if any."""
        self._known[part].pop(node_id, None)
        return self.of(node_id)

    def reset(self, part: int) -> None:
        """Nothing is known of what the partition knows."""
        self._known[part].clear()

    def of(self, node_id: str) -> NodeInfo | None:
        """How any partition knows it; None: none does."""
        return next((known[node_id] for known in self._known if node_id in known), None)

    def lacking(self, node: NodeInfo) -> list[str]:
        """The partitions that do not know this start of a node."""
        known = zip(self._names, self._known, strict=True)
        return [name for name, nodes in known if node.id not in nodes or nodes[node.id].incarnation != node.incarnation]
