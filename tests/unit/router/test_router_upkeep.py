"""The router's `/v1/cache` calls that ask and order, over fake nodes with real tiers in memory."""

import asyncio
import re
from typing import Any

import httpx
import msgspec
import pytest
from support.metadata_rigs import DirectTransport
from support.router_fakes import CHUNK_TOKENS, FakeNode, FakeNodes, spec, two_and_two, until
from support.router_tiers import LIVE, OLD, PROMPT, THEIRS, Kept, kept_rig, keys_of, put

from kvcore.chunk_keys import owner_of
from kvcore.clock import SystemClock
from kvcore.errors import MetadataUnavailableError, ModelLoadError
from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from metadata_server.messages import ManifestEntry, RegisterRequest, SegmentManifest
from nodeapi.messages import PROMOTE_OWNER, Promoted


async def ask(client: httpx.AsyncClient, what: str, body: object = None, **query: str) -> Any:
    reply = await client.post(f"/v1/cache/{what}", json=body or {"prompt": PROMPT}, params=query)
    assert reply.status_code == 200, reply.text
    return reply.json()


async def test_a_lookup_says_what_lies_in_memory_what_follows_in_tiers_and_what_would_be_computed():
    rig, kept, client = await kept_rig()
    keys = keys_of()
    rig.cluster.index.store("p0", keys[:2], "p0.1")
    rig.cluster.index.store("d1", keys[:1], "d1.1")
    await put(kept.disks["d0"], keys[2:4])
    await put(kept.cloud, keys[3:5])
    found = await ask(client, "lookup", {"prompt": [PROMPT, PROMPT[:5]]})
    assert (found["fingerprint"], found["chunk_tokens"], found["problems"]) == (LIVE.hex(), CHUNK_TOKENS, [])
    long, short = found["prompts"]
    assert (long["tokens"], long["chunks"], long["memory_tokens"], long["tier_tokens"]) == (99, 6, 32, 48)
    assert long["memory"] == {"d1": 16, "p0": 32} and long["new_tokens"] == 99 - 5 * 16
    assert long["tiers"] == [{"tier": "cloud", "node": "", "tokens": 32}, {"tier": "disk", "node": "d0", "tokens": 32}]
    assert (short["chunks"], short["memory_tokens"], short["tier_tokens"], short["new_tokens"]) == (0, 0, 0, 5)


async def test_a_lookup_stops_at_the_first_hole_and_leaves_a_token_to_compute():
    rig, kept, client = await kept_rig()
    prompt = PROMPT[: 6 * CHUNK_TOKENS]
    keys = keys_of(prompt)
    await put(kept.cloud, [keys[0], *keys[2:]])
    (line,) = (await ask(client, "lookup", {"prompt": prompt}))["prompts"]
    assert (line["chunks"], line["tier_tokens"], line["new_tokens"]) == (6, 16, 5 * 16)
    rig.cluster.index.store("p0", keys, "p0.1")
    (line,) = (await ask(client, "lookup", {"prompt": prompt}))["prompts"]
    assert (line["memory_tokens"], line["new_tokens"]) == (5 * 16, 16), "the last chunk would be computed again"


async def test_the_salt_of_a_body_and_its_template_decide_its_chunks():
    _, kept, client = await kept_rig()
    await put(kept.cloud, keys_of(salt=b"tenant"))
    salted = await ask(client, "lookup", {"prompt": PROMPT, "cache_salt": "tenant"})
    assert salted["prompts"][0]["tier_tokens"] == 96 and (await ask(client, "lookup"))["prompts"][0]["tier_tokens"] == 0
    chat = await ask(client, "lookup", {"messages": [{"role": "user", "content": "hello " * 30}]})
    assert chat["prompts"][0]["tokens"] > 30


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"no json", "no JSON object"),
        (b"[1]", "no JSON object"),
        (b"{}", "neither messages .* nor prompt"),
        (b'{"prompt": 3}', "prompt"),
        (b'{"prompt": "a", "best": 3}', "best is no field"),
        (b'{"prompt": ""}', "has no tokens"),
        (b'{"prompt": "a", "cache_salt": ""}', "cache_salt"),
    ],
)
async def test_a_bad_body_is_refused_in_the_words_of_the_api(body, words):
    _, _, client = await kept_rig()
    for what in ("lookup", "warm", "evict"):
        reply = await client.post(f"/v1/cache/{what}", content=body)
        assert reply.status_code == 400
        assert re.search(words, reply.json()["error"]["message"])


