"""The connector's worker half: takes orders on vLLM's worker thread, carries them out on a thread and loop of its own.

Owns that thread and all on it: store, transports, bus, jobs. Every method is called from vLLM's thread, returns fast
(`preempted` and an idle step's `finished` wait, bounded) and never raises: what fails is a load that did not come or a
save that was left out.
"""

import asyncio
import concurrent.futures
import logging
import os
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress

from engines.jobs.load import JobContext
from engines.vllm.connector.bus_messages import AskSample, EndHandoff, FromHalf, ToHalf, WorkerHello, WorkerSample
from engines.vllm.connector.device_blocks import Event
from engines.vllm.connector.kv_blocks import KVBlocks
from engines.vllm.connector.orders import LoadOrder, SaveOrder
from engines.vllm.connector.settings import ConnectorSettings
from engines.vllm.connector.worker_bus import WorkerBus
from engines.vllm.connector.worker_jobs import WorkerJobs
from engines.vllm.connector.worker_reports import SaveTicket, TransferReports
from engines.vllm.connector.worker_store import OpenedStore, StoreOpener, open_store
from kvcore.clock import SystemClock
from kvcore.process.service import loop_factory

_START_S = 60.0
"""Opening transports takes milliseconds; pinning an engine's KV memory for RDMA seconds."""
_WRITE_ENDS_S = 5.0
"""A preempted request's writes under way have this long before they are cancelled."""
_CUT_S = 10.0
"""A preemption waits no longer than this, whatever does not answer; then nothing more of its request is committed."""
_IDLE_S = 0.005
"""A new request waits for an idle step's end; a load that ends does not."""
_SAVES_END_S = 3.0
_CLOSE_S = 15.0
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
        write_ends_s: float = _WRITE_ENDS_S,
        cut_s: float = _CUT_S,
    ) -> None:
        """Returns once the store is open. Raises ConfigError for settings that this machine cannot serve, TimeoutError
        where transports cannot be opened in time."""
        self.spec = blocks.build_spec(settings.provenance, settings.chunk_tokens, rank, tp_size)
        self._settings = settings
        self._blocks = blocks
        self._open_store = open_store
        self._write_ends_s = write_ends_s
        self._cut_s = cut_s
        self._reports = TransferReports()
        self._counters: Counter[str] = Counter()
        self._failing: set[str] = set()
        self._started: concurrent.futures.Future[_Running] = concurrent.futures.Future()
        self._thread = threading.Thread(target=self._run, name=f"kvferry-worker-{rank}", daemon=True)
        self._thread.start()
        self._running = self._started.result(_START_S)

    # --- vLLM's thread -------------------------------------------------------------------------------------------

    def preempted(self, request_ids: Sequence[str]) -> None:
        """Returns once nothing reads or writes these requests' blocks any more, or after `cut_s`; in that case what was
        not committed never will be. What was written in whole before is committed."""
        tickets, loading = self._reports.preempted(request_ids)
        if not tickets and not loading:
            return
        ended: concurrent.futures.Future[None] = concurrent.futures.Future()
        with self._boundary("preempted"):
            try:
                self._post(self._cut, tickets, loading, ended)
                ended.result(self._cut_s)
            except BaseException:
                for ticket in tickets:
                    ticket.void = True
                raise

    def start_loads(self, orders: Sequence[LoadOrder]) -> None:
        """Each ends with a report of its request as received."""
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
        """After the forward pass that fills these chunks was told to run."""
        tickets = [self._reports.save_ordered(order.request_id) for order in orders]
        with self._boundary("offer_saves"):
            try:
                if orders:
                    self._post(self._save, orders, tickets, self._blocks.mark())
            except BaseException:
                self._drop(tickets)
                raise

    def finished(self, finished_ids: set[str], *, idle: bool = False) -> tuple[set[str], set[str]]:
        """(sent, received): those named here so far whose saves have all ended; those whose loads have. Each once.

        A load of a finished request is cancelled, and received when it has let go of the blocks. After an `idle` step
        that has nothing to tell, it waits a moment for something: vLLM would ask again at once, on a core that others
        may compute on.
        """
        if idle and not finished_ids:
            self._reports.wait_for_news(_IDLE_S)
        sent, received, busy = self._reports.report(finished_ids)
        if busy:
            with self._boundary("finished"):
                self._post(self._jobs.finish, busy)
        return sent, received

    def failed_blocks(self) -> set[int]:
        """Blocks without their KV of the loads that `finished` has told of, each once."""
        return self._reports.failed_blocks()

    def end_handoff(self, leg: str) -> None:
        """The leg's prefill has ended: its loads, now or to come, take what is there. (The bus says it too.)"""
        with self._boundary("end_handoff"):
            self._post(self._jobs.end_handoff, leg)

    def close(self) -> None:
        """Let saves under way end and the thread with them, bounded. Idempotent."""
        if self._thread.is_alive():
            with suppress(RuntimeError):  # the loop ended by itself meanwhile
                self._post(self._running.stopping.set)
            self._thread.join(_CLOSE_S)
            if self._thread.is_alive():
                _logger.error("worker_half_stuck after_s=%g", _CLOSE_S)

    def _drop(self, tickets: Sequence[SaveTicket]) -> None:
        try:
            self._post(self._end_idle, tickets)
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
        """An exception in a worker-side method would kill vLLM's engine: told once a method, and counted."""
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
            opened = await stack.enter_async_context(self._open_store(self._settings, self.spec))
            for region in self._blocks.start(self.spec.chunk_bytes // self._blocks.block_bytes):
                await opened.store.register(region)
            running = await stack.enter_async_context(self._start(opened))
            self._started.set_result(running)
            await running.stopping.wait()

    @asynccontextmanager
    async def _start(self, opened: OpenedStore) -> AsyncIterator["_Running"]:
        context = JobContext(opened.store, SystemClock(), self._counters, self._settings.transport.timeout_s)
        bus: WorkerBus | None = None

        def tell(frame: FromHalf) -> None:
            if bus is not None:
                bus.send(frame)

        jobs = WorkerJobs(context, self._blocks, self.spec, self._reports, tell)

        def take(frame: ToHalf) -> None:
            match frame:
                case EndHandoff(leg=leg):
                    jobs.end_handoff(leg)
                case AskSample():
                    tell(self._sample(jobs, opened))

        talking: asyncio.Task[None] | None = None
        if self._settings.bus is not None:
            bus = WorkerBus(self._settings.bus, WorkerHello(spec=self.spec), take)
            talking = asyncio.create_task(bus.run(), name="kv-bus")
        try:
            yield _Running(asyncio.get_running_loop(), asyncio.Event(), jobs)
        finally:
            await jobs.aclose(_SAVES_END_S)
            if talking is not None:
                talking.cancel()
                await asyncio.wait({talking})

    def _load(self, orders: Sequence[LoadOrder], after: Event | None) -> None:
        for order in orders:
            with self._boundary("load"):
                try:
                    self._jobs.load(order, after)
                except BaseException:
                    self._reports.load_ended(order, 0)
                    raise

    def _save(self, orders: Sequence[SaveOrder], tickets: Sequence[SaveTicket], after: Event | None) -> None:
        for order, ticket in zip(orders, tickets, strict=True):
            with self._boundary("save"):
                try:
                    self._jobs.save(order, ticket, after)
                except BaseException:
                    self._end_idle([ticket])
                    raise

    def _end_idle(self, tickets: Sequence[SaveTicket]) -> None:
        """Those without a job: what was ordered of them is left out, and so is the rest."""
        for ticket in tickets:
            if not self._jobs.is_saving(ticket):
                self._reports.save_ended(ticket)

    def _cut(
        self, tickets: Sequence[SaveTicket], loading: Sequence[str], ended: concurrent.futures.Future[None]
    ) -> None:
        task = self._jobs.cut(tickets, loading, self._write_ends_s)
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
