"""A tenant's `cache_salt` goes from the request to every leg and every key: what is lost on the way is shared."""

import httpx
import pytest
from support.router_fakes import CHUNK_TOKENS, FakeNodes, make_rig, spec, two_and_two

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.config.routing import RoutingPolicy
from router.routing.decision import Decision
from router.routing.policy import make_policy
from router.routing.views import NO_HITS, ClusterView, RouteRequest

CHAT = {"model": "fake-model", "messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 4}
COMPLETION = {"model": "fake-model", "prompt": [5] * 100, "max_tokens": 4}
BODIES = [("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION)]


async def post(nodes: FakeNodes, path: str, body: dict[str, object]) -> httpx.Response:
    rig = await make_rig(nodes)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as client:  # type: ignore[arg-type]
        return await client.post(path, json=body)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body"), BODIES, ids=["chat", "completion"])
async def test_both_legs_and_a_continuation_carry_it(path, body, stream):
    nodes = two_and_two()
    nodes["d0"].die_after = nodes["d1"].die_after = 2
    reply = await post(nodes, path, {**body, "cache_salt": "tenant-ä", "stream": stream})
    assert reply.status_code == 200
    prefills = [leg for node in nodes.nodes for leg in node.prefills]
    generates = [leg for node in nodes.nodes for leg in node.generates]
    assert prefills and len(generates) >= 2, "one decoder died, another went on"
    assert {leg.cache_salt for leg in [*prefills, *generates]} == {"tenant-ä".encode()}


async def test_without_one_legs_have_none():
    nodes = two_and_two()
    await post(nodes, "/v1/completions", {**COMPLETION, "cache_salt": None})
    assert {leg.cache_salt for node in nodes.nodes for leg in [*node.prefills, *node.generates]} == {b""}


class Spy:
    """Chooses as round robin does, and keeps what it was asked."""

    def __init__(self) -> None:
        self.inner, self.asked = make_policy(RoutingPolicy.ROUND_ROBIN), list[RouteRequest]()

    def choose(self, request: RouteRequest, view: ClusterView) -> Decision:
        self.asked.append(request)
        return self.inner.choose(request, view)


async def test_the_router_looks_for_a_tenants_chunks_under_its_own_keys():
    spy = Spy()
    rig = await make_rig(policy=spy)
    fingerprint = spec().fingerprint
    rig.cluster.index.store("p0", chunk_keys(root_key(fingerprint, b"a"), COMPLETION["prompt"], CHUNK_TOKENS), "p0.1")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as client:  # type: ignore[arg-type]
        for salt in ("a", "b", None):
            await client.post("/v1/completions", json={**COMPLETION, "cache_salt": salt})
    assert [asked.hits.get(fingerprint, NO_HITS).longest for asked in spy.asked] == [6, 0, 0]