async def test_an_unknown_model_and_an_end_that_is_no_time_are_refused():
    _, _, client = await kept_rig()
    reply = await client.post("/v1/cache/lookup", json={"prompt": "a", "model": "other"})
    assert reply.status_code == 404 and "other" in reply.json()["error"]["message"]
    for ttl_s in ("0", "-1", "inf", "nan", "soon"):
        reply = await client.post("/v1/cache/expire", json={"prompt": "a"}, params={"ttl_s": ttl_s})
        assert reply.status_code == 400 and reply.json()["error"]["param"] == "ttl_s"


async def test_what_is_evicted_leaves_every_tier_and_every_node_learns_of_it():
    _, kept, client = await kept_rig()
    keys = keys_of()
    await put(kept.cloud, keys)
    await put(kept.disks["p1"], keys[:3])
    reply = await ask(client, "evict", {"prompt": PROMPT})
    assert (reply["prompts"], reply["tokens"], reply["chunks"], reply["problems"]) == (1, 99, 6, [])
    counts = {(one["place"], one["node"]): one["chunks"] for one in reply["places"]}
    assert counts["cloud", ""] == 6 and counts["disk", "p1"] == 3 and counts["disk", "d0"] == 0
    assert not kept.cloud.chunks and not kept.disks["p1"].chunks and sorted(kept.forgotten) == ["d0", "d1", "p0", "p1"]


async def test_an_end_in_time_is_given_and_taken_back():
    _, kept, client = await kept_rig()
    keys = keys_of()
    await put(kept.cloud, keys[:4])
    reply = await ask(client, "expire", ttl_s="60")
    assert {one["place"]: one["chunks"] for one in reply["places"] if one["chunks"]} == {"cloud": 4}
    assert all(end is not None for _, end in kept.cloud.chunks.values())
    await ask(client, "expire")
    assert all(end is None for _, end in kept.cloud.chunks.values())


async def test_a_prefetch_has_each_node_with_a_tier_bring_what_it_has_until_none_brings_more():
    nodes = two_and_two()
    rig, _, client = await kept_rig(nodes)
    known = rig.cluster.nodes["d0"]
    known.report = msgspec.structs.replace(known.report, tiers=[])
    nodes["p1"].promotions = [[], [Promoted(tier="disk", num_chunks=1)]]
    nodes["p0"].promotions = [[Promoted(tier="disk", num_chunks=2)], [Promoted(tier="cloud", num_chunks=1)]]
    nodes["d1"].promotions = [[Promoted(tier="disk", num_chunks=1)]]
    reply = await ask(client, "prefetch", {"prompt": PROMPT, "cache_salt": "tenant"})
    assert (reply["prompts"], reply["tokens"], reply["chunks"], reply["problems"]) == (1, 99, 6, [])
    assert {(one["place"], one["node"]): one["chunks"] for one in reply["places"]} == {
        ("disk", "p0"): 2, ("disk", "p1"): 1, ("disk", "d1"): 1, ("cloud", ""): 1
    }  # fmt: skip
    assert [len(nodes[name].promote_requests) for name in ("p0", "p1", "d0", "d1")] == [3, 3, 0, 3]
    request = nodes["p0"].promote_requests[0]
    assert (request.fingerprint, request.keys) == (LIVE, keys_of(salt=b"tenant"))


@pytest.mark.parametrize(("protocol", "owner"), [(PROMOTE_OWNER, owner_of(b"tenant")), (1, msgspec.UNSET)])
async def test_a_prefetch_says_whose_chunks_they_are_to_nodes_that_know_owners(protocol, owner):
    nodes = two_and_two()
    rig, _, client = await kept_rig(nodes)
    known = rig.cluster.nodes["p0"]
    known.report = msgspec.structs.replace(known.report, protocol=protocol)
    await ask(client, "prefetch", {"prompt": PROMPT, "cache_salt": "tenant"})
    (request,) = nodes["p0"].promote_requests
    assert request.owner == owner


async def test_a_prefetch_leaves_out_who_does_not_answer_and_needs_no_prompt_that_fills_a_chunk():
    nodes = two_and_two()
    _, _, client = await kept_rig(nodes)
    nodes["p0"].down = True
    nodes["p1"].promotions = [[Promoted(tier="cloud", num_chunks=6)]]
    reply = await ask(client, "prefetch")
    assert reply["places"] == [{"place": "cloud", "node": "", "chunks": 6, "problem": ""}]
    assert reply["problems"] == ["p0: p0 refused the connection"]
    reply = await ask(client, "prefetch", {"prompt": PROMPT[:5]})
    assert (reply["chunks"], reply["places"], reply["problems"]) == (0, [], [])


