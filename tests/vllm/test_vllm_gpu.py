"""vLLM on a GPU as it runs there unless told otherwise: bfloat16, its own kernels and graphs, forked processes."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import psutil
import pytest
import pytest_asyncio
from support.cluster import ClusterHandle, cluster
from support.gpus import vllm_on_gpu
from support.tiny_models import make_tiny_model
from support.vllm_questions import NEW_TOKENS, Questions, computed_tokens, prompt_of
from support.vllm_reference import References

from kvcore.config.checks import engine_of
from kvferry.doctor.vllm import host_bytes
from kvferry.vllm_here import installed_vllm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not vllm_on_gpu(), reason="the vLLM here is none for GPUs"),
    pytest.mark.timeout(600),
    pytest.mark.asyncio(loop_scope="module"),
]

CONTEXT, CHUNK, BLOCK = 4224, 256, 16
PROMPTS = [prompt_of(length, 800 + length) for length in (1, 255, 256, 257, 1000, 4000)]
TIE = 0.1
"""Of logprobs in bfloat16."""
RESTART_S = 200.0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("gpu") / "qwen3", max_context=CONTEXT, head_dim=64)


@pytest.fixture(scope="module")
def questions(model: Path) -> Iterator[Questions]:
    args = {"dtype": "bfloat16", "enforce_eager": False, "max_model_len": CONTEXT}
    with closing(References("tiny-bfloat16", model, tie=TIE, **args)) as single:
        yield Questions(single, PROMPTS, NEW_TOKENS)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def subject(
    model: Path, questions: Questions, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterHandle]:
    """A prefiller and a decoder on one GPU."""
    overrides = [
        "model.dtype=bfloat16",
        "engine.args.enforce-eager=null",
        "engine.args.block-size=null",
        f"kv.chunk_tokens={CHUNK}",
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        *(f"nodes.{node}.segment=64MiB" for node in ("prefill-0", "decode-0")),
    ]
    folder = tmp_path_factory.mktemp("vllm-gpu")
    async with cluster(folder, engine="vllm", model=model, prefillers=1, decoders=1, overrides=overrides) as handle:
        yield handle


def engine_processes(subject: ClusterHandle, node: str) -> list[psutil.Process]:
    """Every process below a node's service."""
    return psutil.Process(subject.launcher.pids[node]).children(recursive=True)


@pytest.mark.parametrize("prompt", PROMPTS, ids=[str(len(prompt)) for prompt in PROMPTS])
async def test_tokens_are_those_of_one_vllm_and_the_decoder_computes_no_chunk_of_the_prompt(
    subject: ClusterHandle, questions: Questions, prompt: list[int]
) -> None:
    before = await computed_tokens(subject, "decode-0")
    answer = await questions.ask(subject, prompt)
    computed = await computed_tokens(subject, "decode-0") - before
    assert computed <= (BLOCK if len(prompt) > CHUNK else len(prompt)), await subject.explain(answer.id)
    again = await questions.ask(subject, prompt)
    assert again.usage["prompt_tokens_details"]["cached_tokens"] >= (len(prompt) - 1) // CHUNK * CHUNK


async def test_an_engine_takes_the_main_memory_that_the_doctor_reckons(subject: ClusterHandle) -> None:
    engine = engine_of(subject.config, subject.config.nodes["decode-0"])
    reckoned = host_bytes(engine, subject.config.model, installed_vllm(), CHUNK)
    parts = {process.pid: process.memory_full_info().pss for process in engine_processes(subject, "decode-0")}
    assert sum(parts.values()) <= reckoned, parts


async def test_a_killed_core_takes_its_group_along_and_the_next_engine_finds_the_kv(
    subject: ClusterHandle, questions: Questions
) -> None:
    victim = "decode-0"
    await questions.ask(subject, PROMPTS[-1])
    before, old = await subject.node_info(victim), engine_processes(subject, victim)
    core = max(old, key=lambda process: (len(process.parents()), process.memory_info().rss))
    assert len({os.getpgid(process.pid) for process in old}) == 1, "one group, the guard's"
    core.send_signal(signal.SIGKILL)

    async def is_back() -> bool:
        report = await subject.node_info(victim)
        return report.engine_restarts > before.engine_restarts and report.engine is not None

    await subject.until(is_back, RESTART_S)
    assert not [process for process in old if process.is_running()]
    await subject.until(subject.all_ready, RESTART_S)
    answer = await questions.ask(subject, PROMPTS[-1])
    assert answer.usage["prompt_tokens_details"]["cached_tokens"] >= (len(PROMPTS[-1]) - 1) // CHUNK * CHUNK


async def test_a_request_in_mid_answer_goes_on_when_the_node_dies(subject: ClusterHandle, questions: Questions) -> None:
    pid = subject.launcher.pids["decode-0"]
    asking = [asyncio.create_task(questions.ask(subject, prompt)) for prompt in PROMPTS for _ in range(4)]
    os.kill(pid, signal.SIGKILL)
    await asyncio.gather(*asking)
    await subject.launcher.wait_restarted("decode-0", pid, RESTART_S)
    await subject.until(subject.all_ready, RESTART_S)
    assert (await subject.status())["requests"]["failed"] == 0
