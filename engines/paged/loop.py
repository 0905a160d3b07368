"""The engine over a ModelRunner: one task steps the model, requests come and go around it.

Owns legs, their deadlines and their jobs; decides nothing about blocks (Scheduler) and moves no bytes (connector).
State changes between awaits only; a step or a store that fails costs its requests time or an error, never the loop.
"""

import asyncio
import functools
import logging
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from engines.paged.blocks import BlockManager
from engines.paged.connector import LoadJob, SaveJob, StorePort, chunks_to_save
from engines.paged.leg import Leg, StopRule, leading
from engines.paged.runner import ModelRunner, Sampled, SampleSpec, StepOutput, StepSlice
from engines.paged.scheduler import Plan, Scheduler, Work
from engines.paged.sequence import Status, TokenSequence
from kvcore.chunk_keys import root_key, usable_chunks
from kvcore.clock import Clock
from kvcore.config.schema import PagedEngineConfig
from kvcore.errors import (
    CancelledByPeerError,
    ContextLengthError,
    DeadlineExceededError,
    EngineDiedError,
    EngineError,
    InvalidRequestError,
    KVFerryError,
    NodeUnavailableError,
)
from kvstore.store import KVStore
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)

_log = logging.getLogger("engines")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Bounds of one engine; the names are those of the engine's configuration."""

    max_batch_tokens: int
    max_sequences: int
    max_waiting: int
    save_output: bool = True
    store_timeout_s: float = 30.0
    """For one call of the store."""
    close_s: float = 5.0
    """Saves under way have this long at the end."""

    @classmethod
    def of(cls, config: PagedEngineConfig, store_timeout_s: float) -> Self:
        """Those of an engine's configuration."""
        return cls(
            max_batch_tokens=config.max_batch_tokens,
            max_sequences=config.max_sequences,
            max_waiting=config.max_waiting,
            save_output=config.save_output,
            store_timeout_s=store_timeout_s,
        )


