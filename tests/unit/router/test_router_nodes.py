"""The router's `/v1/nodes`: what nodes do, and orders about them, over fake nodes and a real index."""

import asyncio
import logging
from typing import Any

import httpx
import pytest
from support.metadata_rigs import DirectTransport
from support.router_fakes import FakeNode, FakeNodes, Rig, make_rig, two_and_two

from kvcore.clock import SystemClock
from kvcore.errors import MetadataUnavailableError, NodeUnavailableError
from kvcore.types import NodeInfo, Role, Segment
from metadata_server import cache_messages as c
from metadata_server.messages import Event, EventKind, RegisterRequest, SegmentManifest

PROMPT = {"prompt": "hello", "max_tokens": 2, "model": "fake-model"}


async def nodes_rig(nodes: FakeNodes | None = None, **how: Any) -> tuple[Rig, httpx.AsyncClient]:
    rig = await make_rig(nodes, **how)
    return rig, httpx.AsyncClient(transport=httpx.ASGITransport(rig.app), base_url="http://router")


def url_of(rig: Rig, node: FakeNode) -> str:
    return next(url for url, one in rig.nodes.by_url.items() if one is node)


def join(rig: Rig, *names: str, used: int = 0) -> None:
    """They register at the metadata server, and its events reach the router."""
    for name in names:
        node = rig.nodes[name]
        info = NodeInfo(id=name, role=node.role, control_url=url_of(rig, node), incarnation=node.incarnation)
        segment = Segment(id=f"{name}.1", node_id=name, size_bytes=1 << 20, host_id="h", addresses={})
        request = RegisterRequest(node=info, segments=[SegmentManifest(segment=segment)], ttl_s=900)
        rig.metadata.register(request, SystemClock().now())
        rig.cluster.on_events([Event(seq=1, kind=EventKind.NODE_UP, node_id=name, node=info)])


async def rows(client: httpx.AsyncClient) -> dict[str, dict[str, Any]]:
    reply = await client.get("/v1/nodes")
    assert reply.status_code == 200, reply.text
    return {row["id"]: row for row in reply.json()["nodes"]}


async def order(client: httpx.AsyncClient, action: str, node: str, **fields: Any) -> Any:
    reply = await client.post(f"/v1/nodes/{action}", json={"node": node, **fields})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def refused(client: httpx.AsyncClient, action: str, node: str, **fields: Any) -> str:
    reply = await client.post(f"/v1/nodes/{action}", json={"node": node, **fields})
    assert reply.status_code == 400, reply.text
    return reply.json()["error"]["message"]


async def ask(client: httpx.AsyncClient) -> None:
    reply = await client.post("/v1/completions", json=PROMPT)
    assert reply.status_code == 200, reply.text


async def test_each_node_says_what_it_does_and_how_full_it_is():
    nodes = two_and_two()
    nodes["p1"].down = True
    nodes["d1"].cluster = "another"
    rig, client = await nodes_rig(nodes, connected=True)
    join(rig, "p0")
    rig.nodes["p0"].running = 3
    await rig.prober.probe()
    found = await rows(client)
    assert {name: row["state"] for name, row in found.items()} == {
        "p0": "ready", "p1": "lost", "d0": "registering", "d1": "refused",
    }  # fmt: skip
    assert (found["p0"]["requests"], found["p0"]["used_bytes"], found["p0"]["size_bytes"]) == (3, 0, 1 << 20)
    assert "another" in found["d1"]["why"] and "does not know it" in found["d0"]["why"]
    assert abs(found["p0"]["since"] - SystemClock().wall()) < 60


async def test_a_state_keeps_its_time_until_it_changes():
    rig, client = await nodes_rig()
    before = (await rows(client))["p0"]["since"]
    await rig.prober.probe()
    assert (await rows(client))["p0"]["since"] == before
    rig.nodes["p0"].down = True
    await rig.prober.probe()
    assert (await rows(client))["p0"]["since"] > before


