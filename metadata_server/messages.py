"""Wire messages of the metadata server (docs/wire-formats.md).

Every body is msgpack (`application/msgpack`) or the same as JSON (`application/json`, keys base64). Calls are batched
and answer per item: an expected outcome is a value. Unknown fields are refused in requests, ignored elsewhere.
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Self

import msgspec

from kvcore.types import ChunkKey, NodeInfo, OwnerTag, ReplicaRef, Segment
from metadata_server.versions import TermReply, VersionedMessage, VersionedTermReply

ONLY_PREFERRED = 2
"""Version of the protocol since which a reservation may be for one segment alone."""
TIER_HOLDINGS = 2
"""Since which nodes tell what lies on their disks."""
IN_ORDER = 3
"""Since which callers say that keys are one prompt's, in order."""
OWNERS = 4
"""Since which writers say whose chunks they are."""
NAMED_LEASES = 4
"""Since which readers name their leases, and renew them."""
IN_PIECES = 4
"""Since which nodes tell what lies in their segments in pieces (`account_messages`)."""
PARTITIONS = 5
"""Since which several servers may share the index, each with a slice of every segment."""
TOLD_OWNERS = 5
"""Since which they tell whose it is, too."""
NAMED_WRITES = 6
"""Since which writers name what they reserve, as readers their leases."""
OWNED_LEASES = 7
"""Since which readers say whose prompt they read."""
FORGERIES = 5
"""Since which readers say of a replica that it is `forged` or `unproven`; to older servers they say `checksum`."""


