"""One request under way: carries out what the ledger decides, with legs as tasks, timers, and outputs in order.

Owns every task of a request from `async with` to its end. Decides nothing that the ledger decides.
"""

import asyncio
import logging
import weakref
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Any, Self

from kvcore.errors import CancelledByPeerError, EngineError, KVFerryError
from nodeapi.messages import TokenDelta
from router.requests.completions import PromptScores
from router.requests.events import (
    Action,
    CancelLeg,
    ClientGone,
    DeadlinePassed,
    DecodeFailed,
    DeltaReceived,
    Emit,
    EndHandoff,
    Fail,
    Finish,
    LegStalled,
    PrefillFailed,
    RequestEvent,
    RequestTimer,
    StartDecode,
    StartPrefill,
    StartTimer,
    StopHit,
    TimerFired,
)
from router.requests.flow.end_tokens import EndTokens
from router.requests.flow.outputs import Outputs
from router.requests.flow.timers import RunningTimer
from router.requests.ledger import RequestMachine
from router.requests.legs import RequestLegs
from router.requests.prefill_half import Picker
from router.requests.records import LegRecord, record_of
from router.requests.services import RequestServices
from router.requests.spec import RequestSpec
from router.routing.decision import Decision

_log = logging.getLogger("router")
_DEADLINE, _GONE = DeadlinePassed(), ClientGone()
_FIRED = {timer: TimerFired(timer) for timer in RequestTimer}


