"""What one partition of the index is told of a node's segment: its slice of the room, and what lies there. Pure."""

from kvcore.partitions import Part
from metadata_server.messages import Room, SegmentManifest


def of_part(manifest: SegmentManifest, part: Part | None) -> SegmentManifest:
    """The entries that lie in the partition's slice and are its own. What else lies there is forgotten, and its room is
    free. None: the index is one server's."""
    if part is None:
        return manifest
    start, length = part.slice_of(manifest.segment.size_bytes)
    own = [
        entry
        for entry in manifest.entries
        if start <= entry.offset and entry.offset + entry.length <= start + length and part.owns(entry.key)
    ]
    return SegmentManifest(segment=manifest.segment, entries=own, room=Room(start=start, length=length))
