"""LoRA adapters of a cluster of vLLM engines: answers are one vLLM's with the same adapter, and KV is its own."""

import asyncio
import os
import signal
from contextlib import closing
from pathlib import Path

import psutil
import pytest
from support.cluster import ClusterHandle, cluster
from support.tiny_adapters import RANK, make_tiny_adapter
from support.vllm_questions import prompt_of
from support.vllm_reference import Reference, References

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
NEW_TOKENS, LONG = 12, 400
PROMPTS = [prompt_of(300, 71), prompt_of(410, 72)]


async def ask(subject: ClusterHandle, name: str, prompt: list[int]) -> tuple[list[int], int]:
    """Greedy tokens of an answer, and how many of the prompt's there was KV of."""
    fields = {"max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    answer = await subject.complete(prompt, **{"model": name, **fields})
    assert answer["model"] == name
    return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def references(model: Path, adapters: dict[str, Path]) -> dict[str, list[Reference]]:
    """By adapter's name, and by none of the model alone, what one vLLM answers PROMPTS; and with LONG tokens."""
    args = {"max_model_len": 1024, "enable_lora": True, "max_lora_rank": 8, "max_loras": 2}
    with closing(References("tiny with adapters", model, **args)) as single:
        of_each = {name: single.answers(PROMPTS, NEW_TOKENS, adapters.get(name)) for name in (model.name, *adapters)}
        return of_each | {"long": single.answers(PROMPTS[:1], LONG, adapters["one"])}


async def test_adapters_answer_as_one_vllm_does_and_share_no_kv(tiny: Path, tmp_path: Path) -> None:
    adapters = {name: make_tiny_adapter(tiny, tmp_path / name, seed=n) for n, name in enumerate(("one", "two"), 1)}
    expected = await asyncio.to_thread(references, tiny, adapters)
    tokens = {tuple(answers[0].token_ids) for name, answers in expected.items() if name != "long"}
    assert len(tokens) == 3, "the adapters change nothing"
    overrides = [
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        *(f"model.adapters.{name}={folder}" for name, folder in adapters.items()),
        *(f"nodes.{node}.segment=64MiB" for node in ("prefill-0", "decode-0")),
    ]
    async with cluster(tmp_path, engine="vllm", model=tiny, prefillers=1, decoders=1, overrides=overrides) as subject:
        base, chunk = subject.config.model.name, subject.config.kv.chunk_tokens
        for number, prompt in enumerate(PROMPTS):
            for name in (base, *adapters):
                got, cached = await ask(subject, name, prompt)
                expected[name][number].check(got, f"{name}, prompt {number}")
                assert cached == 0, f"{name} was given KV of another"
            for name in (base, *adapters):
                again, cached = await ask(subject, name, prompt)
                expected[name][number].check(again, f"{name}, prompt {number}, again")
                assert cached >= len(prompt) // chunk * chunk, name
        await check_models(subject, adapters)
        await check_takeover(subject, expected["long"][0])


async def check_models(subject: ClusterHandle, adapters: dict[str, Path]) -> None:
    async with subject.session.get(f"{subject.url}/v1/models") as reply:
        models = {model["id"]: model for model in (await reply.json())["data"]}
    base = subject.config.model.name
    assert list(models) == [base, *adapters] and models[base]["parent"] is None
    assert {(models[name]["root"], models[name]["parent"]) for name in adapters} == {
        (str(folder), base) for folder in adapters.values()
    }
    status, _, body = await subject.post("/v1/completions", {"model": "three", "prompt": "a"})
    assert (status, body["error"]["code"]) == (404, "model_not_found")
    for node in subject.nodes:
        engine = (await subject.node_info(node)).engine
        assert engine is not None and [one.name for one in engine.adapters] == list(adapters)
    assert RANK <= 8, "the rank that the reference has room for"


async def check_takeover(subject: ClusterHandle, expected: Reference) -> None:
    """The decoder's engine dies in mid-answer: whoever goes on has the adapter too."""
    body = {"model": "one", "prompt": PROMPTS[0], "max_tokens": LONG, "temperature": 0, "ignore_eos": True}
    engine = psutil.Process(subject.launcher.pids["decode-0"]).children(recursive=True)
    got: list[int] = []
    killed, request_id = False, ""
    async for event in subject.events("/v1/completions", body | {"return_token_ids": True}):
        request_id = event["id"]
        got += [token for choice in event["choices"] for token in choice["token_ids"] or ()]
        if got and not killed:
            killed = True
            for process in engine:
                os.kill(process.pid, signal.SIGKILL)
    expected.check(got, "an answer that changed its decoder")
    legs = [leg["node"] for leg in (await subject.explain(request_id))["legs"] if leg["kind"] == "decode"]
    assert legs[:2] == ["decode-0", "prefill-0"], legs
