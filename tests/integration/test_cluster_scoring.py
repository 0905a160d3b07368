"""Logprobs of a prompt that a cluster of real processes tells, each once, when the decoder dies at work on them."""

import asyncio
import os
import random
import signal
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

from engines.sim.reference import expected_prompt_rows, expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SLOW = ("engine.inter_token_s=0.2", "engine.prefill_tokens_per_s=200", "engine.max_batch_tokens=64")


async def decoder_of_the_newest(subject: ClusterHandle) -> str | None:
    """Once its engine computes."""
    for name in ("decode-0", "decode-1"):
        stats = (await subject.node_info(name)).stats
        if stats is not None and stats.running:
            return name
    return None


async def test_none_is_lost_or_told_twice_when_the_decoder_is_killed(tmp_path: Path) -> None:
    draw = random.Random(5)
    prompt, top = [draw.randrange(1, 50_000) for _ in range(600)], 2
    async with cluster(tmp_path, overrides=SLOW) as subject:
        asked = {"prompt_logprobs": top, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        answer = asyncio.create_task(subject.complete(prompt, max_tokens=4, **asked))
        victim = await subject.until(lambda: decoder_of_the_newest(subject), 30)
        os.kill(subject.launcher.pids[victim], signal.SIGKILL)
        body = await answer
        engine = subject.config.engine
        assert isinstance(engine, SimEngineConfig)
        rows = expected_prompt_rows(engine, prompt, top)
        told = body["choices"][0]["prompt_logprobs"]
        assert told[0] is None and len(told) == len(prompt)
        for shown, row in zip(told[1:], rows, strict=True):
            assert {int(token): one["logprob"] for token, one in shown.items()} == dict(row.top)
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert [body["choices"][0]["token_ids"]] == expected_tokens(engine, prompt, sampling)
        record = await subject.explain(body["id"])
        assert record["retries"] >= 1 and record["route"]["reason"] == "prompt_logprobs", record
