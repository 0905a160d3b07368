"""The metadata server as its callers see it: one typed method an endpoint over an injectable transport.

Owns deadlines and the pause after a failure; never retries (its callers know better what a lost answer means).
Every method raises MetadataUnavailableError (go on without the cache) or MetadataProtocolError (a bug on one side).
`metadata_server.subscription` follows the event stream.
"""

import asyncio
from collections.abc import Sequence
from typing import Protocol, TypeVar

import msgspec

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.partitions import Part
from kvcore.types import ChunkKey
from metadata_server import endpoints
from metadata_server.account_messages import (
    ImportReply,
    ImportRequest,
    OrphansReply,
    OrphansRequest,
    RemoveOrphansReply,
    RemoveOrphansRequest,
    Stats,
)
from metadata_server.cache_messages import (
    BlendSwitchesReply,
    BlendSwitchesRequest,
    CacheReply,
    EvictRequest,
    ExpireRequest,
    MoveChunksReply,
    MoveChunksRequest,
    NodeOrderReply,
    NodeOrderRequest,
    NodeOrdersReply,
    PinRequest,
    PinsReply,
    RebalanceReply,
    RebalanceRequest,
    ReleaseRequest,
    ReleaseWriterRequest,
    RenewReply,
    RenewRequest,
    UnpinRequest,
)
from metadata_server.calling.breaker import CallBreaker
from metadata_server.endpoints import EndpointSpec, Rep, Req
from metadata_server.limits import ClientLimits
from metadata_server.messages import (
    CommitReply,
    FindHoldersReply,
    FindHoldersRequest,
    HeartbeatReply,
    HeartbeatRequest,
    LeaveRequest,
    MatchReply,
    MatchRequest,
    NodesReply,
    QuarantineRequest,
    RegisterReply,
    RegisterRequest,
    ReplicaIds,
    ReserveReply,
    ReserveRequest,
    TellHoldingsReply,
    TellHoldingsRequest,
    WaitRequest,
)
from metadata_server.versions import SPOKEN, Protocols, TermReply, VersionedMessage, VersionedTermReply

_G = TypeVar("_G", bound=VersionedMessage)


class MetadataTransport(Protocol):
    """Carries one request body to the server and the answer back."""

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """Msgpack in, msgpack out; an empty body asks one of the GET endpoints.

        Raises MetadataUnavailableError (refused, late, broken off, 5xx) or MetadataProtocolError (4xx). Cancelling it
        leaves nothing open; whether the server acted is then unknown.
        """
        ...

    async def aclose(self) -> None:
        """Release connections. Idempotent."""
        ...