class RequestRun:
    """One request under way: its legs' LegListener, and the executor of the ledger's actions.

    `opened`: where it is kept until it is entered; one that never is must be dropped, or its nodes keep its load.
    `waited_s`: so long ago the request came, and its time began.
    `running`: where it is kept between entering and leaving. Leaving the `async with` before the end means that the
    client has gone: every leg is cancelled and awaited.

    Nothing of it holds it but its legs' tasks, so that all of it is freed when it ends: what had to wait for a
    collection of garbage was a sixth of what a request cost, and others waited for that, too.
    """

    def __init__(
        self,
        services: RequestServices,
        spec: RequestSpec,
        decision: Decision,
        picker: Picker,
        *,
        opened: "set[RequestRun]",
        running: "set[RequestRun]",
        waited_s: float = 0.0,
    ) -> None:
        route = decision.route
        assert route is not None, "a run has a route"
        self._services = services
        self._route, self._decision = route, decision
        self._opened = opened
        self._running = running
        self.started_at = services.clock.now() - waited_s
        self.record = record_of(spec, decision, waited_s)
        self.outputs = Outputs(services.limits.max_unread)
        """What iterating this gives."""
        self._legs = RequestLegs(
            services,
            spec,
            weakref.proxy(self),
            self.record.legs,
            self.outputs,
            started_at=self.started_at,
            route=route,
            worth_waiting_s=decision.worth_waiting_s,
            before_handoff_s=decision.before_handoff_s,
        )
        self.rows, self.scores, self.flow, self.sequences = spec.rows, spec.scores, spec.flow, spec.sampling.n
        sampling = spec.sampling
        self.machine = RequestMachine(
            spec.request_id,
            picker,
            n=sampling.n,
            max_tokens=sampling.max_tokens,
            min_tokens=sampling.min_tokens,
            attempts=services.config.attempts,
            num_chunks=self._legs.num_chunks(route.decoder, route.prefiller),
            end_token_ids=EndTokens(services.cluster, route.decoder, sampling),
            logprobs=sampling.logprobs is not None,
            scores=None if (top := sampling.prompt_logprobs) is None else PromptScores(spec.prompt_token_ids, top),
            handoff=services.handoff,
            limits=services.limits,
        )
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._timers: dict[str, RunningTimer] = {}
        self._telling: str | None = None
        """The leg of which a delta is looked at just now."""
        opened.add(self)

    def __repr__(self) -> str:
        record, route = self.record, self._route
        legs = " ".join(sorted(self._tasks)) or "none"
        return (
            f"<RequestRun {record.id} {record.state} {route.prefiller or '-'}>{route.decoder}, legs: {legs}, "
            f"{self.machine.completion_tokens} tokens, {len(self.outputs)} unread>"
        )

    @property
    def approximate_tokens(self) -> int:
        """Of the prompt, reused where they are not exact: at most so many in any decode leg so far."""
        return self._legs.approximate_tokens

    @property
    def may_be_approximate(self) -> bool:
        """Whether some of it is, or no decode leg has said yet."""
        return self._legs.may_be_approximate

    def drop(self) -> None:
        """It will not be entered. Nothing comes of this if it was."""
        if self in self._opened:
            self._opened.discard(self)
            self._legs.drop_chosen()

    async def __aenter__(self) -> Self:
        self._opened.remove(self)
        self._services.log.open(self.record, self._decision)
        self._running.add(self)
        spent_s = self._services.clock.now() - self.started_at
        timeout_s = max(0.0, self._services.config.request_timeout_s - spent_s)
        self._timers["deadline"] = self._services.timers.start(self, _DEADLINE, timeout_s)
        self._carry_out(self.machine.start, self._route)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.outputs.take = None  # its reader holds this request
        if not self.machine.ended:
            self.tell(_GONE)
        self._close_record()
        self._running.discard(self)
        if isinstance(self.outputs.end, Finish):
            self._services.control.adopt(self._tasks.values())
        elif self._tasks:
            await asyncio.wait(list(self._tasks.values()), timeout=self._services.limits.control_timeout_s)

    def __aiter__(self) -> AsyncIterator[Emit]:
        """Outputs in order; ends when the request is complete, raises its error when it fails."""
        return self.outputs

    def stop(self, index: int, num_tokens: int) -> None:
        """A stop string was found in the text of this completion's first `num_tokens` tokens: it needs no more, and
        yields none. What failed after the last completion's end, unread yet, does not matter any more."""
        self.outputs.drop(index)
        self.tell(StopHit(index, num_tokens))
        if isinstance(self.outputs.end, Fail) and self.machine.complete:
            self.outputs.end = Finish()

    def cut(self, why: KVFerryError) -> None:
        """It may take no longer, whatever its own deadline."""
        self.tell(DeadlinePassed(why))

    def move_prefill(self, node: str, error: KVFerryError) -> None:
        """This node does not answer, and may be lost: a prefill leg on it fails by `error` if another prefiller is
        there to be tried. Where there is none it goes on, as the node may come to itself."""
        for leg in list(self.record.legs):
            task = self._tasks.get(leg.id) if leg.node == node else None
            if task is not None and not task.cancelling() and self.machine.prefill.could_move(leg.id):
                task.cancel()
                self._leg_failed(leg, error)

    def give_up(self, node: str, error: KVFerryError) -> None:
        """This node is lost, though no connection to it broke: fail every leg that needs it, so that each goes on
        elsewhere. A leg needs the node in one of three ways:

        1. It runs there: it fails by `error`.
        2. It is a decode leg elsewhere that waits for KV of this node.
        3. It is a prefill leg elsewhere that writes KV into this node. Such a leg fails last, when the ledger has
           already put the decode leg elsewhere, so that the next prefill leg writes for that decoder.

        Called again at each probe that the node does not answer: a leg that was given up before is left alone.
        """
        machine = self.machine
        for leg in sorted(self.record.legs, key=lambda leg: machine.prefill.saves_for(leg.id) == node):
            if leg.node == node:
                failure = error
            elif machine.fetches_from(leg.id) == node:
                failure = EngineError(f"waited for KV of node {node}, which is lost: {error.message}")
            elif machine.prefill.saves_for(leg.id) == node:
                failure = EngineError(f"wrote KV into node {node}, which is lost: {error.message}")
            else:
                continue
            task = self._tasks.get(leg.id)
            if task is None or task.cancelling():
                continue
            task.cancel()
            self._leg_failed(leg, failure, lost=True)

    # --- LegListener ---

    def tell(self, event: RequestEvent) -> bool:
        """An event happened: carry out what the ledger makes of it. Whether it makes anything of it."""
        return self._carry_out(self.machine.handle, event)

    def take(self, leg: str, delta: TokenDelta) -> bool:
        """See LegListener."""
        machine = self.machine
        self._telling = leg
        try:
            self._execute(machine.handle(DeltaReceived(leg, delta)))
        except Exception:  # see `_crash`
            self._crash()
            return False
        self._telling = None
        if not machine.runs(leg):
            self.outputs.deliver()
            if delta.finish_reason is None:  # it broke the protocol, or is of another model
                raise machine.last_error
            return False
        self.outputs.deliver()  # by which a stop string may be found
        return machine.runs(leg)

    def stalled(self, leg: LegRecord, error: KVFerryError) -> None:
        """See LegListener."""
        if self.tell(LegStalled(leg.id, error)):
            leg.error = f"{error.code}: {error.message}"

    def _crash(self) -> None:
        """The ledger has a bug, or what carries its actions out: some are lost, and what waits for them would wait for
        good. The request fails at once, every leg is cancelled, and whoever told it something goes on."""
        _log.exception("request_crashed id=%s", self.record.id)
        self.machine.ended = True
        for task in self._tasks.values():
            if task is not asyncio.current_task():
                task.cancel()  # its node is left by that
        if self.outputs.end is None:
            self._close(Fail(EngineError("internal error")))

    # --- actions ---

    def _carry_out(self, decide: Callable[[Any], list[Action]], what: object) -> bool:
        try:
            self._execute(actions := decide(what))
            self.outputs.deliver()
        except Exception:  # see `_crash`
            self._crash()
            return True
        return bool(actions)

    def _execute(self, actions: list[Action]) -> None:
        for action in actions:
            _CARRIED_OUT_BY[type(action)](self, action)

    def _start_timer(self, action: StartTimer) -> None:
        timers = self._services.timers
        if (running := self._timers.get(action.timer)) is not None:
            timers.cancel(running)
        self._timers[action.timer] = timers.start(self, _FIRED[action.timer], action.after_s)

    def _spawn(self, action: StartPrefill | StartDecode) -> None:
        leg = action.leg
        self._tasks[leg] = task = asyncio.get_running_loop().create_task(self._legs.start(action))
        task.add_done_callback(lambda done: self._leg_task_ended(leg, done))

    def _leg_task_ended(self, leg: str, task: asyncio.Task[None]) -> None:
        """A leg that failed by a bug of ours is a failed leg, logged as an error, not a request that hangs."""
        self._tasks.pop(leg, None)
        self._legs.let_go(leg)
        if task.cancelled() or (bug := task.exception()) is None:
            return
        _log.error("leg_crashed id=%s", leg, exc_info=bug)
        error = EngineError(f"internal error in leg {leg}")
        self.tell(PrefillFailed(leg, error))
        self.tell(DecodeFailed(leg, error))

    def _leg_failed(self, leg: LegRecord, failure: KVFerryError, *, lost: bool = False) -> None:
        leg.error = f"{failure.code}: {failure.message}"
        self.tell(PrefillFailed(leg.id, failure) if leg.kind == "prefill" else DecodeFailed(leg.id, failure, lost))

    def _end_handoff(self, action: EndHandoff) -> None:
        if not self.machine.prefill.saved_all:
            self._legs.computes_itself(action.leg)
        services, url = self._services, self._legs.url(action.node)
        timeout_s = services.limits.control_timeout_s
        services.control.send(services.client.end_handoff(url, action.leg, timeout_s=timeout_s))

    def _cancel(self, action: CancelLeg) -> None:
        task = self._tasks.get(action.leg)
        if task is not None and task is not asyncio.current_task() and action.leg != self._telling:
            task.cancel()
        services, url = self._services, self._legs.url(action.node)
        services.control.send(services.client.abort(url, action.leg, timeout_s=services.limits.control_timeout_s))

    def _emit(self, emit: Emit) -> None:
        if self.record.ttft_s is None and emit.token_ids:
            self.record.ttft_s = self._services.clock.now() - self.started_at
        self.outputs.add(emit)

    def _close(self, end: Finish | Fail) -> None:
        self._legs.drop_chosen()
        for timer in self._timers.values():
            self._services.timers.cancel(timer)
        self._timers.clear()
        self.record.total_s = self._services.clock.now() - self.started_at
        self.outputs.close(end)

    def _close_record(self) -> None:
        """With the last look at the outputs: until they have been read, a stop string may be found among them."""
        record, machine, end = self.record, self.machine, self.outputs.end
        record.cached_tokens, record.approximate_tokens = machine.cached_tokens, self.approximate_tokens
        record.completion_tokens = machine.completion_tokens - self.outputs.num_unread_tokens
        record.retries, record.retried_legs = len(machine.retries), machine.retries
        if isinstance(end, Fail):
            record.state = "cancelled" if isinstance(end.error, CancelledByPeerError) else "failed"
            record.error = f"{end.error.code}: {end.error.message}"
        else:
            record.state = "ok"
        self._services.log.close(record, self._legs.spec, machine.completions[0].tokens)


_CARRIED_OUT_BY: dict[type[Action], Callable[[RequestRun, Any], None]] = {
    Emit: RequestRun._emit,
    StartPrefill: RequestRun._spawn,
    StartDecode: RequestRun._spawn,
    EndHandoff: RequestRun._end_handoff,
    CancelLeg: RequestRun._cancel,
    StartTimer: RequestRun._start_timer,
    Finish: RequestRun._close,
    Fail: RequestRun._close,
}
"""What a request does for each action. A table, as a chain of cases is 0.2 µs a class that it is not."""