async def test_a_pin_reaches_the_nodes_disks_as_far_as_their_share_goes_and_holds_there():
    _, kept, client = await kept_rig()
    await put(kept.disks["d0"], keys_of()[:2])
    await put(kept.disks["d1"], keys_of()[1:4])
    await put(kept.cloud, keys_of())
    reply = await ask(client, "pin")
    assert {(one["place"], one["node"]): one["chunks"] for one in reply["places"] if one["place"] == "disk"} == {
        ("disk", node): 2 if node in ("d0", "d1") else 0 for node in kept.disks
    }
    (problem,) = reply["problems"]
    assert problem.startswith("d1: disk: 1 chunks were not pinned: pins have their share") and "pin_share" in problem
    reply = await ask(client, "evict")
    assert len(kept.disks["d0"].chunks) == 2 and len(kept.disks["d1"].chunks) == 2 and not kept.cloud.chunks
    assert {one.partition(" ")[0]: one for one in reply["problems"]} == {
        "d0:": "d0: disk: 2 chunks are pinned", "d1:": "d1: disk: 2 chunks are pinned"
    }  # fmt: skip
    reply = await ask(client, "unpin")
    assert sum(one["chunks"] for one in reply["places"] if one["place"] == "disk") == 4
    await ask(client, "evict")
    assert not kept.disks["d0"].chunks and not kept.disks["d1"].chunks


async def test_pins_are_the_metadata_servers_and_what_is_in_memory_is_evicted_there():
    rig, kept, client = await kept_rig()
    reply = await ask(client, "pin")
    (memory,) = (one for one in reply["places"] if one["place"] == "memory")
    assert (memory["chunks"], memory["problem"], reply["problems"]) == (6, "", [])
    assert rig.metadata.pins(None, SystemClock().now()).num_pins == 6
    node = NodeInfo(id="p0", role=Role.PREFILLER, control_url="http://p0", incarnation=1)
    segment = Segment(id="p0.1", node_id="p0", size_bytes=1 << 20, host_id="h", addresses={})
    entries = [
        ManifestEntry(key=ChunkKey(key), offset=at * 4096, length=1000, generation=at + 1)
        for at, key in enumerate(keys_of())
    ]
    manifest = SegmentManifest(segment=segment, entries=entries)
    rig.metadata.register(RegisterRequest(node=node, segments=[manifest], ttl_s=900), SystemClock().now())
    reply = await ask(client, "evict")
    assert reply["places"][0]["chunks"] == 0 and "6 chunks are pinned" in reply["problems"][0]
    unpinned = {one["place"]: one["chunks"] for one in (await ask(client, "unpin"))["places"]}
    assert unpinned == {"memory": 6, "disk": 0}
    assert (await ask(client, "expire", ttl_s="100"))["places"][-1]["chunks"] == 6
    await put(kept.cloud, keys_of())
    reply = await ask(client, "evict")
    assert {one["place"]: one["chunks"] for one in reply["places"] if one["chunks"]} == {"cloud": 6, "memory": 6}
    assert rig.metadata.stats(SystemClock().now(), 0).objects == 0


async def test_a_metadata_server_that_is_away_is_named_and_the_tiers_are_served(monkeypatch):
    _, kept, client = await kept_rig()
    await put(kept.cloud, keys_of())

    async def away(*_: object) -> bytes:
        raise MetadataUnavailableError("switched off")

    monkeypatch.setattr(DirectTransport, "call", away)
    reply = await ask(client, "evict")
    assert any(line.startswith("memory: ") for line in reply["problems"]) and not kept.cloud.chunks


async def test_a_node_that_does_not_answer_or_is_too_old_is_named_and_the_others_are_asked():
    rig, kept, client = await kept_rig()
    await put(kept.cloud, keys_of())
    rig.nodes["p0"].upkeep, rig.nodes["p1"].down = None, True
    found = await ask(client, "lookup")
    assert sorted(line.split(":")[0] for line in found["problems"]) == ["p0", "p1"]
    rig.nodes["p0"].upkeep = None
    await rig.prober.probe()
    rig.nodes["p0"].tiers = []
    await rig.prober.probe()
    found = await ask(client, "lookup")
    assert found["prompts"][0]["tier_tokens"] == 96, "another node is asked about what they share"


async def test_warming_is_a_prefill_without_a_decode_and_says_what_it_did():
    rig, _, client = await kept_rig()
    rig.nodes["p0"].cached_tokens = rig.nodes["p1"].cached_tokens = 32
    reply = await ask(client, "warm", {"prompt": [PROMPT, PROMPT[1:]], "cache_salt": "s"})
    first, second = reply["prompts"]
    names = ("tokens", "cached_tokens", "computed_tokens", "stored_tokens")
    assert [first[name] for name in names] == [99, 32, 67, 96]
    assert second["tokens"] == 98 and not any(node.generates for node in rig.nodes.nodes)
    (request, *_) = [one for node in rig.nodes.nodes for one in node.prefills]
    assert request.cache_salt == b"s" and request.prompt_token_ids in (PROMPT, PROMPT[1:])
    assert all(node.prefill_tokens == node.sequences == 0 for node in rig.cluster.nodes.values())


