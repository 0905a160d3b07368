import io
import json
from collections.abc import Mapping, Sequence

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from kvcore.types import NodeInfo, Role, Segment
from kvferry.status import run_status
from metadata_server.account_messages import RefusedNode, SegmentStats, Stats
from router.cache.report import CacheCounts, CacheStats

TIER = {
    "name": "disk",
    "shared": False,
    "num_chunks": 12,
    "used_bytes": 3 << 20,
    "capacity_bytes": 1 << 30,
    "counts": {"saved": 14, "promoted": 5},
    "load_rate": 2.0 * (1 << 20),
}
CLUSTER = {
    "cluster": "c",
    "nodes": [
        {
            "id": "d",
            "role": "decoder",
            "url": "http://d:1",
            "healthy": True,
            "reason": None,
            "running": 2,
            "waiting": 1,
            "tiers": [TIER],
        },
        {"id": "p", "role": "prefiller", "url": "http://p:1", "healthy": False, "reason": "refused [odd] markup"},
    ],
    "requests": {"in_flight": 1, "total": 7, "ok": 5, "failed": 1, "cancelled": 0, "retried": 2},
    "hit_rate": 0.25,
    "a_field_of_tomorrow": 1,
}
STATS = Stats(
    epoch="e1",
    nodes=[NodeInfo(id="d", role=Role.DECODER, control_url="http://d:1", incarnation=1)],
    segments=[
        SegmentStats(
            segment=Segment(id="d.1", node_id="d", size_bytes=4 << 20, host_id="h", addresses={}),
            used_bytes=1 << 20,
            reserved_bytes=0,
            retiring_bytes=0,
            num_replicas=3,
        )
    ],
    objects=3,
    reservations=0,
    read_leases=0,
    waiters=0,
    counters={},
)


@pytest.fixture
async def serve():
    servers = []

    async def serve(path: str, body: bytes, status: int = 200) -> str:
        async def answer(_: web.Request) -> web.Response:
            return web.Response(body=body, status=status, content_type="application/json")

        app = web.Application()
        app.router.add_get(path, answer)
        server = TestServer(app)
        await server.start_server()
        servers.append(server)
        return str(server.make_url("")).rstrip("/")

    yield serve
    for server in servers:
        await server.close()


async def show(
    router: str,
    metadata: str | None,
    *,
    as_json: bool = False,
    standbys: Sequence[str] = (),
    partitions: Mapping[str, Sequence[str]] = {},
    routers: Sequence[str] = (),
) -> tuple[int, str]:
    out = io.StringIO()
    console = Console(file=out, width=160)
    code = await run_status(
        router,
        metadata,
        standbys=standbys,
        partitions=partitions,
        routers=routers,
        as_json=as_json,
        console=console,
    )
    return code, out.getvalue()


async def test_both_answers_are_shown(serve):
    router = await serve("/v1/cluster", json.dumps(CLUSTER).encode())
    metadata = await serve("/v1/stats", msgspec.json.encode(STATS))
    code, out = await show(router, metadata)
    assert code == 0
    for text in (
        "2 running, 1 waiting",
        "refused [odd] markup",
        "7 (5 ok, 1 failed",
        "hit rate 25.0%",
        "1.0 MiB (25%)",
        "disk",
        "3.0 MiB",
        "2.0 MiB/s",
    ):
        assert text in out


async def test_of_several_metadata_servers_the_one_that_leads_is_shown_and_that_its_index_is_not_whole(serve):
    router = await serve("/v1/cluster", json.dumps(CLUSTER).encode())
    stats = msgspec.structs.replace(STATS, rebuilding=1)
    leader = await serve("/v1/stats", msgspec.json.encode(stats))
    error = {"message": "it does not lead", "type": "server_error", "param": None, "code": "not_leader"}
    follower = await serve("/v1/stats", json.dumps({"error": error}).encode(), 503)
    for first, rest in ((follower, [leader]), ("http://127.0.0.1:9", [follower, leader]), (leader, [follower])):
        code, out = await show(router, first, standbys=rest)
        assert code == 0 and "1.0 MiB (25%)" in out and "the index is being rebuilt" in out
    code, out = await show(router, follower, standbys=["http://127.0.0.1:9"])
    assert code == 1 and "it does not lead" in out


