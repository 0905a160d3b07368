"""Filling behind the commit and promoting on demand, over a metadata server and in virtual time."""

import asyncio
from typing import ClassVar

import msgspec
import pytest
from support.sim_loop import run_sim
from support.store_fakes import SPEC, key, payload
from support.tier_world import DiskLike, TierNode, TierWorld, put_into, shared_tier

from kvcore.config.schema import StoreConfig
from kvcore.config.tiers import RedisTierConfig, TiersConfig
from kvcore.errors import ConfigError
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.peers import PeerDisks
from kvnode.tiers.shape import ChunkShape
from kvstore.chunk_format import HEADER_BYTES
from kvstore.tiers.base import ChunkName
from nodeapi.messages import PromoteReply, PromoteRequest

KEYS = [key(number) for number in range(1, 13)]
SHAPE = ChunkShape(SPEC.fingerprint, SPEC.chunk_bytes, SPEC.chunk_tokens)


def names(keys=KEYS):
    return {ChunkName(SPEC.fingerprint, one) for one in keys}


class Gate:
    """What a memory tier asks first."""

    def __init__(self) -> None:
        self.up, self.delay_s, self.calls = True, 0.0, 0

    async def __call__(self, timeout_s: float) -> bool:
        self.calls += 1
        await asyncio.sleep(min(self.delay_s, timeout_s))
        return self.up and self.delay_s < timeout_s


def test_what_is_committed_is_in_the_tier_soon_after_and_comes_back_when_it_was_evicted():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            assert await a.put(KEYS) == KEYS
            await a.settled()
            assert set(tier.chunks) == names() and a.tiers.filler.counts["memory", "saved"] == len(KEYS)
            assert world.world.state.num_read_leases == 0
            world.forget(KEYS)
            assert await a.cached(KEYS) == 0
            promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert [(one.tier, one.num_chunks) for one in promoted] == [("memory", len(KEYS))]
            assert await a.cached(KEYS) == len(KEYS)
            await a.settled()
            assert a.tiers.filler.counts["memory", "saved"] == len(KEYS), "what came from the tier is not saved again"
            assert world.world.state.num_reservations == 0

    run_sim(main)


def test_only_what_is_in_no_segment_is_promoted_up_to_the_first_that_no_tier_has():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, [*KEYS[:6], *KEYS[7:]])
        async with world.node("a", [tier]) as a:
            await a.put(KEYS[:2])
            promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert [one.num_chunks for one in promoted] == [4] and await a.cached(KEYS) == 6

    run_sim(main)


def test_a_damaged_chunk_ends_the_run_and_is_removed_or_comes_from_the_next_tier():
    async def main(second: bool):
        world = TierWorld()
        first, other = shared_tier(world.world.clock), shared_tier(world.world.clock)
        other.name = "other"
        put_into(first, KEYS, damaged=KEYS[3:4])
        put_into(other, KEYS if second else [])
        async with world.node("a", [first, other]) as a:
            promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert sum(one.num_chunks for one in promoted) == (12 if second else 3)
            assert await a.cached(KEYS) == (12 if second else 3)
            await a.settled()
            name = ChunkName(SPEC.fingerprint, KEYS[3])
            if second:
                assert first.chunks[name][0][HEADER_BYTES:] == payload(KEYS[3][0]), "saved anew, as it should be"
            else:
                assert name not in first.chunks
            assert a.tiers.promoter.counts["memory", "damaged"] == 1
            assert world.world.state.num_reservations == 0

    for second in (False, True):
        run_sim(lambda second=second: main(second))


def test_one_chunk_asked_for_by_many_is_fetched_once():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a:
            gate.delay_s = 0.1
            got = await asyncio.gather(*(a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5) for _ in range(20)))
            assert sum(one.num_chunks for each in got for one in each) == len(KEYS)
            assert a.tiers.promoter.counts["memory", "promoted"] == len(KEYS) and await a.cached(KEYS) == len(KEYS)

    run_sim(main)


def test_a_tier_that_is_late_or_away_costs_its_time_and_nothing_is_left():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        loop = asyncio.get_running_loop()
        async with world.node("a", [tier], limits=MoveLimits(find_s=0.25, first_find_s=0.25)) as a:
            gate.delay_s = 100
            began = loop.time()
            assert await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=2) == []
            assert loop.time() - began < 0.5
            for _ in range(5):
                await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=2)
            began = loop.time()
            assert await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=2) == [] and loop.time() - began < 0.01
            gate.delay_s = 0
            await asyncio.sleep(5)
            assert sum(one.num_chunks for one in await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=2)) == 12
            assert world.world.state.num_reservations == 0

    run_sim(main)


def test_a_cancelled_promotion_gives_its_room_back_and_another_goes_on():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a:
            gate.delay_s = 0.2
            task = asyncio.create_task(a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5))
            other = asyncio.create_task(a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5))
            await asyncio.sleep(0.3)
            task.cancel()
            got = await asyncio.gather(task, other, return_exceptions=True)
            assert isinstance(got[0], asyncio.CancelledError)
            assert sum(one.num_chunks for one in got[1]) == len(KEYS)
            await asyncio.sleep(1)
            assert world.world.state.num_reservations == 0 and await a.cached(KEYS) == len(KEYS)

    run_sim(main)


