"""The router's copy of the index against the metadata server's: the same once it has caught up, whatever happened.

Nodes come, go and start anew, chunks come and go, either side restarts, streams break in the middle, events are lost
on the way, and a router that is far behind is given a snapshot while the index goes on changing. State, event log,
streams, subscription and the router's cluster are production code; only the wire is the test's.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from unittest.mock import patch

import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from support.machines import machine_settings
from support.metadata_rigs import end
from support.metadata_words import granted, ids, key, keys, new_state, registration, reservation
from support.router_fakes import cluster_config

from kvcore.clock import ManualClock
from kvcore.errors import MetadataUnavailableError
from kvcore.types import ChunkKey
from metadata_server.cache_messages import EvictRequest
from metadata_server.core import MetadataCore
from metadata_server.index import event_log
from metadata_server.limits import ClientLimits, ServerLimits
from metadata_server.messages import (
    EventBatch,
    LeaveRequest,
    ManifestEntry,
    QuarantineItem,
    QuarantineReason,
    QuarantineRequest,
)
from metadata_server.subscription import IndexSubscription
from router.nodes.cluster import Cluster

NODES, KEYS, LOG = ("a", "b", "c"), 12, 24
"""Of the log's events, few: who is behind is soon too far behind for a replay."""
NOW = ManualClock().now()
NODE = st.sampled_from(NODES)
SELDOM = st.sampled_from([False, False, True])
NUMBERS = st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=5, unique=True)
SOON = ServerLimits(keep_alive_s=0.001)
"""By a keep-alive a router learns that the last event was lost."""
NO_PAUSE = ClientLimits(first_pause_s=0.0, longest_pause_s=0.0)


class Wire:
    """`EventSource` that lets through what it is told to. `lets`: frames; `loses`: the next event, silently."""

    def __init__(self, core: MetadataCore) -> None:
        self.core = core
        self.lets, self.loses, self.breaks = 0, False, False
        self.moved = asyncio.Event()

    def set(self, **what: object) -> None:
        for name, value in what.items():
            setattr(self, name, value)
        self.moved.set()

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        core, in_snapshot = self.core, 0
        async with aclosing(core.events(epoch, from_seq)) as frames:
            async for frame in frames:
                while not (self.lets or self.breaks or self.core is not core):
                    self.moved.clear()
                    await self.moved.wait()
                if self.breaks or self.core is not core:
                    self.breaks = False
                    raise MetadataUnavailableError("the connection broke")
                self.lets -= 1
                batch = msgspec.msgpack.decode(frame, type=EventBatch)
                in_snapshot = batch.next_seq if batch.reset else in_snapshot
                if self.loses and batch.events and batch.next_seq != in_snapshot:
                    self.loses = False
                    continue
                yield frame

    async def aclose(self) -> None:
        """Nothing is held."""


