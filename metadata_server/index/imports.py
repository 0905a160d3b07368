"""Segments whose nodes tell piece by piece what lies in them, as the server has forgotten it. Pure.

Owns the numbers under which it is told. Invariants: a segment is rebuilding if and only if it has a number; no number
is used twice, in any life of the server, so that a late piece of an earlier telling is known as such.
"""

from collections import Counter

from kvcore.types import ChunkKey
from metadata_server.account_messages import ImportReply, ImportRequest
from metadata_server.index.cache_control import CacheControl
from metadata_server.index.chunks.replicas import ReplicaIndex
from metadata_server.index.chunks.segments import SegmentRecord
from metadata_server.index.nodes import NodeRegistry
from metadata_server.messages import ManifestEntry


class Imports:
    """Mutated by ClusterMembership and MetadataState only, which lets run out what is due before each call."""

    def __init__(
        self, nodes: NodeRegistry, index: ReplicaIndex, cache: CacheControl, counts: Counter[str], last_number: int
    ) -> None:
        """Numbers are above `last_number`."""
        self._nodes = nodes
        self._index = index
        self._cache = cache
        self._counts = counts
        self._numbers: dict[str, int] = {}
        self._last_number = last_number

    def __len__(self) -> int:
        return len(self._numbers)

    def __repr__(self) -> str:
        return f"<Imports of {len(self)} segments>"

    def begin(self, record: SegmentRecord) -> int:
        """The number under which all that lies there is to be told, from its beginning."""
        record.rebuild(True)
        self._last_number += 1
        self._numbers[record.segment.id] = self._last_number
        return self._last_number

    def end(self, record: SegmentRecord) -> None:
        """All is told, or the segment is gone."""
        record.rebuild(False)
        record.allocator.settle()
        self._numbers.pop(record.segment.id, None)

    def take(self, request: ImportRequest, now: float) -> ImportReply:
        """See ImportRequest. What is told renews the node's lease."""
        # Four cases:
        # 1. the node is not registered, or has no such segment: it has to register;
        # 2. all is known of the segment: a late copy of a piece, or the last one told again as its answer was lost;
        # 3. another number: a late piece of an earlier telling. Its room may be another chunk's since: not noted;
        # 4. the number of now.
        node = self._nodes.get(request.node_id, request.incarnation)
        record = node.segments.get(request.segment_id) if node is not None else None
        if node is None or record is None:
            return ImportReply(known=False)
        number = self._numbers.get(request.segment_id)
        if number is not None and number != request.number:
            return ImportReply(known=False)
        self._nodes.renew(node, now)
        if number is None:
            return ImportReply(known=True)
        imported = self.note(record, request.entries, now)
        if request.last:
            self.end(record)
        self._index.publish()
        refused = len(request.entries) - imported
        self._counts["imported"] += imported
        self._counts["import_refused"] += refused
        return ImportReply(known=True, imported=imported, refused=refused)

    def note(self, record: SegmentRecord, entries: list[ManifestEntry], now: float) -> int:
        """These lie in a segment that is rebuilding; returns how many count. Those known already do."""
        index, known, fresh = self._index, 0, dict[ChunkKey, ManifestEntry]()
        complete, writing, take = index.complete, index.writing, record.allocator.take
        for entry in entries:
            key = entry.key
            if key in fresh:
                known += fresh[key] == entry
            elif (key in complete or key in writing) and index.row_in(key, record.number) is not None:
                known += index.holds(record, entry)
            elif take(entry.offset, entry.length):
                fresh[key] = entry
        index.adopt([*fresh.values()], record)
        self._cache.stored(fresh, now)
        return len(fresh) + known

    def check(self) -> None:
        """Assert every invariant. For tests."""
        rebuilding = {name for name, record in self._nodes.segments.items() if record.rebuilding}
        assert rebuilding == self._numbers.keys()
