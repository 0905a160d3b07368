"""The metadata server without its socket: bodies in, bodies out, long polls, event streams, the ticking task.

What the HTTP shell and the simulation share. Owns waiters and subscribers (both bounded); the state decides everything
else. Invariants: a waiter is in `_waiting` only while its call is under way; a lease is granted with the answer.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Iterator
from contextlib import aclosing
from typing import Any

import msgspec

from kvcore.clock import Clock
from kvcore.errors import MetadataProtocolError, NodeRefusedError
from kvcore.peer_log import PeerLog
from kvcore.process.audit import audited
from kvcore.telemetry import log_fields
from kvcore.trust.certificates import PeerNames
from kvcore.types import ChunkKey
from metadata_server.account_messages import ImportReply, Stats
from metadata_server.cache_messages import CacheReply, PinRequest, ReleaseRequest, UnpinRequest
from metadata_server.endpoints import IMPORT
from metadata_server.index.state import MetadataState
from metadata_server.janitor.janitor import Janitor
from metadata_server.leading.leader import Leader, OnlyServer
from metadata_server.limits import ServerLimits
from metadata_server.messages import (
    EventBatch,
    EventKind,
    MatchReply,
    MatchRequest,
    NodesReply,
    Nothing,
    RegisterReply,
    RegisterRequest,
    WaitRequest,
)
from metadata_server.protocol import ANYBODY, Asker, bound_calls, encode
from metadata_server.records.node_orders import NodeOrdering
from metadata_server.records.pins import PinRecords
from metadata_server.records.switches import BlendSwitches
from metadata_server.refusals import Refusals
from metadata_server.shell.event_streams import EventStreams, wait_for
from metadata_server.shell.floods import NodeFloods
from metadata_server.versions import TermReply, VersionedTermReply

Kept = tuple[PinRecords, NodeOrdering, BlendSwitches]  # what writes a term down
_logger = logging.getLogger("metadata_server")
_DONE = Nothing()


class MetadataCore:
    """Answers calls on one event loop. `run` must be running, else nothing runs out unless it is asked for."""

    state: MetadataState
    orders: NodeOrdering
    switches: BlendSwitches
    janitor: Janitor
    floods: NodeFloods

    def __init__(
        self,
        state: MetadataState,
        clock: Clock,
        limits: ServerLimits = ServerLimits(),
        pins: PinRecords | None = None,
        orders: NodeOrdering | None = None,
        *,
        switches: BlendSwitches | None = None,
    ) -> None:
        """`pins`, `orders`, `switches`: what writes them down; None: nothing does."""
        self.state, self._pins = state, pins
        self.orders, self.switches = orders or NodeOrdering(state, clock), switches or BlendSwitches()
        self._clock = clock
        self._limits = limits
        self._waiting: dict[ChunkKey, set[asyncio.Event]] = {}
        self._refusals = Refusals(limits)
        self._said = PeerLog(_logger, clock=clock)
        self.floods = NodeFloods(limits, state.counters, self._said)
        self._turn, self._num_in_turn = asyncio.Lock(), 0
        self._seen_seq = state.log.next_seq
        self._streams = EventStreams(state.log, self._snapshot, self._greet, limits)
        self._sooner, self._planned = asyncio.Event(), float("inf")
        self._pulse_at: float | None = None
        self._stopping = False
        self.leader: Leader = OnlyServer()
        self.janitor = Janitor(self, clock)
        self.token = 0  # of the term that `state` is of
        self._calls = bound_calls(self)

    def begin(self, state: MetadataState, kept: Kept | None = None, token: int = 0) -> None:
        """Go on with another index, of this term: event streams of the one before end, long polls ask this one."""
        self.state, self.token, self.floods.counts = state, token, state.counters
        self._pins, self.orders, self.switches = kept or (None, NodeOrdering(state, self._clock), BlendSwitches())
        self._calls, self._seen_seq, self._planned = bound_calls(self), state.log.next_seq, float("inf")
        self._sooner.set()
        self._wake_all_waiters()
        self._streams.stop()
        self._streams = EventStreams(state.log, self._snapshot, self._greet, self._limits)
        state.began(self._clock.now())

    def __repr__(self) -> str:
        return f"<MetadataCore {self.floods.num_waits} waiters, {self.num_subscribers} subscribers: {self.state}>"

    @property
    def num_waiters(self) -> int:
        """Long polls under way."""
        return self.floods.num_waits

    @property
    def num_subscribers(self) -> int:
        """Event streams open."""
        return len(self._streams)

    @property
    def subscriber_lag(self) -> int:
        """Events that the slowest of them was not sent yet."""
        return self._streams.lag

    async def dispatch(
        self, path: str, body: bytes, *, json: bool = False, reply_json: bool | None = None, who: Asker = ANYBODY
    ) -> bytes:
        """Answer one call; the GET endpoints have empty bodies. The reply is in the body's format, unless `reply_json`
        says otherwise. `who` asks.

        Raises MetadataProtocolError (unknown path, malformed or out of bounds), ProofError, NotLeaderError. Only an
        endpoint that waits or is durable suspends, and one whose large bodies come in turn; cancelling it leaves
        nothing behind. With too many waiting it answers at once with what there is.
        """
        call = self._calls.get(path)
        if call is None:
            raise MetadataProtocolError(f"no such endpoint: {path}")
        self.leader.check()
        if call.in_turn and len(body) > self._limits.small_body:
            reply = await self._in_turn(path, body, json=json, names=who.speaks_for)
        elif call.about is None:
            reply = call.handle(call.decode(body, json=json, names=who.speaks_for), self._now())
            if call.is_async:
                reply = await reply
                self.leader.check()
        else:
            now, request = self._now(), call.decode(body, json=json, names=who.speaks_for)
            with audited(who.address, path, call.about(request)) as line:
                reply = call.handle(request, now)
                if call.is_async:
                    reply = await reply
                line.outcome = call.outcome(reply)
        self._after_change()
        if self.token and isinstance(reply, TermReply | VersionedTermReply):
            reply = msgspec.structs.replace(reply, token=self.token)
        return encode(_DONE if reply is None else reply, json=json if reply_json is None else reply_json)

    async def _in_turn(self, path: str, body: bytes, *, json: bool, names: PeerNames | None) -> Any:
        """Decode and handle while no other such call is, after whatever else is to be done now."""
        if self._num_in_turn >= self._limits.max_in_turn and path == IMPORT.path:
            return ImportReply(known=True, again_s=self._limits.again_s)
        self._num_in_turn += 1
        try:
            async with self._turn:
                await asyncio.sleep(0)
                self.leader.check()
                call = self._calls[path]
                return call.handle(call.decode(body, json=json, names=names), self._now())
        finally:
            self._num_in_turn -= 1

    # --- handlers of the table's calls that are not the state's own --------------------------------------------------

    def register(self, request: RegisterRequest, now: float) -> RegisterReply:
        """See MetadataState.register. A refusal is logged when it is news."""
        node, replaced = request.node, self.state.counters["nodes_replaced"]
        self.floods.check_register(node.id, now)
        try:
            reply = self.state.register(request, now)
        except NodeRefusedError as error:
            if self._refusals.add(node, error.message, now) and self._said.allows("refused", node.id) is not None:
                log_fields(_logger, logging.WARNING, "node_refused", node=node.id, reason=error.message)
            raise
        self.floods.registered(node.id, now)
        self._refusals.taken_in(node)
        news = self.state.counters["nodes_replaced"] != replaced  # a crash, or somebody has taken its name
        if news and self._said.allows("replaced", node.id) is not None:
            log_fields(_logger, logging.WARNING, "node_replaced", node=node.id, by=node.control_url)
        return reply

    def match(self, request: MatchRequest, now: float) -> MatchReply:
        """See MetadataState.match."""
        return self.state.match(
            request.keys,
            now,
            lease_s=request.lease_s,
            node_id=request.node_id,
            incarnation=request.incarnation,
            in_order=request.in_order is True,
            lease_name=request.lease_name or 0,
            owner=request.owner or None,
        )

    def release(self, request: ReleaseRequest, now: float) -> None:
        """See MetadataState.release."""
        self.state.release(request.lease_ids, now, request.lease_names or ())

    async def pin(self, request: PinRequest, now: float) -> CacheReply:
        """See MetadataState.pin; once it is written down. Raises RecordsUnavailableError."""
        reply = self.state.pin(request, now)
        self._after_change()
        if self._pins is not None:
            await self._pins.pinned(request, reply.done, now)
        return reply

    async def unpin(self, request: UnpinRequest, now: float) -> CacheReply:
        """See MetadataState.unpin; once it is written down. Raises RecordsUnavailableError."""
        reply = self.state.unpin(request, now)
        self._after_change()
        await self.forget_pins(request.keys)
        return reply

    async def forget_pins(self, keys: Iterable[ChunkKey]) -> None:
        """Write down that these are not pinned any more. Raises RecordsUnavailableError."""
        if self._pins is not None:
            await self._pins.unpinned(keys)

    def nodes(self, _: object, now: float) -> NodesReply:
        """See MetadataState.nodes."""
        return self.state.speaks.greet(self.state.nodes(now))

    def stats(self, _: object, now: float) -> Stats:
        """See MetadataState.stats; with who was refused lately."""
        return msgspec.structs.replace(self.state.stats(now, self.floods.num_waits), refused=self._refusals.listed(now))

    async def wait(self, request: WaitRequest, now: float) -> MatchReply:
        """As `match`, once more than `more_than` leading keys are complete, time is up, or too many wait."""
        keys, deadline = request.keys, now + request.timeout_s
        wanted = min(request.more_than + 1, len(keys))  # all of them: nothing more can come
        while True:
            self.leader.check()
            have = self.state.complete_prefix(keys, now)
            full = have < wanted and not self.floods.may_wait(request)
            self.state.counters["waits_cut"] += full
            if have >= wanted or now >= deadline or self._stopping or full:
                return self.match(request, now)
            with self.floods.waiting(request):
                await self._until_stored(keys[have], deadline - now)
            now = self._now()

    def replay(self, from_seq: int) -> EventBatch:
        """Events from `from_seq` on, one batch; a reset without events where the log no longer has them."""
        self.leader.check()
        log = self.state.log
        if not log.has(log.epoch, from_seq):
            return EventBatch(epoch=log.epoch, reset=True, next_seq=log.next_seq)
        return log.replay(from_seq)

    def snapshot(self) -> list[EventBatch]:
        """The whole index as batches, the first a reset, the last one empty."""
        self.leader.check()
        return list(self._snapshot())

    async def encoded_snapshot(self, *, json: bool) -> AsyncGenerator[bytes, None]:
        """As `snapshot`, each batch made when the one before it was taken, with other work between any two."""
        self.leader.check()
        for batch in self._snapshot():
            yield encode(batch, json=json)
            await asyncio.sleep(0)

    def _snapshot(self) -> Iterator[EventBatch]:
        batches = self.state.snapshot(self._now())
        self._after_change()
        return batches

    async def events(self, epoch: str, from_seq: int, client: str = "") -> AsyncGenerator[bytes, None]:
        """See EventStreams.follow; to the end of the term. Raises NotLeaderError at the first step."""
        self.leader.check()
        async with aclosing(self._streams.follow(epoch, from_seq, client)) as frames:
            async for frame in frames:
                if not self.leader.leads:
                    return
                yield frame

    def _greet(self, batch: EventBatch) -> EventBatch:
        return msgspec.structs.replace(self.state.speaks.greet(batch), token=self.token)

    def stop(self) -> None:
        """End event streams and answer long polls with what there is, now and from now on. Idempotent."""
        self._stopping = True
        self._wake_all_waiters()
        self._streams.stop()

    async def run(self) -> None:
        """Tick until cancelled, sleeping exactly until something runs out, at most a pulse."""
        self.state.began(self._clock.now())
        while True:
            self._pulse_at = now = self._now()
            self.state.tick(now)
            self._after_change()
            if self.state.sweep():
                await asyncio.sleep(0)
                continue
            deadline = self.state.next_deadline()
            self._planned = float("inf") if deadline is None else deadline
            self._sooner.clear()
            until = min(self._planned, now + self._limits.pulse_s)
            await wait_for(self._sooner, max(self._limits.shortest_sleep_s, until - now))

    def _now(self) -> float:
        """The time. If this process stood still until a moment ago, its nodes are given time to be heard again."""
        now = self._clock.now()
        if self._pulse_at is not None and now - self._pulse_at > self._limits.pulse_s + self._limits.stall_s:
            self._pulse_at = now
            self.state.renew_all_nodes(now)
        return now

    async def _until_stored(self, key: ChunkKey, timeout_s: float) -> None:
        """Return when `key` may have become complete, or after `timeout_s`."""
        woken = asyncio.Event()
        waiters = self._waiting.setdefault(key, set())
        waiters.add(woken)
        try:
            await wait_for(woken, timeout_s)
        finally:
            waiters.discard(woken)
            if not waiters and self._waiting.get(key) is waiters:
                del self._waiting[key]

    def _after_change(self) -> None:
        """Wake whom the last change concerns."""
        log = self.state.log
        deadline = self.state.next_deadline()
        if deadline is not None and deadline < self._planned:
            self._planned = deadline
            self._sooner.set()
        if log.next_seq == self._seen_seq:
            return
        if self._waiting:
            for event in log.since(max(self._seen_seq, log.first_seq)):
                if event.kind is EventKind.STORED:
                    for key in event.keys:
                        for waiter in self._waiting.get(key, ()):
                            waiter.set()
            if self._seen_seq < log.first_seq:  # more happened at once than the log holds
                self._wake_all_waiters()
        self._seen_seq = log.next_seq
        self._streams.wake()

    def _wake_all_waiters(self) -> None:
        for waiters in self._waiting.values():
            for waiter in waiters:
                waiter.set()
