"""A ModelRunner without a model. Owns the bytes of the blocks and the pretence of time.

Blocks are token-major: record of row 0, of row 1, ... Nothing about a sequence is remembered between steps: all is read
back from its blocks.
"""

import asyncio
from collections.abc import Sequence
from hashlib import sha256

import xxhash

from engines.paged.runner import PAGED_LACKS, RowMove, Sampled, StepOutput, StepSlice
from engines.sim.arithmetic import Arithmetic
from kvcore.config.schema import SimEngineConfig
from kvcore.types import DeclaredKV, KVSpec
from nodeapi.adapters import ServedAdapter
from nodeapi.messages import EngineInfo
from nodeapi.prompt_logprobs import PromptLogprobs

EOS_TOKEN = 0


def sim_spec(config: SimEngineConfig, model: str, chunk_tokens: int, declared: DeclaredKV = ()) -> KVSpec:
    """What the simulated KV can be exchanged with: the same version, layout and chunk length, and what else is
    `declared`."""
    own = (("engine.block_size", str(config.block_size)), ("engine.bytes_per_token", str(config.bytes_per_token)))
    return KVSpec(
        model_id=model,
        weights_digest=sha256(config.weights_version.encode()).hexdigest(),
        tokenizer_digest="",
        num_layers=1,
        num_kv_heads=1,
        head_dim=config.bytes_per_token,
        dtype="uint8",
        attention="chained, position laid over",
        layout_id=f"sim.b{config.block_size}",
        chunk_tokens=chunk_tokens,
        chunk_bytes=chunk_tokens * config.bytes_per_token,
        declared=tuple(sorted((*own, *declared))),
    )


class SimRunner:
    """See `engines.paged.runner.ModelRunner`. A step sleeps first, then reads and writes, in one go."""

    def __init__(
        self,
        config: SimEngineConfig,
        model: str,
        chunk_tokens: int,
        declared: DeclaredKV = (),
        adapters: Sequence[ServedAdapter] = (),
    ) -> None:
        self._config = config
        sizes = config.weights_version, config.bytes_per_token, config.vocab_size
        self._adapted = {one.identity: Arithmetic(*sizes, one.identity) for one in adapters}
        self._arithmetic = self._adapted[""] = Arithmetic(*sizes)
        self._block_bytes = config.block_size * config.bytes_per_token
        self._memory = memoryview(bytearray(config.num_blocks * self._block_bytes))
        self._info = EngineInfo(
            kind="sim",
            kv_spec=sim_spec(config, model, chunk_tokens, declared),
            max_context=config.max_context,
            vocab_size=config.vocab_size,
            eos_token_ids=[EOS_TOKEN],
            block_size=config.block_size,
            num_blocks=config.num_blocks,
            refuses_documents="",
            lacks=PAGED_LACKS,
            adapters=list(adapters),
        )

    @property
    def info(self) -> EngineInfo:
        """Made from the configuration."""
        return self._info

    @property
    def memory(self) -> memoryview:
        """See `ModelRunner.memory`."""
        return self._memory

    async def execute(self, slices: Sequence[StepSlice]) -> StepOutput:
        """See `ModelRunner.execute`. Cancelled while it sleeps, it has written nothing."""
        await asyncio.sleep(self.step_seconds(slices))
        for item in slices:
            self._write(item)
        return StepOutput([self._sample(item) for item in slices], [self._score(item) for item in slices])

    def step_seconds(self, slices: Sequence[StepSlice]) -> float:
        """How long a step takes: prompts at their rate, one inter-token time if anything decodes, more for a batch."""
        config = self._config
        decodes = sum(len(item.token_ids) == 1 and item.sample is not None for item in slices)
        prompt_tokens = sum(len(item.token_ids) for item in slices) - decodes
        seconds = prompt_tokens / config.prefill_tokens_per_s + (config.inter_token_s if decodes else 0.0)
        return seconds * (1 + config.batch_slowdown * (len(slices) - 1))

    def block_view(self, block_id: int) -> memoryview:
        """See `ModelRunner.block_view`."""
        return self._memory[block_id * self._block_bytes : (block_id + 1) * self._block_bytes]

    async def move(self, moves: Sequence[RowMove], fresh: Sequence[int]) -> None:
        """See `ModelRunner.move`. Takes no time."""
        for block in fresh:
            self.block_view(block)[:] = bytes(self._block_bytes)
        for item in moves:
            for at in range(item.count):
                record = self._record_at(item.source, item.source_row + at)
                turned = self._arithmetic.turned(record, item.computed_at + at, item.position + at)
                self._record_at(item.target, item.target_row + at)[:] = turned

    async def distance(self, blocks: Sequence[int], others: Sequence[int]) -> float:
        """See `ModelRunner.distance`: 1 where a byte differs."""
        return float(any(self.block_view(a) != self.block_view(b) for a, b in zip(blocks, others, strict=True)))

    def copy_block(self, source: int, target: int) -> None:
        """See `ModelRunner.copy_block`."""
        self.block_view(target)[:] = self.block_view(source)

    async def aclose(self) -> None:
        """Nothing to release: views of the memory may outlive it."""

    def _record_at(self, table: Sequence[int], position: int) -> memoryview:
        block, row = divmod(position, self._config.block_size)
        size = self._config.bytes_per_token
        start = table[block] * self._block_bytes + row * size
        return self._memory[start : start + size]

    def _write(self, item: StepSlice) -> None:
        previous: bytes | memoryview = self._record_at(item.block_table, item.start - 1) if item.start else b""
        arithmetic = self._adapted[item.adapter]
        for position, token in enumerate(item.token_ids, item.start):
            previous = arithmetic.record(previous, token, position)
            self._record_at(item.block_table, position)[:] = previous

    def _sample(self, item: StepSlice) -> list[Sampled]:
        if item.sample is None:
            return []
        sample, digest, params = item.sample, self._digest(item), item.sample.params
        mask = sample.mask(self._info.eos_token_ids)
        if sample.matcher is not None and sample.matcher.problem:
            return []
        tokens = [self._arithmetic.draw(digest, params, index, sample.output, mask) for index in sample.indices]
        whole = self._arithmetic.distribution(digest) if sample.whole else None
        return [Sampled(token, self._arithmetic.logprob(digest, token, params), whole) for token in tokens]

    def _score(self, item: StepSlice) -> PromptLogprobs | None:
        if (spec := item.score) is None:
            return None
        first = item.start + spec.first
        rows = [
            self._arithmetic.prompt_row(self._record_at(item.block_table, position), token, spec.top)
            for position, token in enumerate(spec.targets, first)
        ]
        return PromptLogprobs.pack(first + 1, spec.top, rows)

    def _digest(self, item: StepSlice) -> int:
        """Over all the sequence's KV, as it stands in the blocks."""
        full, rest = divmod(item.start + len(item.token_ids), self._config.block_size)
        digest = xxhash.xxh3_128()
        for block in item.block_table[:full]:
            digest.update(self.block_view(block))
        if rest:
            digest.update(self.block_view(item.block_table[full])[: rest * self._config.bytes_per_token])
        return int(digest.intdigest())