async def test_of_several_routers_the_first_that_is_there_is_asked_and_who_is_not_is_named(serve):
    async def router() -> str:
        return await serve("/{path:.*}", json.dumps(CLUSTER).encode())

    first, second = await router(), await router()
    code, out = await show(first, None, routers=[second])
    assert code == 0 and f"router {first} is there" in out and f"router {second} is there" in out
    code, out = await show("http://127.0.0.1:9", None, routers=[second])
    assert code == 1 and "router http://127.0.0.1:9 is not there" in out and "2 running, 1 waiting" in out


async def test_each_process_of_the_router_is_shown_and_who_is_away_is_an_error(serve):
    lines = [{"name": "router.1", "in_flight": 3}, {"name": "router.2", "in_flight": 0, "stopping": True}]
    code, out = await show(await serve("/v1/cluster", json.dumps({**CLUSTER, "processes": lines}).encode()), None)
    assert code == 0 and "process router.1 has 3 requests in flight" in out and "router.2 has 0" in out
    assert "and is stopping" in out
    lines[1] = {"name": "router.2", "problem": "Connection refused"}
    code, out = await show(await serve("/v1/cluster", json.dumps({**CLUSTER, "processes": lines}).encode()), None)
    assert code == 1 and "process router.2 is not there: Connection refused" in out


async def test_what_all_partitions_hold_is_shown_as_one_and_who_is_away_by_name(serve):
    router = await serve("/v1/cluster", json.dumps(CLUSTER).encode())
    each = [await serve("/v1/stats", msgspec.json.encode(STATS)) for _ in range(2)]
    code, out = await show(router, None, partitions={"a": each[:1], "b": each[1:]})
    assert code == 0 and "2.0 MiB (50%)" in out and "store: 6 chunks" in out and "epoch e1+e1" in out
    code, out = await show(router, None, partitions={"a": each[:1], "b": ["http://127.0.0.1:9"]})
    assert code == 1 and "1.0 MiB (25%)" in out
    assert "metadata server is not there: partition b: " in out and "(http://127.0.0.1:9/v1/stats)" in out
    code, out = await show(router, None, partitions={"a": ["http://127.0.0.1:9", *each]})
    assert code == 0 and "store: 3 chunks" in out, "its standby answers"


async def test_need_and_a_router_that_stops_are_shown(serve):
    metadata = await serve("/v1/stats", msgspec.json.encode(STATS))
    _, usual = await show(await serve("/v1/cluster", json.dumps(CLUSTER).encode()), metadata)
    assert "by prefillers" not in usual and "stopping" not in usual
    counts = {**CLUSTER["requests"], "in_need": 3}
    cluster = {**CLUSTER, "requests": counts, "stopping": True}
    _, out = await show(await serve("/v1/cluster", json.dumps(cluster).encode()), metadata)
    assert "2 retried, 3 decoded by prefillers)" in out
    assert "the router is stopping: it answers what it has and takes no more" in out


async def test_problems_between_nodes_are_shown_as_the_router_says_them(serve):
    lines = ["prefiller p can serve no decoder: kv-cache-dtype [a] against b", "another"]
    router = await serve("/v1/cluster", json.dumps({**CLUSTER, "problems": lines}).encode())
    code, out = await show(router, await serve("/v1/stats", msgspec.json.encode(STATS)))
    assert code == 0
    assert [line for line in out.splitlines() if line.startswith("problem: ")] == [f"problem: {line}" for line in lines]


async def test_a_node_that_is_refused_is_named_with_the_reason(serve):
    node = NodeInfo(id="x", role=Role.DECODER, control_url="http://x:1", incarnation=1)
    refused = RefusedNode(node=node, reason="node x at http://x:1 is of cluster 'b', not 'a'")
    stats = msgspec.structs.replace(STATS, refused=[refused])
    _, out = await show("http://127.0.0.1:9", await serve("/v1/stats", msgspec.json.encode(stats)))
    assert "the metadata server refuses x: node x at http://x:1 is of cluster 'b', not 'a'" in out


