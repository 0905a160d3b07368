"""What a single vLLM, without kvferry, answers greedily: as it was recorded, or else computed in a process of its own.

A divergence is accepted only where that vLLM is itself at a tie: the two tokens' logprobs lie closer than TIE.
`RECORDED` has the answers of one version of vLLM and of what makes the models, by the kind of processor. With others,
and for prompts that are not in it, a vLLM is started and computes them.
Record again after a change of version, with new prompts, or on another kind of processor (some minutes):

    KVFERRY_RECORD=1 .venv-vllm/bin/python -m pytest tests/vllm
"""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIE = 2e-4
GPU_TIE = 0.02
"""On a GPU: its kernels multiply float32 as TF32, in another order for each size of a batch."""
RECORDED = Path(__file__).with_name("vllm_reference.json")
_WORTH_RECORDING = 100 * TIE
_ENV = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
_MARK = "REFERENCE "
_KERNELS = frozenset({"avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "asimd", "bf16"})
_ANSWER_S = 600.0


@dataclass(frozen=True, slots=True)
class Reference:
    """Greedy tokens of one prompt; `gaps[i][t]`: how far token t's logprob lies below the best one's at position i."""

    token_ids: list[int]
    gaps: list[dict[int, float]]
    tie: float = TIE

    def check(self, output: Sequence[int], what: object) -> None:
        """Raises AssertionError unless `output` is these tokens, up to a tie."""
        for index, (got, expected) in enumerate(zip(output, self.token_ids, strict=True)):
            if got != expected:
                gap = self.gaps[index].get(got)
                assert gap is not None and gap < self.tie, (
                    f"{what}: token {index} is {got}, not {expected}; gap {gap}\ngot      {list(output)}\n"
                    f"expected {self.token_ids}"
                )
                return

    def to_json(self) -> dict[str, Any]:
        """Without the gaps that are too large to matter."""
        worth = max(_WORTH_RECORDING, self.tie)
        ties = {
            n: {t: round(gap, 7) for t, gap in gaps.items() if gap < worth and t != self.token_ids[n]}
            for n, gaps in enumerate(self.gaps)
        }
        return {"tokens": self.token_ids, "ties": {str(n): found for n, found in ties.items() if found}}

    @classmethod
    def from_json(cls, answer: dict[str, Any], tie: float = TIE) -> "Reference":
        """As `to_json` gives it, before or after it was written."""
        ties = {int(n): {int(t): gap for t, gap in found.items()} for n, found in answer["ties"].items()}
        return cls(answer["tokens"], [ties.get(n, {}) for n in range(len(answer["tokens"]))], tie)


class References:
    """Answers of a vLLM without kvferry. `model`: its name in RECORDED, `folder`: where it is; `args`: of vllm.LLM."""

    def __init__(self, model: str, folder: Path, *, tie: float | None = None, **args: object) -> None:
        from support.gpus import GPU_SHARE, vllm_on_gpu  # not in the process, which has not the tests' path

        self._model = model
        self._folder = folder
        self._args = {"gpu_memory_utilization": GPU_SHARE, **args} if vllm_on_gpu() else args
        self._tie = tie if tie is not None else GPU_TIE if vllm_on_gpu() else TIE
        self._single: SingleVllm | None = None
        self._recorded: dict[str, Any] = _read_recorded().get(_processor(), {}).get(model, {})
        self._computed: dict[str, Any] = {}

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, adapter: Path | None = None
    ) -> list[Reference]:
        """One a prompt. `adapter`: as `SingleVllm.answers` has it, recorded by its folder's name. From any one thread
        at a time."""
        behind = "" if adapter is None else f".{adapter.name}"
        names = [_name(prompt, max_tokens) + behind for prompt in prompts]
        missing = [n for n, name in enumerate(names) if name not in self._recorded or os.environ.get("KVFERRY_RECORD")]
        if missing:
            warnings.warn(f"{self._model}: {len(missing)} answers are not recorded, a vLLM computes them", stacklevel=2)
            self._single = self._single or SingleVllm(self._folder, tie=self._tie, **self._args)
            computed = self._single.answers([prompts[n] for n in missing], max_tokens, adapter)
            self._computed |= {names[n]: answer.to_json() for n, answer in zip(missing, computed, strict=True)}
        return [Reference.from_json((self._recorded | self._computed)[name], self._tie) for name in names]

    def close(self) -> None:
        """End the vLLM, if there is one, and record what it computed if that is wanted."""
        if self._single is not None:
            self._single.close()
        if os.environ.get("KVFERRY_RECORD") and self._computed:
            answers = _read_recorded()
            here = answers.setdefault(_processor(), {})
            here[self._model] = here.get(self._model, {}) | self._computed
            _write_recorded(answers)


def _read_recorded() -> dict[str, Any]:
    """Kind of processor -> model -> name of a prompt -> answer. Empty if other versions gave them."""
    recorded: dict[str, Any] = json.loads(RECORDED.read_text()) if RECORDED.exists() else {}
    return recorded["answers"] if recorded.items() >= _versions().items() else {}


def _write_recorded(answers: dict[str, Any]) -> None:
    """One line an answer."""
    kinds = [f'"{kind}": {{\n' + ",\n".join(_of_models(answers[kind])) + "\n}" for kind in sorted(answers)]
    versions = [f'"{name}": "{version}"' for name, version in _versions().items()]
    RECORDED.write_text("{\n" + ",\n".join([*versions, '"answers": {\n' + ",\n".join(kinds) + "\n}"]) + "\n}\n")


def _of_models(answers: dict[str, Any]) -> list[str]:
    return [
        f'"{model}": {{\n' + ",\n".join(f'"{name}": {json.dumps(of[name])}' for name in sorted(of)) + "\n}"
        for model, of in sorted(answers.items())
    ]


def _versions() -> dict[str, str]:
    """Of all that logits depend on, but for the processor."""
    return {name: importlib.metadata.version(name) for name in ("vllm", "torch", "transformers")}


def _processor() -> str:
    """What kernels it has instructions for: others round in another way."""
    flags = Path("/proc/cpuinfo").read_text().partition("flags")[2].partition("\n")[0].split()
    return " ".join(sorted(_KERNELS.intersection(flags)))


def _name(prompt: Sequence[int], max_tokens: int) -> str:
    digest = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
    return f"{len(prompt)}+{max_tokens}.{digest[:16]}"


class SingleVllm:
    """A vLLM without kvferry, in a process of its own that stays up. From any one thread at a time."""

    def __init__(self, model: Path, *, tie: float = TIE, **args: object) -> None:
        """`args`: of vllm.LLM. Does not wait for it to come up."""
        self._tie = tie
        self._said = tempfile.TemporaryFile()  # noqa: SIM115  (`close` closes it)
        self._process = subprocess.Popen(
            [sys.executable, __file__, json.dumps({"model": str(model), **args})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            env=os.environ | _ENV,
        )

    def answers(
        self, prompts: Sequence[Sequence[int]], max_tokens: int, adapter: Path | None = None
    ) -> list[Reference]:
        """One a prompt, computed one after the other. `adapter`: the folder of a LoRA to compute them with."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"prompts": [list(prompt) for prompt in prompts], "max_tokens": max_tokens}
        asked |= {"adapter": str(adapter)} if adapter is not None else {}
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
            Reference(answer["token_ids"], [{int(k): v for k, v in gaps.items()} for gaps in answer["gaps"]], self._tie)
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
    from vllm.lora.request import LoRARequest

    adapters: dict[str, LoRARequest] = {}
    llm = LLM(
        enable_prefix_caching=False,
        **({"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 300 << 20} | json.loads(sys.argv[1])),
    )
    for line in sys.stdin:
        asked = json.loads(line)
        sampling = SamplingParams(temperature=0, max_tokens=asked["max_tokens"], ignore_eos=True, logprobs=5)
        answers, path = [], asked.get("adapter")
        adapter = path and adapters.setdefault(path, LoRARequest(path, len(adapters) + 1, path))
        for prompt in asked["prompts"]:
            given = [{"prompt_token_ids": prompt}]
            (request,) = llm.generate(given, sampling, use_tqdm=False, lora_request=adapter)
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
