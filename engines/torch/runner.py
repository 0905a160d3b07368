"""Runs the model's steps on one worker thread.

Owns the thread, the KV memory and the forward. Invariant: one step at a time, and once `execute` has returned or
raised, cancelled or not, nothing writes into any block.
"""

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from engines.paged.runner import StepOutput, StepSlice
from engines.torch.kv_cache import PagedKV
from engines.torch.model import LoadedModel
from engines.torch.sampler import sample_rows
from engines.torch.step_batch import StepBatch
from kvcore.errors import EngineError
from kvcore.types import KVSpec
from nodeapi.messages import EngineInfo


class TorchRunner:
    """A `ModelRunner` over transformers' model code. Takes the loaded model over."""

    def __init__(self, loaded: LoadedModel, spec: KVSpec, *, num_blocks: int, threads: int) -> None:
        self._model = loaded.model
        self._kv = PagedKV(loaded.geometry, num_blocks)
        self._info = EngineInfo(
            kind="torch",
            kv_spec=spec,
            max_context=min(loaded.max_context, num_blocks * loaded.geometry.block_size),
            vocab_size=loaded.vocab_size,
            eos_token_ids=list(loaded.eos_token_ids),
            block_size=loaded.geometry.block_size,
            num_blocks=num_blocks,
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
        step = asyncio.get_running_loop().run_in_executor(self._worker, self._step, slices)
        try:
            return await asyncio.shield(step)
        except asyncio.CancelledError:
            await asyncio.wait([step])
            raise
        except (RuntimeError, IndexError, ValueError) as error:
            raise EngineError(f"the model failed on a step of {len(slices)} slices: {error}") from error

    def _step(self, slices: Sequence[StepSlice]) -> StepOutput:
        specs = [part.sample for part in slices if part.sample is not None]
        with torch.inference_mode():
            self._clear_fresh_pages(slices)
            batch = StepBatch(slices, self._kv)
            logits = self._model(
                input_ids=batch.token_ids,
                position_ids=batch.positions,
                use_cache=False,
                logits_to_keep=batch.last_rows,
                paged_step=batch,
            ).logits[0]
            drawn = iter(sample_rows(logits, specs, self._info.eos_token_ids) if specs else [])
        return StepOutput([next(drawn) if part.sample is not None else [] for part in slices])

    def _clear_fresh_pages(self, slices: Sequence[StepSlice]) -> None:
        """Decodes read whole pages, masked: a NaN behind a sequence's end (of a refused chunk, of a failed step) would
        still reach its sums, as 0 times NaN is NaN."""
        for part in slices:
            page, used = divmod(part.start + len(part.token_ids), self._info.block_size)
            if used and part.start <= page * self._info.block_size:
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
        self._model = None
