"""Lets requests in: at once while some node has room, else in turn; those that would come too late are told so.

A thin shell around FairQueue and Forecast: futures, timers and the clock. Invariants: nobody waits while the nodes have
room; a request leaves when its client does, and when its first token can no longer come in time; what a request does
to the nodes' load is counted in the step that lets it in.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvcore.clock import Clock
from kvcore.config.schema import RouterConfig
from kvcore.errors import RateLimitError
from router.admission.fair_queue import FairQueue, Waiter
from router.admission.forecast import Forecast, forecast
from router.admission.limits import AdmissionLimits
from router.admission.sharing import Order, SharedAdmission
from router.requests.records import RequestRecord
from router.requests.spec import AnswerRequest, RequestSpec
from router.routing.decision import Decision


class Opened(Protocol):
    """What comes of a request that got in."""

    def close(self) -> None:
        """Nobody wants it any more."""
        ...


T = TypeVar("T", bound=Opened)
Open = Callable[[Decision, float], T]
"""Opens a request: by this choice of nodes, after so many seconds of waiting."""


@dataclass(slots=True, eq=False)
class _Turn(Waiter):
    """`go`: lets it in. `spec`: by which nodes are chosen for it."""

    spec: RequestSpec | None = None
    go: Callable[[Decision], None] = lambda _: None


class Admission:
    """One a router. `choose`: what the policy chooses for a request among the nodes of now. `none_is_up`: whether there
    is none for any, and one may come: then those that wait go on waiting. `stopping`: nobody gets in any more, and
    those that wait are told so."""

    def __init__(
        self,
        choose: Callable[[RequestSpec], Decision],
        clock: Clock,
        config: RouterConfig,
        limits: AdmissionLimits = AdmissionLimits(),
        *,
        none_is_up: Callable[[], bool] = lambda: False,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        self._none_is_up, self._stopping = none_is_up, stopping
        self._choose, self._clock, self._config, self._limits = choose, clock, config, limits
        self._queue = FairQueue(limits.max_flows, limits.saved, limits.unknown_output)
        self._asked = False
        self._look_in_s = math.inf
        self._timer: asyncio.TimerHandle | None = None
        self.refused = Counter[str]()
        """By why: `late` when it came, `missed` while it waited, `full`."""
        self._shared: SharedAdmission | None = None
        self.on_admitted: list[Callable[[float], None]] = []
        """Called with the seconds that a request has waited."""

    def __len__(self) -> int:
        return len(self._queue)

    def __repr__(self) -> str:
        return f"<Admission {self._queue!r}, refused: {dict(self.refused)}>"

    async def admit(self, request: AnswerRequest, open_it: Open[T]) -> T:
        """What `open_it` returns, when the request's turn has come. Raises RateLimitError, and what `open_it` does."""
        first, arrived = request.specs[0], self._clock.now()
        decision = self._choose(first)
        if decision.route is None:
            return open_it(decision, 0.0)  # which says why
        tokens = sequences = 0
        for spec in request.specs:
            tokens += len(spec.prompt_token_ids)
            sequences += spec.sampling.n
        seen = forecast(decision, tokens, arrived, self._limits)
        order = (request.turn.rank, self._queue.start_of(request.turn.flow))
        if not self._queue and self._may_go(order, request.turn.flow, sequences, seen):
            self._queue.passed(request.turn.flow, self._cost(request, seen))
            try:
                return self._opened(open_it, decision, arrived)
            finally:
                self._tell_change()
        return await self._in_turn(request, seen, arrived, open_it)

    def go_by(self, config: RouterConfig) -> None:
        """These bounds hold from now on, also for those that wait, but for their time."""
        self._config = config
        self.wake()

    def share(self, shared: SharedAdmission) -> None:
        """With other routers over the same nodes: turns and places are then also theirs."""
        self._shared = shared
        shared.serve(self._queue, self.wake)

    def wake(self) -> None:
        """Some node may have room."""
        self._tell_change()
        if self._queue and not self._asked:
            self._asked = True
            asyncio.get_running_loop().call_soon(self._let_in)

    def ended(self, record: RequestRecord, asked: RequestSpec, _output: Sequence[int]) -> None:
        """A request has ended: how long its flow's answers are, each of its `n` by itself, is known better. An answer
        that its client cut short took what it has."""
        if record.state == "ok" or (record.state == "cancelled" and record.completion_tokens):
            self._queue.answered(asked.flow, record.completion_tokens / asked.sampling.n)

    async def _in_turn(self, request: AnswerRequest, seen: Forecast, arrived: float, open_it: Open[T]) -> T:
        """There are five ends:

        1. Too many wait, or the first token would come too late: it is refused now.
        2. Its turn comes: it is let in, and what opening it raises is raised here.
        3. Its turn does not come in time (another one of a lighter flow went before), or not within the time that a
           whole request may take: it is refused then.
        4. The client leaves while it waits: it leaves the queue.
        5. The client leaves in the moment after 2: what was opened is closed.
        """
        loop, allowed_s = asyncio.get_running_loop(), self._allowed_s(request, seen)
        opened: asyncio.Future[T] = loop.create_future()
        turn = self._turn(request, seen)
        self._queue.add(turn)
        if (refusal := self._refusal(turn, seen, allowed_s)) is not None:
            self._queue.leave(turn)
            raise refusal

        def go(decision: Decision) -> None:
            if opened.done():  # its client has just left
                return
            try:
                made = self._opened(open_it, decision, arrived)
            except Exception as error:  # request boundary: handed to the request that waits, and to no other
                opened.set_exception(error)
            else:
                opened.set_result(made)

        def miss() -> None:
            if not opened.done():
                self._queue.leave(turn)
                if (decision := self._choose(request.specs[0])).route is None:
                    go(decision)  # which says why
                    return
                self.refused["missed"] += 1
                all_s = seen.wait_s(*self._queue.total) + seen.own_s
                opened.set_exception(_too_late("its turn did not come in time for its first token", all_s - allowed_s))

        turn.go = go
        timer = loop.call_later(min(self._config.request_timeout_s, max(0.0, allowed_s - seen.own_s)), miss)
        self.wake()
        try:
            return await opened
        except asyncio.CancelledError:
            if opened.done() and not opened.cancelled() and opened.exception() is None:
                opened.result().close()
            raise
        finally:
            self._queue.leave(turn)
            self._tell_change()
            timer.cancel()

    def _let_in(self) -> None:
        """As many as there is room for, in turn. Each is load of its nodes before the next one is looked at. Looks
        again when some node will be nearly done, if nothing ends before."""
        self._asked, self._look_in_s = False, math.inf
        while (ready := self._ready() or self._ready(stays=True)) is not None:
            turn, decision = ready
            self._queue.take(turn)
            turn.go(decision)
            self._tell_change()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._look_in_s < math.inf:
            look_in_s = max(self._limits.least_look_s, self._look_in_s)
            self._timer = asyncio.get_running_loop().call_later(look_in_s, self.wake)

    def _ready(self, *, stays: bool = False, context: int | None = None) -> tuple[_Turn, Decision] | None:
        """Who gets in, and where it would go now; None: nobody waits, or there is no room. Whoever waits for a
        prefiller keeps nobody waiting who needs none, and for a node of a long context nobody who fits others."""
        turn = self._queue.next(stays=stays, context=context)
        if not isinstance(turn, _Turn) or turn.spec is None:
            return None
        decision, now = self._choose(turn.spec), self._clock.now()
        if self._stopping():
            return turn, decision  # opening it says so
        if decision.route is None and self._none_is_up():
            return None
        seen = None if decision.route is None else forecast(decision, turn.prompt_tokens, now, self._limits)
        if seen is not None and not self._may_go(turn.order[:2], turn.flow, turn.sequences, seen):
            look_in_s = seen.look_in_s if self._shared is None else seen.idle_in_s
            self._look_in_s = min(self._look_in_s, look_in_s or math.inf)
            shorter = [
                node.max_context
                for cut in decision.decoders.cuts
                for node in cut.before
                if node.max_context < turn.context
            ]
            return self._ready(stays=stays, context=max(shorter)) if shorter else None
        return turn, decision

    def _tell_change(self) -> None:
        if self._shared is not None:
            self._shared.changed()

    def _may_go(self, order: Order, flow: str, sequences: int, seen: Forecast) -> bool:
        """Whether there is room for it, and whoever else waits comes after it."""
        if self._shared is None:
            return seen.has_room
        has_room = seen.has_room or (seen.idle_in_s <= 0 and self._shared.has_share(flow, sequences))
        return has_room and self._shared.comes_first(order)

    def _opened(self, open_it: Open[T], decision: Decision, arrived: float) -> T:
        waited_s = self._clock.now() - arrived
        opened = open_it(decision, waited_s)
        for told in self.on_admitted:
            told(waited_s)
        return opened

    def _refusal(self, turn: Waiter, seen: Forecast, allowed_s: float) -> RateLimitError | None:
        expected_s = seen.wait_s(*self._queue.ahead_of(turn)) + seen.own_s
        if len(self._queue) > self._config.max_waiting:
            self.refused["full"] += 1
            return _too_late(f"{self._config.max_waiting} requests wait, as many as may", expected_s)
        if len(self._queue) > 1 and self._queue.prompt_tokens > self._limits.waiting_tokens:
            self.refused["full"] += 1
            return _too_late(f"prompts of {self._limits.waiting_tokens} tokens wait, as many as may", expected_s)
        late_s = expected_s - allowed_s * self._limits.margin
        if late_s <= 0 or seen.has_room:
            return None
        self.refused["late"] += 1
        return _too_late(
            f"its first token would come after {expected_s:.1f} s, and there are {allowed_s:.1f} s", late_s
        )

    def _allowed_s(self, request: AnswerRequest, seen: Forecast) -> float:
        """How long its first token may take. What the client itself says holds as it is."""
        turn = request.turn
        if turn.client_s is not None:
            return turn.client_s
        configured = turn.tenant_s if turn.tenant_s is not None else self._config.first_token_s
        return math.inf if configured is None else max(configured, self._limits.patience * seen.own_s)

    def _turn(self, request: AnswerRequest, seen: Forecast) -> _Turn:
        return _Turn(
            request.turn.flow,
            request.turn.rank,
            self._cost(request, seen),
            seen.tokens,
            sum(spec.sampling.n for spec in request.specs),
            stays=seen.stays,
            context=len(request.specs[0].prompt_token_ids) + request.specs[0].sampling.max_tokens,
            spec=request.specs[0],
            prompt_tokens=sum(len(spec.prompt_token_ids) for spec in request.specs),
            priority=request.turn.priority,
        )

    def _cost(self, request: AnswerRequest, seen: Forecast) -> float:
        flow, output = request.turn.flow, 0.0
        for spec in request.specs:
            output += spec.sampling.n * self._queue.output_of(flow, spec.sampling.max_tokens)
        return seen.tokens + self._limits.output_weight * output


def _too_late(why: str, retry_after_s: float) -> RateLimitError:
    return RateLimitError(f"the cluster has more to do than it can: {why}", retry_after_s=max(0.1, retry_after_s))
