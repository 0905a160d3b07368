"""Other weights behind the model's path while a cluster runs: answers are theirs, and nothing of the old ones."""

import asyncio
from contextlib import aclosing
from pathlib import Path
from typing import Any

import msgspec
import pytest
from support.cluster import ClusterHandle, cluster
from support.generate_reference import assert_identical, load_reference
from support.tiny_models import make_tiny_model

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

QUICK = ["engine.inter_token_s=0.05", "service.start_s=15"]
"""A stream that was cut waits for its own weights as long as a node may take to start."""
PROMPT = [3 + number % 200 for number in range(64 * 4 + 9)]
GREEDY = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True}


async def ask(subject: ClusterHandle) -> tuple[list[int], int]:
    """Its tokens, and how many of the prompt's were cached."""
    body = await subject.complete(PROMPT, **GREEDY)
    return body["choices"][0]["token_ids"], body["usage"]["prompt_tokens_details"]["cached_tokens"]


async def generations(subject: ClusterHandle) -> dict[str, dict[str, Any]]:
    async with subject.session.get(f"{subject.url}/v1/cache/generations") as reply:
        return {line["state"]: line for line in (await reply.json())["generations"]}


async def test_trained_weights_answer_as_the_model_does_and_the_old_generation_is_stale(tmp_path: Path) -> None:
    model, disk = tmp_path / "model", [f"tiers.disk={{path: {tmp_path}/disk, size: 32MiB}}"]
    make_tiny_model("llama", model, seed=1)
    async with cluster(tmp_path, engine="torch", model=model, prefillers=1, decoders=1, overrides=disk) as subject:
        before, _ = await ask(subject)
        again, cached = await ask(subject)
        assert again == before and cached == 256

        async def on_disk() -> bool:
            places = (await generations(subject))["live"]["places"]
            return any(place["place"] == "disk" and place["chunks"] >= 4 for place in places)

        await subject.until(on_disk, 60)
        make_tiny_model("llama", model, seed=2)
        status, _, report = await subject.post("/v1/weights", {"version": "step-1200", "wait_s": 5})
        assert status == 200, report
        fingerprints = {line["fingerprint"] for line in report["nodes"]}
        assert len(report["nodes"]) == 2 and len(fingerprints) == 1
        after, cached = await ask(subject)
        assert cached == 0 and after != before
        assert await ask(subject) == (after, 256), "the new weights' KV is cached and shared as any"
        assert {(await subject.node_info(node)).version for node in subject.nodes} == {"step-1200"}
        lines = await generations(subject)
        assert {lines["live"]["fingerprint"]} == fingerprints and lines["stale"]["places"]
        status, _, cleared = await subject.post("/v1/cache/clear", {"stale": True})
        assert status == 200 and cleared["cleared"] == [lines["stale"]["fingerprint"]]
        assert set(await generations(subject)) == {"live"} and await ask(subject) == (after, 256)
    for tokens, weights in ((before, 1), (after, 2)):
        reference = load_reference(make_tiny_model("llama", model, seed=weights))
        assert_identical(reference, PROMPT, tokens)


async def test_answers_under_way_end_on_the_weights_that_they_began_with_or_are_cut(tmp_path: Path) -> None:
    fields = {"max_tokens": 40, "seed": 1, "ignore_eos": True, "return_token_ids": True}
    long = {**fields, "max_tokens": 1000}  # 50 s: it is in the middle of it when it is cut
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=QUICK) as subject:
        engine = subject.config.engine
        assert isinstance(engine, SimEngineConfig)

        def expected(version: str, num_tokens: int = 40) -> list[int]:
            sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=num_tokens, ignore_eos=True)
            own = msgspec.structs.replace(engine, weights_version=version)
            return expected_tokens(own, PROMPT, sampling)[0]

        async def began(number: int) -> bool:
            records = (await subject._json(f"{subject.url}/v1/requests"))["requests"]
            return len(records) == number and records[0]["ttft_s"] is not None

        under_way = asyncio.create_task(subject.stream(PROMPT, **fields))
        await subject.until(lambda: began(1), 60)
        change = asyncio.create_task(subject.post("/v1/weights", {"version": "step-1", "wait_s": 30}))
        assert (await under_way).token_ids == expected("v1"), "all of it is the old weights'"
        status, _, report = await change
        assert status == 200 and {line["cut"] for line in report["nodes"]} == {0}
        assert (await subject.stream(PROMPT, **fields)).token_ids == expected("v1/step-1")
        cut = asyncio.create_task(_tokens(subject, long))
        await subject.until(lambda: began(3), 60)
        status, _, report = await subject.post("/v1/weights", {"version": "step-2", "wait_s": 0})
        assert status == 200 and sum(line["cut"] for line in report["nodes"]) == 1
        tokens, error = await asyncio.wait_for(cut, 120)
        assert tokens == expected("v1/step-1", len(tokens)) and error == "model_changed", "no token of the new ones"
        assert (await subject.stream(PROMPT, **fields)).token_ids == expected("v1/step-2")


async def _tokens(subject: ClusterHandle, fields: dict[str, Any]) -> tuple[list[int], str | None]:
    """What came of a stream, and the code of the error that ended it."""
    tokens: list[int] = []
    async with aclosing(subject.events("/v1/completions", subject._completion(PROMPT, fields))) as events:
        async for event in events:
            if "error" in event:
                return tokens, event["error"]["code"]
            for choice in event["choices"]:
                tokens += choice.get("token_ids") or []
    return tokens, None
