"""Keeps a node's lease at the metadata server: join, renew, join again when the server has forgotten us, leave.

`LeaseKeeper` decides, without I/O; `Membership` does it. An absent metadata server is never fatal here: the node
serves without the cache and keeps trying. Invariant: `run` has at most one call under way.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from kvcore.errors import MetadataProofError, MetadataProtocolError, MetadataUnavailableError
from kvcore.telemetry import log_fields
from kvcore.types import KVSpec, NodeInfo, Role, Segment
from kvnode.limits import NodeLimits
from kvnode.manifest_pieces import ManifestPieces, without_owners
from kvnode.partitions.slices import of_part
from kvnode.tasks import cancelled, spawned
from metadata_server.cache_messages import HUNG_WRITERS, ReleaseWriterRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import (
    IN_PIECES,
    HeartbeatReply,
    HeartbeatRequest,
    LeaveRequest,
    RegisterReply,
    RegisterRequest,
    SegmentManifest,
)

_JITTER = 0.1
_logger = logging.getLogger("kvnode")


class Step(StrEnum):
    """What to do next at the metadata server."""

    REGISTER = "register"
    HEARTBEAT = "heartbeat"


@dataclass(slots=True)
class LeaseKeeper:
    """What we know of our lease. `on_...` takes an answer in; `step` and `delay_s` say what comes next and when."""

    ttl_s: float
    first_backoff_s: float
    epoch: str | None = None
    """Of the metadata server that knows us; None: none does."""
    failures: int = 0
    """In a row."""

    @property
    def step(self) -> Step:
        """Heartbeat while the server knows us."""
        return Step.REGISTER if self.epoch is None else Step.HEARTBEAT

    def on_registered(self, reply: RegisterReply) -> None:
        """The server knows us, as long as its epoch stays this one."""
        self.epoch = reply.epoch
        self.failures = 0

    def on_heartbeat(self, reply: HeartbeatReply) -> None:
        """Where the server has forgotten us or was started again, the next step is to register, at once."""
        self.failures = 0
        if not reply.known or reply.epoch != self.epoch:
            self.epoch = None

    def on_failure(self) -> None:
        """No answer. Our lease may have ended meanwhile: the next heartbeat that is answered says so."""
        self.failures += 1

    def on_change(self) -> None:
        """What we registered is out of date: register again."""
        self.epoch = None

    def delay_s(self, draw: float) -> float:
        """Until the next step; `draw` is uniform in [0, 1), so that nodes do not march in step."""
        period_s = self.ttl_s / 3
        if self.failures:
            period_s = min(self.first_backoff_s * 2.0 ** min(self.failures - 1, 16), period_s)
        elif self.epoch is None:
            return 0.0
        return period_s * (1 - _JITTER + 2 * _JITTER * draw)


class Membership:
    """Runs a LeaseKeeper for `node`. `segments` lists the node's segments, `scan` what lies in them too, off the loop.

    When it first registers nobody has been told of them: they are empty, and are not scanned. After that the metadata
    server says of which it has forgotten what lies there, and is told it beside the heartbeats (`ManifestPieces`).
    """

    def __init__(
        self,
        client: MetadataClient,
        node: NodeInfo,
        segments: Callable[[], list[Segment]],
        scan: Callable[[], Awaitable[list[SegmentManifest]]],
        *,
        ttl_s: float,
        draw: Callable[[], float] = random.random,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        """The client stays the caller's."""
        self._client = client
        self._node, self._own_role = node, node.role
        self._segments = segments
        self._scan = scan
        self._ttl_s = ttl_s
        self._draw = draw
        self._limits = limits
        self._pieces = ManifestPieces(client, node, scan, draw=draw, limits=limits)
        self._telling: asyncio.Task[None] | None = None
        self._new = True
        """No server was told of our segments so far: nothing lies there."""
        self._lease = LeaseKeeper(ttl_s, limits.lease_first_backoff_s)
        self._changed = asyncio.Event()
        """Something has changed that the step under way, or the last one, did not tell the server."""
        self.refused = ""
        """Why the metadata server does not take the node in; empty: it does, or has not said so."""
        self.drained = ""
        """By order, as the metadata server last said: `stay`, or `move` its chunks elsewhere; empty: it is not."""
        self.sheds = False
        """Whether it last said that chunks are to move away from here."""
        self.registrations = 0
        self.heartbeat_failures = 0
        self.on_registered: Callable[[], None] = lambda: None
        """Called after each registration: the metadata server knows no more than it was told then."""

    def __repr__(self) -> str:
        lease, node = self._lease, self._node
        known = f"known to epoch {lease.epoch}" if lease.epoch is not None else "known to no server"
        known = f"refused: {self.refused}" if self.refused else known
        return (
            f"<Membership {node.role} {node.id}.{node.incarnation:x}, {known}, {lease.failures} failures in a row, "
            f"{self.registrations} registrations>"
        )

    @property
    def node(self) -> NodeInfo:
        """The node as it registers."""
        return self._node

    @property
    def joined(self) -> bool:
        """Whether, as far as we know, the metadata server knows us."""
        return self._lease.epoch is not None and self._lease.failures == 0

    def announce(self, spec: KVSpec) -> None:
        """An engine is ready whose KV is of this spec: the node registers with it at once."""
        fingerprint, digest = spec.fingerprint, spec.tokenizer_digest
        if fingerprint != self._node.fingerprint:
            self._node = msgspec.structs.replace(self._node, fingerprint=fingerprint, tokenizer_digest=digest)
            self.announce_again()

    def announce_again(self) -> None:
        """What `scan` says of the segments has changed: the node registers again at once."""
        self._lease.on_change()
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled. Does not leave: call `leave` after that."""
        try:
            while True:
                self._changed.clear()
                await self._take_step()
                try:
                    async with asyncio.timeout(self._lease.delay_s(self._draw())):
                        await self._changed.wait()
                except TimeoutError:
                    continue
        finally:
            await self._stop_telling()

    async def leave(self) -> None:
        """Give the lease up, so that nobody is sent here any more. Bounded; a server that is away lets it expire."""
        request = LeaveRequest(node_id=self._node.id, incarnation=self._node.incarnation)
        try:
            await self._client.leave(request, timeout_s=self._limits.give_back_s)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            log_fields(_logger, logging.WARNING, "leave_failed", node=self._node.id, reason=error.message)

    async def release_writer(self, *, hangs: bool = False) -> None:
        """Give back what the engine that has just died had reserved and leased; `hangs`: one that has not, and may
        write on: a server that does not know this is told nothing. Bounded; if the server is away it expires there."""
        if hangs and self._client.protocol < HUNG_WRITERS:
            return
        request = ReleaseWriterRequest(
            node_id=self._node.id, incarnation=self._node.incarnation, hangs=hangs or msgspec.UNSET
        )
        try:
            await self._client.release_writer(request, timeout_s=self._limits.give_back_s)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            log_fields(_logger, logging.WARNING, "release_failed", node=self._node.id, reason=error.message)

    async def _take_step(self) -> None:
        """One call to the metadata server, or two. Five cases:

        1. It does not know us and answers: we are registered, and tell all that lies in our segments.
        2. It knows us and answers: our lease is longer, or we learn that it has forgotten us and register next.
        3. It does not answer: we try again, ever more slowly. It is logged once an outage, and we keep the epoch that
           we had: an outage shorter than the lease costs no registration.
        4. What we told changed while we were telling it: the answer is thrown away and we register once more.
        5. It does not take us in: we say why, wherever we are asked, and try again each period. It may be the server
           that is to be corrected, or the lease of a process that died is to end first.
        """
        step = self._lease.step
        try:
            if step is Step.REGISTER:
                await self._register()
            else:
                reply = await self._heartbeat()
                self._lease.on_heartbeat(reply)
                self.drained, self.sheds = reply.drained, reply.sheds
                self._serve_as(reply.role)
        except (MetadataUnavailableError, MetadataProtocolError) as error:
            if isinstance(error, (MetadataProtocolError, MetadataProofError)) and step is Step.REGISTER:
                self._say_refused(error)
            elif self._lease.failures == 0:  # once an outage
                log_fields(_logger, logging.WARNING, f"{step}_failed", node=self._node.id, reason=error.message)
            self._lease.on_failure()
            self.heartbeat_failures += 1

    def _serve_as(self, ordered: str) -> None:
        """Take another role, which is but what others know the node as: its engine serves both, and what runs goes on.
        One that we do not know is of a later version."""
        roles = {role.value: role for role in (Role.PREFILLER, Role.DECODER)}
        role = roles.get(ordered, self._own_role)
        if role is not self._node.role and self._own_role is not Role.STORE:
            log_fields(_logger, logging.INFO, "role", node=self._node.id, before=self._node.role, now=role)
            self._node = msgspec.structs.replace(self._node, role=role)
            self.announce_again()

    def _say_refused(self, error: MetadataProtocolError | MetadataProofError) -> None:
        if error.message != self.refused:
            self.refused = error.message
            log_fields(
                _logger, logging.ERROR, "refused", node=self._node.id, reason=error.message,
                effect="nothing that this node computes is stored; it tries again",
            )  # fmt: skip

    async def _heartbeat(self) -> HeartbeatReply:
        return await self._client.heartbeat(HeartbeatRequest(node_id=self._node.id, incarnation=self._node.incarnation))

    async def _register(self) -> None:
        speaks = (await self._heartbeat()).spoken  # and it is back: a large segment takes seconds to scan
        node, part = self._node, self._client.part
        segments = [of_part(SegmentManifest(segment=segment), part) for segment in self._segments()]
        request = RegisterRequest(node=node, segments=segments, ttl_s=self._ttl_s)
        if not self._new and speaks.newest >= IN_PIECES:
            request = msgspec.structs.replace(request, in_pieces=True)
        elif not self._new:
            request = msgspec.structs.replace(request, segments=await self._whole())
        self._new = False
        await self._stop_telling()
        reply = await self._client.register(request)
        self.refused = ""
        self.registrations += 1
        self.on_registered()
        if not self._changed.is_set():  # case 4: register once more
            self._lease.on_registered(reply)
            if reply.wanted:
                self._telling = spawned(self._tell(reply.wanted), f"manifest of {node.id}")
        log_fields(
            _logger, logging.INFO, "registered", node=node.id, epoch=reply.epoch, imported=reply.imported,
            refused=reply.refused, wanted=len(reply.wanted),
        )  # fmt: skip

    async def _tell(self, wanted: dict[str, int]) -> None:
        if not await self._pieces.tell(wanted):
            self.announce_again()

    async def _stop_telling(self) -> None:
        if self._telling is not None:
            await cancelled(self._telling)
            self._telling = None

    async def _whole(self) -> list[SegmentManifest]:
        """What lies in the segments, as much of it as a server of before IN_PIECES takes."""
        manifests, most = [], self._limits.max_listed
        for manifest in await self._scan():
            if len(manifest.entries) > most:
                log_fields(_logger, logging.WARNING, "manifest_cut", chunks=len(manifest.entries), listed=most)
            entries = without_owners(manifest.entries[:most])
            manifests.append(SegmentManifest(segment=manifest.segment, entries=entries))
        return manifests
