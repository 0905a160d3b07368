"""The loads and saves of one worker half: orders become jobs, jobs that end become reports. Lives on one event loop.

Owns the jobs' tasks. Moves no bytes (`load_job`, `save_job`, `kv_blocks`) and knows no vLLM.
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

from engines.jobs.load import JobContext, LoadJob, as_moved
from engines.jobs.save import Offer, SaveJob
from engines.vllm.connector.bus_messages import FromHalf, LoadEnded, SaveEnded
from engines.vllm.connector.device_blocks import Event
from engines.vllm.connector.kv_blocks import KVBlocks
from engines.vllm.connector.orders import LoadOrder, SaveOrder
from engines.vllm.connector.worker_reports import SaveTicket, TransferReports
from kvcore.chunk_keys import rank_key
from kvcore.types import ChunkKey, KVSpec

_LOAD_BATCH = 4
"""Chunks of one get: fewer than there are staging slots, so that saves go on beside loads."""
_PARALLEL_WRITES = 2
"""Of one request: one is copied or hashed while the other is on its way."""
_REMEMBERED_LEGS = 4096
_logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class _Load:
    order: LoadOrder
    job: LoadJob
    task: asyncio.Task[None]


@dataclass(eq=False, slots=True)
class _Save:
    """`first`: index of the first chunk in the prompt. `keys`: of the chunks ordered so far, from there on.
    `reserve`: what the first order announced. `told`: of so many keys the leg's end was told."""

    ticket: SaveTicket
    leg: str | None
    first: int
    job: SaveJob
    task: asyncio.Task[None]
    sizes: dict[ChunkKey, int]
    reserve: Sequence[ChunkKey]
    keys: list[ChunkKey] = field(default_factory=list)
    told: int = 0