class EngineLoop:
    """`engines.base.Engine` over a runner and, if given, a store. Enter and leave it in one task. Owns the runner.

    A request whose id is in use takes the place of the older one, which is aborted: its owner has started again.
    """

    def __init__(self, runner: ModelRunner, store: KVStore | None, options: EngineOptions, clock: Clock) -> None:
        info = runner.info
        self._runner = runner
        self._options = options
        self._clock = clock
        self._chunk_tokens = info.kv_spec.chunk_tokens
        assert self._chunk_tokens % info.block_size == 0, "a chunk is whole blocks"
        self._blocks = BlockManager(info.num_blocks, info.block_size, self._chunk_tokens // info.block_size)
        self._scheduler = Scheduler(
            self._blocks,
            max_batch_tokens=options.max_batch_tokens,
            max_sequences=options.max_sequences,
            max_waiting=options.max_waiting,
        )
        self._stop_rule = StopRule(
            frozenset(info.eos_token_ids), min(info.max_context, info.num_blocks * info.block_size)
        )
        self._counters: Counter[str] = Counter()
        self._wake = asyncio.Event()
        self._port: StorePort | None = None
        if store is not None:
            self._port = StorePort(
                store, self._blocks, runner.block_view, clock, self._counters, options.store_timeout_s, self._wake.set
            )
        self._legs: dict[str, Leg] = {}
        self._saves: dict[asyncio.Task[None], SaveJob] = {}
        self._tasks = asyncio.TaskGroup()
        self._step_task: asyncio.Task[None] | None = None
        self._arrivals = 0
        self._closing = False

    async def __aenter__(self) -> Self:
        """Raises ConfigError where the store's transports cannot have the KV memory (RDMA pins it)."""
        if self._port is not None:
            try:
                await self._port.store.register(self._runner.memory)
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
            for request_id in list(self._legs):
                await self.abort(request_id)
            if self._saves and kind is None:
                await asyncio.wait(self._saves, timeout=self._options.close_s)
        finally:
            for task in [self._step_task, *self._saves]:
                if task is not None:
                    task.cancel()
            cancelled = kind is not None and issubclass(kind, asyncio.CancelledError)
            try:  # the body's own error passes as it is, not wrapped into the group's
                await self._tasks.__aexit__(*((kind, error, trace) if cancelled else (None, None, None)))
            finally:
                await self._runner.aclose()

    @property
    def info(self) -> EngineInfo:
        """The runner's."""
        return self._runner.info

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See `Engine.prefill`."""
        self._check_tokens(request.prompt_token_ids, self._stop_rule.max_tokens)
        usable = usable_chunks(len(request.prompt_token_ids), self._chunk_tokens)
        if not usable:
            return PrefillResult(request_id=request.request_id, cached_tokens=0, computed_tokens=0, stored_chunks=0)
        sequence = self._sequence(request, request.prompt_token_ids[: usable * self._chunk_tokens], [])
        leg = Leg(request.request_id, self._clock.now(), [sequence], prefer_segment=request.prefer_segment)
        self._open(leg, request.deadline_s)
        try:
            await leg.done
            stored = await self._count_stored(leg, usable)
        finally:
            self._close(leg)
        return PrefillResult(
            request_id=request.request_id,
            cached_tokens=sequence.num_cached or 0,
            computed_tokens=sequence.num_prompt_computed,
            stored_chunks=stored,
            moved=leg.moved,
            timings=leg.timings(self._clock.now()),
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine.generate`."""
        params, output = request.sampling, request.output_token_ids
        self._check_tokens(request.prompt_token_ids + output, self._stop_rule.max_tokens - (not output))
        if output and params.n != 1:
            raise InvalidRequestError("a continued request has n = 1", param="n")
        sequence = self._sequence(request, request.prompt_token_ids, output)
        sequence.sampling, sequence.indices = params, tuple(range(params.n))
        if len(output) >= params.max_tokens or len(sequence.tokens) >= self._stop_rule.max_tokens:
            for index in sequence.indices:
                yield TokenDelta(index=index, finish_reason=FinishReason.LENGTH)
            return
        leg = Leg(request.request_id, self._clock.now(), [sequence], handoff=request.handoff)
        self._open(leg, request.deadline_s)
        try:
            left = params.n
            while left:
                item = await leg.stream.get()
                if isinstance(item, KVFerryError):
                    raise item
                left -= item.finish_reason is not None
                if sequence.paused:
                    leg.set_paused()
                    self._wake.set()
                yield item
        finally:
            self._close(leg)

    async def end_handoff(self, request_id: str) -> None:
        """See `Engine.end_handoff`."""
        if leg := self._legs.get(request_id):
            leg.end_handoff()

    async def abort(self, request_id: str) -> None:
        """See `Engine.abort`. A prefill raises CancelledByPeerError."""
        leg = self._legs.get(request_id)
        if leg is None:
            return
        if leg.first.sampling is None:
            leg.fail(CancelledByPeerError(f"prefill {request_id} was aborted"))
        for sequence in leg.sequences:
            if sequence.sampling is not None and sequence.status is not Status.FINISHED:
                for index in sequence.indices:
                    leg.stream.put_nowait(TokenDelta(index=index, finish_reason=FinishReason.ABORT))
        self._close(leg)

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
            pending_saves=sum(save.num_pending for save in self._saves.values()),
            counters={**self._counters, "preemptions": scheduler.preemptions},
        )

    def check(self) -> None:
        """Assert every invariant of scheduler and blocks (tests, simulation)."""
        self._scheduler.check()

    # --- requests -----------------------------------------------------------------------------------------------

    def _check_tokens(self, tokens: list[int], limit: int) -> None:
        info = self._runner.info
        if not tokens:
            raise InvalidRequestError("the prompt is empty", param="prompt")
        if len(tokens) > limit:
            raise ContextLengthError(
                f"{len(tokens)} tokens; this engine's context is {info.max_context} and its KV cache holds "
                f"{info.num_blocks * info.block_size}",
                param="prompt",
            )
        if min(tokens) < 0 or max(tokens) >= info.vocab_size:
            raise InvalidRequestError(f"token ids lie in [0, {info.vocab_size})", param="prompt")

    def _sequence(
        self, request: PrefillRequest | GenerateRequest, prompt: list[int], output: list[int]
    ) -> TokenSequence:
        self._arrivals += 1
        return TokenSequence(
            request_id=request.request_id,
            age=(self._arrivals, 0),
            tokens=[*prompt, *output],
            num_prompt=len(prompt),
            root=root_key(self._runner.info.kv_spec.fingerprint, request.cache_salt),
            chunk_tokens=self._chunk_tokens,
        )

    def _open(self, leg: Leg, deadline_s: float) -> None:
        """Queue a leg, or raise."""
        if self._closing or self._step_task is None or self._step_task.done():
            raise NodeUnavailableError("the engine is closed")
        if older := self._legs.get(leg.request_id):
            self._fail(older, CancelledByPeerError(f"request {leg.request_id} was started again"))
        leg.first.wants_load = self._port is not None and leg.first.num_reusable_chunks > 0
        self._scheduler.add(leg.first)
        self._legs[leg.request_id] = leg
        late = DeadlineExceededError(f"request {leg.request_id} did not finish in {deadline_s:.3f} s")
        leg.timer = asyncio.get_running_loop().call_later(max(0.0, deadline_s), self._fail, leg, late)
        self._wake.set()

    def _fail(self, leg: Leg, error: KVFerryError) -> None:
        leg.fail(error)
        self._close(leg)

    def _close(self, leg: Leg) -> None:
        """Free all that the leg holds. A decode leg whose sequences all finished goes on saving in the background."""
        if self._legs.get(leg.request_id) is not leg:
            return
        del self._legs[leg.request_id]
        if leg.timer is not None:
            leg.timer.cancel()
        self._counters["aborted"] += not leg.succeeded
        if leg.load_task is not None:
            leg.load_task.cancel()
        if leg.save is not None and leg.save_task is not None:
            leg.save.close()
            if not leg.succeeded:
                leg.save_task.cancel()
        for sequence in leg.sequences:
            if sequence.status is not Status.FINISHED:
                self._scheduler.remove(sequence)
        self._wake.set()

    # --- steps --------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        try:
            while True:
                self._wake.clear()
                plan = self._scheduler.schedule()
                self._begin(plan)
                if plan.work:
                    await self._step(plan)
                    await asyncio.sleep(0)  # a runner that never waits must not keep readers from their tokens
                else:
                    await self._wake.wait()
        except Exception:
            self._closing = True
            for leg in list(self._legs.values()):
                self._fail(leg, EngineDiedError("the engine's loop failed"))
            raise

    def _begin(self, plan: Plan) -> None:
        """Start what the plan says, beside the step itself."""
        now = self._clock.now()
        for sequence in plan.loads:
            self._start_load(self._legs[sequence.request_id], sequence, now)
        for sequence in [*(item.sequence for item in plan.work), *plan.ready]:
            leg = self._legs[sequence.request_id]
            if leg.started is None:
                leg.started = now
                leg.scheduled = now if leg.scheduled is None else leg.scheduled
                self._counters["cached_tokens"] += sequence.num_cached or 0
                self._start_save(leg, sequence)
        for sequence in plan.ready:
            self._end_prefill(self._legs[sequence.request_id])
            self._wake.set()
        if plan.starved:
            for leg in self._legs.values():
                if leg.load is not None:
                    leg.end_handoff()

    async def _step(self, plan: Plan) -> None:
        legs = [self._legs[item.sequence.request_id] for item in plan.work]
        try:
            output = await self._runner.execute([self._slice(item) for item in plan.work])
        except asyncio.CancelledError:
            self._scheduler.fail(plan)
            raise
        except Exception as error:  # the boundary of the requests in this step
            _log.exception("event=step_failed requests=%d", len(plan.work))
            self._scheduler.fail(plan)
            for leg in legs:
                if self._legs.get(leg.request_id) is leg:  # else it ended meanwhile, and the id may be another's
                    self._fail(leg, EngineError(f"the model failed on a step: {error}"))
            return
        self._apply(plan, output)

    def _slice(self, item: Work) -> StepSlice:
        sequence, start, end = item.sequence, item.sequence.num_computed, item.sequence.num_computed + item.num_tokens
        sample = None
        if sequence.sampling is not None and end == len(sequence.tokens):
            prompt = sequence.tokens[: sequence.num_prompt]
            sample = SampleSpec(sequence.sampling, sequence.indices, prompt, sequence.output)
        return StepSlice(sequence.tokens[start:end], start, sequence.block_table, sample)

    def _apply(self, plan: Plan, output: StepOutput) -> None:
        self._scheduler.complete(plan)
        for item, samples in zip(plan.work, output.samples, strict=True):
            self._counters["prefill_tokens"] += item.num_tokens - bool(samples)
            self._counters["decode_tokens"] += len(samples)
            if item.sequence.status is Status.FINISHED:
                continue
            leg = self._legs[item.sequence.request_id]
            self._offer_chunks(leg, item.sequence)
            if samples:
                self._emit(leg, item.sequence, samples)
            elif item.sequence.num_left:
                continue
            elif item.sequence.sampling is None:
                self._end_prefill(leg)
            else:
                self._fail(leg, EngineError("the model's logits are not numbers; a wider model.dtype may help"))

    def _emit(self, leg: Leg, sequence: TokenSequence, samples: list[Sampled]) -> None:
        now = self._clock.now()
        leg.computed = now if leg.computed is None else leg.computed
        sequences = [sequence]
        for child, copy in self._scheduler.fork(sequence) if len(samples) > 1 else []:
            if copy is not None:
                self._runner.copy_block(*copy)
            sequences.append(child)
            leg.sequences.append(child)
        for drawing, sampled in zip(sequences, samples, strict=True):
            drawing.tokens.append(sampled.token_id)
            reason = self._stop_rule.reason(drawing)
            delta = TokenDelta(
                index=drawing.indices[0],
                token_ids=[sampled.token_id],
                logprobs=None if sampled.logprob is None else [sampled.logprob],
                finish_reason=reason,
                stop_token_id=sampled.token_id if reason is FinishReason.STOP else None,
                info=None if leg.info_sent else leg.info(now),
            )
            leg.info_sent = True
            leg.stream.put_nowait(delta)
            if reason is not None:
                self._scheduler.remove(drawing)
        leg.set_paused()
        if leg.finished:
            self._close(leg)

    # --- the store ----------------------------------------------------------------------------------------------

    def _start_load(self, leg: Leg, sequence: TokenSequence, now: float) -> None:
        assert self._port is not None
        leg.scheduled = now
        leg.load = LoadJob(self._port, sequence, leg.handoff)
        leg.load_task = self._tasks.create_task(self._guard(leg.load.run, "load"), name="engine-load")
        leg.load_task.add_done_callback(functools.partial(self._load_ended, sequence, leg.load))

    def _load_ended(self, sequence: TokenSequence, job: LoadJob, _task: asyncio.Task[None]) -> None:
        self._scheduler.load_ended(sequence, job.num_loaded)
        self._wake.set()

    def _start_save(self, leg: Leg, sequence: TokenSequence) -> None:
        """A prefill leg offers all its chunks, those found here too: the store may have lost them."""
        if self._port is None:
            return
        first = 0 if sequence.sampling is None else sequence.num_computed // self._chunk_tokens
        sequence.num_offered = first
        prompt_chunks = sequence.num_prompt // self._chunk_tokens
        leg.save = SaveJob(self._port, leg.prefer_segment, sequence.keys(prompt_chunks)[first:])
        leg.save_task = self._tasks.create_task(self._guard(leg.save.run, "save"), name="engine-save")
        leg.save_task.add_done_callback(functools.partial(self._save_ended, leg, leg.save))
        self._saves[leg.save_task] = leg.save
        self._offer_chunks(leg, sequence)

    def _save_ended(self, leg: Leg, job: SaveJob, task: asyncio.Task[None]) -> None:
        job.abandon()
        del self._saves[task]
        if leg.first.sampling is None and not leg.done.done():
            leg.done.set_result(None)
        self._wake.set()

    async def _guard(self, run: Callable[[], Awaitable[None]], what: str) -> None:
        """Run a job. What it has not done when it fails, the request goes without."""
        try:
            await run()
        except Exception:  # the boundary of a request with the store: never the request's failure
            self._counters[f"{what}_failed"] += 1
            _log.exception("event=%s_failed", what)

    def _offer_chunks(self, leg: Leg, sequence: TokenSequence) -> None:
        if leg.save is None:
            return
        per_chunk = self._blocks.blocks_per_chunk
        for chunk in chunks_to_save(sequence, save_output=self._options.save_output):
            leg.save.offer(sequence.key(chunk), sequence.block_table[chunk * per_chunk : (chunk + 1) * per_chunk])
            sequence.num_offered = chunk + 1

    def _end_prefill(self, leg: Leg) -> None:
        """All is computed; the leg ends when its chunks are saved."""
        leg.computed = self._clock.now()
        self._scheduler.remove(leg.first)
        if leg.save is not None:
            leg.save.close()
        elif not leg.done.done():
            leg.done.set_result(None)

    async def _count_stored(self, leg: Leg, usable: int) -> int:
        """Leading chunks that are complete in the store: ours, or another writer's of the same prefix."""
        if self._port is None or leg.save is None:
            return 0
        keys = leg.first.keys(usable)
        stored = leading(keys, set(leg.save.stored))
        if stored < usable:
            match = await self._port.store.match(keys, timeout_s=self._options.store_timeout_s)
            await self._port.store.release(match)
            stored = match.num_chunks
        return stored
