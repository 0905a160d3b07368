"""What a single vLLM, without kvferry, answers greedily: run in a process of its own, which ends and frees its memory.

A divergence is accepted only where that vLLM is itself at a tie: the two tokens' logprobs lie closer than TIE.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TIE = 2e-4
_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_MARK = "REFERENCE "


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens of one prompt; `gaps[i][t]`: how far token t's logprob lies below the best one's at position i."""

    token_ids: list[int]
    gaps: list[dict[int, float]]

    def check(self, output: Sequence[int], what: object) -> None:
        """Raises AssertionError unless `output` is these tokens, up to a tie."""
        for index, (got, expected) in enumerate(zip(output, self.token_ids, strict=True)):
            if got != expected:
                gap = self.gaps[index].get(got)
                assert gap is not None and gap < TIE, (
                    f"{what}: token {index} is {got}, not {expected}; gap {gap}\ngot      {list(output)}\n"
                    f"expected {self.token_ids}"
                )
                return


def vllm_reference(model: Path, prompts: Sequence[Sequence[int]], max_tokens: int, **args: object) -> list[Reference]:
    """One answer a prompt, computed one after the other."""
    asked = {
        "model": str(model),
        "prompts": [list(prompt) for prompt in prompts],
        "max_tokens": max_tokens,
        "args": args,
    }
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=600,
        env=os.environ | _ENV,
    )
    line = next((line for line in reversed(done.stdout.splitlines()) if line.startswith(_MARK)), None)
    assert line is not None, f"the reference ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    return [
        Reference(answer["token_ids"], [{int(k): v for k, v in gaps.items()} for gaps in answer["gaps"]])
        for answer in json.loads(line.removeprefix(_MARK))
    ]


def main() -> None:
    """The process."""
    from vllm import LLM, SamplingParams

    asked = json.load(sys.stdin)
    llm = LLM(
        model=asked["model"],
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        **({"kv_cache_memory_bytes": 300 << 20} | asked["args"]),
    )
    sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, logprobs=5)
    answers = []
    for prompt in asked["prompts"]:
        (request,) = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
        output = request.outputs[0]
        best = [max(entry.logprob for entry in position.values()) for position in output.logprobs]
        gaps = [
            {token: top - entry.logprob for token, entry in position.items()}
            for top, position in zip(best, output.logprobs, strict=True)
        ]
        answers.append({"token_ids": list(output.token_ids), "gaps": gaps})
    print(_MARK + json.dumps(answers), flush=True)


if __name__ == "__main__":
    main()
