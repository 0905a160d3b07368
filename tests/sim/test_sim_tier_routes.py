"""Where a prompt goes whose KV lies in a tier, in virtual time, on nodes with production tiers."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from support.sim_cluster import SimCluster, Variant
from support.sim_loop import SimSeedLoop, run_sim
from support.sim_plan import Plan, Wanted
from support.sim_tiers import TierPlan

from kvcore.chunk_keys import prompt_keys
from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvcore.types import Role
from metadata_server.cache_messages import NodeOrder
from nodeapi.messages import SamplingParams
from router.requests.records import RequestRecord, RouteRecord

CHUNK = 32
CHUNKS = 10
"""Of each prompt, in a segment that holds 16."""
NODES = ("p1", "d1", "d2", "d3")


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def wanted(name: str, at_s: float, prompt: list[int], max_tokens: int = 4) -> Wanted:
    return Wanted(name, at_s, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True), None)


def prompt_of(number: int) -> list[int]:
    return [number + 1, *[1 + (number + at) % 290 for at in range(CHUNKS * CHUNK)]]


def plan_of(requests: list[Wanted], *, bytes_per_s: float, redis: bool = False) -> Plan:
    """Prompts of which three fit in no segment together; a disk a node, or a server that all share."""
    tiers = TierPlan(
        disks=() if redis else NODES, redis=redis, disk_bytes=1 << 22, redis_bytes=1 << 22, bytes_per_s=bytes_per_s
    )
    engine = SimEngineConfig(
        block_size=8,
        num_blocks=64,
        bytes_per_token=16,
        max_context=512,
        vocab_size=300,
        prefill_tokens_per_s=400.0,
        inter_token_s=0.02,
        max_batch_tokens=400,
        save_output=False,
    )
    return Plan(
        engine=engine,
        store=StoreConfig(max_replicas=1),
        segment_bytes=16 * 4096,
        requests=requests,
        faults=[],
        weather=0.0,
        chunk_tokens=CHUNK,
        nodes=NODES,
        tiers=replace(tiers, warm_up=0.0, timeout_s=10.0, wait_s=10.0),
    )


Meanwhile = Callable[[SimCluster], Awaitable[None]]


def records_of(plan: Plan, meanwhile: Meanwhile | None = None) -> dict[str, RequestRecord]:
    loop, records = SimSeedLoop(1, 2000.0), dict[str, RequestRecord]()

    async def main() -> None:
        cluster = SimCluster(1, loop, Variant(peaceful=True, plan=plan))
        cluster.log.observers.append(lambda record: records.update({record.id: record}))
        tasks = [asyncio.create_task(meanwhile(cluster))] if meanwhile else []
        outcome = await cluster.run()
        await asyncio.gather(*tasks)
        assert not outcome.problems, outcome.problems

    run_sim(main, loop=loop)
    assert {record.state for record in records.values()} == {"ok"}
    return records


AGAIN_S = 30.0
COMPUTING_S = CHUNKS * CHUNK / 400.0


def twice(num_again: int) -> list[Wanted]:
    """Ten prompts, one after the other, of which each goes out of memory before it comes again."""
    requests = [wanted(f"first{number}", 1.0 + 2.0 * number, prompt_of(number)) for number in range(10)]
    return requests + [wanted(f"again{n}", AGAIN_S + 2.0 * n, prompt_of(n)) for n in range(num_again)]


def route_of(record: RequestRecord) -> RouteRecord:
    assert record.route is not None
    return record.route


def test_a_prompt_on_one_nodes_disk_goes_to_that_node_with_what_is_expected_beside_what_came():
    records = records_of(plan_of(twice(6), bytes_per_s=1e6))
    compared = 0
    for number in range(6):
        again, there = records[f"again{number}"], route_of(records[f"first{number}"]).decoder
        (leg,), route = again.legs, route_of(again)
        assert (route.prefiller, route.decoder, leg.node) == (None, there, there)
        assert (leg.cached_tokens, leg.computed_tokens) == (CHUNKS * CHUNK, 1)
        assert leg.promoted[0].tier == "disk" and leg.promoted[0].node == "", "from its own disk"
        mine, *others = (one.scores["tier_tokens"] for one in route.candidates if one.role is Role.DECODER)
        assert all(mine < other for other in others)
        if route.ways:  # from the second time on it is known how fast the disk is
            assert route.ways[0].tier == "disk" and route.ways[0].promote_s > 0 and again.ttft_s is not None
            assert route.expected_s is not None and abs(again.ttft_s - route.expected_s) < 0.1 * COMPUTING_S
            compared += 1
    assert compared >= 3


def test_a_node_with_a_long_queue_is_passed_over_and_its_disk_read_for_another():
    busy = [wanted(f"busy{n}", AGAIN_S - 2.0, [250 + n, 7], max_tokens=300) for n in range(6)]
    order = [first for first in twice(1) if first.id == "again0"]
    holder = route_of(records_of(plan_of(twice(0), bytes_per_s=1e6))["first0"]).decoder

    async def meanwhile(cluster: SimCluster) -> None:
        """Those that keep it busy go to it, as no other is there."""
        away = [name for name in NODES if name[0] == "d" and name != holder]
        await asyncio.sleep(AGAIN_S - 2.5)
        cluster.cluster.on_orders([NodeOrder(node_id=name, kind="drained", since=0.0) for name in away])
        await asyncio.sleep(1.5)
        cluster.cluster.on_orders([])

    records = records_of(plan_of([*twice(0), *busy, *order], bytes_per_s=1e6), meanwhile)
    assert {route_of(records[f"busy{n}"]).decoder for n in range(6)} == {holder}
    again = records["again0"]
    assert route_of(again).decoder != holder
    assert again.ttft_s is not None and again.ttft_s < COMPUTING_S / 4
    assert {one.node for leg in again.legs for one in leg.promoted} >= {holder}


def test_what_a_slow_disk_has_is_computed_once_it_is_known_to_be_slow():
    """Loading a prompt takes it 1.6 s, a prefiller 0.8 s for computing it; no decoder has ever computed one."""
    records = records_of(plan_of(twice(9), bytes_per_s=4e3))
    later = [records[f"again{number}"] for number in range(3, 9)]
    assert {route_of(record).prefiller for record in later} == {"p1"}
    for record in later:
        assert record.ttft_s is not None and record.ttft_s < 2 * COMPUTING_S + 0.3, "it waited for a disk, too"
        slow = [way for way in route_of(record).ways if way.tier]
        assert slow and all(way.promote_s > COMPUTING_S for way in slow), "what loading would take is beside it"


def test_what_went_out_of_memory_is_expected_in_a_tier_that_all_share_until_it_is_missed_there():
    requests = [*twice(4), wanted("more0", AGAIN_S + 20.0, prompt_of(8)), wanted("more1", AGAIN_S + 24.0, prompt_of(9))]

    async def meanwhile(cluster: SimCluster) -> None:
        await asyncio.sleep(AGAIN_S + 10.0)
        assert cluster.setup.tiers is not None and cluster.setup.tiers.redis is not None
        cluster.setup.tiers.redis.lose(1.0)
        await asyncio.sleep(11.0)
        keys = prompt_keys(cluster.cluster.nodes["d1"].fingerprint, b"", prompt_of(8), CHUNK)
        assert not set(keys) & cluster.cluster.tiers._shared.keys()

    records = records_of(plan_of(requests, bytes_per_s=1e6, redis=True), meanwhile)
    for number in range(4):
        again = records[f"again{number}"]
        assert route_of(again).reason == "all_chunks_cached"
        assert [one.tier for leg in again.legs for one in leg.promoted] == ["redis"]
    assert not [one for leg in records["more0"].legs for one in leg.promoted]
