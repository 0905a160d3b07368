"""Attacks on a real router: what they cost its memory and its other clients."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.processes import Cluster, cluster

pytestmark = pytest.mark.slow
BODY_BYTES = int(7.9 * (1 << 20))
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "p0", "d0", "router")
        async with asyncio.timeout(30):
            while not await _answers(subject):  # noqa: ASYNC110 - it is another process
                await asyncio.sleep(0.05)
        yield subject


async def test_bodies_that_are_never_finished_cost_a_bounded_amount_of_memory(served: Cluster):
    """60 bodies of 7.9 MiB without their last byte cost 553 MiB before there was a bound."""
    before, part = _rss(served), b"x" * BODY_BYTES
    async with AsyncExitStack() as held:
        attackers = [asyncio.create_task(_hold(served, part, held)) for _ in range(60)]
        async with asyncio.timeout(60):
            await asyncio.gather(*attackers)
        grown = _rss(served) - before
        assert grown < 250 << 20, f"grew by {grown >> 20} MiB"
        assert await _answers(served), "others are served meanwhile"
        metrics = await _text(served, "/metrics")
    refused = next(line for line in metrics.splitlines() if line.startswith("kvferry_http_refused_total{"))
    assert 'listener="router",reason="bodies"' in refused and float(refused.split()[1]) > 40


async def _hold(served: Cluster, part: bytes, held: AsyncExitStack) -> None:
    """All of a body but its end, which the router takes or refuses."""
    _, writer = await asyncio.open_connection("127.0.0.1", served.ports["router"])
    held.callback(writer.close)
    try:
        writer.write(HEAD % (BODY_BYTES + 1) + part)
        await writer.drain()
    except ConnectionError:
        return


async def _answers(served: Cluster) -> bool:
    body = {"model": "sim", "prompt": "hello", "max_tokens": 2}
    async with served.session.post(served.url("router") + "/v1/completions", json=body) as response:
        return response.status == 200


async def _text(served: Cluster, path: str) -> str:
    async with served.session.get(served.url("router") + path) as response:
        return await response.text()


def _rss(served: Cluster) -> int:
    pages = Path(f"/proc/{served.children['router'].pid}/statm").read_text().split()[1]
    return int(pages) * 4096