async def test_a_drained_node_gets_no_new_requests_and_is_used_again_after_undrain():
    rig, client = await nodes_rig()
    answer = await order(client, "drain", "d0")
    assert answer["node"]["state"] == "drained" and answer["note"] == ""
    for _ in range(4):
        await ask(client)
    assert not rig.nodes["d0"].generates and len(rig.nodes["d1"].generates) == 4
    status = (await client.get("/v1/cluster")).json()
    assert {node["id"]: node["reason"] for node in status["nodes"]}["d0"] == "drained by `kvferry drain d0`"
    assert (await order(client, "undrain", "d0"))["node"]["state"] == "ready"
    rig.nodes["d1"].down = True
    await rig.prober.probe()
    await ask(client)
    assert rig.nodes["d0"].generates


async def test_a_drained_node_is_tried_out_by_a_token_and_says_why_it_made_none():
    rig, client = await nodes_rig(connected=True)
    join(rig, "d0")
    await order(client, "drain", "d0")
    row = (await rows(client))["d0"]
    assert row["serves"] and row["state"] == "drained" and row["incarnation"] == rig.nodes["d0"].incarnation
    assert not (await rows(client))["d1"]["serves"]  # the metadata server does not know it
    assert (await order(client, "try", "d0")) == {"problem": ""} and len(rig.nodes["d0"].generates) == 1
    rig.nodes["d0"].generate_error = NodeUnavailableError("its engine has died")
    assert (await order(client, "try", "d0"))["problem"] == "its engine has died"
    rig.nodes["d0"].generate_error, rig.nodes["d0"].generate_gate = None, asyncio.Event()
    assert "no token in 0.01 s" in (await order(client, "try", "d0", timeout_s=0.01))["problem"]
    assert "there is no node nobody" in await refused(client, "try", "nobody")


async def test_a_role_that_was_ordered_goes_before_the_files_for_this_and_every_other_router():
    """The node hears of it from the metadata server; until it says so itself it is not used."""
    rig, client = await nodes_rig(connected=True)
    join(rig, "d0", "d1")
    told = (await order(client, "role", "d0", role="prefiller"))["node"]
    assert (told["serves"], told["ordered_role"]) == (False, "prefiller")
    assert "is decoder d0, not prefiller d0" in str(rig.cluster.nodes["d0"].problem)
    rig.nodes["d0"].role = Role.PREFILLER
    await rig.prober.probe()
    row = (await rows(client))["d0"]
    assert (row["role"], row["state"], row["serves"]) == ("prefiller", "ready", True)
    view = rig.cluster.view()
    assert {node.id for node in view.prefillers} == {"p0", "p1", "d0"} and [node.id for node in view.decoders] == ["d1"]
    another, _ = await nodes_rig()
    another.admin._metadata._transport = DirectTransport(rig.core)
    await another.admin._take_orders()
    assert another.cluster.nodes["d0"].role is Role.PREFILLER and another.cluster.nodes["d0"].static
    rig.nodes["d0"].role = Role.DECODER
    assert (await order(client, "role", "d0", role="decoder"))["node"]["role"] == "decoder"
    assert "names no role" in await refused(client, "role", "d0")


async def test_what_runs_on_a_drained_node_ends_there():
    rig, client = await nodes_rig()
    rig.nodes["d0"].running = 2
    assert (await order(client, "drain", "d0"))["node"]["state"] == "draining"
    row = (await rows(client))["d0"]
    assert (row["requests"], row["state"]) == (2, "draining")
    rig.nodes["d0"].running = 0
    await rig.prober.probe()
    assert (await rows(client))["d0"]["state"] == "drained"


async def test_it_says_what_is_left_when_the_last_of_a_role_is_drained():
    _, client = await nodes_rig()
    await order(client, "drain", "d0")
    assert "prefillers decode" in (await order(client, "drain", "d1"))["note"]
    assert (await order(client, "drain", "p0"))["note"] == ""
    assert "no request is answered" in (await order(client, "drain", "p1"))["note"]
    await order(client, "undrain", "d0")
    assert "decoders compute" in (await order(client, "drain", "p1"))["note"]
    assert "no request is answered" in (await order(client, "drain", "d0"))["note"]


async def test_another_router_and_one_that_is_started_anew_follow_the_orders():
    rig, client = await nodes_rig()
    await order(client, "drain", "d0")
    another, _ = await nodes_rig()
    another.admin._metadata._transport = DirectTransport(rig.core)
    await another.admin._take_orders()
    assert [node.id for node in another.cluster.view().decoders] == ["d1"]


