"""What is wrong between nodes is said: in status, once in the log, and in the route of each request."""

import logging
from typing import Any

import httpx
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, make_rig, two_and_two

from kvcore.types import NodeInfo, Role
from metadata_server.messages import Event, EventKind
from nodeapi.sampling import SamplingParams
from router.nodes.limits import NodeHealthLimits
from router.requests.records import RouteRecord, route_record
from router.requests.spec import RequestSpec

FP8: dict[str, Any] = {"declared": (("block-size", "32"), ("kv-cache-dtype", "fp8_e4m3"))}
AUTO: dict[str, Any] = {"declared": (("block-size", "32"), ("kv-cache-dtype", "bfloat16"))}


async def problems(rig: Rig) -> list[str]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        found: list[str] = (await client.get("/v1/cluster")).json()["problems"]
    return found


def route(rig: Rig) -> RouteRecord:
    decision = rig.dispatcher.route(RequestSpec("r", list(range(100)), SamplingParams(max_tokens=4)))
    found = route_record(decision)
    found.explain(decision)
    return found


async def test_nodes_that_agree_are_no_problem() -> None:
    assert await problems(await make_rig()) == []


async def test_a_prefiller_that_serves_no_decoder_is_told_of_with_the_argument_that_differs(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.spec = FP8 if node.role is Role.PREFILLER else AUTO
    with caplog.at_level(logging.WARNING, logger="router"):
        rig = await make_rig(nodes)
        for _ in range(3):
            await rig.prober.probe()
    (problem,) = await problems(rig)
    assert problem == (
        "prefiller p0 and prefiller p1 can serve no decoder, as KV there differs from that of decoder d0 and decoder "
        "d1: kv-cache-dtype fp8_e4m3 against bfloat16"
    )
    assert [problem in record.message for record in caplog.records] == [True], "once"
    assert nodes["p0"].prefills == []
    chosen = route(rig)
    assert (chosen.prefiller, chosen.reason) == (None, "other_kv: kv-cache-dtype")
    reasons = {item.node: item.reason for item in chosen.left_out}
    assert reasons == dict.fromkeys(
        ["p0", "p1"], "its KV is not what the decoder reads: kv-cache-dtype fp8_e4m3 against bfloat16"
    )


async def test_metrics_count_such_routes_under_one_label() -> None:
    nodes = two_and_two()
    nodes["p0"].weights, nodes["p1"].weights = "v1", "v2"
    rig = await make_rig(nodes)
    run = rig.dispatcher.open(RequestSpec("r", list(range(100)), SamplingParams(max_tokens=1)))
    async with run:
        assert [emit async for emit in run]
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        assert 'reason="other_kv"} 1' in (await client.get("/metrics")).text
    await rig.dispatcher.aclose()


async def test_decoders_of_two_revisions_are_told_of_and_told_again_when_it_comes_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    nodes = FakeNodes([FakeNode(name, Role.DECODER) for name in ("d0", "d1", "d2")])
    nodes["d2"].weights = "0123456789" * 6
    with caplog.at_level(logging.WARNING, logger="router"):
        rig = await make_rig(nodes)
        (problem,) = await problems(rig)
        assert problem.startswith("decoder d2 and decoder d0 and decoder d1 share no KV, and an answer that began")
        assert problem.endswith("weights 012345678901... against w1")
        nodes["d2"].weights = "w1"
        await rig.prober.probe()
        assert await problems(rig) == []
        nodes["d2"].weights = "w2"
        await rig.prober.probe()
    said = [record.message for record in caplog.records if "cluster_problem" in record.message]
    assert ["weights 012345678901... against w1" in said[0], "weights w2 against w1" in said[1]] == [True, True]
    assert len(said) == 2


async def test_a_node_that_is_down_is_no_problem_between_nodes() -> None:
    nodes = two_and_two()
    nodes["p0"].weights = "w2"
    nodes["p0"].down = True
    assert await problems(await make_rig(nodes)) == []


async def test_chunks_that_no_prompt_fills_and_segments_that_hold_none_are_told_of() -> None:
    nodes = two_and_two()
    nodes["d0"].max_context = 8
    nodes["p0"].segment_bytes = 5
    found = await problems(await make_rig(nodes))
    assert found == [
        "the segment of prefiller p0 has 5 bytes and one chunk 1024: nothing is ever stored there",
        "kv.chunk_tokens 16 is over the context of decoder d0, 8: nothing is ever stored",
    ]


# --- what the metadata server knows ----------------------------------------------------------------------------------


def up(name: str, role: Role, incarnation: int = 1, url: str = "http://elsewhere") -> Event:
    info = NodeInfo(id=name, role=role, control_url=url, incarnation=incarnation)
    return Event(seq=1, kind=EventKind.NODE_UP, node_id=name, node=info)


def known_but(rig: Rig, *left_out: str) -> None:
    rig.cluster.on_events([up(node.id, node.role) for node in rig.nodes.nodes if node.id not in left_out])


AT_ONCE = NodeHealthLimits(unknown_s=0.0)


async def test_a_node_that_the_metadata_server_does_not_know_is_told_of() -> None:
    rig = await make_rig(node_limits=AT_ONCE, connected=True)
    known_but(rig, "p0")
    assert await problems(rig) == [
        "prefiller p0 at http://127.0.0.1:1 is used, but the metadata server does not know it: nothing that it "
        "computes is stored"
    ]
    rig.cluster.on_events([up("p0", Role.PREFILLER)])
    assert await problems(rig) == []


async def test_of_two_processes_with_one_name_the_one_that_is_used_without_a_lease_is_told_of() -> None:
    rig = await make_rig(node_limits=AT_ONCE, connected=True)
    known_but(rig, "p0")
    rig.cluster.on_events([up("p0", Role.PREFILLER, incarnation=2, url="http://second:1")])
    (problem,) = await problems(rig)
    assert "prefiller p0 at http://127.0.0.1:1 is used, but what the metadata server knows as p0 is another" in problem
    assert "process, at http://second:1" in problem
    rig.nodes["p0"].incarnation = 2
    await rig.prober.probe()
    assert await problems(rig) == [], "it had only been started again"


async def test_a_node_that_the_metadata_server_refuses_says_why_itself() -> None:
    rig = await make_rig(node_limits=AT_ONCE, connected=True)
    known_but(rig, "p0")
    rig.nodes["p0"].refused = "node p0 is alive at http://second:1"
    await rig.prober.probe()
    (problem,) = await problems(rig)
    assert "the metadata server refuses it (node p0 is alive at http://second:1): nothing that" in problem


async def test_a_node_has_a_moment_to_register_and_nothing_is_told_while_nobody_can_be_asked() -> None:
    rig = await make_rig(connected=True)
    assert await problems(rig) == [], "5 s have not passed"
    rig = await make_rig(node_limits=AT_ONCE)
    assert await problems(rig) == [], "the metadata server is away, which status shows"


async def test_status_shows_no_load_of_a_node_that_does_not_answer() -> None:
    rig = await make_rig()
    rig.nodes["d0"].running = 3
    await rig.prober.probe()
    assert await loads(rig) == [0, 0, 3, 0]
    rig.nodes["d0"].down = True
    await rig.prober.probe()
    assert await loads(rig) == [0, 0, None, 0]


async def loads(rig: Rig) -> list[int | None]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return [node["running"] for node in (await client.get("/v1/cluster")).json()["nodes"]]
