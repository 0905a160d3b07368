"""The loads and saves of one worker half: orders become jobs, jobs that end become reports. Lives on one event loop.

Owns the jobs' tasks. Moves no bytes (`engines.jobs` and `kv_blocks` do) and knows no vLLM.
Invariant: an end is reported once nothing reads or writes the request's blocks any more, whatever came of the job.
"""

import asyncio
import functools
import itertools
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field

from engines.jobs.context import JobContext, as_moved
from engines.jobs.load import LoadJob
from engines.jobs.save import SavableChunk, SaveJob
from engines.vllm.connector.blocks.device_blocks import DeviceEvent
from engines.vllm.connector.blocks.kv_blocks import KVBlocks
from engines.vllm.connector.bus_messages import FromWorker, LoadEnded, SaveEnded
from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import LoadOrder, SaveOrder
from engines.vllm.connector.worker_reports import SaveTicket, TransferReports
from kvcore.chunk_keys import rank_key
from kvcore.types import ChunkKey, KVSpec

_LOAD_BATCH = 4
"""Chunks of one get: fewer than there are staging slots, so that saves go on beside loads."""
_PARALLEL_WRITES = 2
"""Of one request: one is copied or hashed while the other is on its way."""
_logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _RunningLoad:
    order: LoadOrder
    job: LoadJob
    task: asyncio.Task[None]


@dataclass(eq=False, slots=True)
class _RunningSave:
    """`first`: index of the first chunk in the prompt. `keys`: of the chunks ordered so far, from there on.
    `reserve`: what the first order announced. `num_reported`: so many keys were in the last SaveEnded of the leg."""

    ticket: SaveTicket
    leg: str | None
    first: int
    job: SaveJob
    task: asyncio.Task[None]
    sizes: dict[ChunkKey, int]
    reserve: Sequence[ChunkKey]
    keys: list[ChunkKey] = field(default_factory=list)
    num_reported: int = 0


