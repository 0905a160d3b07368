"""The HTTP shell under bad input: a 4xx with the one error body, never a 500, never a hang."""

import asyncio
import base64
import json
import os
import signal
import sys
import time
from email.utils import parsedate_to_datetime
from pathlib import Path

import aiohttp
import msgspec
import pytest
from support.metadata_rigs import MAX_BODY, metadata_rig, until
from support.metadata_words import granted, ids, key, registration, reservation
from support.ports import free_ports

from metadata_server.client import MetadataClient
from metadata_server.http_transport import HttpMetadataTransport
from metadata_server.index import event_log
from metadata_server.limits import ClientLimits
from metadata_server.messages import EventBatch, MatchReply, MatchRequest, WaitRequest

ROOT = Path(__file__).resolve().parents[3]
JSON = {"Content-Type": "application/json"}
MSGPACK = {"Content-Type": "application/msgpack", "Accept": "application/msgpack"}
MATCH = msgspec.msgpack.encode(MatchRequest(keys=[]))


@pytest.fixture
async def rig():
    async with metadata_rig("http") as rig:
        yield rig


@pytest.fixture
async def http(rig):
    async with aiohttp.ClientSession(rig.url, timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


async def error_of(response, status):
    body = await response.read()
    assert response.status == status, body
    decoded = json.loads(body) if response.content_type == "application/json" else msgspec.msgpack.decode(body)
    assert set(decoded) == {"error"} and set(decoded["error"]) == {"message", "type", "param", "code"}
    return decoded["error"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status", "code"),
    [
        ("GET", "/nope", {}, b"", 404, "not_found"),
        ("POST", "/v1/objects/match/", {}, b"", 404, "not_found"),
        ("GET", "/v1/objects/match", {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/stats", {}, b"", 405, "method_not_allowed"),
        ("POST", "/v1/objects/match", {"Content-Type": "text/xml"}, b"<a/>", 415, "unsupported_media_type"),
        ("POST", "/v1/objects/match", {**JSON, "Content-Encoding": "br"}, b"x", 415, "unsupported_media_type"),
        ("POST", "/v1/leases/release", {**MSGPACK, "Content-Encoding": "gzip"}, b"x", 415, "unsupported_media_type"),
        ("POST", "/v1/objects/match", JSON, b"", 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b'{"keys": [', 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b'{"keys": "x"}', 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b'{"keys": ["\xff\xfe"]}', 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b'{"keys": ["not base64!"]}', 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b'{"keys": [], "x": 1}', 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", JSON, b"[" * 100_000, 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", MSGPACK, MATCH[:-1], 400, "metadata_protocol_error"),
        ("POST", "/v1/objects/match", MSGPACK, MATCH + b"\x00", 400, "metadata_protocol_error"),
        ("POST", "/v1/leases/release", JSON, b'{"lease_ids": [1e400]}', 400, "metadata_protocol_error"),
        ("GET", "/v1/replay", {}, b"", 400, "metadata_protocol_error"),
        ("GET", "/v1/replay?from_seq=-1", {}, b"", 400, "metadata_protocol_error"),
        ("GET", "/v1/events?from_seq=9999999999999999999999", {}, b"", 400, "metadata_protocol_error"),
    ],
)
async def test_bad_input_gets_the_error_body(http, method, path, headers, body, status, code):  # noqa: PLR0917
    async with http.request(method, path, data=body or None, headers=headers) as response:
        assert (await error_of(response, status))["code"] == code


async def test_the_error_names_the_field(http):
    async with http.post("/v1/nodes/heartbeat", json={"node_id": "a", "incarnation": "x"}) as response:
        assert (await error_of(response, 400))["param"] == "incarnation"
    async with http.post("/v1/objects/match", json={"keys": ["AAAA"]}) as response:
        assert (await error_of(response, 400))["param"] == "keys[0]"


async def test_a_body_over_the_bound_is_refused_whether_its_length_is_said_or_not(http):
    async with http.post("/v1/objects/match", data=b"x" * (MAX_BODY + 1)) as response:
        await error_of(response, 413)

    async def endless():
        for _ in range(10):
            yield b"x" * (1 << 20)

    try:
        async with http.post("/v1/objects/match", data=endless()) as response:
            await error_of(response, 413)
    except aiohttp.ClientConnectionError:
        pass  # cut while it was still sending: refused too
    async with http.get("/health") as response:
        assert abs(parsedate_to_datetime(response.headers["Date"]).timestamp() - time.time()) < 60
        assert (await response.json())["status"] == "ok"


async def test_a_client_that_leaves_ends_its_long_poll(rig, http):
    await rig.client.register(registration("a"))
    body = msgspec.msgpack.encode(WaitRequest(keys=[key(1)], timeout_s=60.0, lease_s=60.0))
    async with aiohttp.ClientSession(rig.url) as leaving:
        call = asyncio.create_task(leaving.post("/v1/objects/wait", data=body, headers=MSGPACK))
        await until(lambda: rig.core.num_waiters == 1)
        call.cancel()
    await until(lambda: rig.core.num_waiters == 0)
    assert (await rig.client.stats()).read_leases == 0


async def test_waits_hold_no_other_call_up_however_many_there_are(rig):
    limits = ClientLimits(max_connections=2, max_waits=6, wait_poll_s=0.05)
    transport = HttpMetadataTransport(rig.url, limits)
    client = MetadataClient(transport, rig.clock, 5.0, limits=limits)
    rig.core.state.register(registration("a"), rig.clock.now())
    reserved = granted(rig.core.state.reserve(reservation("a", [1]), rig.clock.now()))
    wanted = WaitRequest(keys=[key(1)], timeout_s=60.0)
    waits = [asyncio.create_task(client.wait(wanted)) for _ in range(6)]
    await until(lambda: rig.core.num_waiters == 6)
    late = [await client.wait(wanted) for _ in range(3)]
    assert [reply.replicas for reply in late] == [[]] * 3, "more than may wait are told what there is"
    assert (await asyncio.gather(*(client.match(MatchRequest(keys=[key(1)])) for _ in range(8))))[0].replicas == []
    assert not any(wait.done() for wait in waits) and rig.core.num_waiters == 6
    await client.commit(ids("a", reserved))
    assert [len(reply.replicas) for reply in await asyncio.gather(*waits)] == [1] * 6
    assert len((await client.wait(wanted)).replicas) == 1
    await transport.aclose()


async def test_a_request_cut_in_its_body_harms_nobody(rig, http):
    host, _, port = rig.url.removeprefix("http://").partition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST /v1/objects/match HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    async with http.get("/health") as response:
        assert response.status == 200


async def test_json_and_msgpack_say_the_same_and_accept_chooses(rig, http):
    await rig.client.register(registration("a"))
    replicas = granted(await rig.client.reserve(reservation("a", [1])))
    await rig.client.commit(ids("a", replicas))
    wanted = {"keys": [base64.b64encode(key(1)).decode()]}
    async with http.post("/v1/objects/match", json=wanted) as response:
        assert response.content_type == "application/json"
        as_json = msgspec.json.decode(await response.read(), type=MatchReply)
    async with http.post("/v1/objects/match", json=wanted, headers={"Accept": "application/msgpack"}) as response:
        assert response.content_type == "application/msgpack"
        assert msgspec.msgpack.decode(await response.read(), type=MatchReply) == as_json
    assert as_json.replicas == [replicas]


async def test_replay_snapshot_and_metrics_are_there(rig, http):
    await rig.client.register(registration("a"))
    async with http.get("/v1/replay?from_seq=1") as response:
        assert [e["kind"] for e in (await response.json())["events"]] == ["node_up"]
    async with http.get("/v1/snapshot", headers={"Accept": "application/msgpack"}) as response:
        batches = msgspec.msgpack.decode(await response.read(), type=list[EventBatch])
        assert [b.reset for b in batches] == [True, False]
    async with http.get("/metrics") as response:
        text = await response.text()
    for line in (
        'kvferry_metadata_nodes{role="decoder"} 1.0',
        'kvferry_metadata_segment_bytes{segment="a.1",state="free"} 65536.0',
        'kvferry_metadata_totals_total{name="registrations"} 1.0',
        'kvferry_metadata_call_seconds_count{endpoint="/v1/nodes/register"} 1.0',
        "kvferry_metadata_reservations 0.0",
    ):
        assert line in text, line


@pytest.mark.parametrize("kind", ["application/json", "application/msgpack"])
async def test_a_snapshot_of_many_batches_is_one_list(rig, http, kind, monkeypatch):
    monkeypatch.setattr(event_log, "MAX_BATCH_KEYS", 8)
    monkeypatch.setattr(event_log, "MAX_EVENT_KEYS", 4)
    await rig.client.register(registration("a", units=128))
    for start in range(0, 100, 20):
        numbers = list(range(start, start + 20))
        await rig.client.commit(ids("a", granted(await rig.client.reserve(reservation("a", numbers)))))
    read = [(await http.get("/v1/snapshot", headers={"Accept": kind})).read() for _ in range(2)]
    first, second = await asyncio.gather(*read)
    decode = msgspec.json.decode if kind.endswith("json") else msgspec.msgpack.decode
    batches = decode(first, type=list[EventBatch])
    assert decode(second, type=list[EventBatch]) == batches and len(batches) > 10
    assert {k for batch in batches for event in batch.events for k in event.keys} == {key(n) for n in range(100)}
    assert [batch.reset for batch in batches] == [True] + [False] * (len(batches) - 1) and not batches[-1].events


async def test_the_document_describes_exactly_what_is_served(rig, http):
    async with http.get("/openapi.json") as response:
        document = await response.json()
    for path, operations in document["paths"].items():
        for method in ("get", "post"):
            async with http.request(method, path + ("?from_seq=x" if method == "get" else "")) as response:
                assert (response.status == 405) == (method not in operations), (method, path)
    references = json.dumps(document).split('"$ref": "')[1:]
    assert {r.partition('"')[0].rpartition("/")[2] for r in references} <= set(document["components"]["schemas"])


# --- the process -------------------------------------------------------------------------------------------------


async def run_server(*overrides):
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "metadata_server", "--config", str(ROOT / "configs" / "laptop.yaml")),
        *(part for override in overrides for part in ("--set", override)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


async def test_a_taken_port_is_said_and_the_process_ends():
    holder = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    port = holder.sockets[0].getsockname()[1]
    process = await run_server(f"metadata_server.port={port}")
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2 and f"127.0.0.1:{port} is in use".encode() in stderr
    holder.close()


async def test_a_wrong_setting_is_said_and_a_signal_ends_it_in_order():
    process = await run_server("metadata_server.prot=1")
    _, stderr = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 2 and b"prot" in stderr
    (port,) = free_ports(1)
    process = await run_server(f"metadata_server.port={port}")
    async with asyncio.timeout(60):
        while b" ready " not in await process.stderr.readline():
            pass
        async with aiohttp.ClientSession() as session:  # an open stream does not hold it up
            stream = await session.get(f"http://127.0.0.1:{port}/v1/events")
            process.send_signal(signal.SIGTERM)
            assert await stream.content.read() and await process.wait() == 0
