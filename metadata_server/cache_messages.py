"""Wire messages that say what the cache shall keep, for readers too, and what nodes shall do (docs/wire-formats.md).

As all messages of the metadata server, see `metadata_server.messages`. Since versions CACHE_CONTROL and NODE_ORDERS of
the protocol.
"""

from collections.abc import Iterable
from typing import Literal

import msgspec

from kvcore.types import ChunkKey, ReplicaRef, Segment
from metadata_server.messages import FromNode, ReplyBody, RequestBody
from metadata_server.versions import TermReply

HUNG_WRITERS = 7
"""Since which nodes give back what an engine has reserved that hangs."""
CACHE_CONTROL = 3
"""Since which chunks are pinned, evicted and given a time by their keys."""
NODE_ORDERS = 4
"""Since which nodes are drained and removed by order."""
REBALANCE = 5
"""Since which segments are evened out by order."""
NODE_ROLES = 7
"""Since which a node is told by order as what it serves."""
BLEND_SWITCHES = 7
"""Since which it is kept whether documents of a kind are reused."""
NodeAction = Literal["drain", "undrain", "remove", "role"]
OrderedRole = Literal["prefiller", "decoder"]


class PinRequest(RequestBody, frozen=True, kw_only=True):
    """Keep every replica of these chunks from eviction, those that are there and those to come."""

    keys: list[ChunkKey]
    ttl_s: float | None = None
    """For so long from now. None: until they are unpinned. A chunk that is pinned already gets this time."""
    extend: bool = False
    """A chunk that is pinned for longer already stays so: for those who must not undo others' pins."""


class UnpinRequest(RequestBody, frozen=True, kw_only=True):
    """End the pins of these chunks."""

    keys: list[ChunkKey]


class EvictRequest(RequestBody, frozen=True, kw_only=True):
    """Forget all complete replicas of these chunks now."""

    keys: list[ChunkKey]


class ExpireRequest(RequestBody, frozen=True, kw_only=True):
    """Forget the chunks that are there now when `ttl_s` is over; for a pinned one, when its pin has ended."""

    keys: list[ChunkKey]
    ttl_s: float


class CacheReply(ReplyBody, frozen=True, kw_only=True):
    """How many of the request's keys were ..."""

    known: int
    """... of a chunk that lies in memory (`unpin`: of a pinned one);"""
    done: int
    """... pinned, unpinned, evicted or given their time;"""
    refused: int
    """... not: `pin`: pins have their share of the memory already; `evict`: the chunk is pinned, or being read."""


class Pin(ReplyBody, frozen=True, kw_only=True):
    """One pinned chunk."""

    key: ChunkKey
    left_s: float | None = None
    """None: until it is unpinned."""
    replicas: int = 0
    """Kept from eviction by it; 0: none is there, or pins had no room for it."""


class PinsReply(ReplyBody, frozen=True, kw_only=True):
    """What is pinned: the oldest pins, as many as one answer holds, and how many there are in all."""

    num_pins: int
    pinned_bytes: int
    most_bytes: int
    """That pins may take of the cluster's memory (`store.pin_share`)."""
    pins: list[Pin]


class NodeOrderRequest(RequestBody, frozen=True, kw_only=True):
    """`drain`: the node gets no new requests and no new chunks, until `undrain`. `remove`: it is forgotten. `role`: it
    serves as this one from now on, whatever its file says; since version NODE_ROLES."""

    node_id: str
    action: NodeAction
    move: bool = False
    """`drain`: it copies its chunks to other nodes, as far as there is free room."""
    force: bool = False
    """`remove`: also a node that is alive; this start of it is not taken in again."""
    incarnation: int = 0
    """`remove`: the start of the node that is meant, as far as who asks knows; 0: not known."""
    role: OrderedRole | msgspec.UnsetType = msgspec.UNSET
    """`role`: which; the others leave it out."""


class NodeOrder(ReplyBody, frozen=True, kw_only=True):
    """What was ordered of one node."""

    node_id: str
    kind: str
    """`drained`, `removed` or `used`: nothing but its role was ordered."""
    since: float
    """Unix seconds."""
    move: bool = False
    """Of a drained one: it copies its chunks to other nodes."""
    incarnation: int = 0
    """Of a removed one: the start that is not taken in any more; 0: every start is."""
    role: str = ""
    """As what it serves, whatever its file says; empty: as what that says."""


class NodeOrderReply(ReplyBody, frozen=True, kw_only=True):
    """What holds of the node now. `refused`: why nothing was changed; empty: what was asked for holds."""

    order: NodeOrder | None = None
    refused: str = ""


class NodeRole(ReplyBody, frozen=True, kw_only=True):
    """As what a node serves by order, drained or not."""

    node_id: str
    role: str


class NodeOrdersReply(ReplyBody, frozen=True, kw_only=True):
    """What was ordered of nodes and not taken back, whether they are alive or not. `orders`: drains and removals."""

    orders: list[NodeOrder]
    roles: list[NodeRole] = msgspec.field(default_factory=list)