@pytest.mark.parametrize("declined", [0, 12])
async def test_chunks_that_found_no_room_are_told_of(serve, declined):
    stats = msgspec.structs.replace(STATS, counters={"declined_full": declined})
    _, out = await show("http://127.0.0.1:9", await serve("/v1/stats", msgspec.json.encode(stats)))
    assert ("12 chunks were not stored" in out) == bool(declined) == ("no segment had room" in out)
    assert "tenant_share" not in out
    shared = msgspec.structs.replace(STATS, counters={"declined_full": 12, "declined_over_share": 5})
    _, out = await show("http://127.0.0.1:9", await serve("/v1/stats", msgspec.json.encode(shared)))
    assert "5 of them were of tenants that had all of their share (store.tenant_share)" in out


@pytest.mark.parametrize("rebuilding", [0, 1])
async def test_an_index_that_is_being_rebuilt_is_told_of(serve, rebuilding):
    stats = msgspec.structs.replace(STATS, rebuilding=rebuilding)
    _, out = await show("http://127.0.0.1:9", await serve("/v1/stats", msgspec.json.encode(stats)))
    assert ("the index is being rebuilt: 1 of 1 segments are not all known yet" in out) == bool(rebuilding)


async def test_the_hit_rate_is_shown_by_source_beside_what_was_missed_and_why(serve):
    hour = CacheCounts(requests=4, prompt_tokens=4000, cached_tokens=2600, by_source={"memory": 2000, "disk": 600})
    hour.last_chunk_tokens, hour.new_tokens = 400, 1000
    start = CacheCounts(requests=9, prompt_tokens=8000, cached_tokens=2600, by_source=hour.by_source, new_tokens=5400)
    stats = CacheStats(minute=CacheCounts().rated(), hour=hour.rated(), start=start.rated())
    code, out = await show(await serve("/v1/cache/stats", msgspec.json.encode(stats)), None)
    assert code == 1, "the router has no /v1/cluster here"
    shares = "disk 15.0%, memory 50.0%, last chunk 10.0%, new 25.0%"
    assert f"hit rate: 65.0% of the prompt tokens of the last hour ({shares})" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "h", "4", "4000", "65.0%", "15.0%", "50.0%", "10.0%", "25.0%"] in rows
    assert ["start", "9", "8000", "32.5%", "7.5%", "25.0%", "67.5%"] in rows
    _, quiet = await show(await serve("/v1/cache/stats", msgspec.json.encode(CacheStats())), None)
    assert "hit rate" not in quiet


async def test_a_router_that_is_down_does_not_hide_the_store(serve):
    metadata = await serve("/v1/stats", msgspec.json.encode(STATS))
    code, out = await show("http://127.0.0.1:9", metadata)
    assert code == 1 and "router is not there: Connection refused" in out and "3 chunks" in out


async def test_errors_and_nonsense_of_a_server_are_told(serve):
    router = await serve("/v1/cluster", b"nope", 500)
    metadata = await serve("/v1/stats", b"[1]")
    code, out = await show(router, metadata)
    assert code == 1 and "HTTP 500: nope" in out and "does not understand" in out
    node = await serve("/v1/cluster", b'{"error": {"code": "invalid_request_error", "message": "Not Found"}}', 404)
    assert "HTTP 404: Not Found" in (await show(node, metadata))[1]


async def test_json_holds_both_answers_whole(serve, capsys):
    router = await serve("/v1/cluster", json.dumps(CLUSTER).encode())
    code, _ = await show(router, "http://127.0.0.1:9", as_json=True)
    said = json.loads(capsys.readouterr().out)
    assert code == 1 and said["router"]["answer"] == CLUSTER
    assert said["metadata_server"]["answer"] is None and "Connection refused" in said["metadata_server"]["problem"]


async def test_a_cluster_of_others_servers_misses_no_metadata_server(serve):
    router = await serve("/v1/cluster", json.dumps(CLUSTER | {"handoff": "nixl"}).encode())
    for metadata in (None, "http://127.0.0.1:9"):
        code, out = await show(router, metadata)
        assert code == 0 and "2 running" in out and "handoff: nixl" in out and "metadata" not in out
