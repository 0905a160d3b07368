"""What a seed of a cluster with tiers stands for: small segments, prompts that come again, faults of tiers. Pure."""

import random

from support.sim_plan import BLOCK, CHUNK, FIRST_S, Fault, Plan, Wanted
from support.sim_tiers import REDIS, TierPlan

from kvcore.config.schema import SimEngineConfig, StoreConfig
from kvnode.tiers.limits import MoveLimits
from nodeapi.sampling import SamplingParams

ROOM = 4096
"""What one chunk takes in a segment."""
LOAD_S = 5.0
_VALUE = 1024
"""At least what one chunk takes in a tier."""
_FAULTS = ["away", "slow", "full", "lose", "damage", "damage", "moving", "moving", "promote", "node", "metadata"]
_WORLDS = [("p1", "d1"), ("p1", "d1"), ("p1", "p2", "d1"), ("d1", "d2"), ("p1", "d1", "s1")]


def make_tier_plan(seed: int, *, faults: bool = True) -> Plan:
    """The plan of a seed; without `faults` the machines and media do as they should, all the time."""
    dice = random.Random(f"tier plan {seed}")
    nodes = dice.choice(_WORLDS)
    prefixes = [
        [dice.randrange(1, 300) for _ in range(CHUNK * dice.randrange(2, 7))] for _ in range(dice.randrange(3, 6))
    ]
    requests = [_request(dice, f"r{number}", prefixes) for number in range(dice.randrange(10, 15))]
    tiers = _tiers(dice, nodes)
    planned = _restart(dice, nodes) if not faults or dice.random() < 0.6 else []
    if faults:
        planned += [fault for _ in range(dice.randrange(2, 6)) for fault in _fault(dice, nodes, tiers, requests)]
    return Plan(
        engine=SimEngineConfig(
            block_size=BLOCK,
            num_blocks=dice.choice([60, 100]),
            bytes_per_token=16,
            max_context=512,
            vocab_size=300,
            prefill_tokens_per_s=dice.choice([500.0, 2000.0, 2000.0, 100_000.0]),
            inter_token_s=0.01,
            max_batch_tokens=dice.choice([40, 128, 400]),
            max_sequences=dice.choice([2, 4, 16]),
        ),
        store=StoreConfig(
            reserve_ttl_s=dice.choice([0.5, 2.0, 5.0]), read_lease_s=dice.choice([0.5, 3.0]), retire_grace_s=0.2
        ),
        segment_bytes=ROOM * dice.choice([2, 5, 8]),
        requests=sorted(requests, key=lambda request: request.at_s),
        faults=sorted(planned, key=lambda fault: fault.at_s),
        weather=dice.choice([0.3, 1.0, 3.0]),
        node_ttl_s=dice.choice([0.8, 2.0]),
        nodes=nodes,
        tiers=tiers,
    )


def _request(dice: random.Random, name: str, prefixes: list[list[int]]) -> Wanted:
    prompt = dice.choice(prefixes) + [dice.randrange(1, 300) for _ in range(dice.choice([1, 2, 20, CHUNK + 1]))]
    sampling = SamplingParams(
        temperature=dice.choice([0.0, 1.0]),
        seed=dice.randrange(1 << 40),
        max_tokens=dice.randrange(1, 12),
        n=dice.choice([1, 1, 1, 2]),
        ignore_eos=True,
    )
    leaves = dice.randrange(1, 4) if dice.random() < 0.1 else None
    return Wanted(name, FIRST_S + dice.random() * LOAD_S, prompt, sampling, leaves)


def _tiers(dice: random.Random, nodes: tuple[str, ...]) -> TierPlan:
    which = dice.choice(["disk", "disk", "redis", "both"])
    disks = nodes if which != "redis" else ()
    return TierPlan(
        disks=disks if dice.random() < 0.8 else disks[:1],
        redis=which != "disk",
        disk_bytes=_VALUE * dice.choice([4, 64, 64]),
        redis_bytes=_VALUE * dice.choice([6, 128, 128]),
        admission=dice.choice(["always", "always", "always", "second_use"]),
        ttl_s=dice.choice([None, None, None, 1.0]),
        timeout_s=dice.choice([0.3, 1.0, 2.0]),
        wait_s=dice.choice([0.3, 2.0]),
        warm_up=dice.choice([0.0, 0.5, 1.0]),
        in_flight=dice.choice([512, 4096, 1 << 20]),
        bytes_per_s=dice.choice([50e3, 1e6, 10e6]),
        rot=dice.choice([0.0, 0.0, 0.3]),
        limits=_limits(dice),
    )


def _limits(dice: random.Random) -> MoveLimits:
    """Small ones, so that each bound is met."""
    return MoveLimits(
        max_queued=dice.choice([3, 16_384, 16_384]),
        max_remembered=dice.choice([40, 262_144]),
        batch_chunks=dice.choice([1, 3, 16]),
        batch_bytes=dice.choice([1500, 32 << 20]),
        announce_keys=dice.choice([2, 4096]),
        explore=dice.choice([2, 16]),
    )


def _restart(dice: random.Random, nodes: tuple[str, ...]) -> list[Fault]:
    """All of it is stopped and started again, in the middle."""
    at_s = FIRST_S + LOAD_S * dice.uniform(0.4, 0.6)
    faults = [Fault(at_s, "kill_metadata"), Fault(at_s + 0.1, "start_metadata")]
    for name in nodes:
        faults += [Fault(at_s, "kill_node", (name,)), Fault(at_s + dice.uniform(0.05, 0.3), "start_node", (name,))]
    return faults


def _fault(dice: random.Random, nodes: tuple[str, ...], tiers: TierPlan, requests: list[Wanted]) -> list[Fault]:
    at_s = dice.choice(requests).at_s + dice.choice([0.02, 0.1, 0.4]) * dice.random()
    end_s = at_s + dice.choice([0.05, 0.3, 1.0, 3.0])
    medium = dice.choice([*(f"disk-{name}" for name in tiers.disks), *([REDIS] if tiers.redis else [])])
    match dice.choice(
        ["away", "slow", "full", "lose", "damage", "damage", "moving", "moving", "promote", "node", "metadata"]
    ):
        case "away" | "slow" | "full" as state:
            return [Fault(at_s, "tier", ("become", medium, state)), Fault(end_s, "tier", ("become", medium, "ok"))]
        case "lose" | "damage" as what:
            share = dice.choice(["0.2", "0.6", "1"])
            return [Fault(at_s, "tier", (what, medium, share))]
        case "moving":
            return [
                Fault(at_s, "tier", ("kill_in", dice.choice(["find", "load", "save"]), dice.choice(["node", "engine"])))
            ]
        case "promote":
            return [Fault(at_s, "tier", ("cut_in_promote", dice.choice(["to", "from"])))]
        case "node":
            where = (dice.choice(nodes),)
            return [Fault(at_s, "kill_node", where), Fault(end_s, "start_node", where)]
        case _:
            return [Fault(at_s, "kill_metadata"), Fault(end_s, "start_metadata")]
