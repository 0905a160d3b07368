"""kvferry.LLM on real vLLM: tokens are those of vLLM alone, and what was computed before is not computed again.

Each scenario is a function that runs in a process of its own (support.vllm_offline).
"""

import asyncio
import os
import select
import signal
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.ports import free_ports
from support.process_tree import descendants
from support.tiny_models import make_tiny_model
from support.vllm_offline import (
    Answers,
    ask,
    ask_saved,
    cached,
    check_answers,
    child_pids,
    command_of,
    environment,
    is_full,
    open_llm,
    run_offline,
)
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, prompt_of
from support.vllm_reference import References

from kvcore.config.fields import ByteSize
from kvcore.config.schema import ModelConfig
from kvferry.offline.cluster import PRIVATE_PORTS, private_cluster, write_cluster
from kvferry.offline.store import OfflineStore

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]

LENGTHS = (1, 127, 128, 129, 300, 1000)
PROMPTS = [prompt_of(length, 500 + seed) for seed, length in enumerate(LENGTHS)]
CONTEXT = 2048


@pytest.fixture(scope="module")
def questions(single: References) -> Questions:
    return Questions(single, PROMPTS, NEW_TOKENS)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model with other weights."""
    folder = tmp_path_factory.mktemp("other") / "qwen3"
    return make_tiny_model("qwen3", folder, seed=1, max_context=4224, head_dim=64)


# --- a store of its own ------------------------------------------------------------------------------------------


def twice_and_then_without_its_store(model: str) -> dict[str, Any]:
    from kvferry import LLM

    with open_llm(model) as llm:
        assert isinstance(llm, LLM)
        cold, warm = ask(llm, PROMPTS, NEW_TOKENS), ask_saved(llm, PROMPTS, NEW_TOKENS)
        (said,) = llm.chat([{"role": "user", "content": "tell me of the quick brown fox"}], use_tqdm=False)
        (server,) = child_pids("metadata_server")
        os.kill(server, signal.SIGKILL)
        without_server = ask(llm, PROMPTS, NEW_TOKENS)
        (node,) = child_pids("kvnode")
        os.kill(node, signal.SIGKILL)
        without_node = ask(llm, PROMPTS, NEW_TOKENS)
    left = child_pids("metadata_server") + child_pids("kvnode")
    with open_llm(model) as llm:
        anew = ask(llm, PROMPTS[-1:], NEW_TOKENS)
    return {
        "cold": cold,
        "warm": warm,
        "chat": said.outputs[0].text,
        "without_server": without_server,
        "without_node": without_node,
        "left": left,
        "anew": anew,
    }


@pytest.mark.parametrize("processes", [False, True], ids=["in_one_process", "in_several"])
def test_answers_are_vllms_with_a_warm_store_and_with_one_that_is_killed(tiny, questions, processes):
    shown = run_offline(twice_and_then_without_its_store, tiny, processes=processes)
    for what in ("cold", "warm", "without_server", "without_node"):
        check_answers(questions, PROMPTS, shown[what], what)
    assert cached(shown["cold"]) == [0] * len(PROMPTS)
    assert all(is_full(*pair) for pair in zip(cached(shown["warm"]), LENGTHS, strict=True)), shown["warm"]
    assert shown["chat"]
    assert shown["left"] == []
    check_answers(questions, PROMPTS[-1:], shown["anew"], "another one, afterwards")
    assert cached(shown["anew"]) == [0]


def until_it_is_killed(model: str) -> None:
    with open_llm(model):
        print("PIDS", *descendants(os.getpid()), flush=True)
        threading.Event().wait()


@pytest.fixture
def scratch() -> Iterator[str]:
    """For what a killed program leaves. Not `tmp_path`: vLLM has sockets there, whose paths have to be short."""
    with tempfile.TemporaryDirectory() as folder:
        yield folder


async def test_kill_minus_9_of_the_program_leaves_no_process(tiny, scratch):
    env = environment(processes=True) | {"TMPDIR": scratch}
    program = await asyncio.create_subprocess_exec(
        *command_of(until_it_is_killed, tiny), env=env, stdout=asyncio.subprocess.PIPE
    )
    assert program.stdout is not None
    lines = [line.split() async for line in until(program.stdout, b"PIDS")]
    pids = [int(pid) for pid in lines[-1][1:]]
    assert len(pids) >= 4  # metadata server, node, vLLM's core and worker
    ended = [os.pidfd_open(pid) for pid in pids]
    program.kill()
    await program.wait()
    async with asyncio.timeout(30):
        for descriptor in ended:
            await asyncio.to_thread(select.select, [descriptor], [], [], 30)
            os.close(descriptor)


async def until(lines: asyncio.StreamReader, mark: bytes) -> AsyncIterator[bytes]:
    """The lines up to the one that begins with `mark`."""
    async for line in lines:
        yield line
        if line.startswith(mark):
            return
    raise AssertionError("the program ended")


def what_is_refused(model: str) -> list[str]:
    from kvcore.errors import ConfigError

    said = []
    for arguments in (
        {"store": "64KiB"},
        {"chunk_tokens": 100},
        {"no_such_argument": 1},
        {"max_model_len": 10**6},
        {"pipeline_parallel_size": 2},
    ):
        try:
            open_llm(model, **arguments)
        except ConfigError as error:
            said.append(error.message)
    with open_llm(model):
        try:
            open_llm(model)
        except ConfigError as error:
            said.append(error.message)
    said.append(weights_written_while_they_are_loaded(model))
    return said


def weights_written_while_they_are_loaded(model: str) -> str:
    from unittest.mock import MagicMock, patch

    from kvcore.errors import ModelLoadError

    started = MagicMock()

    def start(**arguments: Any) -> Any:
        (Path(model) / "model.safetensors").touch()
        return started

    with patch("engines.vllm.offline.LLM", start):
        try:
            open_llm(model)
        except ModelLoadError as error:
            assert started.llm_engine.engine_core.shutdown.called
            return error.message
    return ""


def test_what_cannot_be_is_refused_before_anything_is_started(tiny):
    small, chunk, unknown, long, pipeline, second, written = run_offline(what_is_refused, tiny)
    assert small.startswith("store: 64.0 KiB has no room for one chunk: 128 tokens")
    assert chunk.startswith("chunk_tokens: 100 is not a multiple of vLLM's block size 128")
    assert "no_such_argument" in unknown
    assert "max_model_len" in long
    assert pipeline == "pipeline_parallel_size: 2 is not supported, only 1: use tensor parallelism"
    assert "one LLM with a store at a time" in second
    assert "model.safetensors was written while the model was being loaded" in written


def resets(model: str) -> dict[str, Any]:
    def reset(**how: bool) -> bool:
        return bool(llm.engine.reset_prefix_cache(**how))

    prompt = PROMPTS[-1:]
    with open_llm(model, enable_prefix_caching=True) as llm:
        shown: dict[str, Any] = {"cold": ask(llm, prompt, NEW_TOKENS), "local": reset()}
        shown["loaded"] = ask_saved(llm, prompt, NEW_TOKENS)
        shown["both"] = reset(reset_connector=True)
        shown["anew"] = ask(llm, prompt, NEW_TOKENS)
        shown["local_again"] = reset()
        shown["loaded_again"] = ask_saved(llm, prompt, NEW_TOKENS)
    return shown


@pytest.mark.parametrize("processes", [False, True], ids=["in_one_process", "in_several"])
def test_a_reset_right_after_a_request_succeeds_and_with_the_connector_nothing_of_before_is_read(
    tiny, questions, processes
):
    shown = run_offline(resets, tiny, processes=processes)
    assert [shown[name] for name in ("local", "both", "local_again")] == [True, True, True]
    assert cached(shown["cold"]) == cached(shown["anew"]) == [0]
    for name in ("loaded", "loaded_again"):
        assert is_full(*cached(shown[name]), LENGTHS[-1])
        check_answers(questions, PROMPTS[-1:], shown[name], name)


def a_crowd_on_one_stored_prompt(model: str) -> dict[str, Any]:
    def loaded_tokens() -> int:
        return sum(m.value for m in llm.engine.get_metrics() if m.name == "vllm:external_prefix_cache_hits")

    with open_llm(model, enable_prefix_caching=True, disable_log_stats=False) as llm:
        ask(llm, PROMPTS[-1:], NEW_TOKENS)
        assert loaded_tokens() == 0
        ask_saved(llm, PROMPTS[-1:], NEW_TOKENS)
        assert llm.engine.reset_prefix_cache()
        before = loaded_tokens()
        return {"crowd": ask(llm, PROMPTS[-1:] * 16, NEW_TOKENS), "loaded": loaded_tokens() - before}


def test_a_prompt_that_many_ask_at_once_is_loaded_once(tiny, questions):
    shown = run_offline(a_crowd_on_one_stored_prompt, tiny)
    stored = (LENGTHS[-1] - 1) // BLOCK * BLOCK
    assert shown["loaded"] == stored
    assert cached(shown["crowd"]) == [stored] * 16
    check_answers(questions, PROMPTS[-1:] * 16, shown["crowd"], "one of the crowd")


def with_logprobs_of_the_prompt(model: str) -> dict[str, Any]:
    from vllm import SamplingParams

    prompt, sampling = {"prompt_token_ids": PROMPTS[-1]}, SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    with open_llm(model) as llm:
        outputs = [llm.generate([prompt], sampling, use_tqdm=False)[0] for _ in range(2)]
        logprobs = [[next(iter(each.values())).logprob for each in output.prompt_logprobs[1:]] for output in outputs]
        return {
            "cached": [output.num_cached_tokens for output in outputs],
            "same": logprobs[0] == logprobs[1],
            "after": ask_saved(llm, PROMPTS[-1:], NEW_TOKENS),
        }


def test_a_prompt_whose_logprobs_are_asked_for_is_stored_and_not_loaded(tiny, questions):
    shown = run_offline(with_logprobs_of_the_prompt, tiny)
    assert shown["cached"] == [0, 0] and shown["same"]
    assert is_full(*cached(shown["after"]), LENGTHS[-1])
    check_answers(questions, PROMPTS[-1:], shown["after"], "after it")


# --- the store of a cluster that runs -----------------------------------------------------------------------------


def one_after_the_other(model: str, other: str, file: str) -> dict[str, Any]:
    with open_llm(model, store=file, segment=None) as llm:
        first = ask(llm, PROMPTS, NEW_TOKENS)
    with open_llm(other, store=file, segment=None) as llm:
        foreign = ask(llm, PROMPTS, NEW_TOKENS)
    with open_llm(model, store=file) as llm:
        second = ask(llm, PROMPTS, NEW_TOKENS)
    return {"first": first, "foreign": foreign, "second": second}


@pytest.fixture
def cluster_file(tiny: Path, tmp_path: Path) -> Iterator[Path]:
    """Of a running store that any LLM may join."""
    model = ModelConfig(path=str(tiny), name="tiny")
    cluster = private_cluster(model, ByteSize(64 << 20), BLOCK, free_ports(PRIVATE_PORTS))
    file = tmp_path / "cluster.yaml"
    write_cluster(cluster.config, file)
    with closing(OfflineStore(cluster)) as store:
        store.start()
        yield file


def test_a_second_llm_finds_what_the_first_left_in_the_cluster(tiny, other, questions, cluster_file):
    shown = run_offline(one_after_the_other, tiny, other, cluster_file)
    check_answers(questions, PROMPTS, shown["first"], "first")
    check_answers(questions, PROMPTS, shown["second"], "second")
    assert cached(shown["first"]) == cached(shown["foreign"]) == [0] * len(PROMPTS)
    assert all(is_full(*pair) for pair in zip(cached(shown["second"]), LENGTHS, strict=True)), shown["second"]
    with closing(References("other", other, max_model_len=CONTEXT)) as single:
        check_answers(Questions(single, PROMPTS, NEW_TOKENS), PROMPTS, shown["foreign"], "other weights")


def under_three_names(model: str, file: str) -> list[Answers]:
    answers = []
    for name in ("fp8", "fp8_e4m3", "fp8_e5m2"):
        with open_llm(model, store=file, segment=None, dtype="bfloat16", kv_cache_dtype=name) as llm:
            answers.append(ask(llm, PROMPTS[-1:], NEW_TOKENS))
    return answers


@pytest.mark.skipif(not torch.cpu._is_avx512_supported(), reason="fp8 KV on a CPU takes AVX-512")
def test_two_kinds_of_fp8_never_share_kv_and_two_names_of_one_kind_do(tiny, cluster_file):
    first, alias, other_kind = run_offline(under_three_names, tiny, cluster_file)
    assert [cached(answers) for answers in (first, other_kind)] == [[0], [0]]
    assert is_full(*cached(alias), LENGTHS[-1])
    assert alias[0][0] == first[0][0]
