"""What the metadata server tells of itself: times of calls, positions of event streams, and its document."""

import asyncio
import re
import resource
from dataclasses import replace

import aiohttp
import pytest
from support.metadata_rigs import end, metadata_rig, until
from support.metadata_words import granted, ids, in_pieces, key, new_state, registration, reservation

from kvcore import metric_names
from kvcore.clock import ManualClock, SystemClock
from kvcore.errors import NotLeaderError
from kvcore.process.descriptors import raise_limit
from kvcore.telemetry import Metrics
from metadata_server.client import MetadataClient
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS
from metadata_server.http_transport import HttpMetadataTransport
from metadata_server.limits import ClientLimits
from metadata_server.messages import MatchRequest, WaitRequest
from metadata_server.shell.app import create_app
from metadata_server.shell.openapi import document

WAITS = 1000


class _Follower:
    leads = False

    def check(self) -> None:
        raise NotLeaderError("another leads")


def value(text: str, sample: str) -> float:
    (found,) = re.findall(rf"^{re.escape(sample)} (\S+)$", text, re.M)
    return float(found)


async def test_every_call_has_its_times_from_a_tenth_of_a_millisecond_to_five_seconds():
    async with metadata_rig("http") as rig:
        await rig.client.register(registration("a"))
        await rig.client.match(MatchRequest(keys=[key(1)]))
        await rig.client.stats()
        await rig.client.stats()
        async with aiohttp.ClientSession(rig.url) as http, http.get("/metrics") as response:
            text = await response.text()
    name = metric_names.METADATA_CALL_SECONDS.name
    for path, count in (("/v1/nodes/register", 1), ("/v1/objects/match", 1), ("/v1/stats", 2)):
        assert value(text, f'{name}_count{{endpoint="{path}"}}') == count
        assert value(text, f'{name}_bucket{{endpoint="{path}",le="0.0001"}}') <= count
        assert value(text, f'{name}_bucket{{endpoint="{path}",le="5.0"}}') == count


def test_the_oldest_reservation_and_who_leads_are_told():
    clock = ManualClock()
    core = MetadataCore(new_state(), clock)
    metrics = Metrics()
    create_app(core, clock, metrics, 1 << 20)

    def told(sample: str) -> float:
        return value(metrics.render().decode(), f"kvferry_metadata_{sample}")

    assert (told("leads"), told("oldest_reservation_seconds")) == (1, 0)
    core.leader = _Follower()
    assert told("leads") == 0
    core.state.register(registration("a"), clock.now())
    first = ids("a", granted(core.state.reserve(reservation("a", [1]), clock.now())))
    clock.advance(1.5)
    second = ids("a", granted(core.state.reserve(reservation("a", [2]), clock.now())))
    clock.advance(0.5)
    assert told("oldest_reservation_seconds") == 2.0
    core.state.commit(first, clock.now())
    assert told("oldest_reservation_seconds") == 0.5
    core.state.commit(second, clock.now())
    assert told("oldest_reservation_seconds") == 0


def test_a_scrape_counts_the_segments_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, metrics, asked = ManualClock(), Metrics(), []
    core = MetadataCore(new_state(), clock)
    create_app(core, clock, metrics, 1 << 20)
    core.state.register(in_pieces(registration("a")), clock.now())
    stats = core.state.stats
    monkeypatch.setattr(core.state, "stats", lambda *args: asked.append(args) or stats(*args))
    text = metrics.render().decode()
    assert value(text, "kvferry_metadata_rebuilding_segments") == 1 and len(asked) == 1


