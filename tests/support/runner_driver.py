"""A bare driver of a `ModelRunner`: continuous batching without store, preemption or limits of memory."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from engines.paged.runner import ModelRunner, Sampled, SampleSpec, StepSlice
from nodeapi.sampling import SamplingParams


@dataclass
class Sequence_:  # noqa: N801 - `Sequence` is taken
    """One request: `arrives` is the first step that it takes part in, `computed` tokens have their KV in `blocks`."""

    prompt: list[int]
    params: SamplingParams
    arrives: int = 0
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    output: list[int] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)

    @property
    def missing(self) -> list[int]:
        return [*self.prompt, *self.output][self.computed :]

    @property
    def finished(self) -> bool:
        return len(self.output) >= self.params.max_tokens


class Driver:
    """Decodes first, then prefill slices, `max_batch_tokens` a step together."""

    def __init__(self, runner: ModelRunner, *, max_batch_tokens: int) -> None:
        self._runner = runner
        self._budget = max_batch_tokens
        # Backwards, so that consecutive blocks of a sequence are no neighbours by accident of order.
        self._free = list(range(runner.info.num_blocks))

    async def run(self, sequences: Sequence[Sequence_]) -> list[list[int]]:
        """Run all to their ends; returns their outputs."""
        step = 0
        while any(not sequence.finished for sequence in sequences):
            await self._step([s for s in sequences if s.arrives <= step and not s.finished])
            step += 1
        for sequence in sequences:
            self._free.extend(sequence.blocks)
        return [sequence.output for sequence in sequences]

    async def _step(self, active: list[Sequence_]) -> None:
        left, planned, slices = self._budget, [], []
        for sequence in sorted(active, key=lambda s: len(s.missing) > 1):
            tokens = sequence.missing[:left]
            if not tokens:
                continue
            left -= len(tokens)
            end = sequence.computed + len(tokens)
            while len(sequence.blocks) * self._runner.info.block_size < end:
                sequence.blocks.append(self._free.pop())
            last = end == len(sequence.prompt) + len(sequence.output)
            sample = SampleSpec(sequence.params, (0,), sequence.prompt, list(sequence.output)) if last else None
            slices.append(StepSlice(tokens, sequence.computed, list(sequence.blocks), sample))
            planned.append(sequence)
        if not slices:
            return
        output = await self._runner.execute(slices)
        for sequence, part, samples in zip(planned, slices, output.samples, strict=True):
            sequence.computed += len(part.token_ids)
            for sampled in samples:
                sequence.output.append(sampled.token_id)
                sequence.sampled.append(sampled)
