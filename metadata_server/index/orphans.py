"""What the index holds for nobody: found, and removed where it still is. Pure.

Leases, reservations and segments end with their owners by themselves: this looks at all of them anew, and trusts none
of the lists by which they should have. Owns nothing. Invariant: what a live node holds is never found.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from kvcore.types import ChunkKey
from metadata_server.account_messages import Orphan
from metadata_server.index.membership import ClusterMembership, IndexParts


@dataclass(frozen=True, slots=True)
class Look:
    """When it is looked, on both clocks, and what the caller knows (see OrphansRequest)."""

    now: float
    wall: float
    known: Collection[str]
    older_s: float


class IndexOrphans:
    """`find` and `remove` by kind; let run out what is due before. A kind's `remove` takes what `find` says now."""

    def __init__(self, parts: IndexParts, membership: ClusterMembership) -> None:
        self._parts, nodes = parts, parts.nodes
        self._kinds: dict[str, tuple[Callable[[Look], Iterator[Orphan]], Callable[[str, Look], object]]] = {
            "read_leases": (self._leases, lambda name, _: parts.reading.release([int(name)])),
            "reservations": (self._grants, lambda name, look: parts.reservations.end_grant(int(name), look.now)),
            "segments": (self._segments, lambda name, _: membership.drop_segment(nodes.segments[name])),
            "holdings": (self._disks, lambda name, _: parts.holdings.drop(name)),
            "node_orders": (self._orders, lambda name, _: self._end_order(name.rpartition("@")[0])),
            "pins": (self._pinned, lambda name, look: parts.cache.end_pin(ChunkKey(bytes.fromhex(name)), look.now)),
        }

    def __repr__(self) -> str:
        return f"<IndexOrphans of {', '.join(self._kinds)}>"

    @property
    def kinds(self) -> Collection[str]:
        """That this looks after."""
        return self._kinds.keys()

    def find(self, kind: str, look: Look) -> Iterator[Orphan]:
        """Each one of the kind. Nothing may change until it has ended."""
        return self._kinds[kind][0](look)

    def remove(self, kind: str, ids: Collection[str], look: Look) -> list[str]:
        """Those among `ids` that are orphaned still; returns them."""
        gone = [orphan.id for orphan in self.find(kind, look) if orphan.id in ids]
        for name in gone:
            self._kinds[kind][1](name, look)
        self._parts.index.publish()
        return gone

    def _leases(self, look: Look) -> Iterator[Orphan]:
        for number, lease in self._parts.reading.leases.items():
            reader, incarnation = lease.reader
            if reader and self._parts.nodes.get(reader, incarnation) is None:
                yield Orphan(id=str(number), name=f"{reader} ({len(lease.rows)} chunks)", age_s=look.now - lease.began)

    def _grants(self, look: Look) -> Iterator[Orphan]:
        for grant, end in self._parts.reservations.open_grants():
            writer = self._parts.nodes[grant.node_id].number if grant.node_id in self._parts.nodes else None
            if writer != grant.writer or end is None or end <= look.now:
                name = f"{grant.node_id} ({len(grant.rows)} chunks)"
                yield Orphan(id=str(grant.number), name=name, age_s=look.now - grant.began)

    def _segments(self, _: Look) -> Iterator[Orphan]:
        for name, record in self._parts.nodes.segments.items():
            owner = record.segment.node_id
            if owner not in self._parts.nodes or self._parts.nodes[owner].segments.get(name) is not record:
                yield Orphan(id=name, name=f"{name} ({record.stats().num_replicas} chunks)")

    def _disks(self, _: Look) -> Iterator[Orphan]:
        for name in self._parts.holdings.holders():
            if name not in self._parts.nodes:
                yield Orphan(id=name, name=name)

    def _orders(self, look: Look) -> Iterator[Orphan]:
        for order in self._parts.nodes.orders.all():
            age_s = look.wall - order.since
            if age_s >= look.older_s and order.node_id not in self._parts.nodes and order.node_id not in look.known:
                yield Orphan(id=f"{order.node_id}@{order.since!r}", name=f"{order.node_id} ({order.kind})", age_s=age_s)

    def _end_order(self, node_id: str) -> None:
        order = self._parts.nodes.orders.get(node_id)
        assert order is not None, "it was found just now"
        self._parts.nodes.orders.drop(order)

    def _pinned(self, look: Look) -> Iterator[Orphan]:
        complete, writing = self._parts.index.complete, self._parts.index.writing
        for key, since in self._parts.pins.since():
            age_s = look.now - since
            if age_s >= look.older_s and not (key in complete or key in writing or self._parts.holdings.find([key])):
                yield Orphan(id=key.hex(), name=key.hex(), age_s=age_s)
