"""The names of LoRA adapters that clients may send as `model`, and which files are behind each just now.

Which node has which is what nodes say of themselves. That a request goes to one that serves its adapter is the
policies' (`router.routing.policy`).
"""

from collections import Counter
from collections.abc import Mapping

from kvcore.errors import NodeUnavailableError
from router.nodes.cluster import Cluster
from router.routing.views import NodeViews


class AdapterNames:
    """`declared`: those of the cluster file, with their paths. Servers that run already may have others."""

    def __init__(self, cluster: Cluster, declared: Mapping[str, str] = {}) -> None:
        self._cluster = cluster
        self._declared = declared

    def __repr__(self) -> str:
        return f"<AdapterNames {', '.join(self.paths()) or 'none'}>"

    def paths(self) -> dict[str, str]:
        """Every name with the path that it stands for: those of the file, then what nodes have said that fit."""
        known = dict(self._declared)
        for node in self._cluster.nodes.values():
            if node.report is not None and node.report.engine is not None and node.unfit is None:
                for one in node.report.engine.adapters:
                    known.setdefault(one.name, one.path)
        return known

    def __contains__(self, name: str) -> bool:
        return name in self._declared or name in self.paths()

    def identity(self, name: str) -> str:
        """Of the adapter of this name that most nodes serve which decode now. Raises NodeUnavailableError: none."""
        view = self._cluster.view()
        for nodes in (view.decoders, view.prefillers):  # these decode where no decoder can
            kinds = nodes.kinds if isinstance(nodes, NodeViews) else nodes
            found = {one.identity for kind in kinds for one in kind.adapters if one.name == name}
            if len(found) > 1:  # its files were changed, and nodes are started anew, one after the other
                counts = Counter(one.identity for node in nodes for one in node.adapters if one.name == name)
                return min(found, key=lambda identity: (-counts[identity], identity))
            if found:
                return found.pop()
        raise NodeUnavailableError(f"no node that is up serves the adapter {name!r}")
