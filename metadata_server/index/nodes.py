"""Which nodes live: their incarnations, their own leases, which segments they own, and who was here lately.

Owns the registry and the tombstones. Invariants: a live node has a deadline; every segment belongs to exactly one live
node; a node that has gone cannot come back under an older incarnation while its tombstone lasts.
"""

from collections.abc import Iterator

from kvcore.errors import MetadataProtocolError
from kvcore.types import NodeInfo
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.segments import Replica, SegmentRecord
from metadata_server.messages import RegisterRequest


class LiveNode:
    """A node as it registered, with its segments and the reservations that it has as a writer."""

    def __init__(self, info: NodeInfo) -> None:
        self.info = info
        self.ttl_s = 0.0
        self.segments: dict[str, SegmentRecord] = {}
        self.reservations: dict[int, Replica] = {}

    def __repr__(self) -> str:
        held = f"{len(self.segments)} segments, {len(self.reservations)} reservations"
        return f"<LiveNode {self.info.id} incarnation {self.info.incarnation}: {held}>"


class NodeRegistry:
    """Mutated by MetadataState only."""

    def __init__(self, deadlines: Deadlines, longest_ttl_s: float, tombstone_ttls: int) -> None:
        """A node's lease is at most `longest_ttl_s`; a tombstone lasts `tombstone_ttls` times as long."""
        self.segments: dict[str, SegmentRecord] = {}
        """Of all live nodes, by id."""
        self._deadlines = deadlines
        self._longest_ttl_s = longest_ttl_s
        self._tombstone_s = tombstone_ttls * longest_ttl_s
        self._live: dict[str, LiveNode] = {}
        self._gone: dict[str, tuple[int, float]] = {}  # node id -> (last incarnation, when to forget it)

    def __iter__(self) -> Iterator[LiveNode]:
        return iter(self._live.values())

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._live

    def __getitem__(self, node_id: str) -> LiveNode:
        return self._live[node_id]

    def __repr__(self) -> str:
        return f"<NodeRegistry {len(self._live)} live, {len(self._gone)} gone, {len(self.segments)} segments>"

    def get(self, node_id: str, incarnation: int) -> LiveNode | None:
        """The live node of exactly this incarnation."""
        node = self._live.get(node_id)
        return node if node is not None and node.info.incarnation == incarnation else None

    def check_request(self, request: RegisterRequest) -> LiveNode | None:
        """The live node that registers again, of this incarnation or an older one; None: it is not known.

        Raises MetadataProtocolError for an older incarnation than the last one seen, or for a segment that is another
        node's, listed twice or of another size than before.
        """
        info, node = request.node, self._live.get(request.node.id)
        last = node.info.incarnation if node else self._gone.get(info.id, (0, 0.0))[0]
        if info.incarnation < last:
            raise MetadataProtocolError(
                f"node {info.id} registers with incarnation {info.incarnation}, but {last} has been seen",
                param="node.incarnation",
            )
        seen: set[str] = set()
        for at, manifest in enumerate(request.segments):
            segment, known = manifest.segment, self.segments.get(manifest.segment.id)
            problem = None
            if segment.node_id != info.id or (known is not None and known.segment.node_id != info.id):
                problem = "belongs to another node"
            elif segment.id in seen:
                problem = "is listed twice"
            elif known is not None and known.segment.size_bytes != segment.size_bytes:
                problem = f"was {known.segment.size_bytes} bytes long and cannot change"
            if problem:
                raise MetadataProtocolError(f"segment {segment.id} {problem}", param=f"segments[{at}].segment")
            seen.add(segment.id)
        return node

    def join(self, info: NodeInfo) -> LiveNode:
        """The node, live under this info from now on. Its lease is to be set by `renew`."""
        node = self._live.setdefault(info.id, LiveNode(info))
        node.info = info
        self._gone.pop(info.id, None)
        return node

    def renew(self, node: LiveNode, now: float, ttl_s: float | None = None) -> None:
        """Begin the node's lease anew; `ttl_s` changes its length."""
        if ttl_s is not None:
            node.ttl_s = min(ttl_s, self._longest_ttl_s)
        self._deadlines.set((Expiry.NODE, node.info.id), now + node.ttl_s)

    def add_segment(self, node: LiveNode, record: SegmentRecord) -> None:
        """The node owns one more segment."""
        node.segments[record.segment.id] = self.segments[record.segment.id] = record

    def remove_segment(self, node: LiveNode, segment_id: str) -> SegmentRecord:
        """The node no longer owns the segment. What lay there is the caller's to forget."""
        del self.segments[segment_id]
        return node.segments.pop(segment_id)

    def remove(self, node: LiveNode, now: float) -> None:
        """The node, whose segments are removed already, is gone; its tombstone is set, old ones are cleared."""
        self._deadlines.drop((Expiry.NODE, node.info.id))
        del self._live[node.info.id]
        self._gone = {name: (last, until) for name, (last, until) in self._gone.items() if until > now}
        self._gone[node.info.id] = (node.info.incarnation, now + self._tombstone_s)

    def check(self) -> None:
        """Assert every invariant. For tests."""
        assert self.segments == {name: record for node in self for name, record in node.segments.items()}
        assert all((Expiry.NODE, name) in self._deadlines for name in self._live)
