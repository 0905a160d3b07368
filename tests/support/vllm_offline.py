"""Runs a function that uses kvferry.LLM in a process of its own, which must end well. And what such functions need.

Tiny memory, float32, eager. vLLM's own prefix cache is off, so that every hit is the store's.
"""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # this module runs as a file too, before it has the tests' path
    from support.vllm_questions import Questions

_MARK = "RETURNED "
_TIMEOUT_S = 500.0
_TRIES = 50
_ENV = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "VLLM_CPU_OMP_THREADS_BIND": str((os.cpu_count() or 1) - 1),
    "VLLM_LOGGING_LEVEL": "WARNING",
    "TOKENIZERS_PARALLELISM": "false",
}
Answers = list[tuple[list[int], int]]
"""(tokens, num_cached_tokens) of each prompt; from another process each pair is a list."""


def run_offline(function: Callable[..., Any], *arguments: Any, processes: bool = False) -> Any:
    """What `function` of a test module returns in a process of its own; all values as JSON, paths as text.

    `processes`: vLLM's engine in processes of its own.
    """
    done = subprocess.run(
        command_of(function, *arguments),
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env=environment(processes=processes),
    )
    print(done.stdout[-20_000:], done.stderr[-20_000:])
    assert done.returncode == 0, f"{function.__name__} ended with {done.returncode}"
    line = next(line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK))
    return json.loads(line.removeprefix(_MARK))


def command_of(function: Callable[..., Any], *arguments: Any) -> list[str]:
    """The program that calls `function` and prints what it returns."""
    asked = {"module": function.__module__, "function": function.__name__, "arguments": arguments, "path": sys.path}
    return [sys.executable, __file__, json.dumps(asked, default=str)]


def environment(*, processes: bool) -> dict[str, str]:
    """Of such a program."""
    return os.environ | _ENV | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes))}


def open_llm(model: str, **arguments: Any) -> Any:
    """A kvferry.LLM as small as can be."""
    from kvferry import LLM

    small: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "kv_cache_memory_bytes": 64 << 20,
        "enable_prefix_caching": False,
        "max_model_len": 2048,
        "store": "64MiB",
    }
    return LLM(model, **(small | arguments))


def ask(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answers:
    """All at once, greedy."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return [(list(output.outputs[0].token_ids), output.num_cached_tokens) for output in outputs]


def ask_saved(llm: Any, prompts: Sequence[Sequence[int]], max_tokens: int) -> Answers:
    """`ask` of prompts that were asked before, again until their KV is the store's: it is saved beside the answer, and
    may be on its way when that has ended. What lies in vLLM's own cache is forgotten first, each time."""
    for _ in range(_TRIES):
        assert llm.engine.reset_prefix_cache()
        answers = ask(llm, prompts, max_tokens)
        if all(is_full(num_cached, len(prompt)) for prompt, (_, num_cached) in zip(prompts, answers, strict=True)):
            break
    return answers


def check_answers(questions: "Questions", prompts: Sequence[Sequence[int]], answers: Answers, what: str) -> None:
    """Raises AssertionError unless they are the references' tokens."""
    for prompt, (tokens, _) in zip(prompts, answers, strict=True):
        questions.reference(prompt).check(tokens, f"{what}, prompt of {len(prompt)}")


def cached(answers: Answers) -> list[int]:
    """num_cached_tokens of each."""
    return [num_cached for _, num_cached in answers]


def is_full(num_cached: int, length: int, block_size: int = 128) -> bool:
    """Whether all was had that can be had: full chunks, or the prompt but for a token that has to be computed."""
    return length - block_size <= num_cached < max(length, 1) or num_cached == length // block_size * block_size


def child_pids(module: str) -> list[int]:
    """Of our own children, those that run `module`: `metadata_server`, `kvnode`."""
    from support.process_tree import children  # this module runs as a file too, before it has the tests' path

    return [pid for pid in children(os.getpid()) if module in Path(f"/proc/{pid}/cmdline").read_text().split("\0")]


def main() -> None:
    """The process."""
    asked = json.loads(sys.argv[1])
    sys.path[:] = asked["path"]
    function = getattr(importlib.import_module(asked["module"]), asked["function"])
    print(_MARK + json.dumps(function(*asked["arguments"])), flush=True)


if __name__ == "__main__":
    main()
