"""Requests that come while no node is up wait for one, within bounds, and streaming clients are told so."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, make_rig, until

from kvcore.types import Role
from router.admission.no_node import NoNodeWait

ASK = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
WORD = b": no node is up, waiting for one\n\n"


async def rig_without(wait_s: float) -> Rig:
    rig = await make_rig(FakeNodes([FakeNode("d0", Role.DECODER)]), wait_s=wait_s)
    rig.nodes["d0"].down = True
    await rig.prober.probe()
    return rig


@asynccontextmanager
async def client(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        yield http


def waiting(rig: Rig) -> NoNodeWait:
    (wait,) = [look.__self__ for look in rig.prober.on_round if isinstance(getattr(look, "__self__", None), NoNodeWait)]
    return wait


async def come_up(rig: Rig) -> None:
    rig.nodes["d0"].down = False
    await rig.prober.probe()


@pytest.mark.parametrize("stream", [False, True])
async def test_a_request_waits_for_the_first_node_that_is_up(stream: bool) -> None:
    rig = await rig_without(60.0)
    async with client(rig) as http:
        asked = asyncio.create_task(http.post("/v1/completions", json={**ASK, "stream": stream}))
        await until(lambda: len(waiting(rig)) == 1)
        await come_up(rig)
        reply = await asked
    assert reply.status_code == 200 and not len(waiting(rig))
    assert rig.log.ok == 1


async def test_a_streaming_client_is_told_that_it_waits_and_then_answered() -> None:
    rig = await rig_without(2.0)
    async with client(rig) as http:
        asked = asyncio.create_task(http.post("/v1/completions", json={**ASK, "stream": True}))
        await asyncio.wait([asked], timeout=0.7)
        await come_up(rig)
        reply = await asked
    assert reply.status_code == 200 and reply.content.startswith(WORD)
    assert reply.content.rstrip().endswith(b"data: [DONE]")


@pytest.mark.parametrize("stream", [False, True])
async def test_when_its_time_is_up_it_is_told_what_is_wrong(stream: bool) -> None:
    rig = await rig_without(0.2)
    async with client(rig) as http:
        reply = await http.post("/v1/completions", json={**ASK, "stream": stream})
    if stream:  # its head was out
        words, last = reply.content.split(b"event: error\ndata: ")
        assert reply.status_code == 200 and words == WORD * words.count(WORD) != b""
        assert b'"code":"node_unavailable"' in last and b"[DONE]" not in last and last.endswith(b"}\n\n")
    else:
        assert reply.status_code == 503 and reply.headers["retry-after"]
        assert "refused the connection" in reply.json()["error"]["message"]


async def test_more_than_may_wait_are_refused_at_once() -> None:
    rig = await rig_without(60.0)
    async with client(rig) as http:
        asked = [asyncio.create_task(http.post("/v1/completions", json=ASK)) for _ in range(2)]
        await until(lambda: len(waiting(rig)) == 2)
        reply = await http.post("/v1/completions", json=ASK)
        assert reply.status_code == 503 and "2 requests wait for one already" in reply.json()["error"]["message"]
        await come_up(rig)
        assert [(await one).status_code for one in asked] == [200, 200]


async def test_a_client_that_leaves_waits_no_more() -> None:
    rig = await rig_without(60.0)
    async with client(rig) as http:
        asked = asyncio.create_task(http.post("/v1/completions", json=ASK))
        await until(lambda: len(waiting(rig)) == 1)
        asked.cancel()
        await asyncio.wait([asked])
    assert len(waiting(rig)) == 0 and waiting(rig)._tokens == 0


async def test_nobody_waits_for_nodes_that_do_not_fit_or_were_drained() -> None:
    rig = await rig_without(60.0)
    known = rig.cluster.nodes["d0"]
    known.unfit = "of another model"
    async with client(rig) as http:
        assert (await http.post("/v1/completions", json=ASK)).status_code == 503
    known.unfit = None
    rig.cluster._drained = {"d0"}
    async with client(rig) as http:
        assert (await http.post("/v1/completions", json=ASK)).status_code == 503


async def test_a_router_that_stops_lets_nobody_wait() -> None:
    rig = await rig_without(60.0)
    async with client(rig) as http:
        asked = asyncio.create_task(http.post("/v1/completions", json=ASK))
        await until(lambda: len(waiting(rig)) == 1)
        rig.dispatcher.stopping = True
        waiting(rig).look()
        reply = await asked
    assert reply.status_code == 503
