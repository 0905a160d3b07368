"""The connector's worker half: takes orders on vLLM's worker thread, carries them out on a thread and loop of its own.

Owns that thread and all on it: store, transports, bus, jobs. Every method is called from vLLM's thread and never
raises: a load that fails ends with failed blocks, a save that fails is left out. Methods return fast, except for
`preempted` and an idle step's `finished`, which wait, bounded.
"""

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from engines.jobs.context import JobContext
from engines.vllm.connector.blocks.device_blocks import DeviceEvent
from engines.vllm.connector.blocks.kv_blocks import KVBlocks
from engines.vllm.connector.bus_messages import (
    AskSample,
    BusEndHandoff,
    FromWorker,
    ToWorker,
    WorkerHello,
    WorkerSample,
)
from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import LoadOrder, SaveOrder
from engines.vllm.connector.settings import ConnectorSettings
from engines.vllm.connector.worker_bus import WorkerBus
from engines.vllm.connector.worker_jobs import WorkerJobs
from engines.vllm.connector.worker_reports import SaveTicket, TransferReports
from kvcore.clock import SystemClock
from kvcore.process.service import loop_factory
from kvstore.wiring import OpenedStore, StoreOpener, open_store

_logger = logging.getLogger("engines.vllm")


class WorkerHalf:
    """One rank's. `blocks` belongs to it from now on."""

    def __init__(
        self,
        settings: ConnectorSettings,
        blocks: KVBlocks,
        rank: int,
        tp_size: int,
        *,
        open_store: StoreOpener = open_store,
        limits: ConnectorLimits = ConnectorLimits(),
    ) -> None:
        """Returns once the store is open. Raises ConfigError for settings that this machine cannot serve, TimeoutError
        where transports cannot be opened in time."""
        self.spec = blocks.build_spec(settings.provenance, settings.chunk_tokens, rank, tp_size)
        self._settings = settings
        self._blocks = blocks
        self._open_store = open_store
        self._limits = limits
        self._reports = TransferReports()
        self._counters: Counter[str] = Counter()
        self._failing: set[str] = set()
        self._started: concurrent.futures.Future[_Running] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=f"kvferry-worker-{rank}", daemon=True)
        self._thread.start()
        self._running = self._started.result(limits.worker_start_s)

    def __repr__(self) -> str:
        rank = f"rank {self.spec.tp_rank} of {self.spec.tp_size}"
        if not self._started.done() or self._started.exception() is not None:
            return f"<WorkerHalf {rank}, not started>"
        state = "open" if self._thread.is_alive() else "closed"
        return f"<WorkerHalf {rank}, {state}, {self._started.result().jobs!r}>"

    # --- vLLM's thread -------------------------------------------------------------------------------------------

    def preempted(self, request_ids: Sequence[str]) -> None:
        """Returns once nothing reads or writes these requests' blocks any more, or after `limits.preemption_s`.

        There are four cases for a request:

        1. It has no job under way. There is nothing to wait for.
        2. Its jobs end in time. What was written in whole before is committed, the rest is not.
        3. A job does not end in time, or it cannot be asked to (the loop is closed). vLLM will overwrite the blocks all
           the same, so the ticket is revoked: nothing that was not committed yet ever will be.
        4. A load does not end in time. No ticket is needed: vLLM gives the blocks of a load to nobody before it is
           reported as received.
        """
        tickets, loading = self._reports.preempted(request_ids)
        if not tickets and not loading:
            return
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._boundary("preempted"):
            try:
                self._post(self._end_jobs, tickets, loading, ended)
                ended.result(self._limits.preemption_s)
            except BaseException:
                for ticket in tickets:
                    ticket.revoked = True
                raise

    def start_loads(self, orders: Sequence[LoadOrder]) -> None:
        """Each order ends with a report of its request as received, whatever happens:

        1. The loop takes the orders. The job that begins there reports its end.
        2. The loop does not take them (it is closed, or the device fails to mark the end of its work). Each order ends
           here, with all of its blocks failed, and vLLM computes them.
        """
        for order in orders:
            self._reports.load_ordered(order)
        with self._boundary("start_loads"):
            try:
                if orders:
                    self._post(self._load, orders, self._blocks.mark())
            except BaseException:
                for order in orders:
                    self._reports.load_ended(order, 0)
                raise

    def offer_saves(self, orders: Sequence[SaveOrder]) -> None:
        """After the forward pass that fills these chunks was started. Each ticket ends once, whatever happens:

        1. The loop takes the orders. The first order of a ticket begins its job, later ones are added to it, and the
           job's end is the ticket's.
        2. The loop does not take them, but runs. These orders are left out. A ticket whose job is under way ends with
           that job; a ticket without one has nothing to wait for and ends now.
        3. The loop is closed. No job is left, so that the tickets end now.
        """
        tickets = [self._reports.save_ordered(order.request_id) for order in orders]
        with self._boundary("offer_saves"):
            try:
                if orders:
                    self._post(self._save, orders, tickets, self._blocks.mark())
            except BaseException:
                self._leave_out(tickets)
                raise

    def finished(self, finished_ids: set[str], *, idle: bool = False) -> tuple[set[str], set[str]]:
        """(sent, received): those named here so far whose saves have all ended; those whose loads have. Each once.

        A load of a finished request is cancelled, and received when it has let go of the blocks. An `idle` step
        computes nothing, and vLLM takes the next one at once: if there is nothing to report, it waits `limits.idle_s`
        here, so that others can compute on this core.
        """
        if idle and not finished_ids:
            self._reports.wait_for_report(self._limits.idle_s)
        sent, received, busy = self._reports.report(finished_ids)
        if busy:
            with self._boundary("finished"):
                self._post(self._jobs.finish, busy)
        return sent, received

    def failed_blocks(self) -> set[int]:
        """Blocks without their KV, of the loads that `finished` has reported as received. Each block once."""
        return self._reports.failed_blocks()

    def end_handoff(self, leg: str) -> None:
        """The leg's prefill has ended: its loads, now or to come, take what is there."""
        with self._boundary("end_handoff"):
            self._post(self._jobs.end_handoff, leg)

    def close(self) -> None:
        """Let saves under way end and the thread with them, bounded. Idempotent."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop ended by itself meanwhile
                self._post(self._running.stopping.set)
            self._thread.join(self._limits.worker_close_s)
            if self._thread.is_alive():
                _logger.error("worker_half_stuck after_s=%g", self._limits.worker_close_s)

    def _leave_out(self, tickets: Sequence[SaveTicket]) -> None:
        try:
            self._post(self._end_without_job, tickets)
        except RuntimeError:  # the loop is closed, and no job is left
            for ticket in tickets:
                self._reports.save_ended(ticket)

    @property
    def _jobs(self) -> WorkerJobs:
        return self._running.jobs

    def _post(self, function: Callable[..., object], *args: object) -> None:
        """Call it on our loop. Raises RuntimeError once that is closed."""
        self._running.loop.call_soon_threadsafe(function, *args)

    @contextmanager
    def _boundary(self, what: str) -> Iterator[None]:
        """An exception in a worker-side method would kill vLLM's engine. It is counted, and logged once a method."""
        try:
            yield
        except Exception:
            self._counters[f"{what}_failed"] += 1
            if what not in self._failing:
                self._failing.add(what)
                _logger.exception("worker_half_failed method=%s", what)

    # --- our thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            if self._settings.cpus:
                with suppress(OSError):  # a core that is gone: then as we were started
                    os.sched_setaffinity(0, self._settings.cpus)
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                runner.run(self._serve())
        except BaseException as error:  # the thread's boundary
            if self._started.done():
                _logger.exception("worker_half_died")
            else:
                self._started.set_exception(error)
        finally:
            self._reports.end_all()

    async def _serve(self) -> None:
        async with AsyncExitStack() as stack:
            stack.push_async_callback(self._blocks.aclose)
            opened = await stack.enter_async_context(self._open_store(self._settings.store, self.spec))
            for region in self._blocks.start(self.spec.chunk_bytes // self._blocks.block_bytes):
                await opened.store.register(region)
            running = await stack.enter_async_context(self._start(opened))
            self._started.set_result(running)
            await running.stopping.wait()

    @asynccontextmanager
    async def _start(self, opened: OpenedStore) -> AsyncIterator["_Running"]:
        context = JobContext(opened.store, SystemClock(), self._counters, self._settings.store.transport.timeout_s)
        bus: WorkerBus | None = None

        def send(frame: FromWorker) -> None:
            if bus is not None:
                bus.send(frame)

        jobs = WorkerJobs(context, self._blocks, self.spec, self._reports, send=send, limits=self._limits)

        def handle(frame: ToWorker) -> None:
            match frame:
                case BusEndHandoff(leg=leg):
                    jobs.end_handoff(leg)
                case AskSample():
                    send(self._sample(jobs, opened))

        bus_task: asyncio.Task[None] | None = None
        if self._settings.bus is not None:
            bus = WorkerBus(self._settings.bus, WorkerHello(spec=self.spec), handle, self._limits)
            bus_task = asyncio.create_task(bus.run(), name="kv-bus")
        try:
            yield _Running(asyncio.get_running_loop(), asyncio.Event(), jobs)
        finally:
            await jobs.aclose(self._limits.saves_end_s)
            if bus_task is not None:
                bus_task.cancel()
                await asyncio.wait({bus_task})

    def _load(self, orders: Sequence[LoadOrder], after: DeviceEvent | None) -> None:
        for order in orders:
            with self._boundary("load"):
                try:
                    self._jobs.load(order, after)
                except BaseException:
                    self._reports.load_ended(order, 0)
                    raise

    def _save(self, orders: Sequence[SaveOrder], tickets: Sequence[SaveTicket], after: DeviceEvent | None) -> None:
        for order, ticket in zip(orders, tickets, strict=True):
            with self._boundary("save"):
                try:
                    self._jobs.save(order, ticket, after)
                except BaseException:
                    self._end_without_job([ticket])
                    raise

    def _end_without_job(self, tickets: Sequence[SaveTicket]) -> None:
        """Of these tickets, end those that have no job. Later orders for them are left out too."""
        for ticket in tickets:
            if not self._jobs.is_saving(ticket):
                self._reports.save_ended(ticket)

    def _end_jobs(
        self, tickets: Sequence[SaveTicket], loading: Sequence[str], ended: concurrent.futures.Future[None]
    ) -> None:
        task = self._jobs.end_preempted(tickets, loading, self._limits.write_ends_s)
        task.add_done_callback(lambda done: ended.set_result(None))

    def _sample(self, jobs: WorkerJobs, opened: OpenedStore) -> WorkerSample:
        return WorkerSample(
            rank=self.spec.tp_rank,
            loading=jobs.num_loading,
            pending_saves=jobs.num_pending_saves,
            counters=dict(self._counters),
            store=opened.totals(),
            transports=opened.transports(),
        )


class _Running:
    """What lives on our thread while it serves."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stopping: asyncio.Event, jobs: WorkerJobs) -> None:
        self.loop = loop
        self.stopping = stopping
        self.jobs = jobs
