"""What a client is told when there is too much to do, and what it may say about its first token."""

import asyncio
from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_fakes import Rig, make_rig, until

ASK = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
HEADER = "X-KVFerry-First-Token-S"


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    """Both prefillers compute 10 tokens a second and are at a prompt."""
    rig = await make_rig()
    gate = asyncio.Event()
    for name in ("p0", "p1"):
        rig.nodes[name].prefill_gate = gate
        for now in (0.0, 10.0):
            rig.cluster.nodes[name].rates.prefilled(100, 10.0, now)
        rig.cluster.nodes[name].touch()
    for name in ("d0", "d1"):
        rig.nodes[name].wait_for_handoff = True
    yield rig
    gate.set()
    await rig.dispatcher.aclose()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


async def busy(rig: Rig, http: httpx.AsyncClient) -> list["asyncio.Task[httpx.Response]"]:
    asked = [
        asyncio.create_task(http.post("/v1/completions", json={**ASK, "prompt": f"{number}" * 100, "user": "other"}))
        for number in range(2)
    ]
    await until(lambda: sum(len(rig.nodes[name].prefills) for name in ("p0", "p1")) == 2)
    return asked


def release(rig: Rig) -> None:
    for name in ("p0", "p1"):
        gate = rig.nodes[name].prefill_gate
        assert gate is not None
        gate.set()
    for name in ("d0", "d1"):
        rig.nodes[name].wait_for_handoff = False


async def test_too_late_is_429_with_the_time_to_come_back(rig: Rig, http: httpx.AsyncClient) -> None:
    asked = await busy(rig, http)
    reply = await http.post("/v1/completions", json=ASK, headers={HEADER: "12"})
    assert reply.status_code == 429
    error = reply.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and error["type"] == "requests" and "12.0 s" in error["message"]
    assert 4 <= int(reply.headers["Retry-After"]) <= 10, "10 s until a node is free, and 10 s of its own"
    metrics = (await http.get("/metrics")).text
    assert 'kvferry_router_refused_total{why="late"} 1.0' in metrics
    for task in asked:
        task.cancel()


async def test_who_can_wait_gets_its_turn(rig: Rig, http: httpx.AsyncClient) -> None:
    asked = await busy(rig, http)
    mine = asyncio.create_task(http.post("/v1/completions", json={**ASK, "user": "me"}, headers={HEADER: "60"}))
    await until(lambda: len(rig.admission) == 1)
    assert "kvferry_router_waiting_requests 1.0" in (await http.get("/metrics")).text
    release(rig)
    assert (await mine).status_code == 200
    assert len(rig.admission) == 0
    for task in asked:
        task.cancel()


async def test_a_client_that_leaves_leaves_the_queue(rig: Rig, http: httpx.AsyncClient) -> None:
    asked = await busy(rig, http)
    mine = asyncio.create_task(http.post("/v1/completions", json=ASK, headers={HEADER: "60"}))
    await until(lambda: len(rig.admission) == 1)
    mine.cancel()
    await until(lambda: len(rig.admission) == 0)
    for task in asked:
        task.cancel()


@pytest.mark.parametrize("given", ["0", "-1", "soon", "nan", "inf", ""])
async def test_a_time_that_is_none_is_refused(http: httpx.AsyncClient, given: str) -> None:
    reply = await http.post("/v1/completions", json=ASK, headers={HEADER: given})
    assert reply.status_code == 400 and HEADER in reply.json()["error"]["message"]


async def test_each_of_several_answers_counts_for_how_long_answers_are(rig: Rig, http: httpx.AsyncClient) -> None:
    release(rig)
    reply = await http.post("/v1/completions", json={**ASK, "n": 4, "user": "me", "ignore_eos": True})
    assert reply.json()["usage"]["completion_tokens"] == 16
    assert rig.admission._queue.output_of("me", 1000) == 4
