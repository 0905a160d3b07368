"""Runs the model's steps on one worker thread.

Owns the thread, the KV memory and the forward. Invariant: one step at a time, and once `execute` has returned or
raised, cancelled or not, nothing writes into any block.
"""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from engines.paged.runner import PAGED_LACKS, RowMove, Sampled, StepOutput, StepSlice
from engines.torch.kv_cache import PagedKV
from engines.torch.model import LoadedModel
from engines.torch.prompt_scores import score_prompt
from engines.torch.row_moves import RowMover, documents_problem
from engines.torch.sampler import sample_rows
from engines.torch.step_batch import StepBatch
from kvcore.errors import EngineError
from kvcore.types import KVSpec
from nodeapi.messages import EngineInfo
from nodeapi.prompt_logprobs import PromptLogprobs

_Result = TypeVar("_Result")


class TorchRunner:
    """A `ModelRunner` over transformers' model code. Takes the loaded model over."""

    def __init__(self, loaded: LoadedModel, spec: KVSpec, *, num_blocks: int, threads: int) -> None:
        self._decoder, self._head = loaded.model.get_decoder(), loaded.model.get_output_embeddings()
        """All the architectures' logits are the head's of the last hidden states, and nothing more."""
        self._kv = PagedKV(loaded.geometry, num_blocks)
        self._mover = RowMover(self._kv, loaded.rope_frequencies)
        self._info = EngineInfo(
            kind="torch",
            kv_spec=spec,
            max_context=min(loaded.max_context, num_blocks * loaded.geometry.block_size),
            vocab_size=loaded.vocab_size,
            eos_token_ids=list(loaded.eos_token_ids),
            block_size=loaded.geometry.block_size,
            num_blocks=num_blocks,
            refuses_documents=documents_problem(loaded.model.config, loaded.rope_frequencies, loaded.geometry.head_dim),
            lacks=PAGED_LACKS,
        )
        torch.set_num_threads(threads)
        # OpenMP keeps the number of threads per calling thread, so the worker sets it too.
        self._worker = ThreadPoolExecutor(1, "torch-step", initializer=torch.set_num_threads, initargs=(threads,))

    @property
    def info(self) -> EngineInfo:
        """What never changes; `max_context` is also bounded by what all blocks together hold."""
        return self._info

    @property
    def memory(self) -> memoryview:
        """See `ModelRunner.memory`."""
        return self._kv.memory

    async def execute(self, slices: Sequence[StepSlice]) -> StepOutput:
        """One forward and its draws, off the loop. Raises EngineError. A cancelled step runs to its end first."""
        try:
            return await self._on_worker(lambda: self._step(slices))
        except (RuntimeError, IndexError, ValueError) as error:
            raise EngineError(f"the model failed on a step of {len(slices)} slices: {error}") from error

    async def move(self, moves: Sequence[RowMove], fresh: Sequence[int]) -> None:
        """See `ModelRunner.move`. Off the loop; a cancelled one runs to its end first."""
        if self._info.refuses_documents:
            raise EngineError(f"this model's KV cannot be moved: {self._info.refuses_documents}")
        await self._on_worker(lambda: self._mover.run(moves, fresh))

    async def distance(self, blocks: Sequence[int], others: Sequence[int]) -> float:
        """See `ModelRunner.distance`."""
        return await self._on_worker(lambda: self._kv.distance(blocks, others))

    async def _on_worker(self, work: Callable[[], _Result]) -> _Result:
        job = asyncio.get_running_loop().run_in_executor(self._worker, work)
        try:
            return await asyncio.shield(job)
        except asyncio.CancelledError:
            await asyncio.wait([job])
            raise

    def _step(self, slices: Sequence[StepSlice]) -> StepOutput:
        specs = [part.sample for part in slices if part.sample is not None]
        with torch.inference_mode():
            self._clear_fresh_pages(slices)
            batch = StepBatch(slices, self._kv)
            hidden = self._decoder(
                input_ids=batch.token_ids, position_ids=batch.positions, use_cache=False, paged_step=batch
            ).last_hidden_state[0]
            logits = self._head(hidden[None, batch.last_rows])[0]
            rows = sample_rows(logits, specs, self._info.eos_token_ids) if specs else []
            for row, spec, sampled in zip(logits, specs, rows, strict=False):
                if spec.whole:
                    sampled[:] = [_with_distribution(one, row) for one in sampled]
            drawn, scores = iter(rows), self._scores(slices, hidden)
        return StepOutput([next(drawn) if part.sample is not None else [] for part in slices], scores)

    def _scores(self, slices: Sequence[StepSlice], hidden: torch.Tensor) -> list[PromptLogprobs | None]:
        """`hidden`: of all tokens of the step, slice by slice."""
        scores: list[PromptLogprobs | None] = []
        row = 0
        for part in slices:
            spec, found = part.score, None
            if spec is not None:
                rows = hidden[row + spec.first : row + spec.first + len(spec.targets)]
                found = score_prompt(rows, self._head, spec, part.start + spec.first + 1)
            scores.append(found)
            row += len(part.token_ids)
        return scores

    def _clear_fresh_pages(self, slices: Sequence[StepSlice]) -> None:
        """Decodes read whole pages, masked: a NaN behind a sequence's end (of a refused chunk, of a failed step) would
        still reach its sums, as 0 times NaN is NaN."""
        for part in slices:
            page, used = divmod(part.start + len(part.token_ids), self._info.block_size)
            if used and not part.keeps_rest and part.start <= page * self._info.block_size:
                self._kv.clear_block(part.block_table[page])

    def block_view(self, block_id: int) -> memoryview:
        """See `ModelRunner`."""
        return self._kv.block_view(block_id)

    def copy_block(self, source: int, target: int) -> None:
        """See `ModelRunner`."""
        self._kv.copy_block(source, target)

    async def aclose(self) -> None:
        """Waits for a step under way. Idempotent."""
        await asyncio.to_thread(self._worker.shutdown)
        self._decoder = self._head = None


def _with_distribution(sampled: Sampled, logits: torch.Tensor) -> Sampled:
    return dataclasses.replace(sampled, distribution=torch.log_softmax(logits.float(), dim=-1).numpy())
