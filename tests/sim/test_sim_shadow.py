"""A whole cluster whose router compares what was reused with what is computed, in virtual time."""

import random
from collections import Counter
from functools import cache
from unittest.mock import patch

import pytest
import support.sim_cluster
from support.sim_cluster import Outcome, SimCluster, Variant, run_seed
from support.sim_nodes import DataFaults

from engines.paged.loop import EngineLoop
from kvcore.config.kv.settings import BlendConfig
from kvcore.types import ChunkKey
from kvstore.integrity.checks import Integrity
from nodeapi.documents import CompareReply, CompareRequest
from router.shadow.comparing import ShadowComparisons
from router.shadow.gate import BlendGate
from router.shadow.limits import ShadowLimits
from router.shadow.quarantine import Dropped

SEEDS = range(6)


class Shadowed:
    """Every request that was answered from the cache is compared once its node has nothing to do."""

    def __init__(self, cluster: SimCluster, seed: int) -> None:
        self.dropped: list[ChunkKey] = []
        self.log = cluster.log
        gate = BlendGate(BlendConfig(), cluster.clock.wall)
        self.shadow = ShadowComparisons(
            cluster.cluster,
            cluster.client,
            cluster.clock,
            gate,
            self._drop,
            model="m",
            shares=(1.0, 1.0),
            draw=random.Random(seed).random,
            limits=ShadowLimits(poll_s=0.1, patience_s=20.0, deadline_s=20.0),
        )
        cluster.log.prompt_observers.append(self.shadow.ended)
        cluster.router.spawn(self.shadow.run())

    async def _drop(self, _fingerprint: bytes, keys: list[ChunkKey]) -> Dropped:
        self.dropped += keys
        return Dropped([], [])

    @property
    def counts(self) -> Counter[str]:
        return Counter({outcome: number for (_, outcome), number in self.shadow.counts.items()})


def run(seed: int, variant: Variant) -> tuple[Outcome, Shadowed, Counter[str]]:
    """What became of the seed; what engines did while they had other work: `busy`, and `idle`."""
    found: list[Shadowed] = []
    asked: Counter[str] = Counter()
    right = EngineLoop.compare

    async def compare(self: EngineLoop, request: CompareRequest) -> CompareReply:
        busy = len(self._legs) > 0
        try:
            reply = await right(self, request)
        finally:
            asked["busy" if busy else "idle"] += 1
        assert not busy, "an engine with work has compared"
        return reply

    class WithShadow(SimCluster):
        async def run(self) -> Outcome:
            found.append(Shadowed(self, seed))
            return await super().run()

    with patch.object(support.sim_cluster, "SimCluster", WithShadow), patch.object(EngineLoop, "compare", compare):
        outcome = run_seed(seed, variant)
    return outcome, found[0], asked


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_dies_nothing_is_found_wrong_that_is_right(seed):
    outcome, shadowed, _ = run(seed, Variant())
    assert not outcome.problems
    assert not shadowed.dropped and not shadowed.counts["diverged"], shadowed.shadow.divergences


@cache
def in_peace(seed: int) -> Shadowed:
    return run(seed, Variant(peaceful=True))[1]


def test_requests_are_compared_on_engines_without_work():
    same = sum(in_peace(seed).counts["same"] for seed in SEEDS)
    assert same > 20


def test_what_was_flipped_and_not_verified_is_found_and_named():
    """Somebody else's work fails with it: the oracle sees wrong answers."""
    broken = Variant(integrity=Integrity("header"), data=DataFaults(flip=0.5))
    found = 0
    for seed in SEEDS:
        _, shadowed, _ = run(seed, broken)
        for one in shadowed.shadow.divergences:
            assert one.chunks and one.sources and one.node, one
            found += 1
        keys = {chunk.key for one in shadowed.shadow.divergences for chunk in one.chunks}
        assert keys <= {key.hex() for key in shadowed.dropped}
    assert found > 1


def first_tokens(shadowed: Shadowed) -> list[float]:
    return sorted(record.ttft_s for record in shadowed.log.newest() if record.ttft_s is not None)


def test_no_request_waits_for_it():
    """Of all requests the first tokens come as soon as without it, but for a step that is under way."""
    with_it, without = list[float](), list[float]()
    for seed in SEEDS:
        with_it += first_tokens(in_peace(seed))
        with patch.object(ShadowComparisons, "ended", lambda *_: None):
            without += first_tokens(run(seed, Variant(peaceful=True))[1])
    assert len(with_it) == len(without) > 80
    assert sum(with_it) / len(with_it) < sum(without) / len(without) + 0.02