class WorkerJobs:
    """One rank's. All methods are for the loop that it was made on."""

    def __init__(
        self,
        context: JobContext,
        blocks: KVBlocks,
        spec: KVSpec,
        reports: TransferReports,
        tell: Callable[[FromHalf], None],
    ) -> None:
        self._context = context
        self._blocks = blocks
        self._spec = spec
        self._reports = reports
        self._tell = tell
        self._loads: set[_Load] = set()
        self._saves: dict[SaveTicket, _Save] = {}
        self._ended_handoffs: OrderedDict[str, None] = OrderedDict()

    @property
    def num_loading(self) -> int:
        """Loads under way."""
        return len(self._loads)

    @property
    def num_pending_saves(self) -> int:
        """Chunks whose blocks are waiting to be written."""
        return sum(save.job.num_pending for save in self._saves.values())

    # --- loads -------------------------------------------------------------------------------------------------

    def load(self, order: LoadOrder, after: Event | None) -> None:
        """Begin. It was noted in the reports, and ends there."""
        waits = order.wait_until is not None and order.leg not in self._ended_handoffs
        job = LoadJob(
            self._context,
            [rank_key(place.key, self._spec.tp_rank) for place in order.chunks],
            functools.partial(self._destination, order, after),
            first=order.first_chunk,
            wait_chunks=order.first_chunk + len(order.chunks) if waits else 0,
            deadline=order.wait_until or 0.0,
            batch=_LOAD_BATCH,
        )
        load = _Load(order, job, asyncio.create_task(self._guard(job.run, "load"), name="kv-load"))
        self._loads.add(load)
        load.task.add_done_callback(functools.partial(self._load_ended, load))

    def end_handoff(self, leg: str) -> None:
        """Of loads under way, and of those to come."""
        self._ended_handoffs[leg] = None
        while len(self._ended_handoffs) > _REMEMBERED_LEGS:
            self._ended_handoffs.popitem(last=False)
        for load in self._loads:
            if load.order.leg == leg:
                load.job.stop_waiting()

    def _destination(
        self, order: LoadOrder, after: Event | None, first: int, count: int
    ) -> AbstractAsyncContextManager[Sequence[Sequence[memoryview]]]:
        chunks = [place.block_ids for place in order.chunks[first : first + count]]
        return self._blocks.writing(chunks, order.keep_blocks if first == 0 else 0, after)

    def _load_ended(self, load: _Load, _task: asyncio.Task[None]) -> None:
        self._loads.discard(load)
        order, job = load.order, load.job
        num_good = job.num_loaded - order.first_chunk
        self._reports.load_ended(order, num_good)
        if order.leg is not None:
            kept = order.keep_blocks * self._spec.chunk_tokens * self._blocks.block_bytes // self._spec.chunk_bytes
            good = sum(place.num_tokens for place in order.chunks[:num_good])
            self._tell(
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

    def save(self, order: SaveOrder, ticket: SaveTicket, after: Event | None) -> None:
        """One more order of the ticket's. The first one begins its job."""
        if ticket.ended:  # its job has failed
            return
        save = self._saves.get(ticket) or self._begin(order, ticket)
        for place in order.chunks:
            key = rank_key(place.key, self._spec.tp_rank)
            save.sizes[key] = len(place.block_ids) * self._blocks.block_bytes
            save.keys.append(key)
            save.job.add(Offer(key, place.num_tokens, functools.partial(self._blocks.reading, place.block_ids, after)))

    def is_saving(self, ticket: SaveTicket) -> bool:
        """Whether the ticket's job is under way."""
        return ticket in self._saves

    def finish(self, request_ids: Sequence[str]) -> None:
        """These requests have ended: so do their saves once what was ordered is done, and their loads now."""
        for save in self._saves.values():
            if save.ticket.request_id in request_ids:
                save.job.close()
        for load in self._loads:
            if load.order.request_id in request_ids:
                load.task.cancel()

    def cut(self, tickets: Sequence[SaveTicket], loading: Sequence[str], timeout_s: float) -> asyncio.Task[None]:
        """The blocks of these are about to be given to others. The task ends once nothing reads or writes them: writes
        under way have `timeout_s` to end."""
        saves = [save for ticket in tickets if (save := self._saves.get(ticket))]
        for save in saves:
            save.leg = None  # the saves that follow the preemption are the ones that count
            save.job.abandon()
        loads = [load.task for load in self._loads if load.order.request_id in loading]
        for task in loads:
            task.cancel()
        return asyncio.create_task(self._cut(saves, loads, timeout_s), name="kv-cut")

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

    async def _cut(self, saves: Sequence[_Save], loads: Sequence[asyncio.Task[None]], timeout_s: float) -> None:
        await asyncio.gather(*(save.job.cut(timeout_s) for save in saves))
        if loads:
            await asyncio.wait(loads)

    def _begin(self, order: SaveOrder, ticket: SaveTicket) -> _Save:
        rank, size = self._spec.tp_rank, self._blocks.block_bytes
        sizes = {rank_key(key, rank): num_blocks * size for key, num_blocks in order.reserve}
        job = SaveJob(
            self._context,
            order.prefer_segment,
            list(sizes),
            sizes=sizes,
            parallel=_PARALLEL_WRITES,
            void=lambda: ticket.void,
            committed=lambda: self._committed(save),
        )
        task = asyncio.create_task(self._guard(job.run, "save"), name="kv-save")
        save = _Save(ticket, order.leg, order.first_chunk, job, task, sizes, list(sizes))
        task.add_done_callback(functools.partial(self._save_ended, save))
        self._saves[ticket] = save
        return save

    def _committed(self, save: _Save) -> None:
        """A prefill leg's end: its prompt is saved. vLLM says that a request has finished one step later only."""
        if not save.job.num_pending and set(save.keys).issuperset(save.reserve):
            self._tell_saved(save)

    def _save_ended(self, save: _Save, _task: asyncio.Task[None]) -> None:
        save.job.abandon()
        del self._saves[save.ticket]
        self._reports.save_ended(save.ticket)
        self._tell_saved(save)

    def _tell_saved(self, save: _Save) -> None:
        if save.leg is None or save.told == len(save.keys):
            return
        save.told = len(save.keys)
        leading = itertools.takewhile(save.job.stored.__contains__, save.keys)
        self._tell(
            SaveEnded(
                leg=save.leg,
                rank=self._spec.tp_rank,
                num_chunks=save.first + sum(1 for _ in leading),
                save_s=save.job.save_s,
                moved=as_moved(save.job.moved),
            )
        )

    async def _guard(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        """Run a job. What it has not done when it fails, the request goes without."""
        try:
            await run()
        except Exception:  # the boundary of a request with the store: never the request's failure
            self._context.counters[f"{what}_failed"] += 1
            _logger.exception("event=%s_failed", what)
