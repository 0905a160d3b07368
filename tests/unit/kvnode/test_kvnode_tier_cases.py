"""Single cases of filling and promoting, most of them found by the simulation or by reading for its kind."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest
from support.sim_loop import run_sim
from support.store_fakes import CHUNK_BYTES, SPEC, key, payload
from support.tier_world import TierWorld, put_into, shared_tier

from kvcore.chunk_keys import chunk_keys, rank_key, root_key
from kvcore.config.schema import StoreConfig
from kvcore.documents.keys import keys_of_documents
from kvnode.tasks import cancelled, spawned
from kvnode.tiers.choice import LoadCosts, choose
from kvnode.tiers.limits import MoveLimits
from kvnode.tiers.shape import ChunkShape
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.tiers.base import ChunkName
from kvstore.tiers.rate import RunningRate
from metadata_server.messages import Event, EventKind
from nodeapi.documents import Documents
from nodeapi.messages import (
    GenerateRequest,
    LegInfo,
    PrefillRequest,
    PrefillResult,
    Promoted,
    PromoteReply,
    PromoteRequest,
    Timings,
)
from nodeapi.sampling import SamplingParams

KEYS = [key(number) for number in range(1, 13)]
SHAPE = ChunkShape.of(SPEC)
TWO_RANKS = msgspec.structs.replace(SPEC, tp_size=2)


def names(keys=KEYS):
    return {ChunkName(SPEC.fingerprint, one) for one in keys}


def put_rank(tier, name: ChunkName, *, length: int = CHUNK_BYTES) -> None:
    """One chunk under any name, of any length, well-formed."""
    body = payload(name.key[0])[:1] * length
    header = ChunkHeader(name.key, name.fingerprint, SPEC.chunk_tokens, length, checksum([memoryview(body)]), 7)
    tier.chunks[name] = (pack(header) + body, None)
    tier._used += HEADER_BYTES + length


def events(kind, keys=KEYS, node="a"):
    segment = "" if kind is EventKind.NODE_DOWN else f"{node}.1"
    return [Event(seq=1, kind=kind, node_id=node, segment_id=segment, keys=[] if not segment else list(keys))]


def test_what_is_gone_before_the_filler_looks_ends_it_not():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            await asyncio.sleep(1)
            a.tiers.filler.on_events(events(EventKind.STORED))
            a.tiers.filler.on_events(events(EventKind.REMOVED))
            await asyncio.sleep(1)
            await a.put(KEYS)
            await a.settled()
            assert set(tier.chunks) == names()

    run_sim(main)


def test_what_a_tier_gave_up_is_saved_again_when_it_was_computed_again():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            for _ in range(2):
                await a.put(KEYS)
                await a.settled()
                assert set(tier.chunks) == names()
                world.forget(KEYS)
                tier.chunks.clear()
                await asyncio.sleep(0.1)

    run_sim(main)


def test_a_node_that_has_lost_its_place_waits_for_none_of_its_chunks():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            await asyncio.sleep(1)
            a.tiers.filler.on_events(events(EventKind.STORED))
            await asyncio.sleep(2)
            assert not a.tiers.filler.idle, "as far as it knows they are there, and nobody can say where"
            a.tiers.filler.on_events(events(EventKind.NODE_DOWN, node="b"))
            assert not a.tiers.filler.idle
            a.tiers.filler.on_events(events(EventKind.NODE_DOWN))
            assert a.tiers.filler.idle

    run_sim(main)


def test_a_chunk_of_another_length_is_removed_and_not_found_again_and_again():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        put_rank(tier, ChunkName(SPEC.fingerprint, KEYS[2]), length=16)
        async with world.node("a", [tier]) as a:
            await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert await a.cached(KEYS) == 2
            assert ChunkName(SPEC.fingerprint, KEYS[2]) not in tier.chunks
            assert a.tiers.promoter.counts["memory", "damaged"] == 1

    run_sim(main)


def test_a_warm_up_goes_on_behind_what_is_short_or_damaged():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS, damaged=KEYS[3:4])
        put_rank(tier, ChunkName(SPEC.fingerprint, KEYS[1]), length=16)
        async with world.node("a", [tier]) as a:
            (guard,) = a.tiers.tiers
            wanted = [ChunkName(SPEC.fingerprint, one) for one in KEYS]
            assert await a.tiers.promoter.promote_names(guard, wanted, SHAPE, None) == len(KEYS) - 2
            assert wanted[1] in tier.chunks, "of its own length it may be whole"
            assert wanted[3] not in tier.chunks

    run_sim(main)


def test_a_prompt_that_comes_while_its_chunks_are_warmed_up_waits_for_them_and_finds_them():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        whole, calls = tier.load, list[int]()

        async def slow(chunks, *, timeout_s):
            calls.append(len(chunks))
            await asyncio.sleep(1)
            return await whole(chunks, timeout_s=timeout_s)

        tier.load = slow
        async with world.node("a", [tier]) as a:
            (guard,) = a.tiers.tiers
            promoter = a.tiers.promoter
            wanted = [ChunkName(SPEC.fingerprint, one) for one in KEYS]
            warming = asyncio.create_task(promoter.promote_names(guard, wanted[:8], SHAPE, None))
            await asyncio.sleep(0.5)
            promoted = await promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert await warming == 8 and [one.num_chunks for one in promoted] == [4]
            assert await a.cached(KEYS) == 12 and calls == [8, 4]

    run_sim(main)


def test_a_prompts_rest_is_not_saved():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        async with world.node("a", [tier]) as a:
            rest = key(100)
            async with await a.store.begin_put([rest], prefer_segment="a.1", timeout_s=5, sizes={rest: 16}) as session:
                await session.write(rest, 1, [memoryview(bytes(16))], timeout_s=5)
                assert await session.commit(timeout_s=5) == [rest]
            await a.put(KEYS)
            await a.settled()
            assert set(tier.chunks) == names() and a.tiers.filler.idle

    run_sim(main)


def test_chunks_that_another_node_brought_meanwhile_end_no_run():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        async with world.node("a", [tier]) as a, world.node("b", [tier]) as b:
            whole = a.tiers.promoter.loader.load

            async def late(plan, num_bytes, end):
                await b.tiers.promoter.promote(KEYS[:4], SHAPE, timeout_s=5)
                return await whole(plan, num_bytes, end)

            a.tiers.promoter.loader.load = late
            promoted = await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert [one.num_chunks for one in promoted] == [8] and await a.cached(KEYS) == 12

    run_sim(main)


def test_of_a_tensor_parallel_engine_all_ranks_parts_are_promoted():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        shape = ChunkShape.of(TWO_RANKS)
        wanted = shape.names(KEYS)
        assert [name.key for name in wanted[:4]] == [KEYS[0], rank_key(KEYS[0], 1), KEYS[1], rank_key(KEYS[1], 1)]
        assert len({name.fingerprint for name in wanted}) == 2
        for name in wanted:
            put_rank(tier, name)
        del tier.chunks[wanted[9]]
        async with world.node("a", [tier]) as a:
            a.tiers.engine_ready(TWO_RANKS)
            request = PromoteRequest(fingerprint=shape.fingerprint, keys=list(KEYS), deadline_s=5)
            (promoted,) = (await a.tiers.promote(request)).promoted
            assert promoted.num_chunks == 9, "both ranks' parts of four chunks, and one's of the fifth"
            for rank in range(2):
                match = await a.store.match([rank_key(one, rank) for one in KEYS], timeout_s=5)
                await a.store.release(match)
                assert match.num_chunks == 5 - rank

    run_sim(main)


def test_a_leg_says_what_was_chosen_and_has_the_time_that_is_left():
    async def main():
        world = TierWorld()
        tier = shared_tier(world.world.clock)
        prompt = list(range(1, 5 * SPEC.chunk_tokens + 2))
        async with world.node("a", [tier]) as a:
            request = PrefillRequest(request_id="r", prompt_token_ids=prompt, deadline_s=9.0)
            same, given = await a.tiers.before_leg(request)
            assert same.deadline_s <= 9.0 and not given.promoted and not given.choices, "no tier had any of it"
            keys = chunk_keys(root_key(SPEC.fingerprint, b""), prompt, SPEC.chunk_tokens)
            for one in keys:
                put_rank(tier, ChunkName(SPEC.fingerprint, one))
            sampling = SamplingParams(max_tokens=1)
            alone = GenerateRequest(
                request_id="r", prompt_token_ids=prompt, sampling=sampling, deadline_s=9.0, reuse=False
            )
            assert await a.tiers.before_leg(alone) == (alone, PromoteReply()), "it reuses nothing"
            _, given = await a.tiers.before_leg(request)
            (choice,) = given.choices
            assert (choice.tier, choice.use, choice.num_chunks) == ("memory", "load", 5)
            assert choice.load_s is None and choice.compute_s is None, "nothing is measured yet"
            world.forget(keys)
            little = LegInfo(cached_tokens=0, computed_tokens=SPEC.chunk_tokens - 1, timings=Timings(compute_s=5.0))
            a.tiers.after_leg(little)
            assert a.tiers.promoter.prefill_rate.value is None, "less than a chunk says nothing"
            second = Timings(compute_s=1.0)
            much = PrefillResult(
                request_id="r", cached_tokens=0, computed_tokens=10**12, stored_chunks=0, timings=second
            )
            a.tiers.after_leg(much)
            _, given = await a.tiers.before_leg(request)
            (choice,) = given.choices
            assert choice.use == "compute" and choice.load_s > choice.compute_s > 0 and not given.promoted

    run_sim(main)


@pytest.mark.parametrize("spec", [SPEC, TWO_RANKS])
def test_a_leg_tells_the_node_s_own_tiers_which_chunk_continues_which(spec):
    async def main():
        world, told = TierWorld(), []
        prompt = list(range(1, 5 * spec.chunk_tokens + 1))
        async with world.node("a", [shared_tier(world.world.clock)]) as a:
            a.tiers.engine_ready(spec)
            a.tiers.local["disk"] = SimpleNamespace(link=told.append)
            await a.tiers.before_leg(PrefillRequest(request_id="r", prompt_token_ids=prompt, deadline_s=9.0))
        keys = chunk_keys(root_key(spec.fingerprint, b""), prompt, spec.chunk_tokens)
        assert len(keys) == 5 and told == [ChunkShape.of(spec).names(keys)]

    run_sim(main)


@pytest.mark.parametrize(
    ("load_rate", "prefill_rate", "load", "seconds"),
    [
        (None, None, True, (None, None)),
        (100.0, None, True, (10.0, None)),
        (None, 5.0, True, (None, 4.0)),
        (100.0, 5.0, False, (10.0, 4.0)),
        (250.0, 5.0, True, (4.0, 4.0)),
    ],
)
def test_it_loads_unless_computing_is_known_to_be_faster(load_rate, prefill_rate, load, seconds):
    choice = choose(LoadCosts(1000, 20, load_rate, prefill_rate))
    assert (choice.load, (choice.load_s, choice.compute_s)) == (load, seconds)


def test_a_task_that_fails_says_so_at_once():
    async def main():
        told = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))

        async def broken() -> None:
            raise ValueError("a bug")

        failed, ended = spawned(broken(), "broken"), spawned(asyncio.sleep(100), "sleeps")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert [str(context["exception"]) for context in told] == ["a bug"] and "broken" in told[0]["message"]
        await cancelled(failed, ended)
        assert len(told) == 1

    asyncio.run(main())


class ScriptedPeers:
    """Other nodes' disks: `holds[node]` is what each has; it brings one run of it at a time into its segment."""

    def __init__(self, holds, nodes) -> None:
        self.holds, self.nodes, self.asked = holds, nodes, []

    async def holders(self, keys, *, timeout_s):
        return [[node for node, having in self.holds.items() if one in having] for one in keys]

    async def promote(self, node_id, names, *, owner=None, timeout_s):
        self.asked.append((node_id, len(names)))
        brought = await self.nodes[node_id].put([name.key for name in names]) if node_id in self.nodes else []
        return PromoteReply(promoted=[Promoted(tier="disk", node=node_id, num_chunks=len(brought))] if brought else [])


