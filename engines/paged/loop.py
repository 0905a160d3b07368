"""The engine over a ModelRunner: one task steps the model, requests come and go around it.

Owns that task, and the order in which the parts start and stop. What it is made of: arrivals make legs, the table of
legs ends them, the scheduler plans steps over the blocks, the stepper runs them, the store jobs move chunks.
State changes between awaits only; a step or a store that fails costs its requests time or an error, never the loop.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Sequence
from types import TracebackType
from typing import Self

import msgspec

from engines.jobs.context import JobContext
from engines.paged.arrivals import Arrivals
from engines.paged.blocks import BlockManager
from engines.paged.compare import compared, one_way
from engines.paged.desk import DocumentDesk
from engines.paged.leg import Leg, StopRule
from engines.paged.legs import LegTable
from engines.paged.options import EngineOptions
from engines.paged.runner import ModelRunner
from engines.paged.scheduler import Scheduler
from engines.paged.steps import Stepper
from engines.paged.store_jobs import StoreJobs
from kvcore.clock import Clock
from kvcore.errors import (
    CancelledByPeerError,
    EngineDiedError,
    InvalidRequestError,
    KVFerryError,
    NodeUnavailableError,
    OverloadedError,
)
from kvstore.store import KVStore
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)


class EngineLoop:
    """`engines.base.Engine` over a runner and, if given, a store. Enter and leave it in one task. Owns the runner.

    A request whose id is in use replaces the older one, which is aborted: its owner has started again.
    """

    def __init__(
        self,
        runner: ModelRunner,
        store: KVStore | None,
        options: EngineOptions,
        clock: Clock,
        grammars: Grammars | None = None,
    ) -> None:
        """`grammars`: compiles those that answers must follow; it is closed with the engine. None: nothing can."""
        info = runner.info
        chunk_tokens = info.kv_spec.chunk_tokens
        assert chunk_tokens % info.block_size == 0, "a chunk is whole blocks"
        self._runner = runner
        self._grammars = grammars
        self._options = options
        self._clock = clock
        self._counters: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._tasks = asyncio.TaskGroup()
        self._step_task: asyncio.Task[None] | None = None
        self._closing = False
        self._blocks = BlockManager(info.num_blocks, info.block_size, chunk_tokens // info.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_tokens=options.max_batch_tokens,
            max_sequences=options.max_sequences,
            max_waiting=options.max_waiting,
        )
        self._stop_rule = StopRule(
            frozenset(info.eos_token_ids), min(info.max_context, info.num_blocks * info.block_size)
        )
        self._arrivals = Arrivals(info, self._stop_rule, clock, load=store is not None)
        self._legs = LegTable(self._scheduler, self._counters, self._wake.set)
        context = None if store is None else JobContext(store, clock, self._counters, options.store_timeout_s)
        self._store_jobs = StoreJobs(
            context,
            self._blocks,
            runner.block_view,
            self._tasks,
            save_output=options.save_output,
            loaded=self._scheduler.loaded,
            load_ended=self._scheduler.load_ended,
            give_up=self._scheduler.remove,
            wake=self._wake.set,
        )
        self._desk = DocumentDesk(
            context,
            runner=runner,
            blocks=self._blocks,
            arrivals=self._arrivals,
            legs=self._legs,
            store_jobs=self._store_jobs,
            clock=clock,
            wake=self._wake.set,
            most_computed=max(1, options.max_sequences // 2),
        )
        self._compared: list[Leg] = []
        """What the comparison under way has run; empty: there is none."""
        self._stepper = Stepper(
            runner,
            self._scheduler,
            self._legs,
            self._store_jobs,
            self._stop_rule,
            clock=clock,
            counters=self._counters,
            max_unread=options.max_unread,
        )

    def __repr__(self) -> str:
        state = "serving" if self._serving else "closed"
        return f"<EngineLoop {self._runner.info.kind} {state}, {len(self._legs)} legs, {self._scheduler!r}>"

    async def __aenter__(self) -> Self:
        """Raises ConfigError where the store's transports cannot have the KV memory (RDMA pins it)."""
        try:
            await self._store_jobs.register(self._runner.memory)
        except BaseException:
            await self._runner.aclose()
            raise
        await self._tasks.__aenter__()
        self._step_task = self._tasks.create_task(self._run(), name="engine-steps")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Abort every request, let finished ones' saves end (bounded), close the runner."""
        self._closing = True
        try:
            self._legs.abort_all()
            await self._desk.aclose()
            if kind is None:
                await self._store_jobs.finish(self._options.close_s)
        finally:
            if self._step_task is not None:
                self._step_task.cancel()
            self._store_jobs.cancel()
            cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
            try:  # the body's own error passes as it is, not wrapped into the group's
                await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
            finally:
                if self._grammars is not None:
                    self._grammars.close()
                await self._runner.aclose()

    @property
    def info(self) -> EngineInfo:
        """The runner's, and how much the scheduler does at a time."""
        return msgspec.structs.replace(self._runner.info, max_sequences=self._options.max_sequences)

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See `Engine.prefill`."""
        if request.documents is not None:
            self._check_serving()
            return await self._desk.prefill(request, self.prefill)
        leg = self._arrivals.prefill_leg(request)
        if leg is None:
            return PrefillResult(request_id=request.request_id, cached_tokens=0, computed_tokens=0, stored_chunks=0)
        self._open(leg, request.deadline_s)
        try:
            await leg.done
            stored = await self._store_jobs.count_stored(leg)
        finally:
            self._legs.close(leg)
        return leg.result(stored, self._clock.now())

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine.generate`."""
        leg = self._arrivals.decode_leg(request)
        if request.sampling.grammar is not None:
            leg.first.matcher = await self._matcher(request.sampling.grammar, request.cache_salt)
        if self._stop_rule.is_full(leg.first):
            for index in leg.first.indices:
                yield TokenDelta(index=index, finish_reason=FinishReason.LENGTH)
            return
        self._open_decode(leg, request)
        try:
            left = request.sampling.n
            while left:
                item = await leg.stream.get()
                if isinstance(item, KVFerryError):
                    raise item
                left -= item.finish_reason is not None
                if leg.first.paused:
                    leg.update_paused(self._options.max_unread)
                    self._wake.set()
                yield item
        finally:
            self._legs.close(leg)

    async def compare(self, request: CompareRequest) -> CompareReply:
        """See `Engine.compare`."""
        if len(self._legs) or self._compared:  # between its two ways and in the end a comparison has no leg
            raise OverloadedError("the engine has other work: prompts are compared while it is idle")
        try:
            full = await self._run_one_way(one_way(request, reuse=False), ())
            tokens = full.first.output
            # Kept blocks are for distances. Nobody can take them for a request that comes meanwhile and goes first:
            # they are let go where there are no distances to tell (documents have copies of their own) or little room,
            # and when such a request comes.
            if request.documents is not None or not self._blocks.can_allocate(2 * len(full.kept or ())):
                self._let_go_of_compared()
            again = msgspec.structs.replace(request, num_tokens=len(tokens))
            reused = await self._run_one_way(one_way(again, reuse=True), tokens)
            distances = list[float]()
            if full.kept and request.documents is None:
                distances = await self._distances(full, reused, request.max_distance)
            return compared(request.request_id, full, reused, distances, self._clock.now())
        finally:
            self._let_go_of_compared()
            self._compared.clear()
            self._wake.set()

    def _let_go_of_compared(self) -> None:
        for leg in self._compared:
            self._blocks.release(leg.kept or ())
            leg.kept = []

    async def _distances(self, full: Leg, reused: Leg, limit: float) -> list[float]:
        """Of each chunk that `reused` had by its prefix; those beyond `limit`, if it is one, are found no more, nor
        what `reused` has computed behind them."""
        sequence, size, distances = reused.first, self._blocks.blocks_per_chunk, list[float]()
        exact = min(sequence.num_cached or 0, sequence.keyed_tokens) // sequence.chunk_tokens
        keys = sequence.keys(sequence.keyed_tokens // sequence.chunk_tokens)
        for first, key in zip(range(0, exact * size, size), keys, strict=False):
            if not (full.kept and reused.kept):  # they were let go
                break
            blocks = full.kept[first : first + size], reused.kept[first : first + size]
            distances.append(await self._runner.distance(*blocks))
            if 0 < limit < distances[-1]:
                for wrong in (key, *keys[exact:]):
                    self._blocks.forget(wrong)
        return distances

    async def _run_one_way(self, request: GenerateRequest, forced: Sequence[int]) -> Leg:
        leg = self._arrivals.compared_leg(request, forced)
        self._compared.append(leg)
        self._open_decode(leg, request)
        try:
            while not leg.finished:
                item = await leg.stream.get()
                if isinstance(item, KVFerryError):
                    raise item
                if item.finish_reason is FinishReason.ABORT:
                    raise CancelledByPeerError(f"comparison {request.request_id} was aborted")
        finally:
            self._legs.close(leg)
        return leg

    async def _matcher(self, grammar: Grammar, salt: bytes) -> GrammarMatcher:
        if self._grammars is None:
            raise InvalidRequestError("this engine cannot constrain answers", param="structured_outputs")
        return await self._grammars.matcher(grammar, salt)  # by which a node tells tenants apart

    async def end_handoff(self, request_id: str) -> None:
        """See `Engine.end_handoff`."""
        if leg := self._legs.get(request_id):
            leg.end_handoff()
            self._wake.set()  # it may have waited for the load of another one

    async def abort(self, request_id: str) -> None:
        """See `Engine.abort`. A prefill raises CancelledByPeerError."""
        self._desk.abort(request_id)
        if leg := self._legs.get(request_id):
            self._legs.abort(leg)

    async def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        scheduler = self._scheduler
        return EngineStats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            loading=len(scheduler.loading),
            used_blocks=self._blocks.used_blocks,
            cached_blocks=self._blocks.cached_blocks,
            total_blocks=self._blocks.num_blocks,
            pending_saves=self._store_jobs.num_pending,
            counters={**self._counters, "preemptions": scheduler.preemptions},
        )

    def check(self) -> None:
        """Assert every invariant of scheduler and blocks (tests, simulation)."""
        self._scheduler.check()

    @property
    def _serving(self) -> bool:
        return not self._closing and self._step_task is not None and not self._step_task.done()

    def _check_serving(self) -> None:
        if not self._serving:
            raise NodeUnavailableError("the engine is closed")

    def _open(self, leg: Leg, deadline_s: float) -> None:
        self._check_serving()
        if all(leg is not one for one in self._compared):
            self._let_go_of_compared()
        self._legs.open(leg, deadline_s)

    def _open_decode(self, leg: Leg, request: GenerateRequest) -> None:
        self._open(leg, request.deadline_s)
        if leg.first.held:
            leg.documents_task = asyncio.create_task(self._desk.prepare(leg, request), name="engine-documents")

    async def _run(self) -> None:
        """Step for ever. What changes while a step runs is planned for in the next one."""
        try:
            while True:
                self._wake.clear()
                plan = self._scheduler.schedule()
                self._stepper.begin(plan)
                if plan.work:
                    await self._stepper.run(plan)
                    await asyncio.sleep(0)  # a runner that never waits must not keep readers from their tokens
                elif not plan.fully_cached:  # those have given their blocks back: others may begin now
                    await self._wake.wait()
        except Exception:
            self._closing = True
            self._legs.fail_all(EngineDiedError("the engine's loop failed"))
            raise