class WorkerJobs:
    """One rank's. All methods are for the loop that it was made on."""

    def __init__(
        self,
        context: JobContext,
        blocks: KVBlocks,
        spec: KVSpec,
        reports: TransferReports,
        *,
        send: Callable[[FromWorker], None],
        limits: ConnectorLimits,
    ) -> None:
        self._context = context
        self._blocks = blocks
        self._spec = spec
        self._reports = reports
        self._send = send
        self._limits = limits
        self._loads: set[_RunningLoad] = set()
        self._saves: dict[SaveTicket, _RunningSave] = {}
        self._ended_handoffs: OrderedDict[str, None] = OrderedDict()

    def __repr__(self) -> str:
        return f"<WorkerJobs {len(self._loads)} loads, {len(self._saves)} saves with {self.num_pending_saves} chunks>"

    @property
    def num_loading(self) -> int:
        """Loads under way."""
        return len(self._loads)

    @property
    def num_pending_saves(self) -> int:
        """Chunks whose blocks are waiting to be written."""
        return sum(save.job.num_pending for save in self._saves.values())

    # --- loads -------------------------------------------------------------------------------------------------

    def load(self, order: LoadOrder, after: DeviceEvent | None) -> None:
        """Begin an order that the reports know; its end goes there. Waiting for chunks that are not in the store yet:

        1. No prefiller is computing them (`wait_until` is None). The load takes what is there.
        2. One is, and its handoff has not ended. The load waits for all chunks of the order, until `wait_until`.
        3. One was, but the word that its handoff has ended came before this order. As in case 1.
        """
        waits = order.wait_until is not None and order.leg not in self._ended_handoffs
        job = LoadJob(
            self._context,
            [rank_key(place.key, self._spec.tp_rank) for place in order.chunks],
            functools.partial(self._destination, order, after),
            first=order.first_chunk,
            wait_chunks=order.first_chunk + len(order.chunks) if waits else 0,
            deadline=order.wait_until or 0.0,
            batch=_LOAD_BATCH,
            owner=order.owner,
        )
        load = _RunningLoad(order, job, asyncio.create_task(self._guard(job.run, "load"), name="kv-load"))
        self._loads.add(load)
        load.task.add_done_callback(functools.partial(self._load_ended, load))

    def end_handoff(self, leg: str) -> None:
        """Of loads under way, and of those to come."""
        self._ended_handoffs[leg] = None
        while len(self._ended_handoffs) > self._limits.remembered_handoffs:
            self._ended_handoffs.popitem(last=False)
        for load in self._loads:
            if load.order.leg == leg:
                load.job.stop_waiting()

    def _destination(
        self, order: LoadOrder, after: DeviceEvent | None, first: int, count: int
    ) -> AbstractAsyncContextManager[Sequence[Sequence[memoryview]]]:
        chunks = [place.block_ids for place in order.chunks[first : first + count]]
        return self._blocks.writing(chunks, order.keep_blocks if first == 0 else 0, after)

    def _load_ended(self, load: _RunningLoad, _task: asyncio.Task[None]) -> None:
        self._loads.discard(load)
        order, job = load.order, load.job
        num_good = job.num_loaded - order.first_chunk
        self._reports.load_ended(order, num_good)
        if order.leg is not None:
            kept = order.keep_blocks * self._spec.chunk_tokens * self._blocks.block_bytes // self._spec.chunk_bytes
            good = sum(place.num_tokens for place in order.chunks[:num_good])
            self._send(
                LoadEnded(
                    leg=order.leg,
                    rank=self._spec.tp_rank,
                    first_chunk=order.first_chunk,
                    num_chunks=job.num_loaded,
                    num_tokens=order.first_chunk * self._spec.chunk_tokens + max(good, kept),
                    wait_s=job.wait_s,
                    load_s=job.load_s,
                    moved=as_moved(job.moved),
                )
            )

    # --- saves -------------------------------------------------------------------------------------------------

    def save(self, order: SaveOrder, ticket: SaveTicket, after: DeviceEvent | None) -> None:
        """One more order of the ticket's. The first one begins its job."""
        if ticket.ended:  # its job failed, or never began: see WorkerHalf.offer_saves
            return
        save = self._saves.get(ticket) or self._begin(order, ticket)
        for place in order.chunks:
            key = rank_key(place.key, self._spec.tp_rank)
            save.sizes[key] = len(place.block_ids) * self._blocks.block_bytes
            save.keys.append(key)
            reading = functools.partial(self._blocks.reading, place.block_ids, after)
            save.job.add(SavableChunk(key, place.num_tokens, reading))

    def is_saving(self, ticket: SaveTicket) -> bool:
        """Whether the ticket's job is under way."""
        return ticket in self._saves

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests have ended. Their saves end once all that was ordered is done; their loads are cancelled."""
        for save in self._saves.values():
            if save.ticket.request_id in request_ids:
                save.job.close()
        for load in self._loads:
            if load.order.request_id in request_ids:
                load.task.cancel()

    def end_preempted(
        self, tickets: Sequence[SaveTicket], loading: Sequence[str], timeout_s: float
    ) -> asyncio.Task[None]:
        """The blocks of these requests are about to be given to others. The task ends once nothing reads or writes
        them; writes under way have `timeout_s` to end."""
        saves = [save for ticket in tickets if (save := self._saves.get(ticket))]
        for save in saves:
            save.leg = None  # the leg reports the saves that follow the preemption, not these
            save.job.abandon()
        loads = [load.task for load in self._loads if load.order.request_id in loading]
        for task in loads:
            task.cancel()
        return asyncio.create_task(self._wait_ended(saves, loads, timeout_s), name="kv-preemption")

    async def aclose(self, timeout_s: float) -> None:
        """Let saves under way end (bounded), then cancel all that is left."""
        for save in self._saves.values():
            save.job.close()
        for load in self._loads:
            load.task.cancel()
        saving = [save.task for save in self._saves.values()]
        if saving:
            await asyncio.wait(saving, timeout=timeout_s)
        left = [task for task in [*saving, *(load.task for load in self._loads)] if not task.done()]
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _wait_ended(
        self, saves: Sequence[_RunningSave], loads: Sequence[asyncio.Task[None]], timeout_s: float
    ) -> None:
        await asyncio.gather(*(save.job.cut(timeout_s) for save in saves))
        if loads:
            await asyncio.wait(loads)

    def _begin(self, order: SaveOrder, ticket: SaveTicket) -> _RunningSave:
        rank, size = self._spec.tp_rank, self._blocks.block_bytes
        sizes = {rank_key(key, rank): num_blocks * size for key, num_blocks in order.reserve}
        job = SaveJob(
            self._context,
            order.prefer_segment,
            list(sizes),
            owner=order.owner,
            public=frozenset(rank_key(key, rank) for key in order.public),
            sizes=sizes,
            parallel=_PARALLEL_WRITES,
            void=lambda: ticket.revoked,
            committed=lambda: self._committed(save),
        )
        task = asyncio.create_task(self._guard(job.run, "save"), name="kv-save")
        save = _RunningSave(ticket, order.leg, order.first_chunk, job, task, sizes, list(sizes))
        task.add_done_callback(functools.partial(self._save_ended, save))
        self._saves[ticket] = save
        return save

    def _committed(self, save: _RunningSave) -> None:
        """Report the end of a prefill leg as soon as its prompt is saved. vLLM tells a request's end one step later."""
        if not save.job.num_pending and set(save.keys).issuperset(save.reserve):
            self._report_saved(save)

    def _save_ended(self, save: _RunningSave, _task: asyncio.Task[None]) -> None:
        save.job.abandon()
        del self._saves[save.ticket]
        self._reports.save_ended(save.ticket)
        self._report_saved(save)

    def _report_saved(self, save: _RunningSave) -> None:
        if save.leg is None or save.num_reported == len(save.keys):
            return
        save.num_reported = len(save.keys)
        leading = itertools.takewhile(save.job.stored.__contains__, save.keys)
        self._send(
            SaveEnded(
                leg=save.leg,
                rank=self._spec.tp_rank,
                num_chunks=save.first + sum(1 for _ in leading),
                save_s=save.job.save_s,
                moved=as_moved(save.job.moved),
            )
        )

    async def _guard(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        """Run a job. If it fails, the request goes on without what the job has not done."""
        try:
            await run()
        except Exception:  # the boundary of a request with the store: never the request's failure
            self._context.counters[f"{what}_failed"] += 1
            _logger.exception("event=%s_failed", what)