async def test_a_warm_up_goes_behind_requests_and_one_at_a_time_a_prefiller():
    rig, _, client = await kept_rig()
    gate = rig.nodes["p0"].prefill_gate = rig.nodes["p1"].prefill_gate = asyncio.Event()
    busy = rig.cluster.work_chosen("p0", sequences=0, prefill_tokens=500)
    tasks = [asyncio.create_task(ask(client, "warm")) for _ in range(3)]
    await until(lambda: len(rig.nodes["p1"].prefills) == 1)
    await asyncio.sleep(0.2)
    assert (len(rig.nodes["p0"].prefills), len(rig.nodes["p1"].prefills)) == (0, 1), "p0 has requests to prefill"
    assert rig.cluster.nodes["p1"].prefill_tokens == 99, "requests see it"
    rig.cluster.leg_ended(busy)
    await until(lambda: len(rig.nodes["p0"].prefills) == 1)
    gate.set()
    await asyncio.gather(*tasks)
    assert sum(len(node.prefills) for node in rig.nodes.nodes) == 3


async def test_without_a_prefiller_warming_says_so_and_a_failed_leg_is_told():
    decoders = FakeNodes([FakeNode("d0", Role.DECODER)])
    _, _, client = await kept_rig(decoders)
    reply = await client.post("/v1/cache/warm", json={"prompt": PROMPT})
    assert reply.status_code == 503
    assert "needs a prefiller, and this cluster has none" in reply.json()["error"]["message"]
    rig, _, client = await kept_rig()
    rig.nodes["p0"].down = rig.nodes["p1"].down = True
    await rig.prober.probe()
    reply = await client.post("/v1/cache/warm", json={"prompt": PROMPT})
    assert reply.status_code == 503 and "p0 refused the connection" in reply.json()["error"]["message"]


async def test_a_warm_up_whose_client_leaves_ends():
    rig, _, _ = await kept_rig()
    rig.nodes["p0"].prefill_gate = rig.nodes["p1"].prefill_gate = asyncio.Event()
    leave = asyncio.Event()
    body = iter([{"type": "http.request", "body": b'{"prompt": "' + b"a" * 99 + b'"}', "more_body": False}])

    async def receive():
        if (first := next(body, None)) is not None:
            return first
        await leave.wait()
        return {"type": "http.disconnect"}

    async def send(_message):
        pass

    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/cache/warm", "headers": headers, "query_string": b""}
    scope |= {"http_version": "1.1", "scheme": "http", "server": ("x", 1), "root_path": "", "raw_path": b""}
    task = asyncio.create_task(rig.app(scope, receive, send))  # type: ignore[operator]
    await until(lambda: sum(node.running for node in rig.nodes.nodes) == 1)
    leave.set()
    await asyncio.wait_for(task, 60)
    assert sum(node.running for node in rig.nodes.nodes) == 0
    assert all(node.prefill_tokens == 0 for node in rig.cluster.nodes.values())


async def three_generations(kept: Kept) -> None:
    await put(kept.cloud, keys_of())
    await put(kept.disks["d0"], keys_of()[:2])
    await put(kept.cloud, keys_of()[:3], OLD)
    await put(kept.disks["d1"], keys_of()[:4], OLD)
    await put(kept.cloud, keys_of()[:5], THEIRS)
    await kept.cloud.mark(THEIRS, "other/d0", "a model of theirs", ttl_s=900, timeout_s=1)
    await kept.cloud.mark(OLD, "test/d0", "an older revision", ttl_s=900, timeout_s=1)


async def test_generations_say_where_they_lie_and_who_uses_them():
    _, kept, client = await kept_rig()
    await three_generations(kept)
    report = (await client.get("/v1/cache/generations")).json()
    live, marked, stale = report["generations"]
    assert report["incomplete"] == []
    assert (live["fingerprint"], live["state"], live["nodes"]) == (LIVE.hex(), "live", ["d0", "d1", "p0", "p1"])
    assert "fake-model, float32" in live["note"]
    places = {(one["place"], one["node"]): one["chunks"] for one in live["places"]}
    assert places == {("cloud", ""): 6, ("disk", "d0"): 2}
    assert (marked["fingerprint"], marked["state"], marked["note"]) == (THEIRS.hex(), "marked", "a model of theirs")
    assert [mark["owner"] for mark in marked["marks"]] == ["other/d0"]
    assert (stale["fingerprint"], stale["state"], stale["marks"]) == (OLD.hex(), "stale", []), "marked by us, before"


