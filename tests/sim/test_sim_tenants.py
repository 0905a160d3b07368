"""Two tenants of one cluster, one of which floods it: what the other has stored stays once each has a share."""

import dataclasses
import logging
import random

import pytest
from support.sim_cluster import SimCluster, Variant
from support.sim_loop import SimSeedLoop, run_sim
from support.sim_plan import BLOCK, CHUNK, Fault, Plan, Wanted
from support.sim_tiers import TierPlan

from kvcore.chunk_keys import owner_of
from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvnode.tiers.limits import MoveLimits
from nodeapi.sampling import SamplingParams
from router.requests.records import RequestRecord

TALKS, ROUNDS, CHUNKS = 4, 6, 5
"""The calm tenant asks each of its prompts, of so many chunks, in so many rounds."""
SEGMENT_CHUNKS = 24


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def plan_of(seed: int, *, flood: bool, tenant_share: float | None) -> Plan:
    dice = random.Random(seed)

    def wanted(name: str, at_s: float, prompt: list[int], salt: bytes) -> Wanted:
        sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
        return Wanted(name, at_s, prompt, sampling, None, salt)

    def prompt() -> list[int]:
        return [dice.randrange(1, 300) for _ in range(CHUNK * CHUNKS + 3)]

    talks = [prompt() for _ in range(TALKS)]
    requests = [
        wanted(f"calm{turn}-{talk}", 1.0 + 4 * turn + 0.5 * talk, talks[talk], b"calm")
        for turn in range(ROUNDS)
        for talk in range(TALKS)
    ]
    if flood:
        requests += [wanted(f"flood{n}", 1.0 + 0.2 * n, prompt(), b"flood") for n in range(20 * ROUNDS)]
    return Plan(
        engine=SimEngineConfig(
            block_size=BLOCK,
            num_blocks=4 * CHUNKS * CHUNK // BLOCK,
            bytes_per_token=16,
            max_context=512,
            vocab_size=300,
            prefill_tokens_per_s=4000.0,
            inter_token_s=0.005,
            max_batch_tokens=4 * CHUNK,
        ),
        store=StoreConfig(retire_grace_s=0.5, tenant_share=tenant_share, max_replicas=1),
        segment_bytes=4096 * SEGMENT_CHUNKS,
        requests=requests,
        faults=[],
        weather=0.0,
    )


def played(plan: Plan, seed: int = 1) -> tuple[float, SimCluster]:
    """The share of the calm tenant's prompt tokens that were cached, after the first round."""
    records: list[RequestRecord] = []
    loop = SimSeedLoop(seed, 300.0)

    async def main() -> SimCluster:
        cluster = SimCluster(seed, loop, Variant(peaceful=True, plan=plan))
        cluster.log.observers.append(records.append)
        await cluster.run()
        return cluster

    cluster = run_sim(main, loop=loop)
    assert not cluster.problems, cluster.problems
    assert {one.state for one in records} == {"ok"}
    calm = [one for one in records if one.id.startswith("calm") and not one.id.startswith("calm0")]
    return sum(one.cached_tokens for one in calm) / sum(one.prompt_tokens for one in calm), cluster


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 5))
def test_a_tenant_that_floods_costs_the_other_one_prompt_in_twenty_at_most(seed):
    """One, early on: where more of its first chunks lie in one segment than its share of that has room for."""
    alone, _ = played(plan_of(seed, flood=False, tenant_share=None), seed)
    flooded, _ = played(plan_of(seed, flood=True, tenant_share=None), seed)
    held, cluster = played(plan_of(seed, flood=True, tenant_share=0.5), seed)
    assert flooded < alone - 0.3, "the flood was too small to show anything"
    assert held > alone - 0.05
    assert cluster.metadata.core.state.counters["evicted_own"] > 0


def test_after_all_was_started_again_each_tenant_is_held_to_its_share_as_before():
    """Nodes bring what their disks have, another life of the metadata server is told what lies in segments: of every
    chunk in any of them it is known whose it is."""
    plan = plan_of(1, flood=True, tenant_share=0.25)
    slow = MoveLimits(batch_chunks=1)  # so that a warm-up is under way still when its node is known
    disks = TierPlan(disks=plan.nodes, redis=False, disk_bytes=1 << 20, redis_bytes=0, warm_up=1.0, limits=slow)
    killed = [Fault(9.0, "kill_node", (name,)) for name in plan.nodes]
    started = [Fault(9.5, "start_node", (name,)) for name in plan.nodes]
    again = [Fault(14.0, "kill_metadata"), Fault(14.3, "start_metadata")]
    faults = [Fault(9.0, "kill_metadata"), *killed, Fault(9.1, "start_metadata"), *started, *again]
    _, cluster = played(dataclasses.replace(plan, requests=plan.requests[::2], faults=faults, tiers=disks))
    assert cluster.setup.tiers.counts["tier_warmed"] > 0
    records = cluster.metadata.core.state._nodes.segments.values()
    for record in records:
        used = record._quotas.used_bytes
        assert sum(used.values()) == record.allocator.used > 0
        assert max(used.values()) <= 4096 * SEGMENT_CHUNKS // 4
    known = {owner for record in records for owner in record._quotas.used_bytes}
    assert known == {owner_of(b"calm"), owner_of(b"flood")}


def test_in_a_cluster_each_tenant_is_held_to_its_share():
    plan = plan_of(0, flood=True, tenant_share=0.25)
    _, cluster = played(dataclasses.replace(plan, requests=plan.requests[::2]))
    records = cluster.metadata.core.state._nodes.segments.values()
    used = [used for record in records for used in record._quotas.used_bytes.values()]
    assert used and max(used) <= 4096 * SEGMENT_CHUNKS // 4
