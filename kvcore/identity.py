"""Which cluster and model a process belongs to, and why another one's does not fit. Pure."""

from dataclasses import dataclass

from kvcore.types import NodeInfo


@dataclass(frozen=True, slots=True)
class ClusterIdentity:
    """What the cluster file names. An empty name, here or of a node, fits every name: of an older version it comes
    empty, and a node without an engine has no model."""

    cluster: str = ""
    model: str = ""

    def why_foreign(self, node: NodeInfo) -> str | None:
        """One sentence, with what to do; None: the node may be one of this cluster's."""
        who = f"node {node.id} at {node.control_url}"
        if _differ(node.cluster, self.cluster):
            return (
                f"{who} is of cluster {node.cluster!r}, not {self.cluster!r}: correct the addresses in its file, or "
                f"give it the file of {self.cluster!r}"
            )
        if _differ(node.model, self.model):
            return (
                f"{who} serves model {node.model!r}, not {self.model!r} as the cluster {self.cluster!r} does: "
                "model.name is the same in all its processes' files"
            )
        return None


def _differ(one: str, other: str) -> bool:
    return bool(one) and bool(other) and one != other
