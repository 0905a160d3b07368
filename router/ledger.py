"""The life of one request as a state machine: events in, actions out. No await, no clock, no socket, no text.

    event                     what comes of it (T: tokens so far)
    start(route)              StartPrefill if the route has one, StartDecode at the same time
    PrefillDone               legs not yet decoding: EndHandoff at once if chunks were declined, else after a moment
    PrefillFailed             another prefiller while a decode leg waits; none left: EndHandoff, the decoder computes
    Delta                     Emit; the last index's end: Finish (after PrefillDone or a moment: honest usage)
    DecodeFailed, T = 0       another decoder, the whole request anew (its prefill goes on; its chunks are in the store)
    DecodeFailed, T > 0       another decoder continues each unfinished index after its T tokens, by a leg of its own
    DecodeFailed for good     CancelLeg all, Fail
    StopHit                   the index has ended; its leg is cancelled once none of its indices is left
    ClientGone, Deadline      CancelLeg all, Fail
    TimerFired(RETRY)         no decoder was there: look again, failed ones included, until patience is at its end

Invariants (check_invariants): a request ends once; after that no leg runs; every token was emitted once, in order.
"""

from dataclasses import dataclass, field
from typing import Protocol

from engines.base import FinishReason, LegInfo, PrefillResult, TokenDelta
from kvcore.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    EngineError,
    KVFerryError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.types import Route
from router.request_events import (
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
    PrefillDone,
    PrefillFailed,
    StartDecode,
    StartPrefill,
    StartTimer,
    StopHit,
    Timer,
    TimerFired,
)

HANDOFF_GRACE_S = 0.25
"""After a prefill that stored everything, a decoder should find it by itself; else it is told to stop waiting."""
HANDOFF_LONGEST_S = 2.0
SETTLE_S = 1.0
"""How long the end of a request waits for the reply of a prefill that its decoder overtook."""
RETRY_PAUSE_S = 0.25
PATIENCE_S = 15.0
"""How long a request that was accepted waits for some decoder to come back."""


class Picker(Protocol):
    """Chooses replacements among the nodes usable at this moment. Pure as far as the machine is concerned."""

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        """Another prefiller for this decoder."""
        ...

    def decoder(self, exclude: frozenset[str]) -> str | None:
        """Another decoder."""
        ...


@dataclass(slots=True)
class _DecodeLeg:
    node: str
    index: int | None
    open: set[int]
    handoff: bool
    started: bool = False


@dataclass(slots=True)
class _Completion:
    tokens: list[int] = field(default_factory=list)
    finished: FinishReason | None = None
    tries: int = 0