class MetadataClient:
    """Typed calls with a deadline each: `timeout_s`, which a call's own can only shorten, as callers who have much time
    for their bytes should not spend it on a server that hangs. Bound to one event loop; any number may be under way.

    What a dead or hanging server costs them is its `CallBreaker`'s.
    """

    def __init__(
        self,
        call: MetadataTransport,
        clock: Clock,
        timeout_s: float,
        *,
        speaks: Protocols = SPOKEN,
        limits: ClientLimits = ClientLimits(),
    ) -> None:
        self._transport = call
        self._clock = clock
        self._limits = limits
        self._breaker = CallBreaker(timeout_s, limits)
        self._num_waits = 0
        self._speaks = speaks
        self._protocol = 1
        self.parts: tuple[MetadataClient, ...] = (self,)
        """A client for each partition of the index: a node is known to each by itself."""
        self.token = 0
        """The greatest that an answer had: of the latest leader that we have heard of."""

    def __repr__(self) -> str:
        way = "available" if self.available else f"not tried for {self._breaker.left_s(self._clock.now()):.2f} s"
        return f"<MetadataClient protocol {self.protocol}, {way}>"

    @property
    def part(self) -> Part | None:
        """Which partition of the index it speaks to; None: the index is one server's."""
        return self._speaks.part

    @property
    def protocol(self) -> int:
        """The newest version that both sides speak, once `register` or `nodes` was answered; else the first. A field
        of a later version is sent to no server of an earlier one, which would refuse it."""
        return self._protocol

    @property
    def available(self) -> bool:
        """Whether a call now would be tried at all."""
        return not self._breaker.is_open(self._clock.now())

    async def register(self, request: RegisterRequest, *, timeout_s: float | None = None) -> RegisterReply:
        """Join, or join again with what lies in the segments. Raises NodeRefusedError if the server does not take this
        node in, MetadataProtocolError if the two have no version of the protocol in common."""
        return self._greeted(await self._call(endpoints.REGISTER, self._speaks.greet(request), timeout_s))

    async def heartbeat(self, request: HeartbeatRequest, *, timeout_s: float | None = None) -> HeartbeatReply:
        """Renew the node's lease. `known` false: register again, with manifests."""
        return await self._call(endpoints.HEARTBEAT, request, timeout_s)

    async def import_piece(self, request: ImportRequest, *, timeout_s: float | None = None) -> ImportReply:
        """Say what lies in a segment, piece by piece, as a registration's reply asked for it. Idempotent. Has a time of
        its own (`limits`) on top of the call's: after a restart of the server all nodes do this."""
        return await self._call(endpoints.IMPORT, request, timeout_s, poll_s=self._limits.piece_s)

    async def leave(self, request: LeaveRequest, *, timeout_s: float | None = None) -> None:
        """Drop the node and all that it holds at once. Idempotent."""
        await self._call(endpoints.LEAVE, request, timeout_s)

    async def release_writer(self, request: ReleaseWriterRequest, *, timeout_s: float | None = None) -> None:
        """Give back all that the node has reserved and leased: its engine has died. Idempotent; must be over before
        the next engine's first call."""
        await self._call(endpoints.RELEASE_WRITER, request, timeout_s)

    async def match(self, request: MatchRequest, *, timeout_s: float | None = None) -> MatchReply:
        """Longest complete prefix. A lease is to be given back by `release`."""
        return await self._call(endpoints.MATCH, request, timeout_s)

    async def wait(self, request: WaitRequest, *, timeout_s: float | None = None) -> MatchReply:
        """As match, once there is more or `request.timeout_s` is up; that time is added to the call's own deadline.
        With too many under way it is answered after a moment with what there is."""
        limits = self._limits
        if self._num_waits >= limits.max_waits:
            await asyncio.sleep(min(limits.wait_poll_s, request.timeout_s))
            asked = MatchRequest(
                keys=request.keys,
                lease_s=request.lease_s,
                node_id=request.node_id,
                incarnation=request.incarnation,
                in_order=request.in_order,
                lease_name=request.lease_name,
                owner=request.owner,
            )
            return await self.match(asked, timeout_s=timeout_s)
        self._num_waits += 1
        try:
            return await self._call(endpoints.WAIT, request, timeout_s, poll_s=request.timeout_s)
        finally:
            self._num_waits -= 1

    async def release(self, request: ReleaseRequest, *, timeout_s: float | None = None) -> None:
        """Give read leases back. Idempotent."""
        await self._call(endpoints.RELEASE, request, timeout_s)

    async def renew(self, request: RenewRequest, *, timeout_s: float | None = None) -> RenewReply:
        """Extend read leases under which bytes move. Idempotent; for servers whose `protocol` is NAMED_LEASES or
        later."""
        return await self._call(endpoints.RENEW, request, timeout_s)

    async def reserve(self, request: ReserveRequest, *, timeout_s: float | None = None) -> ReserveReply:
        """Room for chunks. Not idempotent: a lost answer's reservations expire by themselves."""
        return await self._call(endpoints.RESERVE, request, timeout_s)

    async def commit(self, request: ReplicaIds, *, timeout_s: float | None = None) -> CommitReply:
        """Make reserved replicas visible, each by itself. Idempotent for the same writer."""
        return await self._call(endpoints.COMMIT, request, timeout_s)

    async def abort(self, request: ReplicaIds, *, timeout_s: float | None = None) -> None:
        """Give reservations back. Idempotent."""
        await self._call(endpoints.ABORT, request, timeout_s)

    async def tell_holdings(self, request: TellHoldingsRequest, *, timeout_s: float | None = None) -> TellHoldingsReply:
        """Say what came to this node's disk, and what left it. Idempotent. Not known: register first, then say all."""
        return await self._call(endpoints.TELL_HOLDINGS, request, timeout_s)

    async def find_holders(self, request: FindHoldersRequest, *, timeout_s: float | None = None) -> FindHoldersReply:
        """Who has chunks on disk."""
        return await self._call(endpoints.FIND_HOLDERS, request, timeout_s)

    async def quarantine(self, request: QuarantineRequest, *, timeout_s: float | None = None) -> None:
        """Drop replicas that a reader refused, if they still are of that generation. Idempotent."""
        await self._call(endpoints.QUARANTINE, request, timeout_s)

    async def pin(
        self,
        keys: Sequence[ChunkKey],
        ttl_s: float | None = None,
        *,
        extend: bool = False,
        timeout_s: float | None = None,
    ) -> CacheReply:
        """Keep these chunks from eviction, in memory, for `ttl_s` or until `unpin`. Idempotent, as the next three are;
        for servers whose `protocol` is CACHE_CONTROL or later."""
        return await self._call(endpoints.PIN, PinRequest(keys=list(keys), ttl_s=ttl_s, extend=extend), timeout_s)

    async def unpin(self, keys: Sequence[ChunkKey], *, timeout_s: float | None = None) -> CacheReply:
        """End pins."""
        return await self._call(endpoints.UNPIN, UnpinRequest(keys=list(keys)), timeout_s)

    async def evict(self, keys: Sequence[ChunkKey], *, timeout_s: float | None = None) -> CacheReply:
        """Forget these chunks now, but for what is pinned or being read."""
        return await self._call(endpoints.EVICT, EvictRequest(keys=list(keys)), timeout_s)

    async def expire(self, keys: Sequence[ChunkKey], ttl_s: float, *, timeout_s: float | None = None) -> CacheReply:
        """Forget these chunks after `ttl_s`."""
        return await self._call(endpoints.EXPIRE, ExpireRequest(keys=list(keys), ttl_s=ttl_s), timeout_s)

    async def pins(self, *, timeout_s: float | None = None) -> PinsReply:
        """What is pinned."""
        return await self._call(endpoints.PINS, None, timeout_s)

    async def order_node(self, request: NodeOrderRequest, *, timeout_s: float | None = None) -> NodeOrderReply:
        """Drain a node, undrain or remove it. Idempotent, but for `undrain`, which says so the second time."""
        return await self._call(endpoints.ORDER_NODE, request, timeout_s)

    async def move_chunks(self, request: MoveChunksRequest, *, timeout_s: float | None = None) -> MoveChunksReply:
        """Which chunks of a drained node to copy next, with room for them. Not idempotent, as `reserve`."""
        return await self._call(endpoints.MOVE_CHUNKS, request, timeout_s)

    async def node_orders(self, *, timeout_s: float | None = None) -> NodeOrdersReply:
        """Which nodes are drained, and which were removed."""
        return await self._call(endpoints.NODE_ORDERS, None, timeout_s)

    async def rebalance(self, request: RebalanceRequest, *, timeout_s: float | None = None) -> RebalanceReply:
        """Begin to even segments out, or stop."""
        return await self._call(endpoints.REBALANCE, request, timeout_s)

    async def rebalancing(self, *, timeout_s: float | None = None) -> RebalanceReply:
        """How full segments are, and how evening them out goes."""
        return await self._call(endpoints.REBALANCING, None, timeout_s)

    async def orphans(self, request: OrphansRequest, *, timeout_s: float | None = None) -> OrphansReply:
        """What is orphaned."""
        return await self._call(endpoints.ORPHANS, request, timeout_s)

    async def remove_orphans(
        self, request: RemoveOrphansRequest, *, timeout_s: float | None = None
    ) -> RemoveOrphansReply:
        """Remove what is orphaned still. Idempotent."""
        return await self._call(endpoints.REMOVE_ORPHANS, request, timeout_s)

    async def blend_switches(
        self, request: BlendSwitchesRequest, *, timeout_s: float | None = None
    ) -> BlendSwitchesReply:
        """Tell whether documents of a kind are reused, and hear it. Idempotent."""
        return await self._call(endpoints.BLEND_SWITCHES, request, timeout_s)

    async def nodes(self, *, timeout_s: float | None = None) -> NodesReply:
        """Live nodes and their segments, with the addresses to reach them by."""
        return self._greeted(await self._call(endpoints.NODES, None, timeout_s))

    async def greet(self, *, timeout_s: float | None = None) -> None:
        """Learn which version the server speaks, in the time of a call that a request waits for, and no sooner."""
        if not self.available:
            raise MetadataUnavailableError("metadata server failed a moment ago; not tried again yet")
        await self.nodes(timeout_s=self._breaker.limit_s(endpoints.MATCH.path, 0, timeout_s))

    async def stats(self, *, timeout_s: float | None = None) -> Stats:
        """What the server holds now, and its counters."""
        return await self._call(endpoints.STATS, None, timeout_s)

    async def aclose(self) -> None:
        """Release the transport. Idempotent."""
        await self._transport.aclose()

    def _greeted(self, reply: _G) -> _G:
        self._protocol = self._speaks.common(reply.spoken, us="this client", them="the metadata server")
        return reply

    async def _call(
        self, endpoint: EndpointSpec[Req, Rep], request: Req, timeout_s: float | None, *, poll_s: float = 0.0
    ) -> Rep:
        body, path = b"" if request is None else msgspec.msgpack.encode(request), endpoint.path
        breaker, began = self._breaker, self._clock.now()
        limit_s = poll_s + breaker.limit_s(path, len(body), timeout_s)
        probing = breaker.enter(path, began, limit_s)
        try:
            call = self._transport.call(path, body, limit_s)
            reply = await (breaker.poll(call) if poll_s > 0.0 else call)
        except MetadataUnavailableError as error:
            now = self._clock.now()
            breaker.failed(error, now, limit_s, now - began)
            raise
        except MetadataProtocolError:  # it answers, so it is there
            breaker.answered(path, None)
            raise
        except asyncio.CancelledError:
            breaker.cancelled(self._clock.now(), probing)
            raise
        breaker.answered(path, self._clock.now() - began if poll_s == 0.0 else None)
        try:
            return self._of_this_term(msgspec.msgpack.decode(reply, type=endpoint.reply), endpoint.path)
        except msgspec.MsgspecError as error:
            raise MetadataProtocolError(f"metadata server's answer to {endpoint.path} is malformed: {error}") from error

    def _of_this_term(self, reply: Rep, path: str) -> Rep:
        """The reply, unless a leader gave it that was replaced since. Raises MetadataUnavailableError."""
        if isinstance(reply, TermReply | VersionedTermReply) and reply.token:
            if reply.token < self.token:
                raise MetadataUnavailableError(f"{path} was answered by a leader that was replaced since")
            self.token = reply.token
        return reply
