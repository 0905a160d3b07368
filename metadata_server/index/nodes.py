"""Which nodes live: their incarnations, their own leases, which segments they own. Says who may take whose place.

Owns the registry. Invariants: a live node has a deadline; every segment belongs to exactly one live node; of one id one
process is live (docs/adr/0012). Incarnations have no order: the one that registered last is the node's.
"""

from collections import deque
from collections.abc import Iterator, Set

from kvcore.errors import MetadataProtocolError, NodeRefusedError, OverloadedError
from kvcore.extents import ALIGNMENT
from kvcore.identity import ClusterIdentity
from kvcore.types import NodeInfo
from metadata_server.index.chunks.latest import Grant
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.leases import Deadlines, Expiry
from metadata_server.index.limits import IndexLimits
from metadata_server.index.node_orders import NodeOrders
from metadata_server.messages import RegisterRequest


class LiveNode:
    """A node as it registered, with its segments and the reservations that it has as a writer. `replaced`: incarnations
    whose place it took, the latest last."""

    def __init__(self, info: NodeInfo, replaced: deque[int], number: int) -> None:
        self.info = info
        self.number = number
        """As which it writes: no other node or incarnation has or had it."""
        self.replaced = replaced
        self.ttl_s = 0.0
        self.segments: dict[str, SegmentRecord] = {}
        self.grants: dict[int, Grant] = {}
        """What it has reserved, by number."""
        self.num_reserved = 0
        """Chunks in these."""

    def __repr__(self) -> str:
        held = f"{len(self.segments)} segments, {self.num_reserved} reservations"
        return f"<LiveNode {self.info.id} incarnation {self.info.incarnation}: {held}>"


class NodeRegistry:
    """Mutated by MetadataState only."""

    def __init__(
        self, deadlines: Deadlines, longest_ttl_s: float, identity: ClusterIdentity, limits: IndexLimits
    ) -> None:
        """A node's lease is at most `longest_ttl_s`."""
        self.segments: dict[str, SegmentRecord] = {}
        """Of all live nodes, by id."""
        self._deadlines = deadlines
        self._longest_ttl_s = longest_ttl_s
        self.identity = identity
        self.limits = limits
        self.orders = NodeOrders(limits)
        self._live: dict[str, LiveNode] = {}
        self._num_joined = 0

    def __iter__(self) -> Iterator[LiveNode]:
        return iter(self._live.values())

    def __contains__(self, node_id: str) -> bool:
        return node_id in self._live

    def __getitem__(self, node_id: str) -> LiveNode:
        return self._live[node_id]

    def __repr__(self) -> str:
        return f"<NodeRegistry {len(self._live)} live, {len(self.segments)} segments>"

    def find(self, node_id: str) -> LiveNode | None:
        """The live node of this id, if there is one."""
        return self._live.get(node_id)

    def get(self, node_id: str, incarnation: int) -> LiveNode | None:
        """The live node of exactly this incarnation."""
        node = self._live.get(node_id)
        return node if node is not None and node.info.incarnation == incarnation else None

    def check_request(self, request: RegisterRequest) -> LiveNode | None:
        """The live node of this id: the same one, or one whose place is taken. None: no such node lives.

        Raises NodeRefusedError for a node of another cluster or model, or whose id is another living process's;
        MetadataProtocolError for a segment that is another node's, listed twice or of another size than before;
        OverloadedError at the bound of live nodes.
        """
        info, node = request.node, self._live.get(request.node.id)
        foreign = self.identity.why_foreign(info)
        if foreign is not None:
            raise NodeRefusedError(foreign, param="node")
        self.orders.check_joins(info)
        if node is None and len(self._live) >= self.limits.max_nodes:
            raise OverloadedError(f"{self.limits.max_nodes} nodes are live; no further one is taken in")
        if node is not None and info.incarnation != node.info.incarnation:
            _check_takes_place(info, node)
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
            elif (room := manifest.room or None) is not None:
                start, length = room.start, room.length
                if start % ALIGNMENT or length % ALIGNMENT or start + length > segment.size_bytes:
                    problem = f"has no room from {start} on, of {length} bytes"
                elif known is not None and (start, length) != (known.allocator.start, known.allocator.capacity):
                    problem = f"had its room from {known.allocator.start} on, which cannot change"
            if problem:
                raise MetadataProtocolError(f"segment {segment.id} {problem}", param=f"segments[{at}].segment")
            seen.add(segment.id)
        return node

    def join(self, info: NodeInfo, replaces: LiveNode | None = None) -> LiveNode:
        """The node, live under this info from now on. Its lease is to be set by `renew`; `replaces` is gone already."""
        replaced = deque(replaces.replaced if replaces is not None else (), maxlen=self.limits.max_replaced)
        if replaces is not None:
            replaced.append(replaces.info.incarnation)
        self._num_joined += 1
        node = self._live.setdefault(info.id, LiveNode(info, replaced, self._num_joined))
        node.info = info
        return node

    def renew(self, node: LiveNode, now: float, ttl_s: float | None = None) -> None:
        """Begin the node's lease anew; `ttl_s` changes its length."""
        if ttl_s is not None:
            node.ttl_s = min(ttl_s, self._longest_ttl_s)
        self._deadlines.set((Expiry.NODE, node.info.id), now + node.ttl_s)

    def renew_all(self, now: float) -> None:
        """Begin every node's lease anew."""
        for node in self:
            self.renew(node, now)

    def add_segment(self, node: LiveNode, record: SegmentRecord) -> None:
        """The node owns one more segment."""
        node.segments[record.segment.id] = self.segments[record.segment.id] = record

    def closed_segments(self) -> Set[str]:
        """Those that take no new chunks, as their nodes are drained."""
        drained = self.orders.drained
        if not drained:
            return frozenset()
        return {name for node_id in drained if node_id in self for name in self._live[node_id].segments}

    def remove_segment(self, record: SegmentRecord) -> None:
        """No node owns the segment any more. What lay there is the caller's to forget."""
        del self.segments[record.segment.id]
        if record.segment.node_id in self:
            self[record.segment.node_id].segments.pop(record.segment.id, None)

    def remove(self, node: LiveNode) -> None:
        """The node, whose segments are removed already, is gone."""
        self._deadlines.drop((Expiry.NODE, node.info.id))
        del self._live[node.info.id]

    def check(self) -> None:
        """Assert every invariant. For tests."""
        assert self.segments == {name: record for node in self for name, record in node.segments.items()}
        assert all((Expiry.NODE, name) in self._deadlines for name in self._live)


def _check_takes_place(info: NodeInfo, live: LiveNode) -> None:
    """Raises NodeRefusedError unless the process that registers is a later start of the live node."""
    # Three cases:
    # 1. at the live one's address, and not seen before: an address is one process's, so the live one's has ended;
    # 2. one whose place the live one took: a late message of a process that has ended, or of one on another machine;
    # 3. at another address: only the end of the live one's lease says that it is gone.
    if info.incarnation in live.replaced:
        raise NodeRefusedError(
            f"node {info.id} at {info.control_url} was started again since: end this process, or give one of the two "
            "another name",
            param="node.incarnation",
        )
    if info.control_url != live.info.control_url:
        raise NodeRefusedError(
            f"node {info.id} is alive at {live.info.control_url}, and this one is at {info.control_url}: give one of "
            "the two another name, or wait for the lease of the first to end",
            param="node.id",
        )
