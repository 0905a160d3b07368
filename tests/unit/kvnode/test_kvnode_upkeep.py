"""What operators ask of one node about chunks, and its marks in shared tiers; in virtual time."""

import asyncio

import msgspec
from support.sim_loop import run_sim
from support.store_fakes import CHUNK_BYTES, SPEC, key
from support.tier_world import TierNode, TierWorld, put_into, shared_tier

from kvnode.tiers.limits import MoveLimits
from kvnode.upkeep import NodeUpkeep
from kvstore.chunk_format import HEADER_BYTES
from nodeapi.upkeep import ChunksPlace, ChunksRequest, ClearedPlace, ClearRequest, GenerationsRequest

KEYS = [key(number) for number in range(1, 7)]
OTHER = msgspec.structs.replace(SPEC, weights_digest="ff" * 32)


def upkeep(node: TierNode) -> NodeUpkeep:
    return NodeUpkeep(node.view, node.tiers)


def order(action, keys=KEYS, tiers=("memory",), ttl_s=None) -> ChunksRequest:
    return ChunksRequest(
        action=action, fingerprint=SPEC.fingerprint, keys=list(keys), tiers=list(tiers), ttl_s=ttl_s, deadline_s=5.0
    )


def test_generations_of_the_segment_and_of_the_tiers_that_are_asked_for():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            await a.put(KEYS)
            await a.settled()
            reply = await upkeep(a).generations(GenerationsRequest(tiers=["memory", "disk"], deadline_s=5.0))
            segment, shared = reply.places
            (held,) = segment.held
            assert (segment.name, segment.shared, segment.incomplete) == ("memory", False, "")
            assert (held.fingerprint, held.num_chunks, sorted(held.keys)) == (SPEC.fingerprint, 6, sorted(KEYS))
            assert held.num_bytes == 6 * (HEADER_BYTES + CHUNK_BYTES)
            (held,) = shared.held
            assert shared.shared and (held.fingerprint, held.num_chunks, held.keys) == (SPEC.fingerprint, 6, [])
            assert [mark.owner for mark in held.marks] == [reply.owner] and SPEC.model_id in held.note
            reply = await upkeep(a).generations(GenerationsRequest(tiers=[], deadline_s=5.0))
            assert [place.name for place in reply.places] == ["memory"], "the segment alone"

    run_sim(main)


def test_a_node_without_tiers_has_a_segment():
    async def main():
        world = TierWorld()
        async with world.node("a", []) as a:
            await a.put(KEYS[:2])
            bare = NodeUpkeep(a.view, None)
            reply = await bare.generations(GenerationsRequest(tiers=["disk"], deadline_s=5.0))
            assert [place.held[0].num_chunks for place in reply.places] == [2] and reply.owner == ""
            assert (await bare.chunks(order("remove"))).places == []
            assert (await bare.clear(ClearRequest(fingerprints=[b"f" * 16], tiers=["x"], deadline_s=1.0))).places == []

    run_sim(main)


def test_what_is_removed_from_a_tier_is_saved_again_when_it_is_committed_again():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a, world.node("b", [tier]) as b:
            await a.put(KEYS)
            await a.settled()
            (place,) = (await upkeep(a).chunks(order("find", [*KEYS[:2], key(99)]))).places
            assert place == ChunksPlace(name="memory", shared=True, found=[True, True, False], num_chunks=2)
            (place,) = (await upkeep(b).chunks(order("remove"))).places
            assert place == ChunksPlace(name="memory", shared=True, num_chunks=6) and not tier.chunks
            assert (await upkeep(a).chunks(order("remove", tiers=[]))).places == [], "it only learns of it"
            world.forget(KEYS)
            await a.put(KEYS)
            await a.settled()
            assert len(tier.chunks) == 6
            cleared = await upkeep(b).clear(
                ClearRequest(fingerprints=[SPEC.fingerprint], tiers=["memory"], deadline_s=5.0)
            )
            assert cleared.places == [ClearedPlace(name="memory", shared=True, num_chunks=6)]
            await upkeep(a).clear(ClearRequest(fingerprints=[SPEC.fingerprint], tiers=[], deadline_s=5.0))
            world.forget(KEYS)
            await a.put(KEYS)
            await a.settled()
            assert len(tier.chunks) == 6

    run_sim(main)


def test_an_end_that_is_given_and_a_pin_that_cannot_be():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            put_into(tier, KEYS)
            (place,) = (await upkeep(a).chunks(order("expire", KEYS[:2], ttl_s=10.0))).places
            assert place.num_chunks == 2 and place.problem == ""
            await asyncio.sleep(11)
            (place,) = (await upkeep(a).chunks(order("find"))).places
            assert place.found == [False, False, True, True, True, True]
            assert (await upkeep(a).chunks(order("pin"))).places == [], "it is not asked of a tier that cannot"

    run_sim(main)


def test_a_node_marks_what_its_engine_uses_renews_it_and_takes_it_back():
    async def main():
        world, limits = TierWorld(), MoveLimits(mark_s=10.0, mark_ttl_s=25.0)
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        same = shared_tier(world.world.clock)  # as b has it: who stops closes its own way there
        same.chunks, same._notes = tier.chunks, tier._notes

        async def marks() -> dict[bytes, list[str]]:
            listed = await tier.generations(timeout_s=1)
            return {one.fingerprint: [mark.owner for mark in one.marks] for one in listed.found}

        async with world.node("a", [tier], limits=limits) as a:
            owner = a.tiers.marker.owner
            await asyncio.sleep(100)
            assert await marks() == {SPEC.fingerprint: [owner]}, "renewed four times since"
            async with world.node("b", [same], limits=limits) as b:
                await asyncio.sleep(1)
                assert await marks() == {SPEC.fingerprint: sorted([owner, b.tiers.marker.owner])}
            assert await marks() == {SPEC.fingerprint: [owner]}
            a.tiers.engine_ready(OTHER)
            await asyncio.sleep(1)
            assert await marks() == {SPEC.fingerprint: []}, "the engine's weights are others"
            assert tier._notes.marks(OTHER.fingerprint)[0].owner == owner
        assert not tier._notes.marks(OTHER.fingerprint)

    run_sim(main)


def test_every_rank_of_a_parallel_engine_is_marked():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            halves = msgspec.structs.replace(SPEC, tp_size=2)
            a.tiers.engine_ready(halves)
            await asyncio.sleep(1)
            for rank in (0, 1):
                assert tier._notes.marks(msgspec.structs.replace(halves, tp_rank=rank).fingerprint)

    run_sim(main)