def test_a_prompt_that_lies_by_turns_on_two_disks_is_brought_whole_and_who_has_nothing_is_asked_once():
    async def main():
        world = TierWorld()
        nodes, holds = {}, {"b": KEYS[:3] + KEYS[6:9], "c": KEYS[3:6] + KEYS[9:], "gone": KEYS[:4]}
        peers = ScriptedPeers(holds, nodes)
        async with (
            world.node("a", [], peers=lambda _: peers) as a,
            world.node("b", []) as nodes["b"],
            world.node("c", []) as nodes["c"],
        ):
            await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert await a.cached(KEYS) == len(KEYS)
            assert peers.asked == [("gone", 4), ("b", 3), ("c", 3), ("b", 3), ("c", 3)]

    run_sim(main)


def test_another_nodes_disk_is_waited_for_no_longer_than_computing_takes():
    async def main():
        given: list[float] = []

        class Noting(ScriptedPeers):
            async def promote(self, node_id, names, *, owner=None, timeout_s):
                given.append(timeout_s)
                return await super().promote(node_id, names, owner=owner, timeout_s=timeout_s)

        world, tokens = TierWorld(), len(KEYS) * SHAPE.chunk_tokens
        async with world.node("a", [], peers=lambda _: Noting({"b": KEYS}, {})) as a:
            promoter = a.tiers.promoter
            await promoter.promote(KEYS, SHAPE, timeout_s=5)
            for seconds in (1.0, 0.001):
                promoter.prefill_rate = RunningRate()
                promoter.prefill_rate.observe(tokens, seconds)
                await promoter.promote(KEYS, SHAPE, timeout_s=5)
        unknown, second, never_less = given
        assert unknown > 4.9 and 0.99 < second <= 1.0 and never_less == MoveLimits().find_s

    run_sim(main)