class RequestMachine:
    """One request. Every method returns the actions to carry out, in order, before the next event."""

    def __init__(
        self,
        request_id: str,
        picker: Picker,
        *,
        n: int,
        max_tokens: int,
        attempts: int,
        num_chunks: int = 0,
        end_token_ids: frozenset[int] = frozenset(),
        min_tokens: int = 0,
        logprobs: bool = False,
    ) -> None:
        self._id = request_id
        self._picker = picker
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._end_token_ids = end_token_ids
        self._logprobs = logprobs
        self._attempts = attempts
        self._num_chunks = num_chunks
        self._completions = [_Completion() for _ in range(n)]
        self._decodes: dict[str, _DecodeLeg] = {}
        self._prefill: tuple[str, str] | None = None
        self._prefill_tries = 0
        self._legs = 0
        self._failed_prefillers: set[str] = set()
        self._failed_decoders: set[str] = set()
        self._homeless: set[int] = set()
        self._waited_s = 0.0
        self._handoff_pause_s = HANDOFF_GRACE_S
        self.last_error: KVFerryError = NodeUnavailableError("no decoder is ready")
        self.prefill_result: PrefillResult | None = None
        self.decode_info: LegInfo | None = None
        self.retries: list[tuple[str, str]] = []
        """(`prefill` or `decode`, code of the failure) of each leg that was tried again."""
        self.ended = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute: the lesser of both legs' counts, as a decoder also counts as cached
        what the prefiller had just computed for it."""
        decode = self.decode_info.cached_tokens if self.decode_info else 0
        return min(decode, self.prefill_result.cached_tokens) if self.prefill_result else decode

    @property
    def completion_tokens(self) -> int:
        """Tokens emitted, over all indices."""
        return sum(len(completion.tokens) for completion in self._completions)

    def runs(self, leg: str) -> bool:
        """Whether events of this decode leg still matter."""
        return leg in self._decodes

    def start(self, route: Route) -> list[Action]:
        """The first actions. Called once."""
        assert self._legs == 0, "a request starts once"
        actions: list[Action] = []
        if route.prefiller is not None:
            actions += self._start_prefill(route.prefiller, route.decoder)
        return actions + self._start_decodes(route.decoder, set(range(len(self._completions))))

    def handle(self, event: Event) -> list[Action]:
        """The actions that follow. Events of legs that have ended, and after the end, are ignored."""
        if self.ended:
            return []
        match event:
            case PrefillDone():
                return self._prefill_done(event)
            case PrefillFailed():
                return self._prefill_failed(event)
            case Delta():
                return self._delta(event)
            case DecodeFailed():
                return self._decode_failed(event.leg, event.error)
            case StopHit():
                return self._stop_hit(event.index)
            case TimerFired():
                return self._timer_fired(event.timer)
            case ClientGone():
                return self._fail(CancelledByPeerError("the client closed the connection"))
            case Deadline():
                if self._all_finished():  # only the prefill's reply was still waited for
                    return self._end(Finish())
                return self._fail(DeadlineExceededError("the request's time ran out"))

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        if self.ended:
            assert not self._decodes and self._prefill is None and not self._homeless
            return
        served = [index for leg in self._decodes.values() for index in leg.open]
        assert len(served) == len(set(served)), "an index is served by one leg"
        assert self._homeless.isdisjoint(served)
        unfinished = {i for i, completion in enumerate(self._completions) if completion.finished is None}
        assert unfinished <= self._homeless | set(served), "an unfinished index is served or waits for a decoder"
        assert all(len(completion.tokens) <= self._max_tokens for completion in self._completions)

    # --- prefill ---

    def _start_prefill(self, node: str, decoder: str) -> list[Action]:
        self._prefill_tries += 1
        self._prefill = (self._next_leg("p"), node)
        return [StartPrefill(self._prefill[0], node, decoder)]

    def _prefill_done(self, event: PrefillDone) -> list[Action]:
        if self._prefill is None or self._prefill[0] != event.leg:
            return []
        self._prefill = None
        self.prefill_result = event.result
        if self._all_finished():
            return self._finish()
        if event.result.stored_chunks < self._num_chunks:
            return self._end_handoffs()
        return [StartTimer(Timer.HANDOFF, HANDOFF_GRACE_S)] if self._waiting_legs() else []

    def _prefill_failed(self, event: PrefillFailed) -> list[Action]:
        if self._prefill is None or self._prefill[0] != event.leg:
            return []
        self._failed_prefillers.add(self._prefill[1])
        self._prefill = None
        if self._all_finished():
            return self._finish()
        waiting = self._waiting_legs()
        if waiting and event.error.retryable and self._prefill_tries < self._attempts:
            decoder = waiting[0][1].node
            node = self._picker.prefiller(decoder, frozenset(self._failed_prefillers))
            if node is not None:
                self.retries.append(("prefill", event.error.code))
                return self._start_prefill(node, decoder)
        return self._end_handoffs()

    def _waiting_legs(self) -> list[tuple[str, _DecodeLeg]]:
        return [(name, leg) for name, leg in self._decodes.items() if leg.handoff and not leg.started]

    def _end_handoffs(self) -> list[Action]:
        """Said again until the leg speaks: the word may reach a node before the leg itself, which ignores it then."""
        actions: list[Action] = [EndHandoff(name, leg.node) for name, leg in self._waiting_legs()]
        if actions:
            actions.append(StartTimer(Timer.HANDOFF, self._handoff_pause_s))
            self._handoff_pause_s = min(2 * self._handoff_pause_s, HANDOFF_LONGEST_S)
        return actions

    # --- decode ---

    def _start_decodes(self, node: str, indices: set[int]) -> list[Action]:
        for index in indices:
            self._completions[index].tries += 1
        handoff = self._prefill is not None
        everything = len(indices) == len(self._completions)
        if everything and (len(indices) == 1 or not self.completion_tokens):
            leg = self._next_leg("d")
            self._decodes[leg] = _DecodeLeg(node, None, set(indices), handoff)
            return [StartDecode(leg, node, handoff, None, tuple(self._completions[0].tokens))]
        actions: list[Action] = []
        for index in sorted(indices):
            leg = self._next_leg("d")
            self._decodes[leg] = _DecodeLeg(node, index, {index}, handoff)
            actions.append(StartDecode(leg, node, handoff, index, tuple(self._completions[index].tokens)))
        return actions

    def _delta(self, event: Delta) -> list[Action]:
        leg, delta = self._decodes.get(event.leg), event.delta
        if leg is None:
            return []
        if lie := self._lie(leg, delta):
            error = EngineError(f"node {leg.node} broke the protocol: {lie}")
            return [CancelLeg(event.leg, leg.node), *self._decode_failed(event.leg, error)]
        leg.started = True
        if delta.info is not None and self.decode_info is None:
            self.decode_info = delta.info
        index = delta.index if leg.index is None else leg.index
        completion = self._completions[index]
        reason = None if delta.finish_reason is FinishReason.ABORT else delta.finish_reason
        actions: list[Action] = []
        if completion.finished is None and (delta.token_ids or reason):
            completion.tokens += delta.token_ids
            completion.tries = 1  # of what is left: a long answer on a bad network goes on as long as it gets anywhere
            completion.finished = reason
            actions.append(Emit(index, delta.token_ids, delta.logprobs, reason, delta.stop_token_id))
        if delta.finish_reason is FinishReason.ABORT:
            gone = NodeUnavailableError(f"node {leg.node} gave the request up")
            return [*actions, CancelLeg(event.leg, leg.node), *self._decode_failed(event.leg, gone)]
        if reason is not None:
            leg.open.discard(index)
            if not leg.open:
                del self._decodes[event.leg]
            if self._all_finished():
                actions += self._finish()
        return actions

    def _lie(self, leg: _DecodeLeg, delta: TokenDelta) -> str | None:
        if delta.index not in (leg.open if leg.index is None else {0}):
            return f"a delta for index {delta.index}, which is not running"
        index = delta.index if leg.index is None else leg.index
        room = self._max_tokens - len(self._completions[index].tokens)
        if self._completions[index].finished is None and len(delta.token_ids) > room:
            return "more than max_tokens tokens"
        if self._logprobs and len(delta.logprobs or ()) != len(delta.token_ids):
            return "not one logprob a token"
        return None

    def _decode_failed(self, name: str, error: KVFerryError) -> list[Action]:
        leg = self._decodes.pop(name, None)
        if leg is None:
            return []
        if isinstance(error, CancelledByPeerError):  # somebody did, but it was not us
            error = NodeUnavailableError(f"node {leg.node} gave the request up: {error.message}")
        self._failed_decoders.add(leg.node)
        self.last_error = error
        actions: list[Action] = []
        lost: set[int] = set()
        for index in sorted(leg.open):
            completion = self._completions[index]
            if completion.finished is None and (reason := self._end_reached(completion.tokens)):
                completion.finished = reason
                actions.append(Emit(index, (), () if self._logprobs else None, reason))
            if completion.finished is None:
                lost.add(index)
        if not lost:
            return actions + (self._finish() if self._all_finished() else [])
        if not error.retryable:
            return actions + self._fail(error)
        self.retries.append(("decode", error.code))
        return actions + self._place(lost)

    def _end_reached(self, tokens: list[int]) -> FinishReason | None:
        """How a sequence would have ended whose leg died between its last token and its finish reason."""
        if tokens and tokens[-1] in self._end_token_ids and len(tokens) > self._min_tokens:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(tokens) >= self._max_tokens else None

    def _place(self, indices: set[int]) -> list[Action]:
        if any(self._completions[index].tries >= self._attempts for index in indices):
            return self._fail(self.last_error)
        node = self._picker.decoder(frozenset(self._failed_decoders))
        if node is not None:
            return self._start_decodes(node, indices)
        shed = isinstance(self.last_error, OverloadedError) and not self.completion_tokens
        if shed or self._waited_s >= PATIENCE_S:
            return self._fail(self.last_error)
        running = bool(self._homeless)
        self._homeless |= indices
        if running:
            return []
        self._waited_s += RETRY_PAUSE_S
        return [StartTimer(Timer.RETRY, RETRY_PAUSE_S)]

    def _stop_hit(self, index: int) -> list[Action]:
        completion = self._completions[index]
        if completion.finished is not None:
            return []
        completion.finished = FinishReason.STOP
        self._homeless.discard(index)
        actions: list[Action] = []
        for name, leg in list(self._decodes.items()):
            if index in leg.open and all(self._completions[i].finished is not None for i in leg.open):
                del self._decodes[name]
                actions.append(CancelLeg(name, leg.node))
        return actions + (self._finish() if self._all_finished() else [])

    # --- ends ---

    def _timer_fired(self, timer: Timer) -> list[Action]:
        if timer is Timer.HANDOFF:
            return self._end_handoffs() if self._prefill is None else []
        if timer is Timer.SETTLE:
            return self._end(Finish()) if self._all_finished() else []
        homeless, self._homeless = self._homeless, set()
        if not homeless:
            return []
        self._failed_decoders.clear()
        return self._place(homeless)

    def _all_finished(self) -> bool:
        return all(completion.finished is not None for completion in self._completions)

    def _finish(self) -> list[Action]:
        if self._prefill is not None:
            return [StartTimer(Timer.SETTLE, SETTLE_S)]
        return self._end(Finish())

    def _fail(self, error: KVFerryError) -> list[Action]:
        return self._end(Fail(error))

    def _end(self, last: Finish | Fail) -> list[Action]:
        actions: list[Action] = [CancelLeg(name, leg.node) for name, leg in self._decodes.items()]
        if self._prefill is not None:
            actions.append(CancelLeg(*self._prefill))
        self._decodes.clear()
        self._homeless.clear()
        self._prefill = None
        self.ended = True
        return [*actions, last]

    def _next_leg(self, kind: str) -> str:
        self._legs += 1
        return f"{self._id}.{kind}{self._legs}"
