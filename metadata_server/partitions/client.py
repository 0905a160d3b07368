"""Several metadata servers as if they were one: each call is split, asked of all partitions at the same time, merged.

Owns what is to be given back to partitions behind the callers' backs. A partition that is away is a miss for its own
keys, and has a breaker of its own: nobody else waits for it or fails by it. Each is asked once for its set before
anything else is asked of it, so that a program with another cluster file does nothing.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvcore.partitions import Partitions
from metadata_server import endpoints
from metadata_server.cache_messages import ReleaseRequest
from metadata_server.client import MetadataClient, MetadataTransport
from metadata_server.endpoints import EndpointSpec, Rep, Req
from metadata_server.limits import ClientLimits
from metadata_server.messages import (
    NAMED_WRITES,
    OWNED_LEASES,
    PARTITIONS,
    MatchReply,
    MatchRequest,
    ReplicaIds,
    ReserveRequest,
    TellHoldingsRequest,
    WaitRequest,
)
from metadata_server.partitions.merging import leases_beyond
from metadata_server.partitions.rules import RULES
from metadata_server.partitions.splitting import Piece


class PartitionedMetadataClient(MetadataClient):
    """See MetadataClient. Its typed calls are all made by `_call`, and `wait` by several of them."""

    def __init__(
        self, parts: Sequence[MetadataClient], whole: Partitions, clock: Clock, limits: ClientLimits = ClientLimits()
    ) -> None:
        """One client a partition, in the order of the set; they are closed with this one."""
        super().__init__(_Parts(parts), clock, 0.0, limits=limits)
        self.parts = tuple(parts)
        self._whole = whole
        self._behind = set[int]()
        """Partitions that were not there when holdings were told last."""
        self._background = set[asyncio.Task[None]]()

    def __repr__(self) -> str:
        each = ", ".join(f"{name} {part}" for name, part in zip(self._whole.names, self.parts, strict=True))
        return f"<PartitionedMetadataClient {each}>"

    @property
    def protocol(self) -> int:
        """What all partitions speak that have said so."""
        return min((part.protocol for part in self.parts if part.protocol >= PARTITIONS), default=PARTITIONS)

    @property
    def available(self) -> bool:
        """Whether any partition would be tried now."""
        return any(part.available for part in self.parts)

    async def wait(self, request: WaitRequest, *, timeout_s: float | None = None) -> MatchReply:
        """As of one server, but for a further round trip at its end."""
        # Each partition that has keys among the first `more_than + 1` waits until it has all of these; a lookup follows
        # whose answer is of one time for all, and whose leases nobody has had to hold meanwhile. One that is away ends
        # the wait: the prefix cannot grow beyond its first key.
        wanted = request.keys[: request.more_than + 1]
        waits = [
            self._until(piece, request.timeout_s, timeout_s)
            for piece in RULES[endpoints.MATCH.path].split(
                MatchRequest(**{**_asked(request), "keys": wanted, "lease_s": 0.0, "lease_name": msgspec.UNSET}),
                self._whole,
            )
        ]
        tasks = [asyncio.ensure_future(wait) for wait in waits]  # the first one that fails ends them all
        try:
            if tasks:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception) and not isinstance(error, MetadataUnavailableError):
                raise error
        return await self.match(MatchRequest(**_asked(request)), timeout_s=timeout_s)

    async def _until(self, piece: Piece[MatchRequest], wait_s: float, timeout_s: float | None) -> None:
        asked = piece.request
        request = WaitRequest(**_asked(asked), more_than=len(asked.keys) - 1, timeout_s=wait_s)
        await self._greet(piece.number, timeout_s)
        part = self.parts[piece.number]
        reply = await part.wait(_for_version(request, part.protocol), timeout_s=timeout_s)
        if len(reply.replicas) < len(asked.keys):  # time is up, or too many wait there: so it is for the others
            raise MetadataUnavailableError("the wait has ended")

    async def aclose(self) -> None:
        """Close all partitions' clients. What is being given back expires."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await super().aclose()

    async def _call(
        self, endpoint: EndpointSpec[Req, Rep], request: Req, timeout_s: float | None, *, poll_s: float = 0.0
    ) -> Rep:
        rule = RULES[endpoint.path]
        pieces = rule.split(request, self._whole) or [Piece(0, request)]
        asking = [self._ask(piece.number, endpoint, piece.request, timeout_s, poll_s) for piece in pieces]
        if len(asking) == 1:  # no task for the one
            answers: list[Any] = [await asking[0]]
        else:
            answers = await asyncio.gather(*asking, return_exceptions=True)
        failures = [answer for answer in answers if isinstance(answer, BaseException)]
        replies = [None if isinstance(answer, BaseException) else answer for answer in answers]
        for failure in failures:
            if not isinstance(failure, MetadataUnavailableError) or rule.all_or_none or len(failures) == len(pieces):
                self._undo(request, pieces, replies)
                raise failure
        merged: Rep = rule.merge(request, pieces, replies)
        if isinstance(request, MatchRequest) and isinstance(merged, MatchReply) and request.lease_s > 0:
            self._give_back(request, len(merged.replicas), pieces, replies)
        if isinstance(request, ReserveRequest) and request.write_name:
            for piece in [piece for piece, reply in zip(pieces, replies, strict=True) if reply is None]:
                self._release_soon(piece.number, ReleaseRequest(lease_ids=[], lease_names=[request.write_name]))
        if isinstance(request, TellHoldingsRequest) and not self._all_told(request, pieces, replies):
            return msgspec.structs.replace(merged, known=False)
        return merged

    async def _ask(
        self, number: int, endpoint: EndpointSpec[Req, Rep], request: Req, timeout_s: float | None, poll_s: float
    ) -> Rep:
        if endpoint is not endpoints.NODES:
            await self._greet(number, timeout_s)
            request = _for_version(request, self.parts[number].protocol)
            return await self.parts[number]._call(endpoint, request, timeout_s, poll_s=poll_s)
        return await self.parts[number].nodes(timeout_s=timeout_s)  # type: ignore[return-value]  # it is of NODES

    async def _greet(self, number: int, timeout_s: float | None) -> None:
        """Before anything else is asked: is it a partition of our set, and the one that we take it for?"""
        if self.parts[number].protocol < PARTITIONS:
            await self.parts[number].greet(timeout_s=timeout_s)

    async def greet(self, *, timeout_s: float | None = None) -> None:
        """Each partition by itself, in the time of a call that a request waits for."""
        greetings = (part.greet(timeout_s=timeout_s) for part in self.parts)
        failures = [failure for failure in await asyncio.gather(*greetings, return_exceptions=True) if failure]
        for failure in failures:  # one that is away is greeted when it is asked, and is a miss until then
            if not isinstance(failure, MetadataUnavailableError) or len(failures) == len(self.parts):
                raise failure

    def _greeted(self, reply: Any) -> Any:
        return reply  # each partition's client has looked at its own

    def _all_told(self, request: TellHoldingsRequest, pieces: Sequence[Piece[Any]], replies: Sequence[Any]) -> bool:
        """False: one that missed what was told before is back, and has to be told all."""
        missed = {piece.number for piece, reply in zip(pieces, replies, strict=True) if reply is None}
        back, self._behind = self._behind - missed, missed
        return request.reset or not back

    # --- what is to be given back ------------------------------------------------------------------------------------

    def _undo(self, request: object, pieces: Sequence[Piece[Any]], replies: Sequence[Any]) -> None:
        """The call fails as a whole: nobody will use or give back what those granted that answered."""
        if isinstance(request, MatchRequest):
            for lease_id in leases_beyond(0, pieces, replies):
                self._release_soon(lease_id % len(self.parts), ReleaseRequest(lease_ids=[lease_id]))
        elif isinstance(request, ReserveRequest):
            for piece, reply in zip(pieces, replies, strict=True):
                outcomes = reply.outcomes if reply is not None else ()
                if granted := [one.replica.id for one in outcomes if one.replica is not None]:
                    ids = ReplicaIds(node_id=request.node_id, incarnation=request.incarnation, replica_ids=granted)
                    self._give_back_soon(partial(self.parts[piece.number].abort, ids))

    def _give_back(
        self, request: MatchRequest, found: int, pieces: Sequence[Piece[Any]], replies: Sequence[MatchReply | None]
    ) -> None:
        """Leases that hold nothing of the prefix of `found` chunks; and by its name one whose answer did not come: the
        caller takes the call for answered."""
        for lease_id in leases_beyond(found, pieces, replies):
            self._release_soon(lease_id % len(self.parts), ReleaseRequest(lease_ids=[lease_id]))
        for piece, reply in zip(pieces, replies, strict=True):
            if reply is None and request.lease_name:
                self._release_soon(piece.number, ReleaseRequest(lease_ids=[], lease_names=[request.lease_name]))

    def _release_soon(self, number: int, request: ReleaseRequest) -> None:
        self._give_back_soon(partial(self.parts[number].release, request))

    def _give_back_soon(self, call: Callable[[], Awaitable[None]]) -> None:
        if len(self._background) >= self._limits.max_give_backs:  # they expire
            return
        task = asyncio.ensure_future(self._try_to(call))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _try_to(self, call: Callable[[], Awaitable[None]]) -> None:
        for pause_s in self._limits.give_back_pauses_s:
            await asyncio.sleep(pause_s)
            try:
                await call()
            except (MetadataUnavailableError, MetadataProtocolError):
                continue
            return


class _Parts(MetadataTransport):
    """Closes the clients. Calls go through them, and never here."""

    def __init__(self, parts: Sequence[MetadataClient]) -> None:
        self._parts = parts

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        raise AssertionError(f"{path} is a partition's to be asked")

    async def aclose(self) -> None:
        for part in self._parts:
            await part.aclose()


def _asked(request: MatchRequest) -> dict[str, Any]:
    """What a lookup asks, without what makes it a wait."""
    return {name: getattr(request, name) for name in MatchRequest.__struct_fields__}


def _for_version(request: Req, protocol: int) -> Req:
    """The request as a partition takes it, of which others may be newer."""
    if isinstance(request, ReserveRequest) and protocol < NAMED_WRITES:
        return msgspec.structs.replace(request, write_name=msgspec.UNSET)
    if isinstance(request, MatchRequest) and protocol < OWNED_LEASES:
        return msgspec.structs.replace(request, owner=msgspec.UNSET)
    return request
