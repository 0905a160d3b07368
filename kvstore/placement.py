"""Where chunks lie and may be put: the metadata server as the store sees it, with its failures turned into values.

Owns nothing but whether the server has said its version. Invariant: no method raises a KVFerryError; what the server
could not say is "nothing", and counted.
Answers are checked against the question: a replica of another key or length is dropped here.
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import StoreConfig
from kvcore.errors import KVFerryError, MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import ChunkKey, OwnerTag, ReplicaRef, Segment
from kvstore.background import Background
from kvstore.counters import Count, StoreCounters
from kvstore.give_back import GiveBack
from kvstore.leases import ReaderLeases
from kvstore.limits import StoreLimits
from kvstore.types import Match
from metadata_server.cache_messages import ReleaseRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import (
    FORGERIES,
    IN_ORDER,
    NAMED_WRITES,
    ONLY_PREFERRED,
    OWNERS,
    MatchReply,
    MatchRequest,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
    ReplicaIds,
    ReserveItem,
    ReserveReply,
    ReserveRequest,
    ReserveStatus,
    WaitRequest,
)

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Reserved:
    """What a reserve gave. Writes into `granted` must have ended at `write_by` (Clock.now). `answered` False: nothing,
    as the server was away."""

    granted: Mapping[ChunkKey, ReplicaRef] = field(default_factory=dict)
    complete: frozenset[ChunkKey] = frozenset()
    segments: Mapping[str, Segment] = field(default_factory=dict)
    write_by: float = 0.0
    answered: bool = True
    writers: Mapping[ChunkKey, tuple[str, ...]] = field(default_factory=dict)
    """Keys that were being written already, granted or not -> by which nodes, as in a Match."""
    full: bool = False
    """There was no room for any of the keys that nobody has or is writing."""
    owner: OwnerTag | None = None
    """Whose they are, if known."""


class Placement:
    """The calls of one node's writer and readers. Close it with `aclose`, or its owner's `background`."""

    def __init__(
        self,
        metadata: MetadataClient,
        *,
        node_id: str,
        incarnation: int,
        clock: Clock,
        config: StoreConfig,
        counters: StoreCounters | None = None,
        background: Background | None = None,
        limits: StoreLimits = StoreLimits(),
    ) -> None:
        """`counters` and `background` are a KVStore's; without them it has its own, as one that moves no bytes does."""
        self._metadata = metadata
        self._node_id = node_id
        self._incarnation = incarnation
        self._clock = clock
        self._config = config
        self._counters = counters or StoreCounters()
        self._background = background or Background(limits.max_background_tasks)
        self._limits = limits
        self._greeted = self._refused = False
        self._greeting: asyncio.Task[bool] | None = None
        self._give_back = GiveBack(
            metadata,
            node_id=node_id,
            incarnation=incarnation,
            counters=self._counters,
            background=self._background,
            limits=limits,
        )
        self._leases = ReaderLeases(
            metadata,
            node_id=node_id,
            incarnation=incarnation,
            lease_s=config.read_lease_s,
            clock=clock,
            counters=self._counters,
            background=self._background,
            give_back=self._give_back,
            limits=limits,
        )

    def __repr__(self) -> str:
        return f"<Placement of {self._node_id} incarnation {self._incarnation}, {self._metadata}>"

    async def match(
        self,
        keys: Sequence[ChunkKey],
        timeout_s: float,
        *,
        in_order: bool = True,
        leased: bool = True,
        owner: OwnerTag | None = None,
    ) -> Match:
        """Longest complete prefix; `leased`: it is to be read. `in_order`: each key continues the one before it. A
        call that is cancelled, or whose reply does not come, leaves no lease behind. `owner`: whose prompt it is."""
        if not await self._knows_version():
            return Match()
        reader = self._leases.reader(leased=leased, owner=owner)
        request = MatchRequest(keys=list(keys), in_order=self._said(in_order), **reader)
        asking = self._match(request, timeout_s)
        return await (self._background.finish(asking, self.release) if leased else asking)

    async def _match(self, request: MatchRequest, timeout_s: float) -> Match:
        call = self._leases.seen(request.lease_name, self._metadata.match(request, timeout_s=timeout_s))
        return self._matched(request.keys, await self._value(call))

    async def wait(
        self,
        keys: Sequence[ChunkKey],
        more_than: int,
        timeout_s: float,
        *,
        leased: bool = True,
        owner: OwnerTag | None = None,
    ) -> Match:
        """As match, once there is more or time is up, at most `limits.longest_wait_s`."""
        if not await self._knows_version():
            return Match()
        wait_s = min(max(0.0, timeout_s), self._limits.longest_wait_s)
        reader = self._leases.reader(leased=leased, owner=owner)
        asked = {"keys": list(keys), "in_order": self._said(True), **reader}
        request = WaitRequest(more_than=more_than, timeout_s=wait_s, **asked)
        call = self._leases.seen(request.lease_name, self._metadata.wait(request))
        return self._matched(keys, await self._value(call))

    def renewing(self, match: Match) -> AbstractContextManager[None]:
        """Bytes of the match move inside of the context: its lease does not run out meanwhile."""
        return self._leases.renewing(match.lease)

    async def release(self, match: Match) -> None:
        """Give the lease back. Server away: tried again in the background for a minute, then left to expire."""
        if match.lease is not None:
            request = ReleaseRequest(lease_ids=[match.lease.id])
            if await self._value(self._done(self._metadata.release(request))) is None:
                self._leases.give_back(match.lease)

    def release_soon(self, match: Match) -> None:
        """As `release`, without waiting for it."""
        self._leases.give_back(match.lease)

    async def reserve(
        self,
        lengths: Mapping[ChunkKey, int],
        prefer_segment: str | None,
        timeout_s: float,
        *,
        ttl_s: float | None = None,
        only_preferred: bool = False,
        in_order: bool = True,
        owner: OwnerTag | None = None,
    ) -> Reserved:
        """Room for one chunk a key, of so many bytes (header included), in this order; for `ttl_s` (default: the
        configuration's). `only_preferred`: nowhere else; none at all from a server that does not know this. A call that
        is cancelled, or whose reply does not come, leaves no reservation behind. `in_order` as in `match`. `owner`:
        whose they are, if known."""
        if not await self._knows_version() or (only_preferred and self._metadata.protocol < ONLY_PREFERRED):
            return Reserved(answered=False)
        ttl_s = self._config.reserve_ttl_s if ttl_s is None else ttl_s
        request = ReserveRequest(
            node_id=self._node_id,
            incarnation=self._incarnation,
            items=[ReserveItem(key=key, length=length) for key, length in lengths.items()],
            prefer_segment=prefer_segment,
            ttl_s=ttl_s,
            only_preferred=only_preferred or msgspec.UNSET,
            in_order=self._said(in_order),
            owner=owner if owner is not None and self._metadata.protocol >= OWNERS else msgspec.UNSET,
            write_name=self._leases.name() if self._metadata.protocol >= NAMED_WRITES else msgspec.UNSET,
        )
        reserved = await self._background.finish(self._reserve(lengths, request, timeout_s), self.give_back)
        return replace(reserved, owner=owner)

    async def give_back(self, reserved: Reserved) -> None:
        """Abort all that was granted. The work survives the caller's cancellation."""
        ids = [replica.id for replica in reserved.granted.values()]
        await asyncio.shield(self._background.spawn(self.abort(ids)))

    async def aclose(self, timeout_s: float) -> None:
        """End give-backs and reports under way, after `timeout_s` by cancellation. Idempotent."""
        await self._background.aclose(timeout_s)

    async def _reserve(self, lengths: Mapping[ChunkKey, int], request: ReserveRequest, timeout_s: float) -> Reserved:
        write_by = self._clock.now() + self._limits.writable_share * request.ttl_s
        call = self._leases.seen(request.write_name, self._metadata.reserve(request, timeout_s=timeout_s))
        reply = await self._value(call)
        return Reserved(answered=False) if reply is None else self._reserved(lengths, reply, write_by)

    async def commit(self, replica_ids: Sequence[int], timeout_s: float) -> list[bool] | None:
        """One answer an id; None: not known, ask again."""
        reply = await self._value(self._metadata.commit(self._ids(replica_ids), timeout_s=timeout_s))
        if reply is None:
            return None
        if len(reply.committed) != len(replica_ids):
            self._failed(MetadataProtocolError(f"{len(reply.committed)} answers to {len(replica_ids)} commits"))
            return None
        if refused := reply.committed.count(False):
            why = ", ".join(sorted({refusal for refusal in reply.refusals if refusal}))
            log_fields(_log, logging.INFO, "commit_refused", chunks=refused, why=why)
        return reply.committed

    async def abort(self, replica_ids: Sequence[int]) -> None:
        """Give reservations back. Server away: tried again in the background for a minute, then left to expire."""
        if replica_ids and await self._value(self._done(self._metadata.abort(self._ids(replica_ids)))) is None:
            self._give_back.reservations(replica_ids)

    async def quarantine(self, items: Sequence[QuarantineItem]) -> None:
        """Report replicas that were wrong; if the server is away the next reader will."""
        if self._metadata.protocol < FORGERIES:
            items = [_as_damaged(item) for item in items]
        request = QuarantineRequest(items=list(items))
        if await self._value(self._done(self._metadata.quarantine(request))) is None:
            self._counters.add(Count.REPORTS_DROPPED, len(items))

    def _matched(self, keys: Sequence[ChunkKey], reply: MatchReply | None) -> Match:
        self._counters.add(Count.MATCHES)
        if reply is None:
            return Match()
        replicas: list[tuple[ReplicaRef, ...]] = []
        lease = self._leases.granted(reply.lease_id)
        segments = {segment.id: segment for segment in reply.segments}
        for key, found in zip(keys, reply.replicas, strict=False):
            right = tuple(replica for replica in found if replica.key == key and replica.segment_id in segments)
            if not right:
                break
            replicas.append(right)
        self._counters.add(Count.MATCHED_CHUNKS, len(replicas))
        if len(replicas) < len(reply.replicas):
            return Match(tuple(replicas), lease, segments)
        return Match(tuple(replicas), lease, segments, tuple(reply.writers), reply.num_writing)

    def _reserved(self, lengths: Mapping[ChunkKey, int], reply: ReserveReply, write_by: float) -> Reserved:
        segments = {segment.id: segment for segment in reply.segments}
        granted: dict[ChunkKey, ReplicaRef] = {}
        complete: set[ChunkKey] = set()
        writers: dict[ChunkKey, tuple[str, ...]] = {}
        for (key, length), outcome in zip(lengths.items(), reply.outcomes, strict=False):
            replica = outcome.replica
            if outcome.writers:
                writers[key] = tuple(outcome.writers)
            match outcome.status:
                case ReserveStatus.GRANTED:
                    if replica and (replica.key, replica.length) == (key, length) and replica.segment_id in segments:
                        granted[key] = replica
                    else:
                        self._failed(MetadataProtocolError(f"granted {replica}, asked for {length} bytes"))
                case ReserveStatus.EXISTS:
                    complete.add(key)
                    self._counters.add(Count.CHUNKS_EXISTED)
                case ReserveStatus.BUSY:
                    self._counters.add(Count.DECLINED_BUSY)
                case ReserveStatus.FULL | ReserveStatus.UNKNOWN:
                    self._counters.add(Count.DECLINED_FULL)
        statuses = {outcome.status for outcome in reply.outcomes}
        full = ReserveStatus.FULL in statuses and statuses <= {ReserveStatus.FULL, ReserveStatus.EXISTS}
        return Reserved(granted, frozenset(complete), segments, write_by, writers=writers, full=full)

    def _said(self, in_order: bool) -> bool | msgspec.UnsetType:
        """The field of that name: not for a server that is older than it."""
        return True if in_order and self._metadata.protocol >= IN_ORDER else msgspec.UNSET

    async def _knows_version(self) -> bool:
        """Whether the server has said what it speaks; False: it is away. Before that nothing is asked that it would
        keep for us: what it grants after it has hung can be given back by its name only, which not every server knows.
        Who comes first asks, and others wait with it."""
        if self._greeted or (self._metadata.protocol > 1 and not self._refused):
            return True
        if self._greeting is None and not self._background.full:
            self._greeting = self._background.spawn(self._greet())
        return self._greeting is not None and await asyncio.shield(self._greeting)

    async def _greet(self) -> bool:
        """Learn what the server speaks, if no registration has told: an engine's client makes none."""
        try:
            await self._metadata.greet()
        except MetadataUnavailableError as error:  # the next call's turn
            self._failed(error)
            return False
        except MetadataProtocolError:  # what it speaks is no matter of ours: it may still answer the first version
            return True
        finally:
            self._greeting = None
        self._greeted, self._refused = True, False
        return True

    def _ids(self, replica_ids: Sequence[int]) -> ReplicaIds:
        return ReplicaIds(node_id=self._node_id, incarnation=self._incarnation, replica_ids=list(replica_ids))

    async def _done(self, call: Awaitable[None]) -> bool:
        await call
        return True

    async def _value(self, call: Awaitable[_T]) -> _T | None:
        try:
            return await call
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            self._failed(error)
            return None

    def _failed(self, error: KVFerryError) -> None:
        if isinstance(error, MetadataProtocolError):
            self._greeted, self._refused = False, True  # it may be an older one now
            self._counters.add(Count.METADATA_PROTOCOL)
            log_fields(_log, logging.ERROR, "metadata_protocol", error=error.message)
        else:
            self._counters.add(Count.METADATA_UNAVAILABLE)


def _as_damaged(item: QuarantineItem) -> QuarantineItem:
    """In the words of a server of before FORGERIES."""
    forged = item.reason in (QuarantineReason.FORGED, QuarantineReason.UNPROVEN)
    return msgspec.structs.replace(item, reason=QuarantineReason.CHECKSUM) if forged else item
