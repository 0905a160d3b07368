"""Wire messages of accounts: what nodes tell of their segments' contents, and the server of all that it holds, also for
nobody any more."""

from typing import Literal

import msgspec

from kvcore.types import NodeInfo, Segment
from metadata_server.messages import ManifestEntry, ReplyBody, RequestBody

JANITOR = 5
"""Since which it is said what is orphaned."""
OrphanKind = Literal[
    "read_leases", "reservations", "segments", "holdings", "node_orders", "pins", "mooncake", "doctor_records"
]
"""`read_leases`: of readers that named themselves and are not registered. `reservations`: of writers that are not, or
over their time. `segments`, `holdings`: of nodes that are not alive. `node_orders`: about nodes that nobody knows.
`pins`: of chunks that lie in no segment and on no disk. `mooncake`: of dead owners. `doctor_records`: of probes."""


class ImportRequest(RequestBody, frozen=True, kw_only=True):
    """A piece of what lies in a segment. Until the last one is told the segment gives no room to anybody.

    A piece that is told twice counts once. Those that are told first are evicted first.
    """

    node_id: str
    incarnation: int
    segment_id: str
    number: int
    """From `wanted` of the RegisterReply: a late piece of an earlier registration has another one."""
    entries: list[ManifestEntry] = msgspec.field(default_factory=list)
    last: bool = False


class ImportReply(ReplyBody, frozen=True, kw_only=True):
    """`known` false: nothing was noted, register again. `again_s` above 0: nothing was noted, send the same again after
    that time, the server has many pieces to look at."""

    known: bool
    imported: int = 0
    refused: int = 0
    again_s: float = 0.0


class SegmentStats(ReplyBody, frozen=True, kw_only=True):
    """Use of one segment, bytes."""

    segment: Segment
    used_bytes: int
    reserved_bytes: int
    retiring_bytes: int
    num_replicas: int
    room_bytes: int = 0
    """Of the segment, that this server may give out: of several partitions each has a slice. 0: an older server's."""
    rebuilding: bool = False
    """Its node has not yet told all that lies in it: it gives no room until then."""


class RefusedNode(ReplyBody, frozen=True, kw_only=True):
    """A node that wants to join and is not taken in."""

    node: NodeInfo
    reason: str


class Stats(ReplyBody, frozen=True, kw_only=True):
    """What /v1/stats shows. After a drained load `reservations` and `read_leases` are 0."""

    epoch: str
    nodes: list[NodeInfo]
    segments: list[SegmentStats]
    objects: int
    """Keys that are complete somewhere. What lay with a node that is gone counts until it is forgotten, in slices."""
    reservations: int
    read_leases: int
    waiters: int
    counters: dict[str, int]
    """Totals since start: lookups, hits, reserved, committed, aborted, expired, evicted, declined_full,
    quarantined_<reason>, ..."""
    refused: list[RefusedNode] = msgspec.field(default_factory=list)
    """Those that asked within the last minute."""
    rebuilding: int = 0
    """How many segments are: lookups find less than there is."""


class OrphansRequest(RequestBody, frozen=True, kw_only=True):
    """What is orphaned now? Changes nothing."""

    known: list[str]
    """Nodes of which who asks knows, alive or not: what is ordered of them is no orphan."""
    older_s: float
    """Nor is an order that was given since."""


class Orphan(ReplyBody, frozen=True, kw_only=True):
    """One that nobody owns any more."""

    id: str
    """Names it and nothing else, also when another of its name comes later."""
    name: str
    """For people."""
    age_s: float | None = None
    """Since it began. None: nobody has noted it."""


class OrphansOfKind(ReplyBody, frozen=True, kw_only=True):
    """All of a kind, of which there are some."""

    kind: str
    count: int
    oldest_s: float | None
    listed: list[Orphan]
    """The oldest, as many as one answer holds."""


class OrphansReply(ReplyBody, frozen=True, kw_only=True):
    """`unknown`: why it cannot be told now what is orphaned, as not all nodes were heard; empty: it can."""

    kinds: list[OrphansOfKind]
    unknown: str = ""


class RemoveOrphansRequest(RequestBody, frozen=True, kw_only=True):
    """Remove those of a kind that were listed and are orphaned still. `known`, `older_s` as they were then."""

    kind: OrphanKind
    ids: list[str]
    known: list[str]
    older_s: float


class RemoveOrphansReply(ReplyBody, frozen=True, kw_only=True):
    """The ids of those that are gone now. `unknown` as of an OrphansReply: nothing was removed."""

    removed: list[str]
    unknown: str = ""
