"""One answer is of one model: a stream goes on only where the weights and settings are those that it began with."""

import asyncio
import json
from unittest.mock import patch

import httpx
import pytest
from support.router_fakes import FakeNode, FakeNodes, Rig, expected, make_rig, next_token, until

from kvcore.errors import ModelChangedError
from kvcore.types import Role
from nodeapi.sampling import SamplingParams
from router.requests.limits import RequestLimits
from router.requests.spec import RequestSpec

PROMPT = list(range(100, 140))
HASTY = RequestLimits(patience_s=0.05, retry_pause_s=0.01)


def other_model(tokens: list[int], index: int) -> int:
    """No token of it is one of the first model's."""
    return next_token(tokens, index) + 200


def decoders(*weights: str) -> FakeNodes:
    """d0, d1, ... of these weights; those of w2 answer as `other_model`."""
    nodes = [FakeNode(f"d{number}", Role.DECODER, weights=name) for number, name in enumerate(weights)]
    for node in nodes:
        node.tokens = other_model if node.weights == "w2" else next_token
    return FakeNodes(nodes)


def keep_busy(rig: Rig, *names: str) -> None:
    """So that the policy prefers the others."""
    for name in names:
        rig.cluster.work_chosen(name, sequences=5, prefill_tokens=0)


async def answer(rig: Rig, n: int = 1) -> list[list[int]]:
    outputs: list[list[int]] = [[] for _ in range(n)]
    probes = asyncio.create_task(rig.prober.run())
    async with rig.dispatcher.open(RequestSpec("r", PROMPT, SamplingParams(max_tokens=8, n=n))) as run:
        async for emit in run:
            outputs[emit.index] += emit.token_ids
    probes.cancel()
    await rig.dispatcher.aclose()
    return outputs


@pytest.mark.parametrize("n", [1, 2])
async def test_a_stream_goes_on_at_a_busy_decoder_of_its_model_and_not_at_an_idle_one_of_another(n: int) -> None:
    rig = await make_rig(decoders("w1", "w2", "w1"))
    rig.nodes["d0"].die_after = 6
    keep_busy(rig, "d1", "d2")
    rig.cluster.work_chosen("d2", sequences=50, prefill_tokens=0)
    assert await answer(rig, n) == [expected(PROMPT, 8, 0), expected(PROMPT, 3, 1) + continued(3)][:n]
    assert not rig.nodes["d1"].generates
    assert len(rig.nodes["d2"].generates) == n


def continued(at: int) -> list[int]:
    """What the fake model says to index 1 after its first `at` tokens, which goes on as index 0 of a leg of its own."""
    tokens = expected(PROMPT, at, 1)
    while len(tokens) < 8:
        tokens.append(next_token(PROMPT + tokens, 0))
    return tokens[at:]


async def test_before_its_first_token_a_request_goes_to_any_decoder() -> None:
    rig = await make_rig(decoders("w1", "w2"))
    rig.nodes["d0"].die_after = 0
    keep_busy(rig, "d1")
    (tokens,) = await answer(rig)
    assert tokens == [token for token in tokens if token >= 200 + 97] and len(tokens) == 8


async def test_a_prefiller_of_its_model_goes_on_with_a_stream_rather_than_a_decoder_of_another() -> None:
    nodes = decoders("w1", "w2")
    nodes = FakeNodes([*nodes.nodes, FakeNode("p0", Role.PREFILLER, weights="w1")])
    rig = await make_rig(nodes, min_prefill_tokens=1000)
    rig.nodes["d0"].die_after, rig.nodes["d0"].stays_dead = 3, True
    keep_busy(rig, "d1")
    assert await answer(rig) == [expected(PROMPT, 8)]
    assert [len(rig.nodes[name].generates) for name in ("d0", "d1", "p0")] == [1, 0, 1]


async def test_a_stream_whose_model_is_gone_ends_with_an_error_that_says_so() -> None:
    rig = await make_rig(decoders("w1", "w2"), limits=HASTY)
    rig.nodes["d0"].die_after, rig.nodes["d0"].stays_dead = 3, True
    keep_busy(rig, "d1")
    transport = httpx.ASGITransport(app=rig.app)
    body = {"model": "fake-model", "prompt": PROMPT, "max_tokens": 8, "stream": True, "return_token_ids": True}
    probes = asyncio.create_task(rig.prober.run())
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        reply = await client.post("/v1/completions", json=body)
    probes.cancel()
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    *events, last = [json.loads(line) for line in lines]
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == expected(PROMPT, 3)
    assert last["error"]["code"] == "model_changed"
    assert "d0 died; no node has the weights and settings that the answer began with any more: node d1" in str(last)
    assert not rig.nodes["d1"].generates
    await rig.dispatcher.aclose()


async def test_a_stream_waits_for_a_decoder_of_its_model_to_come_back() -> None:
    rig = await make_rig(decoders("w1", "w2"))
    rig.nodes["d0"].die_after = 3
    keep_busy(rig, "d1")
    async with rig.dispatcher.open(RequestSpec("r", PROMPT, SamplingParams(max_tokens=8))) as run:
        tokens: list[int] = []
        async for emit in run:
            tokens += emit.token_ids
            if len(tokens) == 3:
                await until(lambda: bool(run.machine.retries))
                rig.nodes["d0"].die_after = None
    assert tokens == expected(PROMPT, 8)
    assert [leg.node for leg in run.record.legs] == ["d0", "d0"]
    await rig.dispatcher.aclose()


async def test_nothing_is_taken_of_a_decoder_that_has_changed_its_weights_since_it_reported() -> None:
    """It was started anew between two probes: what its first delta says counts."""
    rig = await make_rig(decoders("w1", "w1", "w1"))
    rig.nodes["d0"].die_after = 3
    rig.nodes["d1"].tokens, rig.nodes["d1"].weights_said = other_model, "w2"
    keep_busy(rig, "d1", "d2", "d2")
    asked = rig.cluster.probe_asked
    with patch.object(asked, "clear"):
        assert await answer(rig) == [expected(PROMPT, 8)]
    assert [len(rig.nodes[name].generates) for name in ("d0", "d1", "d2")] == [1, 1, 1]
    assert rig.cluster.nodes["d1"].breaker._failures == 0, "it is a healthy node"
    assert asked.is_set(), "the router wants to know what it is now"
    (failed,) = [leg.error for leg in rig.log.find("r").legs if leg.node == "d1"]  # type: ignore[union-attr]
    assert failed is not None and failed.startswith("model_changed: node d1 has other weights or settings")


async def test_what_a_first_leg_says_counts_more_than_what_its_node_had_reported() -> None:
    rig = await make_rig(decoders("w1", "w1", "w2"))
    rig.nodes["d0"].tokens, rig.nodes["d0"].weights_said, rig.nodes["d0"].die_after = other_model, "w2", 3
    keep_busy(rig, "d1", "d2", "d2")
    (tokens,) = await answer(rig)
    assert min(tokens) > 200 and len(tokens) == 8
    assert not rig.nodes["d1"].generates


async def test_the_record_of_a_failed_request_has_the_code() -> None:
    rig = await make_rig(decoders("w1", "w2"), limits=HASTY)
    rig.nodes["d0"].die_after, rig.nodes["d0"].stays_dead = 3, True
    keep_busy(rig, "d1")
    with pytest.raises(ModelChangedError):
        await answer(rig)
    record = rig.log.find("r")
    assert record is not None and record.error is not None and record.error.startswith("model_changed: ")
