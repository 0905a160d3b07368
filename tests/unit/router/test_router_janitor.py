"""The router's `/v1/janitor`: the metadata server's account, without what the router and the tiers know better."""

from typing import Any

import httpx
import msgspec
import pytest
from support.router_fakes import Rig
from support.router_tiers import LIVE, OLD, kept_rig, keys_of, put

from kvcore.clock import SystemClock
from metadata_server.cache_messages import NodeOrderRequest, PinRequest
from metadata_server.messages import LeaveRequest, RegisterRequest
from metadata_server.versions import Protocols

AGE = {"older_s": 0.0}


def pin(rig: Rig, *keys: bytes) -> None:
    rig.metadata.pin(PinRequest(keys=list(keys)), 0.0)  # type: ignore[arg-type]


def drain(rig: Rig, node: str) -> None:
    rig.metadata.orders.give(NodeOrderRequest(node_id=node, action="drain"), None, 0.0)


async def look(client: httpx.AsyncClient, **query: Any) -> dict[str, Any]:
    reply = await client.get("/v1/janitor", params=AGE | query)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    return found | {one["kind"]: [orphan["name"] for orphan in one["listed"]] for one in found["kinds"]}


async def remove(client: httpx.AsyncClient, kind: str, *ids: str) -> dict[str, Any]:
    reply = await client.post("/v1/janitor", json={"kind": kind, "ids": list(ids), **AGE})
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_an_order_about_a_node_of_the_cluster_file_is_no_orphan_though_it_is_down():
    rig, _, client = await kept_rig()
    for name in ("d0", "elsewhere"):
        drain(rig, name)
    rig.nodes["d0"].down = True
    found = await look(client)
    assert found["node_orders"] == ["elsewhere (drained)"]
    both = ["d0@0.0", "elsewhere@0.0"]
    assert (await remove(client, "node_orders", *both))["removed"] == ["elsewhere@0.0"]
    assert rig.metadata.orders.drained == {"d0"}


async def test_a_pin_whose_chunk_lies_in_any_tier_under_any_fingerprint_is_no_orphan():
    rig, kept, client = await kept_rig()
    in_cloud, on_disk, old, nowhere = keys_of()[:4]
    await put(kept.cloud, [in_cloud])
    await put(kept.disks["d1"], [on_disk])
    await put(kept.cloud, [old], OLD)
    pin(rig, in_cloud, on_disk, old, nowhere)
    found = await look(client)
    (pins,) = found["kinds"]
    assert found["problems"] == [] and (pins["kind"], pins["count"]) == ("pins", 1)
    assert found["pins"] == [nowhere.hex()]
    every = [key.hex() for key in (in_cloud, on_disk, old, nowhere)]
    assert (await remove(client, "pins", *every))["removed"] == [nowhere.hex()]
    await put(kept.cloud, [nowhere])
    assert (await look(client))["kinds"] == []


async def test_a_pin_whose_chunk_came_into_a_tier_since_it_was_shown_stays():
    rig, kept, client = await kept_rig()
    (key,) = keys_of()[:1]
    pin(rig, key)
    assert (await look(client))["pins"] == [key.hex()]
    await put(kept.cloud, [key])
    assert (await remove(client, "pins", key.hex()))["removed"] == []
    assert rig.metadata.pins(None, 0.0).num_pins == 1


async def test_while_a_node_does_not_answer_nothing_is_said_of_pins_and_none_is_removed():
    rig, _, client = await kept_rig()
    (key,) = keys_of()[:1]
    pin(rig, key)
    rig.nodes["d1"].down = True
    await rig.prober.probe()
    found = await look(client)
    assert found["kinds"] == [] and any("d1 does not answer" in why for why in found["problems"])
    done = await remove(client, "pins", key.hex())
    assert done["removed"] == [] and done["problems"] and rig.metadata.pins(None, 0.0).num_pins == 1


async def test_generations_that_no_live_node_uses_are_named():
    _, kept, client = await kept_rig()
    await put(kept.cloud, keys_of(), LIVE)
    await put(kept.cloud, keys_of()[:2], OLD)
    assert (await look(client))["stale_generations"] == [OLD.hex()]


async def test_a_node_that_registers_between_looking_and_removing_keeps_its_order():
    rig, _, client = await kept_rig()
    drain(rig, "new")
    assert (await look(client))["node_orders"] == ["new (drained)"]
    info = (await rig.nodes.info("http://127.0.0.1:1", timeout_s=1)).node
    node = msgspec.structs.replace(info, id="new", control_url="http://new")
    rig.metadata.register(RegisterRequest(node=node, segments=[], ttl_s=60.0), SystemClock().now())
    assert (await remove(client, "node_orders", "new@0.0"))["removed"] == []
    rig.metadata.leave(LeaveRequest(node_id="new", incarnation=node.incarnation), SystemClock().now())
    assert (await remove(client, "node_orders", "new@0.0"))["removed"] == ["new@0.0"]


async def test_a_metadata_server_that_has_just_begun_cannot_tell():
    rig, _, client = await kept_rig()
    drain(rig, "elsewhere")
    rig.metadata.began(float("inf"))
    assert "still to be heard" in (await look(client))["problems"][0]
    done = await remove(client, "node_orders", "elsewhere@0.0")
    assert done["removed"] == [] and done["problems"] and rig.metadata.orders.drained


async def test_an_older_metadata_server_is_named():
    rig, _, client = await kept_rig()
    rig.metadata.speaks = Protocols(oldest=1, newest=4)
    reply = await client.get("/v1/janitor")
    assert reply.status_code == 400 and "is older than such orders" in reply.text


@pytest.mark.parametrize(
    "body",
    [{}, {"kind": "nodes", "ids": [], **AGE}, {"kind": "pins", "ids": ["x"], **AGE}, {"kind": "pins", "ids": []}],
)
async def test_what_is_no_order_is_refused(body):
    _, _, client = await kept_rig()
    assert (await client.post("/v1/janitor", json=body)).status_code == 400


@pytest.mark.parametrize("older_s", ["x", "nan", "-1", "1e12"])
async def test_an_age_that_is_none_is_refused_by_name(older_s):
    _, _, client = await kept_rig()
    reply = await client.get("/v1/janitor", params={"older_s": older_s})
    assert reply.status_code == 400 and reply.json()["error"]["param"] == "older_s"
