"""Which nodes were refused lately, and why: for the log, once each, and for who asks for stats. Pure."""

from kvcore.types import NodeInfo
from metadata_server.account_messages import RefusedNode
from metadata_server.limits import ServerLimits


class Refusals:
    """One a process that was refused; forgotten when it is taken in, or has not asked again for some time."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._seen: dict[tuple[str, str], tuple[float, RefusedNode]] = {}  # by id and address, the latest last

    def __repr__(self) -> str:
        return f"<Refusals of {len(self._seen)} nodes>"

    def add(self, node: NodeInfo, reason: str, now: float) -> bool:
        """The node was refused. True: it is news."""
        self._drop_old(now)
        who, refused = (node.id, node.control_url), RefusedNode(node=node, reason=reason)
        before = self._seen.pop(who, None)
        self._seen[who] = now, refused
        if len(self._seen) > self._limits.max_refused:
            del self._seen[next(iter(self._seen))]
        return before is None or before[1] != refused

    def taken_in(self, node: NodeInfo) -> None:
        """The node is no longer refused."""
        self._seen.pop((node.id, node.control_url), None)

    def listed(self, now: float) -> list[RefusedNode]:
        """Those that still ask."""
        self._drop_old(now)
        return [refused for _, refused in self._seen.values()]

    def _drop_old(self, now: float) -> None:
        while self._seen:
            who, (at, _) = next(iter(self._seen.items()))
            if now - at < self._limits.refused_s:
                return
            del self._seen[who]
