"""Real processes without a decoder that can be used: prefillers decode, at once, until one is back."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = pytest.mark.slow

GAP_S = 10.0
"""The longest silence of a stream whose decoder was killed. It is some milliseconds; a busy machine has its pauses."""
RESTART_S, TRIES = 60.0, 8


def prompt_of(seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, 50_000) for _ in range(200)]


def expect(subject: ClusterHandle, prompt: list[int], max_tokens: int) -> list[int]:
    engine = subject.config.engine
    assert isinstance(engine, SimEngineConfig)
    return expected_tokens(engine, prompt, SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True))[0]


async def longest_gap(subject: ClusterHandle, prompt: list[int], max_tokens: int, kill_at: int) -> tuple[float, str]:
    """(Seconds between two events of a stream, at most; its id). Its decoder is killed after `kill_at` tokens."""
    fields = {"max_tokens": max_tokens, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    now = asyncio.get_running_loop().time
    tokens: list[int] = []
    last, gap, request_id = now(), 0.0, ""
    async for event in subject.events("/v1/completions", subject._completion(prompt, fields)):
        assert "error" not in event, event
        gap, last, request_id = max(gap, now() - last) if tokens else 0.0, now(), event["id"]
        before = len(tokens)
        tokens += [token for choice in event["choices"] for token in choice["token_ids"]]
        if before < kill_at <= len(tokens):
            os.kill(subject.launcher.pids["decode-0"], signal.SIGKILL)
    assert tokens == expect(subject, prompt, max_tokens)
    return gap, request_id


async def test_a_stream_whose_only_decoder_is_killed_goes_on_at_once(tmp_path: Path) -> None:
    overrides = ("engine.inter_token_s=0.02",)
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=overrides) as subject:
        for _ in range(TRIES):  # until the signal comes before the decoder has sent its last token
            old = subject.launcher.pids["decode-0"]
            gap_s, request_id = await longest_gap(subject, prompt_of(1), 60, kill_at=15)
            told = await subject.explain(request_id)
            if told["retries"]:
                break
            await subject.launcher.wait_restarted("decode-0", old, RESTART_S)
            await subject.until(subject.all_ready, RESTART_S)
        assert gap_s < GAP_S
        decoded = [(leg["node"], leg["in_need"]) for leg in told["legs"] if leg["kind"] == "decode"]
        assert decoded == [("decode-0", False), ("prefill-0", True)]
        assert (await subject.status())["requests"]["in_need"] == 1
        await subject.launcher.wait_restarted("decode-0", old, RESTART_S)
        await subject.until(subject.all_ready, RESTART_S)
        answer = await subject.complete(prompt_of(2), max_tokens=4)
        assert [leg["node"] for leg in (await subject.explain(answer["id"]))["legs"] if leg["kind"] == "decode"] == [
            "decode-0"
        ], "it is back"


async def test_prefillers_alone_serve_and_the_cluster_says_so(tmp_path: Path) -> None:
    async with cluster(tmp_path, without=("decode-0", "decode-1")) as subject:
        async with subject.session.get(f"{subject.url}/health") as health:
            assert health.status == 200

        async def stored() -> bool:
            return (await subject.stats()).objects >= 3

        for _ in range(2):
            answer = await subject.complete(
                prompt_of(3), max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True
            )
            assert answer["choices"][0]["token_ids"] == expect(subject, prompt_of(3), 8)
            await subject.until(stored, RESTART_S)  # beside the answer, not before it
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= 192, "with the cache, as always"
        told = await subject.explain(answer["id"])
        assert told["route"]["reason"] == "in_need" and [leg["kind"] for leg in told["legs"]] == ["decode"]
        (problem,) = (await subject.status())["problems"]
        assert "decode-0" in problem and "decode-1" in problem and "prefillers decode" in problem


async def test_without_any_engine_requests_wait_and_streams_are_told_so(tmp_path: Path) -> None:
    names = ("prefill-0", "prefill-1", "decode-0", "decode-1")
    async with cluster(tmp_path, without=names) as subject:
        body = {"model": "sim", "messages": [{"role": "user", "content": "hello"}], "stream": True}
        async with subject.session.post(f"{subject.url}/v1/chat/completions", json=body) as reply:
            assert reply.status == 200
            assert await reply.content.readline() == b": no node is up, waiting for one\n"
        reasons = {node["id"]: node["reason"] for node in (await subject.status())["nodes"]}
        assert reasons.keys() == set(names) and all(reasons.values())
        async with subject.session.get(f"{subject.url}/health") as health:
            assert health.status == 503