class ReleaseRequest(RequestBody, frozen=True, kw_only=True):
    """Give read leases back. Unknown ids are ignored: they have expired."""

    lease_ids: list[int]
    lease_names: list[int] | msgspec.UnsetType = msgspec.UNSET
    """Of those whose replies did not come; a request with such a name that comes later gets no lease. Since version
    NAMED_LEASES of the protocol."""


class ReleaseWriterRequest(FromNode, frozen=True, kw_only=True):
    """The node's engine has died: all that is reserved or leased in its name is given back. Its replicas stay."""

    hangs: bool | msgspec.UnsetType = msgspec.UNSET
    """It has not: it hangs, and may write on when it wakes; what was reserved rests for as long as that might be. Since
    HUNG_WRITERS."""


class RenewRequest(FromNode, frozen=True, kw_only=True):
    """Bytes still move under these read leases of this node: they end in `lease_s` at the earliest. Since
    NAMED_LEASES."""

    lease_ids: list[int]
    lease_s: float


class RenewReply(TermReply, ReplyBody, frozen=True, kw_only=True):
    """`renewed[i]` false: the node does not hold that lease (any more)."""

    renewed: list[bool]


class MoveChunksRequest(FromNode, frozen=True, kw_only=True):
    """A node that is to be emptied, or that sheds, asks which of its chunks to copy next, and where to. Room for the
    copies is reserved in its name for `ttl_s`, as by a ReserveRequest, and evicts nothing. Its replicas of `copied`
    that lie elsewhere now go, whether it is to move more or not."""

    copied: list[ChunkKey]
    most_bytes: int
    """Of all copies together, but one at least."""
    ttl_s: float


class ChunkMove(ReplyBody, frozen=True, kw_only=True):
    """A chunk where it lies, and room for its copy."""

    source: ReplicaRef
    target: ReplicaRef


class MoveChunksReply(ReplyBody, frozen=True, kw_only=True):
    """The most used chunks first. `left`: chunks that lie nowhere else yet, these included; above 0 while not all were
    looked at. `more`: ask again at once, also where nothing could be moved. `in_use`: those of `copied` that are being
    read here, to be named again."""

    moves: list[ChunkMove]
    segments: list[Segment]
    """Of the targets."""
    left: int
    more: bool = False
    in_use: list[ChunkKey] = msgspec.field(default_factory=list)


class RebalanceRequest(RequestBody, frozen=True, kw_only=True):
    """`start`: chunks of segments that are fuller than the cluster as a whole are moved to emptier ones, `most_bytes`
    in all (0: as many as it takes); a run under way ends. `stop`: that is over. Since REBALANCE."""

    action: Literal["start", "stop"]
    most_bytes: int = 0


class SegmentFill(ReplyBody, frozen=True, kw_only=True):
    """How full one segment is. `sheds`: chunks are moved away from it."""

    segment_id: str
    node_id: str
    used_bytes: int
    size_bytes: int
    sheds: bool = False


class RebalanceReply(ReplyBody, frozen=True, kw_only=True):
    """The latest run of this life of the server: its number (0: there was none), and `end`, why it is over."""

    number: int
    running: bool
    end: str
    most_bytes: int
    """That it moves; what is copied in vain counts."""
    moved_bytes: int
    moved_chunks: int
    share: float
    """Of the cluster's room that is in use: where all segments go to."""
    to_move_bytes: int
    """That a run begun now would move at most."""
    segments: list[SegmentFill]


class KindSwitch(msgspec.Struct, frozen=True, kw_only=True):
    """Whether documents of a kind, of a model, are reused (`router.shadow.gate`). `off`: why not; empty: they are.
    `at`: since when, Unix seconds. `number`: how often that was changed."""

    model: str
    kind: str
    number: int = 0
    off: str = ""
    at: float = 0.0

    @property
    def order(self) -> tuple[int, bool]:
        """Of two about one kind the greater is right: the later one, of two at once the one that is off."""
        return self.number, bool(self.off)


class BlendSwitchesRequest(RequestBody, frozen=True, kw_only=True):
    """What a router knows of kinds that were ever turned; nothing if it has just begun. Since BLEND_SWITCHES."""

    switches: list[KindSwitch]


class BlendSwitchesReply(ReplyBody, frozen=True, kw_only=True):
    """What is right of all kinds that any router told of, written down."""

    switches: list[KindSwitch]


def latest_switches(said: Iterable[KindSwitch]) -> list[KindSwitch]:
    """Of each kind what is right, in the order of their names."""
    right: dict[tuple[str, str], KindSwitch] = {}
    for one in said:
        before = right.setdefault((one.model, one.kind), one)
        right[one.model, one.kind] = max(before, one, key=lambda switch: switch.order)
    return [one for _, one in sorted(right.items())]
