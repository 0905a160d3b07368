"""A real cluster in the middle of a change of weights: two decoders, two revisions, and one of them is killed."""

from pathlib import Path

import msgspec
import pytest
from support.cluster import cluster
from support.mid_answer import killed_at_work

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = pytest.mark.slow

PROMPT = list(range(1, 201))
SAMPLING = SamplingParams(temperature=1.0, seed=1, max_tokens=60, ignore_eos=True)
FIELDS = {"max_tokens": 60, "seed": 1, "ignore_eos": True, "return_token_ids": True}


async def test_a_stream_waits_for_its_own_revision_and_takes_no_token_of_the_other(tmp_path: Path) -> None:
    overrides = (
        "engine.inter_token_s=0.05",
        "nodes.decode-1.engine={kind: sim, inter_token_s: 0.05, weights_version: v2}",
    )
    async with cluster(tmp_path, prefillers=0, overrides=overrides) as subject:
        (problem,) = (await subject.status())["problems"]
        assert problem.startswith("decoder decode-1 and decoder decode-0 share no KV") and "weights" in problem
        told = await killed_at_work(subject, lambda: subject.stream(PROMPT, **FIELDS))
        victim, answer = told.before["route"]["decoder"], told.answer
        engine = subject.config.engine
        assert isinstance(engine, SimEngineConfig)
        revision = {"decode-0": "v1", "decode-1": "v2"}[victim]
        own = msgspec.structs.replace(engine, weights_version=revision)
        assert answer.token_ids == expected_tokens(own, PROMPT, SAMPLING)[0]
        legs = told.after["legs"]
        assert {leg["node"] for leg in legs} == {victim} and len(legs) > 1
