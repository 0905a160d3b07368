"""How nodes come and go, and what that does to all that is known of them. Pure.

Owns the order: whose place is taken is dropped first, with its segments, reservations and leases. NODE_DOWN stands for
the removal of all that lay in the node's segments.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from kvcore.errors import NodeRefusedError
from kvcore.types import Segment
from metadata_server.index.cache_control import CacheControl
from metadata_server.index.chunks.new_segments import acceptable
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.event_log import EventLog
from metadata_server.index.imports import Imports
from metadata_server.index.nodes import LiveNode, NodeRegistry
from metadata_server.index.pins import Pins
from metadata_server.index.reading import Reading
from metadata_server.index.reservations import Reservations
from metadata_server.index.tier_holdings import TierHoldings
from metadata_server.messages import (
    EventKind,
    ManifestEntry,
    RegisterReply,
    RegisterRequest,
    Room,
    SegmentManifest,
)


@dataclass(frozen=True, slots=True)
class IndexParts:
    """What a node's death, or a look at who holds what, goes through. Of one MetadataState."""

    nodes: NodeRegistry
    index: ReplicaIndex
    reservations: Reservations
    reading: Reading
    cache: CacheControl
    pins: Pins
    imports: Imports
    holdings: TierHoldings


class ClusterMembership:
    """Mutated by MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self,
        parts: IndexParts,
        *,
        log: EventLog,
        new_record: Callable[[Segment, list[ManifestEntry], Room | None], SegmentRecord],
        counts: Counter[str],
    ) -> None:
        self._log = log
        self._nodes = parts.nodes
        self._index = parts.index
        self._reservations = parts.reservations
        self._reading = parts.reading
        self._cache = parts.cache
        self._imports = parts.imports
        self._holdings = parts.holdings
        self._new_record = new_record
        self._counts = counts

    def __repr__(self) -> str:
        return f"<ClusterMembership {self._nodes}>"

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        """See MetadataState.register."""
        info = request.node
        try:
            node = self._nodes.check_request(request)
        except NodeRefusedError:
            self._counts["nodes_refused"] += 1
            raise
        # Nothing has changed so far; from here on nothing is refused. Who registers is one of four:
        # 1. a later start of a node that still counts as alive: the old one is dropped with all it held, then 2;
        # 2. a node that is not alive: it joins, and an event says so;
        # 3. a known incarnation with another address or fingerprint: only its info changes, and an event says so;
        # 4. a known incarnation as it was, which was told to register again or wants to be sure: nobody is told.
        replaces = node if node is not None and node.info.incarnation != info.incarnation else None
        if replaces is not None:
            self.drop(replaces, now)
            self._counts["nodes_replaced"] += 1
        if node is None or node.info != info:
            node = self._nodes.join(info, replaces)
            self._nodes.orders.joined(info)
            self._log.append(EventKind.NODE_UP, info.id, node=info)
        self._nodes.renew(node, now, request.ttl_s)
        for absent in node.segments.keys() - {manifest.segment.id for manifest in request.segments}:
            self.drop_segment(node.segments[absent])
        wanted, imported = {}, 0
        if request.in_pieces is True:
            wanted = self._ask(node, request.segments)
        else:
            imported = sum(self._adopt(node, manifest, now) for manifest in request.segments)
        refused = sum(len(manifest.entries) for manifest in request.segments) - imported
        self._counts["registrations"] += 1
        self._counts["imported"] += imported
        self._counts["import_refused"] += refused
        self._index.publish()
        return RegisterReply(epoch=self._log.epoch, imported=imported, refused=refused, wanted=wanted)

    def give_back(self, node: LiveNode, now: float, *, writes_on: bool = False) -> None:
        """End what the node has reserved and leased. `writes_on`: nobody says that its writers have ended."""
        self._reservations.end_all_of(node, now, writes_on=writes_on)
        self._reading.end_all_of(node)

    def drop(self, node: LiveNode, now: float) -> None:
        """The node is gone, with all that it held."""
        # Its segments first: what it has reserved there needs no rest, what it has reserved elsewhere does: a node that
        # we do not hear may reach other nodes, and one that leaves does so before its engine has ended.
        for record in list(node.segments.values()):
            self.drop_segment(record, emit_event=False)
        self.give_back(node, now, writes_on=True)
        self._nodes.remove(node)
        self._holdings.drop(node.info.id)
        self._index.publish()
        self._log.append(EventKind.NODE_DOWN, node.info.id)

    def _ask(self, node: LiveNode, manifests: list[SegmentManifest]) -> dict[str, int]:
        """Of which segments is to be told what lies in them, and under which numbers: of all that are new, and of those
        of which not all was told. What was told of these stays."""
        wanted = {}
        for manifest in manifests:
            record = node.segments.get(manifest.segment.id)
            fresh = record is None
            if record is None:
                record = self._add(node, manifest, [])
            record.segment = manifest.segment
            if fresh or record.rebuilding:
                wanted[manifest.segment.id] = self._imports.begin(record)
        return wanted

    def _add(self, node: LiveNode, manifest: SegmentManifest, taken: list[ManifestEntry]) -> SegmentRecord:
        record = self._new_record(manifest.segment, taken, manifest.room or None)
        self._nodes.add_segment(node, record)
        self._index.rooms.add(record)
        self._cache.room_changed()
        return record

    def _adopt(self, node: LiveNode, manifest: SegmentManifest, now: float) -> int:
        """Add a segment with what lies in it, or confirm what is known to lie there; returns how many entries count."""
        known = node.segments.get(manifest.segment.id)
        if known is not None:
            known.segment = manifest.segment
            if known.rebuilding:  # told in pieces so far, and now as a whole
                imported = self._imports.note(known, manifest.entries[::-1], now)
                self._imports.end(known)
                return imported
            return sum(self._index.holds(known, entry) for entry in manifest.entries)
        room = manifest.room or Room(start=0, length=manifest.segment.size_bytes)
        entries = acceptable(room, manifest.entries)
        record = self._add(node, manifest, entries)
        self._index.adopt(entries[::-1], record)  # the newest generation will be the last to be evicted
        self._cache.stored((entry.key for entry in entries), now)
        return len(entries)

    def drop_segment(self, record: SegmentRecord, *, emit_event: bool = True) -> None:
        """Forget it with all that lies there. `emit_event` false: another event tells of it."""
        self._nodes.remove_segment(record)
        self._imports.end(record)
        rows = list(record.incomplete)
        self._reservations.forget(rows)
        for row in rows:
            self._index.remove(row)
        self._index.drop(record, emit_event=emit_event)
        self._cache.room_changed()
