"""Two adapters and the model alone in one cluster whose nodes die: answers are right, and no KV is another's."""

import logging
import random

import pytest
from support.sim_cluster import SimCluster, Variant, run_seed
from support.sim_loop import SimSeedLoop, run_sim
from support.sim_plan import BLOCK, CHUNK, Fault, Plan, Wanted

from kvcore.chunk_keys import adapted_salt, adapter_identity
from kvcore.config.schema import SimEngineConfig, StoreConfig
from nodeapi.adapters import ServedAdapter
from nodeapi.sampling import SamplingParams
from router.requests.records import RequestRecord

ONE, TWO = (ServedAdapter(name=name, identity=adapter_identity(name, b"its files")) for name in ("one", "two"))
SALTS = {"": b"", "one": adapted_salt(ONE.identity, b""), "two": adapted_salt(TWO.identity, b"tenant")}
NODES = ("p1", "p2", "d1", "d2", "d3")
SERVED = {"p1": (ONE, TWO), "d1": (ONE, TWO), "d2": (ONE, TWO), "d3": (ONE,), "p2": (TWO,)}


@pytest.fixture(autouse=True)
def _quiet():
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


def plan_of(seed: int, faults: list[Fault], rounds: int = 4) -> Plan:
    """The same prompts by each name, one after the other, again and again."""
    dice = random.Random(seed)
    prompts = [[dice.randrange(1, 300) for _ in range(3 * CHUNK + 5)] for _ in range(3)]
    requests = [
        Wanted(
            f"{name or 'base'}-{number}-{turn}",
            1.0 + turn + 0.3 * number + 0.1 * at,
            prompt,
            SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
            None,
            salt,
        )
        for turn in range(rounds)
        for number, prompt in enumerate(prompts)
        for at, (name, salt) in enumerate(SALTS.items())
    ]
    return Plan(
        engine=SimEngineConfig(
            block_size=BLOCK,
            num_blocks=200,
            bytes_per_token=16,
            max_context=512,
            vocab_size=300,
            prefill_tokens_per_s=4000.0,
            inter_token_s=0.01,
            max_batch_tokens=4 * CHUNK,
        ),
        store=StoreConfig(retire_grace_s=0.5, max_replicas=2),
        segment_bytes=4096 * 100,
        requests=requests,
        faults=faults,
        weather=0.0,
        nodes=NODES,
        adapters=SERVED,
    )


def played(seed: int, faults: list[Fault]) -> tuple[SimCluster, list[RequestRecord]]:
    records: list[RequestRecord] = []
    loop = SimSeedLoop(seed, 300.0)

    async def main() -> SimCluster:
        cluster = SimCluster(seed, loop, Variant(peaceful=True, plan=plan_of(seed, faults)))
        cluster.log.observers.append(records.append)
        await cluster.run()
        return cluster

    cluster = run_sim(main, loop=loop)
    assert not cluster.problems, cluster.problems
    return cluster, records


def test_each_reuses_its_own_kv_and_is_sent_to_nodes_that_serve_it():
    cluster, records = played(1, [])
    assert {one.state for one in records} == {"ok"}
    for one in records:
        first = one.id.endswith("-0")
        assert (one.cached_tokens == 0) if first else (one.cached_tokens > 0), one.id
        served = {node for node, adapters in SERVED.items() if any(one.id.startswith(a.name) for a in adapters)}
        assert one.id.startswith("base") or {leg.node for leg in one.legs} <= served, (one.id, one.legs)
    answers = {tuple(answer.tokens[0]) for answer in cluster.answers}
    assert len(answers) == 9, "three prompts by three names have answers of their own"


def test_where_decoders_die_the_answer_goes_on_with_the_adapter():
    """The oracle compares every token, and every stored chunk with what must lie under its key."""
    deaths = [Fault(1.05 + 0.4 * n, "kill_node", (NODES[2 + n % 2],)) for n in range(8)]
    births = [Fault(1.25 + 0.4 * n, "start_node", (NODES[2 + n % 2],)) for n in range(8)]
    cluster, records = played(2, sorted(deaths + births, key=lambda fault: fault.at_s))
    assert {one.state for one in records} == {"ok"}
    moved = [one for one in records if len({leg.node for leg in one.legs if leg.kind == "decode"}) > 1]
    assert {one.id.partition("-")[0] for one in moved} == {"base", "one", "two"}, "too little died"
    assert len({tuple(answer.tokens[0]) for answer in cluster.answers}) == 9


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 9))
def test_with_all_kinds_of_faults(seed):
    dice = random.Random(seed)
    faults = []
    for _ in range(6):
        where, at_s = (dice.choice(NODES),), 1.0 + 4 * dice.random()
        kind = dice.choice(["node", "engine"])
        faults += [Fault(at_s, f"kill_{kind}", where), Fault(at_s + dice.random(), f"start_{kind}", where)]
    plan = plan_of(seed, sorted(faults, key=lambda fault: fault.at_s))
    outcome = run_seed(seed, Variant(plan=plan))
    assert not outcome.problems, outcome.problems