async def test_stale_generations_are_cleared_everywhere_and_no_other():
    _, kept, client = await kept_rig()
    await three_generations(kept)
    report = await ask(client, "clear", {"stale": True})
    assert report["cleared"] == [OLD.hex()] and report["kept"] == {THEIRS.hex(): "used by other/d0"}
    counts = {(one["place"], one["node"]): one["chunks"] for one in report["places"] if one["chunks"]}
    assert counts == {("cloud", ""): 3, ("disk", "d1"): 4}
    assert {name.fingerprint for name in kept.cloud.chunks} == {LIVE, THEIRS} and not kept.disks["d1"].chunks
    report = await ask(client, "clear", {"stale": True})
    assert (report["cleared"], report["places"]) == ([], [])


async def test_all_is_cleared_but_what_others_use_and_that_by_force():
    _, kept, client = await kept_rig()
    await three_generations(kept)
    report = await ask(client, "clear", {"fingerprints": [THEIRS.hex()[:8]]})
    assert report["cleared"] == [] and list(report["kept"]) == [THEIRS.hex()]
    await ask(client, "clear", {"fingerprints": [OLD.hex()[:8]]})
    assert {name.fingerprint for name in kept.cloud.chunks} == {LIVE, THEIRS}
    reply = await client.post("/v1/cache/clear", content=b"")
    assert reply.json()["cleared"] == [LIVE.hex()] and {one.fingerprint for one in kept.cloud.chunks} == {THEIRS}
    report = await ask(client, "clear", {"force": True})
    assert THEIRS.hex() in report["cleared"] and not kept.cloud.chunks
    reply = await client.post("/v1/cache/clear", json={"all": True})
    assert reply.status_code == 400 and "no order to clear" in reply.json()["error"]["message"]


async def test_what_is_stale_is_not_known_while_a_node_is_away():
    rig, kept, client = await kept_rig()
    await three_generations(kept)
    rig.nodes["d1"].down = True
    await rig.prober.probe()
    reply = await client.post("/v1/cache/clear", json={"stale": True})
    assert reply.status_code == 503 and "which KV d1 will use" in reply.json()["error"]["message"]
    assert {name.fingerprint for name in kept.cloud.chunks} == {LIVE, OLD, THEIRS}
    report = await ask(client, "clear", {"stale": True, "force": True})
    assert OLD.hex() in report["cleared"]


async def test_every_node_takes_other_weights_over_and_requests_go_by_them_at_once():
    rig, _, client = await kept_rig()
    rig.cluster.nodes["d0"].breaker.failed(SystemClock().now())
    reply = await client.post("/v1/weights", json={"version": "step-2", "wait_s": 0.5})
    assert reply.status_code == 200
    new = spec("step-2").fingerprint.hex()
    lines = {line["node"]: (line["fingerprint"], line["cut"], line["problem"]) for line in reply.json()["nodes"]}
    assert lines == dict.fromkeys(("p0", "p1", "d0", "d1"), (new, 1, ""))
    assert {node.fingerprint.hex() for node in rig.cluster.nodes.values()} == {new}, "known before it is answered"
    assert (await client.get("/v1/cache/generations")).json()["generations"][0]["fingerprint"] == new


async def test_a_node_that_keeps_its_weights_is_named_and_the_answer_is_no_success():
    rig, _, client = await kept_rig()
    rig.nodes["p1"].weights_error, rig.nodes["d1"].down = ModelLoadError("a file is torn"), True
    reply = await client.post("/v1/weights", json={"version": "step-2"})
    body = reply.json()
    assert reply.status_code == 503 and body["error"]["code"] == "node_unavailable"
    assert "p1: a file is torn" in body["error"]["message"] and "d1: d1 refused" in body["error"]["message"]
    assert [bool(line["problem"]) for line in body["nodes"]] == [False, True, False, True]


@pytest.mark.parametrize("body", [{}, {"version": ""}, {"version": "a", "wait_s": -1}, {"version": "a", "n": 1}, []])
async def test_a_change_of_weights_without_a_name_is_refused(body):
    rig, _, client = await kept_rig()
    reply = await client.post("/v1/weights", json=body)
    assert reply.status_code == 400 and "no change of weights" in reply.json()["error"]["message"]
    assert {node.weights for node in rig.nodes.nodes} == {"w1"}
