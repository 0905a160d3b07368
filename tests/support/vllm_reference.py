"""What a single vLLM, without kvferry, answers greedily: run in a process of its own.

A divergence is accepted only where that vLLM is itself at a tie: the two tokens' logprobs lie closer than TIE.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
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
_ANSWER_S = 600.0


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


class SingleVllm:
    """A vLLM without kvferry, in a process of its own that stays up. From any one thread at a time."""

    def __init__(self, model: Path, **args: object) -> None:
        """`args`: of vllm.LLM. Does not wait for it to come up."""
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"model": str(model), **args})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | _ENV,
        )

    def answers(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Reference]:
        """One a prompt, computed one after the other."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
        limit = threading.Timer(_ANSWER_S, self._process.kill)
        limit.start()
        try:
            print(json.dumps(asked), file=self._process.stdin, flush=True)
            line = next((line for line in self._process.stdout if line.startswith(_MARK)), None)
        finally:
            limit.cancel()
        if line is None:
            self._said.seek(0)
            raise AssertionError(f"the reference ended with {self._process.wait()}: {self._said.read()[-4000:]!r}")
        return [
            Reference(answer["token_ids"], [{int(k): v for k, v in gaps.items()} for gaps in answer["gaps"]])
            for answer in json.loads(line.removeprefix(_MARK))
        ]

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()
        self._said.close()


def main() -> None:
    """The process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        dtype="float32",
        enforce_eager=True,
        enable_prefix_caching=False,
        **({"kv_cache_memory_bytes": 300 << 20} | json.loads(sys.argv[1])),
    )
    for line in sys.stdin:
        asked = json.loads(line)
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
