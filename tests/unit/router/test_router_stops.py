"""Usage of answers that end at a stop string: the same, whatever has arrived of them before they are read."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_fakes import FakeNode, FakeNodes, make_rig, until

from kvcore.errors import InvalidRequestError, KVFerryError, NodeUnavailableError
from kvcore.types import Role
from nodeapi.messages import FinishReason, GenerateRequest, TokenDelta, TokenLogprob
from router.requests.limits import RequestLimits

IMPATIENT = RequestLimits(patience_s=0.0, retry_pause_s=0.01)
TEXT = "one two END three END"
UP_TO_STOP = len("one two END")
ASK = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 21, "stop": ["END", "q"], "logprobs": 0}


class Bursts(FakeNode):
    """Says TEXT, a token a character, so many at once (0: all), and then fails if told to. Nothing of it is read
    before all has arrived."""

    burst = 0
    failure: KVFerryError | None = None
    says = len(TEXT)

    async def _deltas(self, request: GenerateRequest) -> AsyncIterator[TokenDelta]:
        done = len(request.output_token_ids)
        ids, step = list(TEXT.encode())[done : self.says], self.burst or len(TEXT)
        for index in range(request.sampling.n):
            for at in range(0, len(ids), step):
                part = ids[at : at + step]
                entries = [TokenLogprob(logprob=-1.0) for _ in part]
                last = done + at + step >= len(TEXT)
                reason = FinishReason.LENGTH if last and self.failure is None else None
                yield TokenDelta(index=index, token_ids=part, finish_reason=reason, logprobs=entries)
        if self.failure is not None:
            raise self.failure


async def ask(http: httpx.AsyncClient, *, stream: bool, **more: object) -> tuple[list[str], int, int]:
    """(the texts, completion_tokens, number of logprobs entries)."""
    body = {**ASK, **more, "stream": stream, **({"stream_options": {"include_usage": True}} if stream else {})}
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    events = [json.loads(event[6:]) for event in reply.text.split("\n\n")[:-2]] if stream else [reply.json()]
    texts: dict[int, str] = {}
    entries = 0
    for choice in [choice for event in events for choice in event["choices"]]:
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
        entries += len((choice["logprobs"] or {"tokens": []})["tokens"])
    return [texts[index] for index in sorted(texts)], events[-1]["usage"]["completion_tokens"], entries


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("burst", [0, 1, 3])
async def test_usage_record_logprobs_and_metric_end_at_the_stop_string(burst: int, n: int, stream: bool) -> None:
    node = Bursts("d0", Role.DECODER)
    node.burst = burst
    rig = await make_rig(FakeNodes([node]), limits=IMPATIENT)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        assert await ask(http, stream=stream, n=n) == (["one two "] * n, n * UP_TO_STOP, n * UP_TO_STOP)
        (record,) = (await http.get("/v1/requests")).json()["requests"]
        assert (record["state"], record["completion_tokens"]) == ("ok", n * UP_TO_STOP)
        assert f"kvferry_router_completion_tokens_total {n * UP_TO_STOP}.0" in (await http.get("/metrics")).text
    await until(lambda: rig.log.in_flight == 0 and node.running == 0)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("min_tokens", "text"), [(0, "one two "), (10, "one two "), (11, "one two END three "), (21, TEXT)]
)
async def test_stop_strings_count_after_min_tokens(min_tokens: int, text: str, stream: bool) -> None:
    rig = await make_rig(FakeNodes([Bursts("d0", Role.DECODER)]), limits=IMPATIENT)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        texts, count, entries = await ask(http, stream=stream, min_tokens=min_tokens)
    assert (texts, count, entries) == ([text], *[UP_TO_STOP if text == "one two " else len(TEXT)] * 2)


@pytest.mark.parametrize("error", [NodeUnavailableError("died"), InvalidRequestError("its own fault")])
async def test_what_fails_after_the_stop_string_fails_no_answer(error: KVFerryError) -> None:
    node = Bursts("d0", Role.DECODER)
    node.failure = error
    rig = await make_rig(FakeNodes([node]), limits=IMPATIENT)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        assert await ask(http, stream=False) == (["one two "], UP_TO_STOP, UP_TO_STOP)
        (record,) = (await http.get("/v1/requests")).json()["requests"]
        assert (record["state"], record["completion_tokens"], record["error"]) == ("ok", UP_TO_STOP, None)
        assert (rig.log.ok, rig.log.failed) == (1, 0)


@pytest.mark.parametrize("says", [4, 9, 14])
async def test_a_decoder_that_dies_before_in_or_after_the_stop_string_changes_no_count(says: int) -> None:
    nodes = FakeNodes([Bursts("d0", Role.DECODER), Bursts("d1", Role.DECODER)])
    nodes.nodes[0].says, nodes.nodes[0].failure = says, NodeUnavailableError("died")  # type: ignore[attr-defined]
    rig = await make_rig(nodes, limits=IMPATIENT)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        for _ in range(2):
            assert await ask(http, stream=True) == (["one two "], UP_TO_STOP, UP_TO_STOP)
    assert sum(len(node.generates) for node in nodes.nodes) >= 2
