"""The table of the metadata server's calls. Client, dispatch, routes, OpenAPI and metric labels are made from it.

A new call is: its messages, a method of the state, a row here with its bounds, and a typed method of the client. The
event stream and what only operators ask (`/health`, `/metrics`, replay, snapshot) are not calls: see `app`, `openapi`.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from metadata_server import account_messages as ac
from metadata_server import cache_messages as c
from metadata_server import messages as m
from metadata_server.bounds import (
    MAX_GENERATION,
    MAX_WAIT_SECONDS,
    check_import,
    check_incarnation,
    check_items,
    check_keep,
    check_keys,
    check_lengths,
    check_move,
    check_name,
    check_orphans,
    check_owner,
    check_quarantine,
    check_rebalance,
    check_register,
    check_release,
    check_renew,
    check_seconds,
    check_switches,
    check_tell_holdings,
    require,
)

if TYPE_CHECKING:  # clients know the table without the server's code
    from metadata_server.core import MetadataCore

Req = TypeVar("Req")
Rep = TypeVar("Rep", bound=msgspec.Struct)


def _check_node(request: m.FromNode | c.NodeOrderRequest) -> None:
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")


def _check_match(request: m.MatchRequest) -> None:
    check_keys(request.keys)
    check_seconds(request.lease_s, "lease_s", zero=True)
    check_name(request.node_id, "node_id", empty=True)
    check_incarnation(request.incarnation, "incarnation")
    if isinstance(request.lease_name, int):
        require(0 < request.lease_name < MAX_GENERATION, "lease_name", "out of range")
    check_owner(request.owner, "owner")


def _check_wait(request: m.WaitRequest) -> None:
    _check_match(request)
    require(request.more_than >= 0, "more_than", "negative")
    check_seconds(request.timeout_s, "timeout_s", zero=True, most=MAX_WAIT_SECONDS)


def _check_reserve(request: m.ReserveRequest) -> None:
    check_name(request.node_id, "node_id")
    check_incarnation(request.incarnation, "incarnation")
    check_seconds(request.ttl_s, "ttl_s")
    check_name(request.prefer_segment or "", "prefer_segment", empty=True)
    check_owner(request.owner, "owner")
    if isinstance(request.write_name, int):
        require(0 < request.write_name < MAX_GENERATION, "write_name", "out of range")
    check_keys([item.key for item in request.items], "items", ".key")
    check_lengths([item.length for item in request.items], "items")


def _check_replica_ids(request: m.ReplicaIds) -> None:
    _check_node(request)
    check_items(request.replica_ids, "replica_ids")


def _check_only_keys(request: m.FindHoldersRequest | c.UnpinRequest | c.EvictRequest) -> None:
    check_keys(request.keys)


@dataclass(frozen=True, slots=True)
class EndpointSpec(Generic[Req, Rep]):
    """One call: a request goes in, a reply comes out; both are bodies."""

    path: str
    request: type[Req] | None
    """None: a GET without a body."""
    reply: type[Rep]
    handler: Callable[["MetadataCore"], Callable[[Req, float], Rep | Awaitable[Rep] | None]]
    """The method that answers at a time `now`; a reply of None stands for `Nothing`."""
    summary: str
    check: Callable[[Req], None] = lambda _: None
    """Raises MetadataProtocolError for a request out of bounds."""
    waits: bool = False
    """A long poll: its handler is async and ends when its client leaves."""
    durable: bool = False
    """Answered once it is written down: its handler is async."""
    about: Callable[[Req], str] | None = None
    """Of an operator's order: what it is about, for the line that it leaves in the log."""
    outcome: Callable[[Rep], str] = lambda _: "ok"
    """What came of it, for the same."""
    in_turn: bool = False
    """Large bodies of such calls are looked at one at a time, and other calls between any two."""
    statuses: tuple[int, ...] = (400, 413, 415, 503)
    """Of its errors."""