async def test_what_was_ordered_holds_while_the_metadata_server_is_away(monkeypatch):
    rig, client = await nodes_rig()
    await order(client, "drain", "d0")

    async def away(*_: object) -> bytes:
        raise MetadataUnavailableError("switched off")

    monkeypatch.setattr(DirectTransport, "call", away)
    with pytest.raises(MetadataUnavailableError):
        await rig.admin._take_orders()
    assert [node.id for node in rig.cluster.view().decoders] == ["d1"]
    reply = (await client.get("/v1/nodes")).json()
    assert reply["problems"][0].startswith("metadata server: ") and len(reply["nodes"]) == 4
    assert (await client.post("/v1/nodes/undrain", json={"node": "d0"})).status_code == 503


async def test_a_node_that_is_alive_is_not_removed_unless_it_is_forced():
    rig, client = await nodes_rig(connected=True)
    join(rig, "d0", "d1")
    assert "d0 is alive at http://127.0.0.1:3" in await refused(client, "remove", "d0")
    assert "d0" in await rows(client)
    answer = await order(client, "remove", "d0", force=True)
    assert "d0" not in {node.id for node in rig.metadata.nodes(SystemClock().now()).nodes}
    rig.cluster.on_events([Event(seq=2, kind=EventKind.NODE_DOWN, node_id="d0")])
    await rig.admin._take_orders()
    assert "d0" not in await rows(client) and "d0" not in rig.cluster.nodes
    assert answer["node"] is None or answer["node"]["id"] == "d0"


async def test_a_removed_node_is_forgotten_also_one_of_the_file_and_a_new_start_of_it_joins():
    nodes = two_and_two()
    rig, client = await nodes_rig(nodes, connected=True)
    nodes["d0"].down = True
    await rig.prober.probe()
    assert (await order(client, "remove", "d0"))["node"] is None
    assert sorted(await rows(client)) == ["d1", "p0", "p1"]
    nodes["d0"].down, nodes["d0"].incarnation = False, 2
    join(rig, "d0")
    await rig.admin._take_orders()
    await rig.prober.probe()
    assert rig.metadata.orders.all() == [] and "d0" in await rows(client)


async def test_a_removed_node_is_taken_back_by_undrain():
    nodes = two_and_two()
    rig, client = await nodes_rig(nodes)
    nodes["d0"].down = True
    await rig.prober.probe()
    await order(client, "remove", "d0")
    nodes["d0"].down = False
    assert "was removed" in await refused(client, "drain", "d0")
    assert (await order(client, "undrain", "d0"))["node"]["state"] == "ready"
    assert "neither drained nor removed" in await refused(client, "undrain", "d0")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"node": "d7"}, "there is no node d7: known are d0, d1"),
        ({"node": ""}, "no order about a node"),
        ({"node": "d0", "force_it": 1}, "force_it"),
        ([], "no order about a node"),
    ],
)
async def test_a_name_that_nobody_knows_and_a_body_that_is_none_are_refused(body, words):
    rig, client = await nodes_rig()
    reply = await client.post("/v1/nodes/drain", json=body)
    assert reply.status_code == 400 and words in reply.json()["error"]["message"]
    assert rig.metadata.orders.all() == []


async def test_nodes_that_are_refused_or_drained_and_away_are_listed(monkeypatch):
    rig, client = await nodes_rig()
    rig.metadata.orders.give(c.NodeOrderRequest(node_id="s9", action="drain"), None, 12.0)
    found = await rows(client)
    assert (found["s9"]["state"], found["s9"]["since"], found["s9"]["role"]) == ("lost", 12.0, "")


async def test_every_order_leaves_a_line_that_says_who_what_on_what_and_with_what_outcome(caplog):
    _, client = await nodes_rig()
    with caplog.at_level(logging.INFO, "audit"):
        await order(client, "drain", "d0")
        await refused(client, "undrain", "d9")
    lines = [record.getMessage() for record in caplog.records if record.name == "audit"]
    first, second = (line for line in lines if "/v1/" not in line)  # the other one is the metadata server's own
    assert first.startswith("audit who=") and 'what="nodes drain" on=d0 outcome=ok' in first
    assert "outcome=invalid_request_error" in second and "d9" in second