def test_while_it_is_paused_nothing_is_promoted_and_nothing_stays_reserved():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a:
            gate.delay_s = 0.2
            task = asyncio.create_task(a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5))
            await asyncio.sleep(0.3)
            async with a.tiers.promoter.work.paused():
                assert await task == [] and await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5) == []
                await asyncio.sleep(1)
                assert world.world.state.num_reservations == 0
            assert len(await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)) == 1

    run_sim(main)


def test_room_is_made_in_the_nodes_own_segment_and_a_full_one_ends_the_run():
    async def main():
        world = TierWorld(StoreConfig(retire_grace_s=0.0, high_watermark=1.0, low_watermark=0.9))
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        async with world.node("a", [tier], chunks=4) as a, world.node("b", [], chunks=64):
            old = [key(100 + number) for number in range(4)]
            await a.put(old)
            promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert sum(one.num_chunks for one in promoted) <= 4
            assert all(ref.ref.segment_id == "a.1" for one in KEYS for ref in world.world.replicas(one))

    run_sim(main)


def test_computing_is_chosen_where_it_is_faster_and_loading_tried_now_and_then():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier], limits=MoveLimits(explore=4)) as a:
            gate.delay_s = 0.2
            promoter = a.tiers.promoter
            await promoter.promote(KEYS[:1], SHAPE, timeout_s=5)
            promoter.prefill_rate.observe(1_000_000, 1.0)
            came = [len(await promoter.promote(KEYS[: n + 2], SHAPE, timeout_s=5)) for n in range(4)]
            assert came == [0, 0, 0, 1] and promoter.counts["memory", "computed"] == 2 - 1 + 3 - 1 + 4 - 1

    run_sim(main)


def test_a_tier_that_was_slow_for_long_is_used_again_after_the_next_try():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier], limits=MoveLimits(explore=4)) as a:
            promoter, gate.delay_s = a.tiers.promoter, 0.2
            await promoter.promote(KEYS[:1], SHAPE, timeout_s=5)
            gate.delay_s = 0.001
            (slow,) = [one.rate("load") for one in promoter._tiers]
            promoter.prefill_rate.observe(1_000_000, 1.0)
            for n in range(4):
                await promoter.promote(KEYS[: n + 2], SHAPE, timeout_s=5)
            (fast,) = [one.rate("load") for one in promoter._tiers]
            assert fast > 50 * slow, "half of what the try showed"

    run_sim(main)


@pytest.mark.parametrize(
    ("tokens_per_s", "answers_after_s", "found"),
    [(None, 0.9, True), (None, 1.1, False), (1e9, 0.2, True), (1e9, 0.3, False), (0.1, 1.9, True), (0.1, 2.1, False)],
)
def test_how_long_an_answer_is_waited_for_follows_from_what_computing_takes(tokens_per_s, answers_after_s, found):
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a:  # its `timeout_s` is 2
            if tokens_per_s is not None:
                a.tiers.promoter.prefill_rate.observe(tokens_per_s, 1.0)
            gate.delay_s = answers_after_s
            plan = asyncio.create_task(a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=60))
            await asyncio.sleep(answers_after_s)
            gate.delay_s = 0.0
            assert bool(await plan) is found

    run_sim(main)


def test_admission_at_second_use_saves_what_prompts_ask_for_twice():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [(tier, RedisTierConfig(url="redis://x", admission="second_use"))]) as a:
            a.tiers.filler.on_asked(KEYS)
            await a.put(KEYS)
            await a.settled()
            assert not tier.chunks
            a.tiers.filler.on_asked(KEYS[:5])
            await a.settled()
            assert set(tier.chunks) == names(KEYS[:5])

    run_sim(main)


def test_a_full_queue_drops_and_counts_and_eviction_waits_for_nobody():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        async with world.node("a", [tier], limits=MoveLimits(max_queued=5)) as a:
            gate.up = False
            await a.put(KEYS)
            await asyncio.sleep(0.1)
            world.forget(KEYS[:3])
            await asyncio.sleep(0.1)
            counts = a.tiers.filler.counts
            assert counts["memory", "dropped"] == len(KEYS) - 5 and counts["memory", "gone"] == 3
            gate.up = True
            await a.settled()
            assert set(tier.chunks) == names(KEYS[3:5])

    run_sim(main)


@pytest.mark.parametrize("what", ["metadata", "tier"])
def test_what_could_not_be_saved_is_saved_when_the_other_side_is_back(what):
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        async with world.node("a", [tier]) as a:
            a.wire.down.update({""} if what == "metadata" else ())
            gate.up = what != "tier"
            await a.put(KEYS)
            await asyncio.sleep(3)
            assert not tier.chunks
            a.wire.down.clear()
            gate.up = True
            await a.settled()
            assert set(tier.chunks) == names()

    run_sim(main)


