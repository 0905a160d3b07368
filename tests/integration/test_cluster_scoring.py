"""Logprobs of a prompt that a cluster of real processes tells, each once, when the decoder dies at work on them."""

import random
from pathlib import Path
from typing import Any

import pytest
from support.cluster import cluster
from support.mid_answer import killed_at_work

from engines.sim.reference import expected_prompt_rows, expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
SLOW = ("engine.inter_token_s=0.2", "engine.prefill_tokens_per_s=200", "engine.max_batch_tokens=64")


async def test_none_is_lost_or_told_twice_when_the_decoder_is_killed(tmp_path: Path) -> None:
    draw = random.Random(5)
    prompt, top = [draw.randrange(1, 50_000) for _ in range(600)], 2
    async with cluster(tmp_path, overrides=SLOW) as subject:
        asked = {"prompt_logprobs": top, "temperature": 0, "ignore_eos": True, "return_token_ids": True}

        async def computes(record: dict[str, Any]) -> bool:
            stats = (await subject.node_info(record["route"]["decoder"])).stats
            return stats is not None and stats.running > 0

        told_of = await killed_at_work(subject, lambda: subject.complete(prompt, max_tokens=4, **asked), at=computes)
        body, record = told_of.answer, told_of.after
        engine = subject.config.engine
        assert isinstance(engine, SimEngineConfig)
        rows = expected_prompt_rows(engine, prompt, top)
        told = body["choices"][0]["prompt_logprobs"]
        assert told[0] is None and len(told) == len(prompt)
        for shown, row in zip(told[1:], rows, strict=True):
            assert {int(token): one["logprob"] for token, one in shown.items()} == dict(row.top)
        sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
        assert [body["choices"][0]["token_ids"]] == expected_tokens(engine, prompt, sampling)
        assert record["route"]["reason"] == "prompt_logprobs", record