async def test_the_slowest_event_stream_and_what_the_log_holds_are_told():
    clock = ManualClock()
    core = MetadataCore(new_state(event_log=4), clock)
    metrics = Metrics()
    create_app(core, clock, metrics, 1 << 20)

    def told(sample: str) -> float:
        return value(metrics.render().decode(), f"kvferry_metadata_{sample}")

    assert told("subscriber_lag_events") == 0
    fast, slow = (core.events(core.state.epoch, core.state.log.next_seq) for _ in range(2))
    for stream in (fast, slow):
        await anext(stream)
    for number in range(3):
        core.state.register(registration(f"n{number}"), clock.now())
    await anext(fast)
    waiting = asyncio.create_task(anext(fast))  # it was taken, and the next is waited for
    await asyncio.sleep(0)
    assert (told("subscribers"), told("subscriber_lag_events")) == (2, 3), "of the slow one"
    assert (told('event_log{position="oldest"}'), told('event_log{position="next"}')) == (1, 4)
    for number in range(3, 9):
        core.state.register(registration(f"n{number}"), clock.now())
    assert told("subscriber_lag_events") == 4, "more the log does not hold: it will get a snapshot"
    await end(waiting)
    await fast.aclose()
    await slow.aclose()
    assert (told("subscribers"), told("subscriber_lag_events")) == (0, 0)


def test_the_document_has_every_path_that_is_served_and_says_how_each_fails():
    clock = SystemClock()
    app = create_app(MetadataCore(new_state(), clock), clock, Metrics(), 1 << 20)
    served = {route.path for route in app.router.routes if getattr(route, "include_in_schema", True)}
    told = document()["paths"]
    assert set(told) == served - {"/openapi.json"}
    assert {row.path for row in ENDPOINTS} < set(told)
    for row in ENDPOINTS:
        (method, operation), *more = told[row.path].items()
        assert not more and method == ("get" if row.request is None else "post")
        statuses = {200, 500} | (set(row.statuses) if row.request is not None else set())
        assert set(operation["responses"]) == {str(status) for status in statuses}, row.path
        ok = operation["responses"]["200"]["content"]
        assert ok["application/json"]["schema"]["$ref"].endswith(f"/{row.reply.__name__}") and len(ok) == 2
        if row.request is not None:
            body = operation["requestBody"]["content"]["application/json"]["schema"]
            assert body["$ref"].endswith(f"/{row.request.__name__}")
    for path, operations in told.items():
        for operation in operations.values():
            assert operation["summary"] and operation["operationId"] == path
            bad = {status: what for status, what in operation["responses"].items() if int(status) >= 400}
            assert "500" in bad and all(what["description"] for what in bad.values())


@pytest.mark.slow
async def test_a_thousand_waits_of_one_process_leave_its_other_calls_alone():
    """As many handoffs as one decoder may wait for. The server is in this process, too: two descriptors a wait."""
    if raise_limit() < 3 * WAITS:
        pytest.skip("too few descriptors")
    async with metadata_rig("http") as rig:
        limits = ClientLimits()
        assert limits.max_waits >= WAITS
        transport = HttpMetadataTransport(rig.url, limits)
        client = MetadataClient(transport, rig.clock, 2.0, limits=limits)
        numbers = list(range(WAITS))
        waits = [
            asyncio.create_task(client.wait(WaitRequest(keys=[key(number)], timeout_s=60.0))) for number in numbers
        ]
        await until(lambda: rig.core.num_waiters == WAITS, 30.0)
        for _ in range(50):
            await client.match(MatchRequest(keys=[key(WAITS)]))  # raises if it takes the two seconds of a call
            assert client.available
        assert not any(wait.done() for wait in waits)
        rig.core.state.register(registration("a", units=2 * WAITS), rig.clock.now())
        reserved = granted(rig.core.state.reserve(reservation("a", numbers), rig.clock.now()))
        await client.commit(ids("a", reserved))
        replies = await asyncio.gather(*waits)
        assert all(len(reply.replicas) == 1 for reply in replies)
        await transport.aclose()


async def test_waits_take_a_quarter_of_few_descriptors():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        client = connect_client(MetadataEndpoints(urls=("http://127.0.0.1:1",), timeout_s=1.0), ManualClock())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert client._limits == replace(ClientLimits(), max_waits=128)
    await client.aclose()
