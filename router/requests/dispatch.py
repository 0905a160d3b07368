"""Carries out the actions of request machines over a NodeClient: legs as tasks, timers, outputs in order.

Owns every task of a request from `open` to the end of its `async with`. Decides nothing that the ledger decides. No
thread and no clock but the injected one, so that a simulation runs it in virtual time.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import aclosing, suppress
from types import TracebackType
from typing import Self

from kvcore.chunk_keys import usable_chunks
from kvcore.clock import Clock
from kvcore.config.schema import HandoffKind, RouterConfig
from kvcore.errors import CancelledByPeerError, EngineError, KVFerryError, NodeUnavailableError, OverloadedError
from kvcore.telemetry import log_fields
from nodeapi.messages import FinishReason, GenerateRequest, Handoff, LegInfo, TokenDelta
from nodeapi.protocol import NodeClient
from router.nodes.cluster import Cluster
from router.nodes.vllm_requests import mooncake_decode_params
from router.requests.events import (
    Action,
    CancelLeg,
    ClientGone,
    Deadline,
    DecodeFailed,
    Delta,
    Emit,
    EndHandoff,
    Event,
    Fail,
    Finish,
    KVSource,
    PrefillDone,
    PrefillFailed,
    StartDecode,
    StartPrefill,
    StartTimer,
    StopHit,
    Timer,
    TimerFired,
)
from router.requests.ledger import RequestMachine
from router.requests.leg_requests import RequestSpec, generate_request, prefill_request
from router.requests.records import LegRecord, RequestLog, RequestRecord, route_record
from router.routing.decision import Decision
from router.routing.policy import RoutePolicy
from router.routing.views import RouteRequest

STALL_S = 30.0
"""A stream that has begun and then says nothing for this long is dead (an engine's step takes far less)."""
CONTROL_TIMEOUT_S = 2.0
TAIL_S = 0.5
"""How long the end of a stream may take after its last finish reason."""
MAX_UNREAD = 256
"""Deltas that wait for a slow client before the node is read no further."""
_log = logging.getLogger("router")


class Dispatcher:
    """Starts requests. One a router."""

    def __init__(
        self,
        *,
        config: RouterConfig,
        cluster: Cluster,
        policy: RoutePolicy,
        client: NodeClient,
        clock: Clock,
        log: RequestLog,
        handoff: HandoffKind = HandoffKind.KVFERRY,
    ) -> None:
        self.config = config
        self.handoff = handoff
        self.cluster = cluster
        self.policy = policy
        self.client = client
        self.clock = clock
        self.log = log
        self._turn = 0
        self._control: set[asyncio.Task[None]] = set()
        self.running: set[RequestRun] = set()
        """Entered and not left: they are told of nodes that are lost."""
        cluster.on_lost.append(self._node_lost)

    def open(self, spec: RequestSpec, *, beside: int = 0) -> "RequestRun":
        """Route a request. `async with` the result starts its legs; iterating yields its outputs.

        `beside`: how many others were opened that are not yet entered. Raises OverloadedError at `max_requests`,
        NodeUnavailableError when no decoder is ready.
        """
        if self.log.in_flight + beside >= self.config.max_requests:
            raise OverloadedError(f"{self.log.in_flight} requests are under way; the router takes no more at a time")
        self._turn += 1
        decision = self.choose(spec, self._turn)
        if decision.route is None:
            raise NodeUnavailableError(decision.why_no_decoder())
        return RequestRun(self, spec, decision, self._turn)

    def choose(
        self, spec: RequestSpec, turn: int, *, exclude: frozenset[str] = frozenset(), decoder: str | None = None
    ) -> Decision:
        """What the policy chooses among the nodes of now. `decoder`: only another prefiller for it is wanted."""
        view = self.cluster.view()
        prompt = spec.prompt_token_ids
        request = RouteRequest(
            prompt_tokens=len(prompt),
            completion_tokens=spec.sampling.max_tokens,
            min_prefill_tokens=0 if decoder else self.config.min_prefill_tokens,
            turn=turn,
            hits=self.cluster.hits(view, prompt, spec.cache_salt),
            exclude=exclude,
            decoder=decoder,
        )
        return self.policy.choose(request, view)

    def control(self, call: Coroutine[object, object, None]) -> None:
        """Send an abort or the end of a handoff beside the requests; it has its own deadline and may fail."""
        self.adopt([asyncio.create_task(_quietly(call))])

    def adopt(self, tasks: Iterable[asyncio.Task[None]]) -> None:
        """Keep tasks that end by themselves within a bound: control calls, the last bytes of finished legs."""
        for task in tasks:
            self._control.add(task)
            task.add_done_callback(self._control.discard)

    async def aclose(self) -> None:
        """Wait for control calls under way (each is bounded)."""
        if self._control:
            await asyncio.wait(self._control, timeout=CONTROL_TIMEOUT_S)
        for task in list(self._control):
            task.cancel()

    def _node_lost(self, node: str, error: KVFerryError) -> None:
        for run in list(self.running):
            run.give_up(node, error)


async def _quietly(call: Coroutine[object, object, None]) -> None:
    try:
        await call
    except KVFerryError as error:
        log_fields(_log, logging.DEBUG, "control_call_failed", code=error.code, error=error.message)


class RequestRun:
    """One request under way: the ledger's Picker, and the executor of its actions.

    Leaving the `async with` before the end means that the client has gone: every leg is cancelled and awaited.
    """

    def __init__(self, dispatcher: Dispatcher, spec: RequestSpec, decision: Decision, turn: int) -> None:
        route = decision.route
        assert route is not None, "a run has a route"
        self._dispatcher = dispatcher
        self._spec = spec
        self._route = route
        self._turn = turn
        self._started_at = dispatcher.clock.now()
        sampling = spec.sampling
        ends = frozenset(sampling.stop_token_ids)
        if not sampling.ignore_eos:
            ends |= dispatcher.cluster.eos_token_ids(route.decoder)
        self.machine = RequestMachine(
            spec.request_id,
            self,
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            attempts=dispatcher.config.attempts,
            num_chunks=self._num_chunks(route.decoder),
            end_token_ids=ends,
            logprobs=sampling.logprobs is not None,
            handoff=dispatcher.handoff,
        )
        self.record = RequestRecord(
            id=spec.request_id,
            client_request_id=spec.client_request_id,
            prompt_tokens=len(spec.prompt_token_ids),
            route=route_record(decision),
            legs=[],
        )
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._unread: deque[Emit] = deque()
        self._changed = asyncio.Event()
        self._drained = asyncio.Event()
        self._drained.set()
        self._end: Finish | Fail | None = None

    async def __aenter__(self) -> Self:
        self._dispatcher.log.open(self.record)
        self._dispatcher.running.add(self)
        loop = asyncio.get_running_loop()
        timeout_s = self._dispatcher.config.request_timeout_s
        self._timers["deadline"] = loop.call_later(timeout_s, self._apply, Deadline())
        self._carry_out(self.machine.start(self._route))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._apply(ClientGone())
        self._dispatcher.running.discard(self)
        if isinstance(self._end, Finish):
            self._dispatcher.adopt(self._tasks.values())
        elif self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=CONTROL_TIMEOUT_S)

    async def __aiter__(self) -> AsyncIterator[Emit]:
        """Outputs in order; ends when the request is complete, raises its error when it fails."""
        while True:
            while self._unread:
                emit = self._unread.popleft()
                if len(self._unread) < MAX_UNREAD:
                    self._drained.set()
                yield emit
            if self._end is not None:
                if isinstance(self._end, Fail):
                    raise self._end.error
                return
            self._changed.clear()
            await self._changed.wait()

    def stop(self, index: int) -> None:
        """A stop string was found in this completion: it needs no more tokens, and yields none."""
        self._apply(StopHit(index))
        self._unread = deque(emit for emit in self._unread if emit.index != index)

    def give_up(self, node: str, error: KVFerryError) -> None:
        """This node is lost, and each leg on it, waiting for its KV or writing KV into it, though nothing broke off: go
        on elsewhere. The writing one is the last: by then its successor knows the next decoder."""
        starved: KVFerryError = EngineError(f"waited for KV of node {node}, which is lost: {error.message}")
        stuck: KVFerryError = EngineError(f"wrote KV into node {node}, which is lost: {error.message}")
        for leg in sorted(self.record.legs, key=lambda leg: self.machine.saves_for(leg.id) == node):
            failure: KVFerryError | None = None
            if leg.node == node:
                failure = error
            elif self.machine.fetches_from(leg.id) == node:
                failure = starved
            elif self.machine.saves_for(leg.id) == node:
                failure = stuck
            task = self._tasks.get(leg.id)
            if failure is None or task is None or task.cancelling():
                continue
            task.cancel()
            leg.error = f"{failure.code}: {failure.message}"
            self._apply(PrefillFailed(leg.id, failure) if leg.kind == "prefill" else DecodeFailed(leg.id, failure))

    # --- Picker ---

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        """See ledger.Picker."""
        route = self._dispatcher.choose(self._spec, self._turn, exclude=exclude, decoder=decoder).route
        return route.prefiller if route else None

    def decoder(self, exclude: frozenset[str]) -> str | None:
        """See ledger.Picker."""
        route = self._dispatcher.choose(self._spec, self._turn, exclude=exclude).route
        return route.decoder if route else None

    # --- events and actions ---

    def _apply(self, event: Event) -> None:
        self._carry_out(self.machine.handle(event))

    def _carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            match action:
                case StartPrefill():
                    self._spawn(action.leg, self._prefill_leg(action))
                case StartDecode():
                    self._spawn(action.leg, self._decode_leg(action))
                case EndHandoff():
                    url = self._url(action.node)
                    client = self._dispatcher.client
                    self._dispatcher.control(client.end_handoff(url, action.leg, timeout_s=CONTROL_TIMEOUT_S))
                case CancelLeg():
                    self._cancel(action)
                case Emit():
                    self._emit(action)
                case StartTimer():
                    loop = asyncio.get_running_loop()
                    if (running := self._timers.get(action.timer)) is not None:
                        running.cancel()
                    self._timers[action.timer] = loop.call_later(action.after_s, self._fired, action.timer)
                case Finish() | Fail():
                    self._close(action)

    def _fired(self, timer: Timer) -> None:
        self._apply(TimerFired(timer))

    def _spawn(self, leg: str, body: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(body)
        self._tasks[leg] = task
        task.add_done_callback(lambda done: self._leg_task_ended(leg, done))

    def _leg_task_ended(self, leg: str, task: asyncio.Task[None]) -> None:
        """A leg that failed by a bug of ours is a failed leg, said loudly, not a request that hangs."""
        self._tasks.pop(leg, None)
        if task.cancelled() or (bug := task.exception()) is None:
            return
        _log.error("leg_crashed id=%s", leg, exc_info=bug)
        error = EngineError(f"internal error in leg {leg}")
        self._apply(PrefillFailed(leg, error))
        self._apply(DecodeFailed(leg, error))

    def _cancel(self, action: CancelLeg) -> None:
        task = self._tasks.get(action.leg)
        if task is not None and task is not asyncio.current_task():
            task.cancel()
        abort = self._dispatcher.client.abort(self._url(action.node), action.leg, timeout_s=CONTROL_TIMEOUT_S)
        self._dispatcher.control(abort)

    def _emit(self, emit: Emit) -> None:
        if self.record.ttft_s is None and emit.token_ids:
            self.record.ttft_s = self._dispatcher.clock.now() - self._started_at
        self._unread.append(emit)
        if len(self._unread) >= MAX_UNREAD:
            self._drained.clear()
        self._changed.set()

    def _close(self, end: Finish | Fail) -> None:
        self._end = end
        record = self.record
        for timer in self._timers.values():
            timer.cancel()
        record.total_s = self._dispatcher.clock.now() - self._started_at
        record.cached_tokens = self.machine.cached_tokens
        record.completion_tokens = self.machine.completion_tokens
        record.retries, record.retried_legs = len(self.machine.retries), self.machine.retries
        if isinstance(end, Finish):
            record.state = "ok"
        else:
            record.state = "cancelled" if isinstance(end.error, CancelledByPeerError) else "failed"
            record.error = f"{end.error.code}: {end.error.message}"
        self._dispatcher.log.close(record)
        self._changed.set()
        self._drained.set()

    # --- legs ---

    async def _prefill_leg(self, action: StartPrefill) -> None:
        dispatcher, spec = self._dispatcher, self._spec
        leg = LegRecord(id=action.leg, node=action.node, kind="prefill")
        self.record.legs.append(leg)
        tokens = len(spec.prompt_token_ids) - self._route.expected_cached_tokens
        decoder = dispatcher.cluster.nodes.get(action.decoder)
        timeout_s = min(dispatcher.config.prefill_timeout_s, self._remaining_s())
        request = prefill_request(spec, action, decoder.segment_id if decoder else None, timeout_s)
        dispatcher.cluster.leg_started(action.node, sequences=0, prefill_tokens=tokens)
        ok, failure = False, None
        try:
            result = await dispatcher.client.prefill(self._url(action.node), request, timeout_s=timeout_s)
            ok = True
        except KVFerryError as error:
            failure = error
        finally:
            dispatcher.cluster.leg_ended(action.node, sequences=0, prefill_tokens=tokens, ok=ok, error=failure)
        if failure is not None:
            leg.error = f"{failure.code}: {failure.message}"
            self._apply(PrefillFailed(action.leg, failure))
            return
        leg.cached_tokens, leg.computed_tokens = result.cached_tokens, result.computed_tokens
        leg.moved, leg.timings = result.moved, result.timings
        self._apply(PrefillDone(action.leg, result))

    async def _decode_leg(self, action: StartDecode) -> None:
        cluster = self._dispatcher.cluster
        leg = LegRecord(id=action.leg, node=action.node, kind="decode")
        self.record.legs.append(leg)
        request = self._generate_request(action)
        sequences = request.sampling.n
        cluster.leg_started(action.node, sequences=sequences, prefill_tokens=0)
        failure: KVFerryError | None = None
        ok = False
        try:
            ok = await self._read(action, request, leg)
            if not ok:
                failure = NodeUnavailableError(f"node {action.node} ended its stream without a finish reason")
        except KVFerryError as error:
            failure = error
        finally:
            in_vain = isinstance(failure, EngineError) and self.machine.fetches_from(action.leg) is not None
            blame = None if in_vain else failure  # its prefiller may have wronged it, nobody here can tell
            cluster.leg_ended(action.node, sequences=sequences, prefill_tokens=0, ok=ok, error=blame)
        if failure is not None:
            leg.error = f"{failure.code}: {failure.message}"
            self._apply(DecodeFailed(action.leg, failure))

    async def _read(self, action: StartDecode, request: GenerateRequest, leg: LegRecord) -> bool:
        """Feed deltas until each index has its finish reason, or none is wanted. False: the stream ended before."""
        client = self._dispatcher.client
        patience_s = min(2 * self._dispatcher.config.prefill_timeout_s, self._remaining_s())
        missing = request.sampling.n
        first = client.generate(self._url(action.node), request, timeout_s=max(patience_s, STALL_S))
        begun = False
        async with aclosing(first) as deltas:
            while missing and self.machine.runs(action.leg):
                try:
                    async with asyncio.timeout(STALL_S if begun else patience_s):
                        delta = await anext(deltas, None)
                except TimeoutError as error:
                    raise NodeUnavailableError(f"node {action.node} has gone silent") from error
                if delta is None:
                    return False
                begun = True
                missing -= delta.finish_reason is not None
                self._note(leg, delta.info)
                await self._take(action, delta)
            # Read on to the stream's end, so that its connection is kept: a new one costs as much as the request.
            with suppress(TimeoutError, KVFerryError):
                async with asyncio.timeout(TAIL_S):
                    await anext(deltas, None)
        return True

    async def _take(self, action: StartDecode, delta: TokenDelta) -> None:
        if delta.finish_reason is FinishReason.ABORT:
            raise NodeUnavailableError(f"node {action.node} gave the request up")
        self._apply(Delta(action.leg, delta))
        if not self.machine.runs(action.leg) and delta.finish_reason is None:
            raise EngineError(f"node {action.node} broke the protocol: {self.machine.last_error.message}")
        await self._drained.wait()

    def _note(self, leg: LegRecord, info: LegInfo | None) -> None:
        if info is not None:
            leg.cached_tokens, leg.computed_tokens = info.cached_tokens, info.computed_tokens
            leg.moved, leg.timings = info.moved, info.timings

    def _generate_request(self, action: StartDecode) -> GenerateRequest:
        remaining_s, handoff = self._remaining_s(), None
        if action.handoff:
            wait_s = min(self._dispatcher.config.prefill_timeout_s, remaining_s)
            handoff = Handoff(num_chunks=self._num_chunks(action.node), wait_s=wait_s)
        return generate_request(self._spec, action, handoff, remaining_s, self._handoff_params(action.source))

    def _handoff_params(self, source: KVSource | None) -> bytes:
        """What nixl's prefill leg answered; mooncake's decode leg is told of the prefill leg that runs beside it. Empty
        if its prefiller is no longer known: the decoder computes then."""
        if source is None or source.params:
            return source.params if source else b""
        node = self._dispatcher.cluster.nodes.get(source.node)
        peer = node.report.engine.kv_peer if node and node.report and node.report.engine else {}
        return mooncake_decode_params(peer, source.leg) if peer else b""

    def _num_chunks(self, decoder: str) -> int:
        node = self._dispatcher.cluster.nodes.get(decoder)
        if node is None or node.report is None or node.report.engine is None:
            return 0
        return usable_chunks(len(self._spec.prompt_token_ids), node.report.engine.kv_spec.chunk_tokens)

    def _remaining_s(self) -> float:
        spent_s = self._dispatcher.clock.now() - self._started_at
        return max(0.001, self._dispatcher.config.request_timeout_s - spent_s)

    def _url(self, node_id: str) -> str:
        node = self._dispatcher.cluster.nodes.get(node_id)
        return node.url if node else "http://127.0.0.1:9"
