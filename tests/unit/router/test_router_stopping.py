"""A router that was told to stop answers what it has, takes no more, and says what it had to cut."""

import asyncio
import json
from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_fakes import Rig, expected, make_rig, until

from kvcore.errors import StoppingError
from nodeapi.sampling import SamplingParams
from router.requests.limits import RequestLimits
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec

PROMPT = [i % 250 for i in range(100)]
QUICK = RequestLimits(retry_pause_s=0.005)
ASK = {"model": "fake-model", "prompt": PROMPT, "max_tokens": 4, "temperature": 0}


@pytest.fixture
async def rig() -> Rig:
    """Its decoders wait for `gate`."""
    rig = await make_rig(limits=QUICK)
    gate = asyncio.Event()
    for name in ("d0", "d1"):
        rig.nodes[name].generate_gate = gate
    return rig


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


def open_gate(rig: Rig) -> None:
    gate = rig.nodes["d0"].generate_gate
    assert gate is not None
    gate.set()


def open_run(rig: Rig, name: str = "r") -> RequestRun:
    return rig.dispatcher.open(RequestSpec(name, PROMPT, SamplingParams(temperature=0, max_tokens=4)))


async def tokens_of(run: RequestRun) -> list[int]:
    async with run:
        return [token async for emit in run for token in emit.token_ids]


async def test_what_runs_is_answered_and_what_comes_is_refused(rig: Rig, http: httpx.AsyncClient) -> None:
    unread = open_run(rig, "not entered yet")
    running = asyncio.create_task(tokens_of(open_run(rig)))
    await until(lambda: rig.log.in_flight == 1)
    draining = asyncio.create_task(rig.dispatcher.drain(60.0))
    await until(lambda: rig.dispatcher.stopping)
    for stream in (False, True):
        refused = await http.post("/v1/completions", json={**ASK, "stream": stream})
        assert refused.status_code == 503 and int(refused.headers["Retry-After"]) >= 1
        assert refused.json()["error"]["code"] == "stopping"
    health = await http.get("/health")
    assert health.status_code == 503 and "stopping" in health.json()["error"]["message"]
    assert (await http.get("/v1/cluster")).json()["stopping"] is True
    assert not draining.done()
    open_gate(rig)
    assert await running == expected(PROMPT, 4) == await tokens_of(unread)
    assert await draining == []
    assert (rig.log.ok, rig.log.failed, rig.log.cancelled) == (2, 0, 0)


async def test_what_has_not_ended_in_time_is_cut_and_told(rig: Rig, http: httpx.AsyncClient) -> None:
    for name in ("d0", "d1"):
        rig.nodes[name].generate_gate = None
        rig.nodes[name].token_gate = asyncio.Event()
    asked = asyncio.create_task(http.post("/v1/completions", json={**ASK, "stream": True}))
    await until(lambda: bool(rig.log.newest()) and rig.log.newest()[0].ttft_s is not None)
    (cut,) = await rig.dispatcher.drain(0.02)
    reply = await asked
    events = [event for event in reply.text.split("\n\n") if event]
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "stopping" and "[DONE]" not in reply.text
    record = rig.log.find(cut)
    assert record is not None and record.state == "failed"
    assert record.error == "stopping: the router stopped, and this request had not ended 0.02 s later"
    assert (rig.log.failed, rig.log.cancelled) == (1, 0), "its client had not left"
    await until(lambda: all(node.running == 0 for node in rig.nodes.nodes))


async def test_a_request_that_had_not_begun_is_refused_once_it_does(rig: Rig) -> None:
    rig.dispatcher.stopping = True
    with pytest.raises(StoppingError):
        open_run(rig)
    assert await rig.dispatcher.drain(60.0) == []
