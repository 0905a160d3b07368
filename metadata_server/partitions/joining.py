"""Whether a node may register at this server: by its versions, and by the partitions that both know. Pure."""

from kvcore.errors import MetadataProtocolError, NodeRefusedError
from metadata_server.messages import RegisterRequest
from metadata_server.versions import Protocols


def check_joins(speaks: Protocols, request: RegisterRequest) -> None:
    """Raises NodeRefusedError for a node that knows other partitions, MetadataProtocolError for one that has no version
    in common with the server, or does not say which room of its segments is the server's."""
    theirs, us, them = request.spoken, "the metadata server", f"node {request.node.id}"
    if (why := speaks.why_apart(theirs, us=us, them=them)) is not None:
        raise NodeRefusedError(why, param="partitions")
    speaks.common(theirs, us=us, them=them)
    if speaks.part is not None and not all(manifest.room for manifest in request.segments):
        raise MetadataProtocolError("a segment's room is missing: without it all would be meant", param="segments")
