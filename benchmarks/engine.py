"""The embedded engine's steps against transformers' own, the same model, by turns in one process, one thread.

Prefill of 256 fresh tokens, of 256 more behind 1024, and one token each for 1 and for 8 sequences of 1280. Times are of
the processor, not of the wall: other processes then cost neither side anything. Estimate for SmolLM2-135M: 2 * 135e6
operations a token at 100 GFLOPS a core and float32 are 370 tokens/s of prefill; a decode reads 0.54 GB of weights.
Run: python -m benchmarks.engine [--rounds 7] [--model PATH]
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from engines.paged.runner import SampleSpec, StepSlice
from engines.torch.model import load_model
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from nodeapi.sampling import SamplingParams

MODEL = "~/.cache/kvferry/models/SmolLM2-135M-Instruct"
PART, BEFORE, BATCH, BLOCK = 256, 1024, 8, 64
TOKENS = [(7 * number) % 4000 + 100 for number in range(BEFORE + PART)]
_Step = Callable[[], Awaitable[object]]


class Ours:
    """A TorchRunner with BATCH sequences of BEFORE + PART tokens in its blocks."""

    def __init__(self, folder: Path) -> None:
        engine = TorchEngineConfig(block_size=BLOCK)
        loaded = load_model(ModelConfig(path=str(folder), name="m", dtype="float32"), engine)
        self._per_sequence = (BEFORE + PART) // BLOCK + 1
        self.runner = TorchRunner(
            loaded, build_kv_spec(loaded, "m", PART), num_blocks=BATCH * self._per_sequence, threads=1
        )

    def slice(self, sequence: int, start: int, tokens: list[int]) -> StepSlice:
        """The next tokens of a sequence, drawn from at the end."""
        table = list(range(sequence * self._per_sequence, (sequence + 1) * self._per_sequence))
        return StepSlice(tokens, start, table, SampleSpec(SamplingParams(max_tokens=1, temperature=0), (0,), [], []))

    async def fill(self) -> None:
        """Give each sequence its tokens."""
        for start in range(0, len(TOKENS), PART):
            await self.runner.execute([self.slice(0, start, TOKENS[start : start + PART])])
        for block in range(self._per_sequence, BATCH * self._per_sequence):
            self.runner.copy_block(block % self._per_sequence, block)

    def step(self, start: int, count: int, sequences: int = 1) -> _Step:
        """A step that may be taken any number of times."""
        tokens = [*TOKENS, 100][start : start + count]
        slices = [self.slice(sequence, start, tokens) for sequence in range(sequences)]
        return lambda: self.runner.execute(slices)


class Theirs:
    """transformers' model with its own attention and a cache cut back after each step."""

    def __init__(self, folder: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def step(self, start: int, count: int, sequences: int = 1) -> _Step:
        """As Ours.step."""
        cache: Any = transformers.DynamicCache()
        with torch.inference_mode():
            if start:
                self._model(input_ids=torch.tensor([TOKENS[:start]]), past_key_values=cache, logits_to_keep=1)
                cache.batch_repeat_interleave(sequences)
        tokens = torch.tensor([[*TOKENS, 100][start : start + count]] * sequences)

        async def take() -> object:
            with torch.inference_mode():
                logits = self._model(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits
                cache.crop(-count)
                return logits[:, -1].argmax(-1).tolist()

        return take


async def measure(folder: Path, rounds: int) -> dict[str, float]:
    """Print the table; returns the RESULT."""
    ours, theirs = Ours(folder), Theirs(folder)
    await ours.fill()
    cases = {
        "prefill256": (0, PART, 1),
        "prefill256_after1024": (BEFORE, PART, 1),
        "decode1": (BEFORE + PART, 1, 1),
        "decode8": (BEFORE + PART, 1, BATCH),
    }
    result: dict[str, float] = {}
    print(f"{'':<22}{'ours tok/s':>12}{'transformers':>14}{'ratio':>8}")
    for name, (start, count, sequences) in cases.items():
        steps = (ours.step(start, count, sequences), theirs.step(start, count, sequences))
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(rounds + 1):
            for step, times in zip(steps, taken, strict=True):
                began = time.process_time()
                await step()
                times.append(time.process_time() - began)
        rates = [count * sequences / statistics.median(times[1:]) for times in taken]
        print(f"{name:<22}{rates[0]:>12.1f}{rates[1]:>14.1f}{rates[0] / rates[1]:>8.2f}", flush=True)
        result |= {f"{name}_tok_s": round(rates[0], 1), f"{name}_ratio": round(rates[0] / rates[1], 3)}
    await ours.runner.aclose()
    return result


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--model", default=MODEL)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = asyncio.run(measure(Path(arguments.model).expanduser(), arguments.rounds))
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