class RequestBody(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What every request is."""


class ReplyBody(msgspec.Struct, frozen=True, kw_only=True):
    """What every reply is."""


class Nothing(ReplyBody, frozen=True, kw_only=True):
    """A reply that says only: done."""


class FromNode(RequestBody, frozen=True, kw_only=True):
    """What a node's process asks in its node's name."""

    node_id: str
    incarnation: int


class TolerantEnum(StrEnum):
    """Of a reply or an event. What only a newer server says is read as the member `UNKNOWN`."""

    @classmethod
    def _missing_(cls, value: object) -> Self:
        return cls("unknown")


class ManifestEntry(RequestBody, frozen=True, kw_only=True):
    """A chunk that a node found in its own segment by its header (see `kvstore.manifest`)."""

    key: ChunkKey
    offset: int
    length: int
    generation: int
    owner: OwnerTag | msgspec.UnsetType = msgspec.UNSET
    """Whose quota it counts for; absent: not known. Since version TOLD_OWNERS of the protocol."""


class Room(RequestBody, frozen=True, kw_only=True):
    """A slice of a segment: both are multiples of 4,096. Since PARTITIONS."""

    start: int
    length: int


class SegmentManifest(RequestBody, frozen=True, kw_only=True):
    """A segment and what lies in it, newest generation first; entries that overlap a newer one are refused."""

    segment: Segment
    entries: list[ManifestEntry] = []
    room: Room | msgspec.UnsetType = msgspec.UNSET
    """What this server may give out, and entries lie in; the rest is other partitions'. Absent: all of it."""


class RegisterRequest(VersionedMessage, RequestBody, frozen=True, kw_only=True):
    """A node joins, or again when the server lost it. 409: of another cluster or model, or its id is another's."""

    node: NodeInfo
    segments: list[SegmentManifest] = []
    ttl_s: float
    in_pieces: bool | msgspec.UnsetType = msgspec.UNSET
    """What lies in the segments is told later, of those that the reply asks for. Since version IN_PIECES."""


class RegisterReply(VersionedTermReply, ReplyBody, frozen=True, kw_only=True):
    """`epoch` identifies this life of the metadata server."""

    epoch: str
    imported: int
    refused: int
    wanted: dict[str, int] = {}
    """Segments whose contents are to be told in pieces, each with the number under which (ImportRequest)."""


class HeartbeatRequest(FromNode, frozen=True, kw_only=True):
    """Renews the node's lease."""


class HeartbeatReply(VersionedTermReply, ReplyBody, frozen=True, kw_only=True):
    """`known` false: register again. `drained`: `stay`, `move` or empty. `sheds`: ask what to move. `role`: be this."""

    epoch: str
    known: bool
    drained: str = ""
    sheds: bool = False
    role: str = ""


class LeaveRequest(FromNode, frozen=True, kw_only=True):
    """A node goes in good order: its replicas and reservations are dropped at once."""


class MatchRequest(RequestBody, frozen=True, kw_only=True):
    """Longest prefix of `keys` with a complete replica each. `lease_s` > 0 protects them from eviction meanwhile."""

    keys: list[ChunkKey]
    lease_s: float = 0.0
    node_id: str = ""
    """Who holds the lease: it dies with this node's incarnation too. Empty: only with time."""
    incarnation: int = 0
    in_order: bool | msgspec.UnsetType = msgspec.UNSET
    """Each key continues the one before it. Since version IN_ORDER of the protocol."""
    lease_name: int | msgspec.UnsetType = msgspec.UNSET
    """Unique, not 0: its reader can give the lease back by it without having seen the reply. Since NAMED_LEASES."""
    owner: OwnerTag | msgspec.UnsetType = msgspec.UNSET
    """Whose prompt it is: no tenant has all leases or waits. Since OWNED_LEASES."""


class WaitRequest(MatchRequest, frozen=True, kw_only=True):
    """As MatchRequest, but answered only when more than `more_than` leading keys are complete, or after `timeout_s`."""

    more_than: int = 0
    timeout_s: float


class MatchReply(TermReply, ReplyBody, frozen=True, kw_only=True):
    """`replicas[i]`: the complete replicas of `keys[i]`, for the longest prefix that has any. `lease_id` 0: none."""

    replicas: list[list[ReplicaRef]]
    lease_id: int = 0
    segments: list[Segment] = []
    """Every segment that the reply names, each once: the reader needs its addresses. The server always fills it."""
    writers: list[str] = []
    """The nodes that are writing the first key behind that prefix, the one that has been at it for longest first."""
    num_writing: int = 0
    """How many keys behind that prefix, one after the other, are being written."""
    rebuilding: bool = False
    """The server was started a short time ago, or is being told what lies in segments: more may be there than this."""


class ReserveItem(RequestBody, frozen=True, kw_only=True):
    """A chunk that the writer is about to write; `length` with its header."""

    key: ChunkKey
    length: int


class ReserveRequest(RequestBody, frozen=True, kw_only=True):
    """Room for chunks. A reservation dies with its writer, or after `ttl_s`, unless committed."""

    node_id: str
    """The writer."""
    incarnation: int
    items: list[ReserveItem]
    prefer_segment: str | None = None
    ttl_s: float
    only_preferred: bool | msgspec.UnsetType = msgspec.UNSET
    """No room in other segments is wanted. Since version ONLY_PREFERRED of the protocol."""
    in_order: bool | msgspec.UnsetType = msgspec.UNSET
    owner: OwnerTag | msgspec.UnsetType = msgspec.UNSET
    """Whose quota they count for; absent: nobody's. Since version OWNERS of the protocol."""
    write_name: int | msgspec.UnsetType = msgspec.UNSET
    """Unique, not 0: its writer can give back by it what it has not seen granted. Since NAMED_WRITES."""


class ReserveStatus(TolerantEnum):
    """What became of one ReserveItem."""

    GRANTED = "granted"
    EXISTS = "exists"
    """A complete replica is there: nothing to write."""
    BUSY = "busy"
    """As many writers as are allowed are writing it now."""
    FULL = "full"
    """No segment has room, even after eviction: do without."""
    UNKNOWN = "unknown"
    """Do without."""


class ReserveOutcome(ReplyBody, frozen=True):
    """`replica` is set iff `status` is GRANTED. Made by position where there are many."""

    status: ReserveStatus
    replica: ReplicaRef | None = None
    writers: list[str] = []
    """With GRANTED and BUSY: the nodes that were writing the chunk already, as in a MatchReply."""


class ReserveReply(TermReply, ReplyBody, frozen=True, kw_only=True):
    """One outcome an item, in order."""

    outcomes: list[ReserveOutcome]
    segments: list[Segment] = []
    """Every segment that the reply names, each once: the writer needs its addresses. The server always fills it."""


class ReplicaIds(FromNode, frozen=True, kw_only=True):
    """Body of commit and abort: ids from a ReserveReply."""

    replica_ids: list[int]


class CommitRefusal(TolerantEnum):
    """Why a reservation was not committed: what was written is not stored."""

    NONE = ""
    WRITER_GONE = "writer_gone"
    """The writer is not registered: its node's lease ended, or another start of it took its place."""
    ENDED = "ended"
    """Its time was up, it was given back, or its segment is gone; or this life of the server never granted it."""
    UNKNOWN = "unknown"


class CommitReply(ReplyBody, frozen=True, kw_only=True):
    """`committed[i]` false: what was written is not a chunk. `refusals[i]` says why; empty: all were committed."""

    committed: list[bool]
    refusals: list[CommitRefusal] = []


class TellHoldingsRequest(FromNode, frozen=True, kw_only=True):
    """Chunks that came to a node's disk or left it. `reset`: it has none but these. Since TIER_HOLDINGS."""

    added: list[ChunkKey] = []
    removed: list[ChunkKey] = []
    reset: bool = False


class TellHoldingsReply(ReplyBody, frozen=True, kw_only=True):
    """`known` false: the node is not registered, and nothing was noted."""

    known: bool


class FindHoldersRequest(RequestBody, frozen=True, kw_only=True):
    """Who has these chunks on disk. Since TIER_HOLDINGS."""

    keys: list[ChunkKey]


class FindHoldersReply(ReplyBody, frozen=True, kw_only=True):
    """`nodes[holders[i][...]]` have `keys[i]`, for the keys up to the first that nobody has."""

    nodes: list[NodeInfo]
    holders: list[list[int]]


class QuarantineReason(StrEnum):
    """Why a reader refused a replica."""

    CHECKSUM = "checksum"
    STALE = "stale"
    FOREIGN = "foreign"
    MALFORMED = "malformed"
    UNREACHABLE = "unreachable"
    FORGED = "forged"
    UNPROVEN = "unproven"


class QuarantineItem(RequestBody, frozen=True, kw_only=True):
    """A replica that a reader refused. It is dropped if it still has this generation."""

    replica: ReplicaRef
    reason: QuarantineReason


class QuarantineRequest(RequestBody, frozen=True, kw_only=True):
    """Body of /v1/objects/quarantine."""

    items: list[QuarantineItem]


class EventKind(TolerantEnum):
    """What an index event says."""

    STORED = "stored"
    REMOVED = "removed"
    NODE_UP = "node_up"
    NODE_DOWN = "node_down"
    ON_DISK = "on_disk"
    """These keys lie on the node's own disk now."""
    OFF_DISK = "off_disk"
    """They do no longer; without keys: nothing does."""
    UNKNOWN = "unknown"
    """Subscriptions leave it out."""


class Event(ReplyBody, frozen=True, kw_only=True):
    """One change of the index. `seq` grows by one each; a gap means loss. Keys are batched per segment."""

    seq: int
    kind: EventKind
    node_id: str
    segment_id: str = ""
    keys: Sequence[ChunkKey] = ()
    node: NodeInfo | None = None
    """With NODE_UP."""


class EventBatch(VersionedTermReply, ReplyBody, frozen=True, kw_only=True):
    """A frame of the event stream, or the answer to a replay. `reset`: forget all, a snapshot follows as events.
    A batch without events is a keep-alive; `next_seq` is the seq of the event after this batch. Snapshot events all
    have seq `next_seq - 1`; a snapshot may take several batches (only the first says `reset`) and is complete with the
    first batch without events or with a later `next_seq`. The first batch of a stream says what the server speaks."""

    epoch: str
    reset: bool = False
    next_seq: int
    events: list[Event] = []


class NodesReply(VersionedMessage, ReplyBody, frozen=True, kw_only=True):
    """Who is alive, and every segment that a ReplicaRef may name now; and which cluster this is."""

    epoch: str
    nodes: list[NodeInfo]
    segments: list[Segment]
    cluster: str = ""
    """Its name in the server's file, and …"""
    model: str = ""
    """… `model.name` there."""