def test_what_pushes_out_its_own_prompt_is_not_brought_again_and_again():
    async def main():
        world = TierWorld(StoreConfig(retire_grace_s=0.0, high_watermark=1.0, low_watermark=0.5))
        tier = shared_tier(world.world.clock)
        put_into(tier, KEYS)
        async with world.node("a", [tier], chunks=4, limits=MoveLimits(batch_chunks=2)) as a:
            loop = asyncio.get_running_loop()
            began = loop.time()
            await a.tiers.promoter.promote(KEYS, SHAPE, timeout_s=5)
            assert loop.time() - began < 1.0
            assert a.tiers.promoter.counts["memory", "promoted"] <= 2 * len(KEYS)

    run_sim(main)


def test_the_documents_of_a_leg_are_brought_each_by_itself():
    async def main():
        world, told = TierWorld(), []
        tier = shared_tier(world.world.clock)
        size = SPEC.chunk_tokens
        prompt = list(range(1, 6 * size + 2))
        said = Documents(header=size + 1, spans=[(size + 1, 3 * size), (4 * size, 6 * size)])
        request = PrefillRequest(request_id="r", prompt_token_ids=prompt, documents=said, deadline_s=9.0)
        header, *_ = whole = chunk_keys(root_key(SPEC.fingerprint, b""), prompt, size)
        _, second = apart = keys_of_documents(
            SPEC.fingerprint, b"", prompt, said.header, said.spans, chunk_tokens=SPEC.chunk_tokens
        )
        async with world.node("a", [tier]) as a:
            a.tiers.engine_ready(SPEC)
            a.tiers.local["disk"] = SimpleNamespace(link=told.append)
            for one in (header, *second):
                put_rank(tier, ChunkName(SPEC.fingerprint, one))
            _, given = await a.tiers.before_leg(request)
            assert sum(one.num_chunks for one in given.promoted) == 3, "though the first document is nowhere"
            assert (await a.store.match(second, timeout_s=5, leased=False)).num_chunks == 2
            assert told == [ChunkShape.of(SPEC).names(keys) for keys in (whole, *apart)]

    run_sim(main)