def test_two_nodes_share_what_one_tier_holds():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            await a.put(KEYS)
            await a.settled()
        tier._closed = False
        world.forget(KEYS)
        async with world.node("b", [tier]) as b:
            assert len(await b.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)) == 1
            assert await b.cached(KEYS) == len(KEYS)

    run_sim(main)


def test_without_time_nothing_is_asked():
    async def main():
        world, gate = TierWorld(), Gate()
        tier = shared_tier(world.world.clock, before=gate)
        async with world.node("a", [tier], config=TiersConfig(wait_s=1.0)) as a:
            assert await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=0) == [] and gate.calls == 0
            assert await a.tiers.promoter.promote([], SHAPE, timeout_s=5) == [] and gate.calls == 0

    run_sim(main)


def test_what_a_tier_did_is_reported():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            await a.put(KEYS)
            await a.settled()
            world.forget(KEYS)
            await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            (report,) = a.tiers.reports()
            assert (report.name, report.shared, report.num_chunks, report.problem) == ("memory", True, 12, "")
            assert report.counts["saved"] == report.counts["promoted"] == 12 and report.load_rate

    run_sim(main)


class DirectPeers(PeerDisks):
    """Asks the other node in the same process."""

    nodes: ClassVar[dict[str, TierNode]] = {}

    async def promote(self, node_id, names, *, owner=None, timeout_s):
        request = PromoteRequest(
            fingerprint=names[0].fingerprint,
            keys=[name.key for name in names],
            deadline_s=timeout_s,
            owner=owner if owner is not None else msgspec.UNSET,
        )
        reply = await self.nodes[node_id].tiers.promote(request)
        return PromoteReply(promoted=[msgspec.structs.replace(one, node=node_id) for one in reply.promoted])


def test_what_lies_on_another_nodes_disk_is_brought_into_that_nodes_segment():
    async def main():
        world = TierWorld()
        disk = DiskLike(world.world.clock)
        put_into(disk, KEYS[:8])
        peers = lambda client: DirectPeers(client, None, "b")  # noqa: E731
        cold, empty = TiersConfig(warm_up=0.0), DiskLike(world.world.clock)
        async with world.node("a", [disk], config=cold) as a, world.node("b", [empty], peers=peers) as b:
            DirectPeers.nodes = {"a": a}
            for node in (a, b):
                assert not node.tiers.announced
                node.tiers.registered()
            await asyncio.sleep(0.01)
            assert a.tiers.announced and b.tiers.announced, "told as soon as the node has registered"
            promoted = await b.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert [(one.tier, one.node, one.num_chunks) for one in promoted] == [("disk", "a", 8)]
            assert await b.cached(KEYS) == 8
            assert {ref.ref.segment_id for one in KEYS[:8] for ref in world.world.replicas(one)} == {"a.1"}
            await a.put(KEYS[8:])
            await a.settled()
            await asyncio.sleep(1)
            world.forget(KEYS)
            assert sum(one.num_chunks for one in await b.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)) == 12

    run_sim(main)


def test_after_a_start_the_disks_chunks_are_warmed_up_to_a_share_of_the_segment():
    async def main():
        world = TierWorld()
        disk = DiskLike(world.world.clock)
        keys = [key(number) for number in range(1, 60)]
        put_into(disk, keys)
        async with world.node("a", [disk], chunks=40, config=TiersConfig(warm_up=0.5)) as a:
            await asyncio.sleep(5)
            assert a.tiers.warmer.promoted_chunks == await a.cached(keys) > 0
            assert world.world.stats().segments[0].used_bytes <= 0.9 * 40 * 4096

    run_sim(main)


def test_a_metadata_server_that_starts_again_is_told_again():
    async def main():
        world = TierWorld()
        disk = DiskLike(world.world.clock)
        put_into(disk, KEYS)
        async with world.node("a", [disk]) as a:
            a.wire.down.add("tell_holdings")
            a.tiers.registered()
            await asyncio.sleep(3)
            assert not a.tiers.announced
            a.wire.down.clear()
            await asyncio.sleep(2)
            assert a.tiers.announced
            holdings = world.world.state._holdings
            assert len(holdings) == 12
            holdings.drop("a")
            a.tiers.registered()
            await asyncio.sleep(0.01)
            assert len(holdings) == 12

    run_sim(main)


async def test_a_codec_lies_between_node_and_tier_and_refuses_kv_that_it_cannot_take():
    world = TierWorld()
    tier = shared_tier(world.world.clock)
    section = RedisTierConfig(url="redis://memory", codec="lossless")
    async with world.node("a", [(tier, section)]) as a:
        assert await a.put(KEYS) == KEYS
        await a.settled()
        assert set(tier.chunks) == names()
        assert all(len(value) < HEADER_BYTES + SPEC.chunk_bytes for value, _ in tier.chunks.values())
        world.forget(KEYS)
        promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
        assert [(one.tier, one.num_chunks) for one in promoted] == [("memory", len(KEYS))]
        assert await a.cached(KEYS) == len(KEYS)
    lossy = msgspec.structs.replace(section, codec="int8")
    with pytest.raises(ConfigError, match=r"tiers\.memory\.codec: int8 cannot be used here"):
        async with world.node("b", [(tier, lossy)]):
            pass
