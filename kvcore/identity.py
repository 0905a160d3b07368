"""Which cluster and model a process belongs to, and why another one's does not fit. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvcore.types import NodeInfo


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """What the cluster file names. An empty name, here or of a node, fits every name: of an older version it comes
    empty, and a node without an engine has no model."""

    cluster: str = ""
    model: str = ""
    node_ids: frozenset[str] | None = None
    """The names that nodes may have; None: any."""
    node_urls: Mapping[str, str] = field(default_factory=dict)
    """Where nodes of these names are, and nowhere else; others may be anywhere."""

    def difference(self, other: "ClusterIdentity") -> str | None:
        """What the other is and this is not, as the end of a sentence; None: they may be one cluster's."""
        if _differ(other.cluster, self.cluster):
            return f"is of cluster {other.cluster!r}, not {self.cluster!r}"
        if _differ(other.model, self.model):
            return f"serves model {other.model!r}, not {self.model!r} as the cluster {self.cluster!r} does"
        return None

    def why_foreign(self, node: NodeInfo) -> str | None:
        """One sentence, with what to do; None: the node may be one of this cluster's."""
        if self.node_ids is not None and node.id not in self.node_ids:
            return f"node {node.id} at {node.control_url} is not listed: add it to security.nodes, or it is a stranger"
        url = self.node_urls.get(node.id, node.control_url)
        if node.control_url != url:
            return (
                f"node {node.id} says that it is at {node.control_url}, and the metadata server's file has it at "
                f"{url}: start it there, or give both the same file"
            )
        differs = self.difference(ClusterIdentity(node.cluster, node.model))
        if differs is None:
            return None
        remedy = "model.name is the same in all its processes' files"
        if _differ(node.cluster, self.cluster):
            remedy = f"correct the addresses in its file, or give it the file of {self.cluster!r}"
        return f"node {node.id} at {node.control_url} {differs}: {remedy}"


def _differ(one: str, other: str) -> bool:
    return bool(one) and bool(other) and one != other
