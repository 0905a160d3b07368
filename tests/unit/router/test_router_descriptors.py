"""A router that has no file descriptor left: no node is blamed, the client is told, and the log says it once."""

import asyncio
import logging
import resource
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

import httpx
import pytest
from fastapi import FastAPI
from support.router_fakes import FakeNode, expected, make_rig, node_app, serve

from kvcore.config.file import load_config
from kvcore.errors import NoDescriptorsError
from kvcore.process.descriptors import RESERVED, soft_limit
from kvcore.process.http_gate import HttpGate
from kvcore.process.limits import HttpLimits
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics
from kvcore.trust.opening import OPEN
from kvcore.types import Role
from nodeapi.client import HttpNodeClient
from nodeapi.messages import PrefillRequest
from router.descriptors import LEGS_PER_REQUEST, clients_at_most, descriptors_needed, operators_at_most
from router.listeners import RouterListeners
from router.nodes.limits import NodeHealthLimits
from router.requests.limits import RequestLimits

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
ERROR = NoDescriptorsError("no file descriptor is left")
PREFILL = PrefillRequest(request_id="a", prompt_token_ids=[1, 2, 3], deadline_s=5)


@contextmanager
def none_left() -> Iterator[None]:
    """Not one more may be opened; what is open stays."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_a_call_without_a_descriptor_says_so_and_the_next_one_goes_through(host: str) -> None:
    client = HttpNodeClient(connect_timeout_s=5, max_connections=10)
    async with serve(node_app(FakeNode("p0", Role.PREFILLER))) as address:
        url = address.replace("127.0.0.1", host)
        with none_left(), pytest.raises(NoDescriptorsError, match=r"may have 3; raise its limit"):
            await client.prefill(url, PREFILL, timeout_s=5)
        assert (await client.prefill(url, PREFILL, timeout_s=5)).request_id == "a"
    await client.aclose()


async def test_requests_that_find_none_are_told_so_and_no_node_is_charged() -> None:
    rig = await make_rig(limits=RequestLimits(patience_s=0.0, retry_pause_s=0.01))
    for node in rig.nodes.nodes:
        node.prefill_error = node.generate_error = ERROR
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        ask = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
        for _ in range(8):
            reply = await http.post("/v1/completions", json=ask)
            assert reply.status_code == 503 and reply.headers["retry-after"] == "1"
            assert reply.json()["error"]["code"] == "no_descriptors"
        for node in rig.nodes.nodes:
            node.prefill_error = node.generate_error = None
        assert {rig.cluster.breaker_state(node) for node in rig.cluster.nodes.values()} == {"closed"}
        text = (await http.post("/v1/completions", json=ask)).json()["choices"][0]["text"]
        assert text == bytes(expected(list(b"hello" * 20), 4)).decode()
    await rig.dispatcher.aclose()


async def test_a_node_that_could_not_be_asked_is_used_as_before(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(node_limits=NodeHealthLimits(lost_rounds=0))
    lost: list[str] = []
    rig.prober.on_lost.append(lambda name, error: lost.append(name))

    async def info(url: str, *, timeout_s: float) -> NoReturn:
        raise ERROR

    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(rig.nodes, "info", info)
        for _ in range(3):
            await rig.prober.probe()
    assert [node.id for node in rig.cluster.view().decoders] == ["d0", "d1"] and not lost
    assert sum("no_descriptors" in line for line in caplog.messages) == 1
    await rig.prober.probe()
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING):
        patched.setattr(rig.nodes, "info", info)
        await rig.prober.probe()
    assert sum("no_descriptors" in line for line in caplog.messages) == 2


def test_so_many_clients_leave_descriptors_for_the_legs_of_each() -> None:
    for limit in (1024, 4096, 20_000):
        clients = clients_at_most(limit, 10)
        assert descriptors_needed(clients, 10) <= limit < descriptors_needed(clients + 1, 10)
        operators = operators_at_most(limit)
        apart = clients_at_most(limit, 10, operators=operators)
        assert 16 <= operators <= limit // 16, "a flood of their port leaves clients most"
        assert descriptors_needed(apart, 10) + operators <= limit
    assert clients_at_most(64, 10) == 16
    assert descriptors_needed(1, 0) - descriptors_needed(0, 0) == 1 + LEGS_PER_REQUEST


def test_the_listeners_of_a_process_have_its_descriptors_between_them() -> None:
    gate = HttpGate(HttpLimits(listeners=2))
    held = 2 * (gate.max_connections + gate.limits.max_spare)
    assert held + RESERVED <= soft_limit() < held + 2 + RESERVED


async def test_a_flood_of_the_operators_port_leaves_clients_their_connections() -> None:
    config = load_config(SIM, ["router.admin_port=0"])
    async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
        made = RouterListeners(FastAPI(), config, OPEN, Metrics(), Lifecycle(stack, tasks))
    assert made.operators is not None
    operators, clients = made.operators.gate.max_connections, made.clients.gate.max_connections
    assert operators == operators_at_most(soft_limit())
    assert descriptors_needed(clients, len(config.nodes)) + operators <= soft_limit()
