"""The text of a node's /metrics."""

from types import SimpleNamespace

import pytest
from prometheus_client.parser import text_string_to_metric_families

from engines.process.messages import Sample
from kvcore.telemetry import Metrics
from kvnode.metrics import NodeMetrics
from nodeapi.messages import EngineStats

STATS = EngineStats(running=2, waiting=0, loading=0, used_blocks=3, total_blocks=8, pending_saves=0)
OWN = b'# HELP vllm:x X.\n# TYPE vllm:x gauge\nvllm:x{node="d0"} 5.0\n'


async def rendered(sample: Sample | None, *, joined: bool = True, refused: str = "") -> dict[str, float]:
    membership = SimpleNamespace(registrations=1, heartbeat_failures=0, joined=joined, refused=refused)
    owner = SimpleNamespace(segment=SimpleNamespace(size_bytes=64), host_restarts=0, refused={("tcp", "forged"): 2})

    async def ask() -> Sample | None:
        return sample

    text = await NodeMetrics(Metrics(), membership, owner, lambda: None).render(None, ask)
    families = text_string_to_metric_families(text.decode())
    return {s.name + "".join(s.labels.values()): s.value for family in families for s in family.samples}


async def test_what_the_engine_keeps_itself_stands_beside_our_own():
    found = await rendered(Sample(id=1, stats=STATS, exposition=OWN))
    assert found["vllm:xd0"] == 5
    assert found["kvferry_engine_staterunning"] == 2


async def test_a_node_whose_engine_does_not_answer_still_tells_of_itself():
    found = await rendered(None)
    assert found["kvferry_node_segment_bytes"] == 64
    assert found["kvferry_node_transfer_refused_totalforgedtcp"] == 2
    assert not [name for name in found if name.startswith("vllm")]


@pytest.mark.parametrize(
    ("joined", "refused", "shown"), [(True, "", (1, 1)), (False, "", (1, 0)), (False, "is of cluster 'b'", (0, 0))]
)
async def test_a_node_that_is_refused_is_not_ready_and_one_that_has_no_lease_is_not_registered(joined, refused, shown):
    found = await rendered(None, joined=joined, refused=refused)
    assert (found["kvferry_node_ready"], found["kvferry_node_registered"]) == shown