REGISTER = EndpointSpec(
    "/v1/nodes/register",
    m.RegisterRequest,
    m.RegisterReply,
    lambda core: core.register,
    "Join, or join again with manifests",
    check_register,
    in_turn=True,
    statuses=(400, 409, 413, 415, 503),
)
IMPORT = EndpointSpec(
    "/v1/segments/import_piece",
    ac.ImportRequest,
    ac.ImportReply,
    lambda core: core.state.import_piece,
    "Say what lies in a segment, piece by piece",
    check_import,
    in_turn=True,
)
HEARTBEAT = EndpointSpec(
    "/v1/nodes/heartbeat",
    m.HeartbeatRequest,
    m.HeartbeatReply,
    lambda core: core.state.heartbeat,
    "Renew a node's lease",
    _check_node,
)
LEAVE = EndpointSpec(
    "/v1/nodes/leave", m.LeaveRequest, m.Nothing, lambda core: core.state.leave, "Leave in good order", _check_node
)
RELEASE_WRITER = EndpointSpec(
    "/v1/nodes/release_writer",
    c.ReleaseWriterRequest,
    m.Nothing,
    lambda core: core.state.release_writer,
    "Give back what a node's dead engine held",
    _check_node,
)
ORDER_NODE = EndpointSpec(
    "/v1/nodes/order_node",
    c.NodeOrderRequest,
    c.NodeOrderReply,
    lambda core: core.orders.order,
    "Drain a node, undrain or remove it",
    _check_node,
    durable=True,
    about=lambda request: f"{request.action} {request.node_id}",
    outcome=lambda reply: "refused" if reply.refused else "ok",
)
MOVE_CHUNKS = EndpointSpec(
    "/v1/objects/move_chunks",
    c.MoveChunksRequest,
    c.MoveChunksReply,
    lambda core: core.state.moves.next,
    "Which chunks of a drained node to copy next, and where to",
    check_move,
)
MATCH = EndpointSpec(
    "/v1/objects/match", m.MatchRequest, m.MatchReply, lambda core: core.match, "Longest complete prefix", _check_match
)
WAIT = EndpointSpec(
    "/v1/objects/wait",
    m.WaitRequest,
    m.MatchReply,
    lambda core: core.wait,
    "Longest complete prefix, once it has grown",
    _check_wait,
    waits=True,
)
RESERVE = EndpointSpec(
    "/v1/objects/reserve",
    m.ReserveRequest,
    m.ReserveReply,
    lambda core: core.floods.paced(core.state.reserve),
    "Room for chunks to be written",
    _check_reserve,
)
COMMIT = EndpointSpec(
    "/v1/objects/commit",
    m.ReplicaIds,
    m.CommitReply,
    lambda core: core.state.commit,
    "Make written chunks visible",
    _check_replica_ids,
)
ABORT = EndpointSpec(
    "/v1/objects/abort",
    m.ReplicaIds,
    m.Nothing,
    lambda core: core.state.abort,
    "Give reservations back",
    _check_replica_ids,
)
QUARANTINE = EndpointSpec(
    "/v1/objects/quarantine",
    m.QuarantineRequest,
    m.Nothing,
    lambda core: core.state.quarantine,
    "Drop replicas that failed verification",
    check_quarantine,
)
RELEASE = EndpointSpec(
    "/v1/leases/release", c.ReleaseRequest, m.Nothing, lambda core: core.release, "End read leases", check_release
)
RENEW = EndpointSpec(
    "/v1/leases/renew",
    c.RenewRequest,
    c.RenewReply,
    lambda core: core.state.renew,
    "Extend read leases under which bytes move",
    check_renew,
)
TELL_HOLDINGS = EndpointSpec(
    "/v1/tiers/tell_holdings",
    m.TellHoldingsRequest,
    m.TellHoldingsReply,
    lambda core: core.state.tell_holdings,
    "Say what came to a node's disk, and what left it",
    check_tell_holdings,
)
FIND_HOLDERS = EndpointSpec(
    "/v1/tiers/find_holders",
    m.FindHoldersRequest,
    m.FindHoldersReply,
    lambda core: core.state.find_holders,
    "Who has chunks on disk",
    _check_only_keys,
)
PIN = EndpointSpec(
    "/v1/cache/pin",
    c.PinRequest,
    c.CacheReply,
    lambda core: core.pin,
    "Keep chunks from eviction",
    check_keep,
    durable=True,
)
UNPIN = EndpointSpec(
    "/v1/cache/unpin", c.UnpinRequest, c.CacheReply, lambda core: core.unpin, "End pins", _check_only_keys, durable=True
)
EVICT = EndpointSpec(
    "/v1/cache/evict",
    c.EvictRequest,
    c.CacheReply,
    lambda core: core.state.evict,
    "Forget chunks that nobody reads now",
    _check_only_keys,
)
EXPIRE = EndpointSpec(
    "/v1/cache/expire", c.ExpireRequest, c.CacheReply, lambda core: core.state.expire, "Forget chunks later", check_keep
)
PINS = EndpointSpec("/v1/cache/pins", None, c.PinsReply, lambda core: core.state.pins, "What is pinned")
REBALANCE = EndpointSpec(
    "/v1/nodes/rebalance",
    c.RebalanceRequest,
    c.RebalanceReply,
    lambda core: core.state.moves.order,
    "Even out how full segments are",
    check_rebalance,
    about=lambda request: f"{request.action} {request.most_bytes or ''}".rstrip(),
)
REBALANCING = EndpointSpec(
    "/v1/nodes/rebalancing", None, c.RebalanceReply, lambda core: core.state.moves.look, "How full segments are"
)
ORPHANS = EndpointSpec(
    "/v1/janitor/orphans",
    ac.OrphansRequest,
    ac.OrphansReply,
    lambda core: core.janitor.look,
    "What is orphaned",
    check_orphans,
    durable=True,
)
REMOVE_ORPHANS = EndpointSpec(
    "/v1/janitor/remove_orphans",
    ac.RemoveOrphansRequest,
    ac.RemoveOrphansReply,
    lambda core: core.janitor.remove,
    "Remove what is orphaned still",
    check_orphans,
    durable=True,
    about=lambda request: f"{len(request.ids)} {request.kind}",
    outcome=lambda reply: "unknown" if reply.unknown else f"{len(reply.removed)} removed",
)
NODE_ORDERS = EndpointSpec(
    "/v1/nodes/node_orders", None, c.NodeOrdersReply, lambda core: core.orders.listed, "Which are drained or removed"
)
BLEND_SWITCHES = EndpointSpec(
    "/v1/cache/blend_switches",
    c.BlendSwitchesRequest,
    c.BlendSwitchesReply,
    lambda core: core.switches.told,
    "Whether documents of a kind are reused",
    check_switches,
    durable=True,
)
NODES = EndpointSpec("/v1/nodes", None, m.NodesReply, lambda core: core.nodes, "Live nodes and segments")
STATS = EndpointSpec("/v1/stats", None, ac.Stats, lambda core: core.stats, "What is held, and counters")

ENDPOINTS: tuple[EndpointSpec[Any, Any], ...] = (
    REGISTER,
    IMPORT,
    HEARTBEAT,
    LEAVE,
    RELEASE_WRITER,
    ORDER_NODE,
    MOVE_CHUNKS,
    MATCH,
    WAIT,
    RESERVE,
    COMMIT,
    ABORT,
    QUARANTINE,
    RELEASE,
    RENEW,
    TELL_HOLDINGS,
    FIND_HOLDERS,
    PIN,
    UNPIN,
    EVICT,
    EXPIRE,
    PINS,
    NODE_ORDERS,
    REBALANCE,
    REBALANCING,
    ORPHANS,
    REMOVE_ORPHANS,
    BLEND_SWITCHES,
    NODES,
    STATS,
)