class RouterIndexMachine(RuleBasedStateMachine):
    @initialize()
    def begin(self):
        self.batches = patch.object(event_log, "MAX_BATCH_KEYS", 3)  # so that a snapshot has many parts
        self.batches.start()
        self.loop = asyncio.new_event_loop()
        self.incarnations, self.lives = dict.fromkeys(NODES, 0), 0
        self.core = self.new_core()
        self.loop.run_until_complete(self.start_router())
        for node in NODES:
            self.start(node)
            self.put(node, node, list(range(KEYS))[NODES.index(node) :: 2][:4], twice=False)
        self.catch_up()
        assert len(self.listed()) > 6

    # --- the two sides -----------------------------------------------------------------------------------------------

    def new_core(self) -> MetadataCore:
        self.lives += 1
        first = self.lives << 40
        return MetadataCore(new_state(LOG, f"e{self.lives}", first, max_replicas=2), ManualClock(), SOON)

    async def start_router(self):
        self.wire = Wire(self.core)
        self.cluster = Cluster(cluster_config([]), ManualClock())
        self.subscription = IndexSubscription(self.wire, self.cluster, ManualClock(), limits=NO_PAUSE)
        self.following = asyncio.ensure_future(self.subscription.run())

    @rule()
    def router_restarts(self):
        self.loop.run_until_complete(end(self.following))
        self.loop.run_until_complete(self.start_router())

    @rule(gone=st.sampled_from([(), (), (), NODES, *((name,) for name in NODES)]))
    def server_restarts(self, gone):
        """Its nodes tell what lies in their segments, or are gone."""
        old, self.core = self.core, self.new_core()
        index = old.state._index
        for name, incarnation in self.incarnations.items():
            if name not in gone and old.state._nodes.get(name, incarnation) is not None:
                rows = [row for one in index.complete for row in index.rows(one)]
                told = [ref for ref in index.refs(rows) if ref.segment_id == f"{name}.{incarnation:x}"]
                self.register(name, told)
        self.wire.set(core=self.core)
        old.stop()
        self.turns()

    def register(self, name, told=()):
        entries = [
            ManifestEntry(key=one.key, offset=one.offset, length=one.length, generation=one.generation) for one in told
        ]
        self.core.state.register(registration(name, units=8, incarnation=self.incarnations[name], entries=entries), NOW)

    # --- the index ---------------------------------------------------------------------------------------------------

    @rule(node=NODE, seldom=SELDOM)
    def starts_anew(self, node, seldom):
        if seldom or self.core.state._nodes.get(node, self.incarnations[node]) is None:
            self.start(node)

    def start(self, node):
        self.incarnations[node] += 1
        self.register(node)
        self.changed()

    @rule(node=NODE)
    def register_again(self, node):
        if self.incarnations[node]:
            self.register(node)
        self.changed()

    @rule(node=NODE, seldom=SELDOM)
    def leave(self, node, seldom):
        if not seldom:
            return
        self.core.state.leave(LeaveRequest(node_id=node, incarnation=self.incarnations[node]), NOW)
        self.changed()

    @rule(node=NODE, prefer=NODE, numbers=NUMBERS, twice=st.booleans())
    def put(self, node, prefer, numbers, twice):
        """`twice`: by two writers at once, into two segments."""
        found = []
        for target in (prefer, node) if twice else (prefer,):
            wish = f"{target}.{self.incarnations[target]:x}"
            request = reservation(node, numbers, prefer=wish, incarnation=self.incarnations[node])
            found += granted(self.core.state.reserve(request, NOW))
        self.core.state.commit(ids(node, found, self.incarnations[node]), NOW)
        self.changed()

    @rule(numbers=NUMBERS)
    def evict(self, numbers):
        self.core.state.evict(EvictRequest(keys=keys(*numbers)), NOW)
        self.changed()

    @rule(number=st.integers(0, KEYS - 1))
    def quarantine(self, number):
        """One replica of it goes, others stay."""
        rows = self.core.state._index.rows(key(number))
        if rows:
            item = QuarantineItem(replica=self.core.state._index.refs(rows)[0], reason=QuarantineReason.CHECKSUM)
            self.core.state.quarantine(QuarantineRequest(items=[item]), NOW)
        self.changed()

    def changed(self):
        self.core._after_change()
        self.turns()

    # --- the wire ----------------------------------------------------------------------------------------------------

    @rule(frames=st.integers(1, 3))
    def some_arrives(self, frames):
        self.wire.set(lets=frames)
        self.turns()
        self.wire.set(lets=0)

    @rule()
    def the_connection_breaks(self):
        self.wire.set(breaks=True)
        self.turns()

    @rule(frames=st.integers(1, 3))
    def a_snapshot_breaks_off(self, frames):
        self.router_restarts()
        self.some_arrives(frames)
        self.the_connection_breaks()

    @rule()
    def an_event_is_lost(self):
        self.wire.set(loses=True)

    @rule()
    def it_catches_up(self):
        self.catch_up()

    def catch_up(self):
        self.wire.set(lets=1 << 30)
        for tried in range(200):
            self.turns()
            if self.is_level:
                break
            if tried > 4:
                self.loop.run_until_complete(asyncio.sleep(SOON.keep_alive_s))
        assert self.is_level, f"{self.subscription} never reaches {self.core.state.log.next_seq}"
        self.wire.set(lets=0)
        assert self.listed() == self.stored()
        leases = {node.id: node.lease.incarnation for node in self.cluster.nodes.values() if node.lease is not None}
        assert leases == {node.id: node.incarnation for node in self.core.state.nodes(NOW).nodes}

    @property
    def is_level(self) -> bool:
        it, state = self.subscription, self.core.state
        return it.connected and (it.epoch, it._next_seq) == (state.epoch, state.log.next_seq)

    def listed(self) -> dict[ChunkKey, set[tuple[str, str]]]:
        (index,) = self.cluster._indexes
        found = {key(number): index.slots(index.mask(key(number))) for number in range(KEYS)}
        return {one: slots for one, slots in found.items() if slots}

    def stored(self) -> dict[ChunkKey, set[tuple[str, str]]]:
        index = self.core.state._index
        segments = {one: [index.record(row).segment for row in index.rows(one)] for one in index.complete}
        return {one: {(segment.node_id, segment.id) for segment in there} for one, there in segments.items()}

    def turns(self):
        async def some() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(some())

    @invariant()
    def who_is_level_knows_what_the_server_knows(self):
        if self.is_level:
            assert self.listed() == self.stored()

    def teardown(self):
        try:
            self.catch_up()
        finally:
            self.batches.stop()
        self.loop.run_until_complete(end(self.following))
        self.core.stop()
        self.loop.run_until_complete(self.loop.shutdown_asyncgens())
        self.loop.close()


class LongRouterIndexMachine(RouterIndexMachine):
    """The same for longer."""


TestRouterIndexMachine = RouterIndexMachine.TestCase
TestRouterIndexMachine.settings = machine_settings(6)
TestLongRouterIndexMachine = pytest.mark.slow(LongRouterIndexMachine.TestCase)
TestLongRouterIndexMachine.settings = machine_settings(120)
