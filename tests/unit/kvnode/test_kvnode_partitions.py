"""A node of an index that several metadata servers share: known to each by itself, with a slice of its segment."""

import asyncio
from dataclasses import replace

import pytest
from support.metadata_rigs import end, until
from support.metadata_words import UNIT, entry, granted, ids, key, new_state, reservation, segment
from support.partition_rigs import PartitionRig
from support.sim_loop import run_sim
from support.store_fakes import key as store_key
from support.tier_world import TierWorld, shared_tier

from kvcore.partitions import Part, Partitions
from kvcore.types import NodeInfo, Role
from kvnode.limits import NodeLimits
from kvnode.partitions.memberships import Memberships
from kvnode.tiers.filler import TierFiller
from metadata_server.core import MetadataCore
from metadata_server.messages import Event, EventKind, ManifestEntry, SegmentManifest
from metadata_server.versions import SPOKEN

A, B = range(2)
SEGMENT = segment("n", units=64)
LIMITS = NodeLimits(lease_first_backoff_s=0.01, spread_s=0.0)


class NodeRig(PartitionRig):
    """Two partitions and one node. `found`: what lies in its segment."""

    def __init__(self) -> None:
        super().__init__(("a", "b"))
        self.found: list[ManifestEntry] = []
        node = NodeInfo(id="n", role=Role.DECODER, control_url="http://n", incarnation=1)
        self.memberships = Memberships(
            self.client, node, lambda: [SEGMENT], self.scan, ttl_s=0.06, draw=self.draw, limits=LIMITS
        )

    def draw(self) -> float:
        self.clock.advance(0.0 if self.client.parts[B].available else 2.0)  # the pause after a failure is over
        return 0.5

    async def scan(self) -> list[SegmentManifest]:
        return [SegmentManifest(segment=SEGMENT, entries=self.found)]

    def restart(self, number: int) -> None:
        """A new life of that partition's server: it knows nothing."""
        state = new_state(epoch="e2", speaks=replace(SPOKEN, part=self.parts[number]))
        self.cores[number] = self.ways[number].core = MetadataCore(state, self.clock)

    def knows(self, number: int) -> bool:
        return bool(self.cores[number].state.nodes(self.clock.now()).nodes)


@pytest.fixture
async def rig():
    rig = NodeRig()
    running = asyncio.create_task(rig.memberships.run())
    yield rig
    await end(running)
    rig.check()


async def test_a_server_that_has_forgotten_all_is_told_what_is_its_own_and_the_other_one_hears_nothing(rig):
    await until(lambda: rig.knows(A) and rig.knows(B))
    before = rig.cores[A].state.counters["registrations"]
    half = 32
    b0, b1, b2 = [n for n in range(200) if rig.number(key(n)) == B][:3]
    a0 = next(n for n in range(200) if rig.number(key(n)) == A)
    rig.found = [entry(b0, half, 9), entry(b1, 0, 8), entry(a0, half + 1, 7), entry(b2, half - 1, 6, units=2)]
    rig.restart(B)
    state = rig.cores[B].state
    await until(lambda: rig.knows(B) and not state.stats(rig.clock.now(), 0).rebuilding)
    assert [n for n in (a0, b0, b1, b2) if state.complete_prefix([key(n)], rig.clock.now())] == [b0]
    use = state.stats(rig.clock.now(), 0).segments[0]
    assert (use.used_bytes, use.room_bytes) == (UNIT, half * UNIT), "the rest is free room"
    assert rig.cores[A].state.counters["registrations"] == before


async def test_with_one_partition_away_the_node_is_joined_and_says_so_to_the_other_when_it_comes():
    rig = NodeRig()
    rig.ways[B].away = True
    running = asyncio.create_task(rig.memberships.run())
    registered: list[None] = []
    rig.memberships.on_registered(lambda: registered.append(None))
    await until(lambda: rig.memberships.joined and rig.knows(A) and rig.memberships.heartbeat_failures > 1)
    assert not rig.knows(B) and rig.memberships.refused == ""
    before = len(registered)
    rig.ways[B].away = False
    await until(lambda: rig.knows(B) and len(registered) > before > 0)
    assert rig.memberships.registrations == len(registered)
    await end(running)
    await rig.memberships.leave()
    assert not rig.knows(A) and not rig.knows(B)


async def test_what_a_dead_engine_held_is_given_back_everywhere(rig):
    await until(lambda: rig.knows(A) and rig.knows(B))
    reply = await rig.client.reserve(reservation("n", list(range(40))))
    await rig.client.commit(ids("n", granted(reply)[:4]))
    assert all(core.state.num_reservations for core in rig.cores)
    await rig.memberships.release_writer()
    assert [core.state.num_reservations for core in rig.cores] == [0, 0]


async def test_who_is_refused_by_one_says_so(rig):
    await until(lambda: rig.knows(A) and rig.knows(B))
    state = new_state(epoch="e2", speaks=replace(SPOKEN, part=Part(Partitions(("a", "b", "c")), 1)))
    rig.cores[B] = rig.ways[B].core = MetadataCore(state, rig.clock)
    await until(lambda: "partitions a, b, c" in rig.memberships.refused)
    assert rig.memberships.joined, "the other one knows it"


def test_a_reset_of_one_partition_forgets_only_its_chunks():
    async def main() -> None:
        world = TierWorld()
        async with world.node("a", [shared_tier(world.world.clock)]) as node:
            whole = Partitions(("a", "b"))
            filler: TierFiller = node.tiers.filler
            sinks = [filler.sink_of(Part(whole, number)) for number in range(2)]
            own = {n: [store_key(i) for i in range(1, 30) if whole.number_of(store_key(i)) == n] for n in range(2)}
            for number, sink in enumerate(sinks):
                stored = Event(seq=1, kind=EventKind.STORED, node_id="a", segment_id="a.1", keys=own[number])
                sink.on_events([stored])
            assert own[0] and own[1] and filler._held == {*own[0], *own[1]}
            sinks[0].on_reset()
            assert filler._held == {*own[1]} and all(set(lane.queue) <= {*own[1]} for lane in filler._lanes)
            sinks[1].on_events([Event(seq=2, kind=EventKind.NODE_DOWN, node_id="a")])
            assert not filler._held and filler.sink_of(None) is filler

    run_sim(main)
