"""The life of one request as a state machine: events in, actions out. No await, no clock, no socket, no text.

    event                     what comes of it (T: tokens so far)
    start(route)              StartPrefill if the route has one, StartDecode at the same time
    PrefillDone               legs not yet decoding: EndHandoff at once if chunks were declined, else after a moment
    PrefillFailed             another prefiller while a decode leg waits; none left: EndHandoff, the decoder computes
    DeltaReceived             Emit; the last index's end: Finish (after PrefillDone or a moment: honest usage)
    DecodeFailed, T = 0       another decoder, the whole request anew (its prefill goes on; its chunks are in the store)
    DecodeFailed, T > 0       another decoder continues each unfinished index after its T tokens, by a leg of its own
    DecodeFailed for good     CancelLeg all, Fail
    StopHit                   the index has ended; its leg is cancelled once none of its indices is left
    ClientGone, DeadlinePassed  CancelLeg all, Fail
    TimerFired(RETRY)         no decoder was there: look again, failed ones included, until patience is at its end

Where vLLM's connectors hand the KV over (`handoff`), one sequence of one decode leg fetches it from the prefiller,
once, and cannot be told that it will not come. So there the first index goes ahead and the others follow it into the
decoder's own prefix cache; a leg that is tried again computes by itself; nixl's decode legs start when the prefill has
ended, with what it answered; mooncake's start at the same time, and anew when it fails.

Invariants (check_invariants): a request ends once; after that no leg runs; every token was emitted once, in order.
"""

from typing import Protocol

from kvcore.config.schema import HandoffKind
from kvcore.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    EngineError,
    KVFerryError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.types import Route
from nodeapi.messages import FinishReason, LegInfo, PrefillResult, TokenDelta
from router.requests.completions import Completion, DecodeLeg
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
    KVSource,
    PrefillDone,
    PrefillFailed,
    RequestEvent,
    RequestTimer,
    StartDecode,
    StartPrefill,
    StartTimer,
    StopHit,
    TimerFired,
)
from router.requests.limits import RequestLimits


class Picker(Protocol):
    """Chooses replacements among the nodes usable at this moment. Pure as far as the machine is concerned."""

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        """Another prefiller for this decoder."""
        ...

    def decoder(self, exclude: frozenset[str]) -> str | None:
        """Another decoder."""
        ...


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
        handoff: HandoffKind = HandoffKind.KVFERRY,
        limits: RequestLimits = RequestLimits(),
    ) -> None:
        self._kind = handoff
        self._limits = limits
        self._id = request_id
        self._picker = picker
        self._max_tokens = max_tokens
        self._min_tokens = min_tokens
        self._end_token_ids = end_token_ids
        self._logprobs = logprobs
        self._attempts = attempts
        self._num_chunks = num_chunks
        self._completions = [Completion() for _ in range(n)]
        self._decodes: dict[str, DecodeLeg] = {}
        self._prefill: tuple[str, str] | None = None
        self._prefill_for = ""
        """The decoder that the last prefill leg was started for."""
        self._prefill_tries = 0
        self._held: str | None = None
        """The decoder, while no decode leg starts before the prefill leg has ended."""
        self._legs = 0
        self._failed_prefillers: set[str] = set()
        self._failed_decoders: set[str] = set()
        self._homeless: set[int] = set()
        self._waited_s = 0.0
        self._handoff_pause_s = limits.handoff_grace_s
        self.last_error: KVFerryError = NodeUnavailableError("no decoder is ready")
        self.prefill_result: PrefillResult | None = None
        self.decode_info: LegInfo | None = None
        self.retries: list[tuple[str, str]] = []
        """(`prefill` or `decode`, code of the failure) of each leg that was tried again."""
        self.ended = False

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute: the lesser of both legs' counts, as a decoder also counts as cached
        what the prefiller had just computed for it. What a leg does not say does not count."""
        told = [leg.cached_tokens for leg in (self.prefill_result, self.decode_info) if leg is not None]
        return min(told, default=0)

    @property
    def completion_tokens(self) -> int:
        """Tokens emitted, over all indices."""
        return sum(len(completion.tokens) for completion in self._completions)

    def runs(self, leg: str) -> bool:
        """Whether events of this decode leg still matter."""
        return leg in self._decodes

    def fetches_from(self, leg: str) -> str | None:
        """The prefiller whose KV this decode leg may still be waiting for."""
        found = self._decodes.get(leg)
        return found.source.node if found is not None and found.source is not None and found.fetches else None

    def saves_for(self, leg: str) -> str | None:
        """The decoder into whose segment this prefill leg writes first, while it runs."""
        running = self._prefill is not None and self._prefill[0] == leg and self._kind is HandoffKind.KVFERRY
        return self._prefill_for if running else None

    def start(self, route: Route) -> list[Action]:
        """The first actions. Called once."""
        assert self._legs == 0, "a request starts once"
        if route.prefiller is None:
            return self._start_decodes(route.decoder, self._unfinished())
        actions = self._start_prefill(route.prefiller, route.decoder)
        if self._kind is HandoffKind.NIXL:
            self._held = route.decoder
            return actions
        return actions + self._start_decodes(route.decoder, self._unfinished(), self._running_source())

    def handle(self, event: RequestEvent) -> list[Action]:
        """The actions that follow. Events of legs that have ended, and after the end, are ignored."""
        if self.ended:
            return []
        match event:
            case PrefillDone():
                return self._prefill_done(event)
            case PrefillFailed():
                return self._prefill_failed(event)
            case DeltaReceived():
                return self._delta(event)
            case DecodeFailed():
                return self._decode_failed(event.leg, event.error)
            case StopHit():
                return self._stop_hit(event.index)
            case TimerFired():
                return self._timer_fired(event.timer)
            case ClientGone():
                return self._fail(CancelledByPeerError("the client closed the connection"))
            case DeadlinePassed():
                if self._all_finished():  # only the prefill's reply was still waited for
                    return self._end(Finish())
                return self._fail(DeadlineExceededError("the request's time ran out"))

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        if self.ended:
            assert not self._decodes and self._prefill is None and not self._homeless and self._held is None
            return
        if self._held is not None:
            assert not self._decodes and not self._homeless and self._prefill is not None, "held for a prefill leg"
            return
        served = [index for leg in self._decodes.values() for index in leg.open | leg.followers]
        assert len(served) == len(set(served)), "an index is served by one leg"
        assert self._homeless.isdisjoint(served)
        assert self._unfinished() <= self._homeless | set(served), (
            "an unfinished index is served or waits for a decoder"
        )
        assert all(len(completion.tokens) <= self._max_tokens for completion in self._completions)

    # --- prefill ---

    def _start_prefill(self, node: str, decoder: str) -> list[Action]:
        self._prefill_tries += 1
        self._prefill, self._prefill_for = (self._next_leg("p"), node), decoder
        return [StartPrefill(*self._prefill, decoder)]

    def _running_source(self) -> KVSource | None:
        """The running prefill leg, where a decode leg is told of it."""
        return KVSource(*self._prefill) if self._prefill and self._kind is HandoffKind.MOONCAKE else None

    def _prefill_done(self, event: PrefillDone) -> list[Action]:
        if self._prefill is None or self._prefill[0] != event.leg:
            return []
        leg, node = self._prefill
        self._prefill = None
        self.prefill_result = event.result
        if self._all_finished():
            return self._finish()
        if self._held is not None:
            params = event.result.handoff_params
            return self._release(KVSource(leg, node, params) if params else None)
        if self._kind is HandoffKind.MOONCAKE:
            return []
        if event.result.stored_chunks < self._num_chunks:
            return self._end_handoffs()
        return [StartTimer(RequestTimer.HANDOFF, self._limits.handoff_grace_s)] if self._waiting_legs() else []

    def _prefill_failed(self, event: PrefillFailed) -> list[Action]:
        if self._prefill is None or self._prefill[0] != event.leg:
            return []
        self._failed_prefillers.add(self._prefill[1])
        self._prefill = None
        if self._all_finished():
            return self._finish()
        decoder = self._held or next((leg.node for _, leg in self._waiting_legs()), None)
        again: list[Action] = []
        if decoder is not None and event.error.retryable and self._prefill_tries < self._attempts:
            node = self._picker.prefiller(decoder, frozenset(self._failed_prefillers))
            if node is not None:
                self.retries.append(("prefill", event.error.code))
                again = self._start_prefill(node, decoder)
        if self._kind is HandoffKind.MOONCAKE:
            return again + self._start_anew()
        if again:
            return again
        return self._end_handoffs() if self._held is None else self._release(None)

    def _release(self, source: KVSource | None) -> list[Action]:
        node, self._held = self._held, None
        assert node is not None
        return self._start_decodes(node, self._unfinished(), source)

    def _start_anew(self) -> list[Action]:
        """The legs that would wait for KV of a prefill leg that failed, with that of the next, or without."""
        actions: list[Action] = []
        for name, leg in self._waiting_legs():
            del self._decodes[name]
            for index in leg.open:
                self._completions[index].tries -= 1  # it did not fail
            actions.append(CancelLeg(name, leg.node))
            actions += self._start_decodes(leg.node, leg.open | leg.followers, self._running_source())
        return actions

    def _waiting_legs(self) -> list[tuple[str, DecodeLeg]]:
        return [(name, leg) for name, leg in self._decodes.items() if leg.waits]

    def _end_handoffs(self) -> list[Action]:
        """Said again until the leg speaks: the word may reach a node before the leg itself, which ignores it then."""
        actions: list[Action] = [EndHandoff(name, leg.node) for name, leg in self._waiting_legs()]
        if actions:
            actions.append(StartTimer(RequestTimer.HANDOFF, self._handoff_pause_s))
            self._handoff_pause_s = min(2 * self._handoff_pause_s, self._limits.handoff_longest_s)
        return actions

    # --- decode ---

    def _start_decodes(self, node: str, indices: set[int], source: KVSource | None = None) -> list[Action]:
        everything = len(indices) == len(self._completions)
        if everything and (len(indices) == 1 or not (self.completion_tokens or source)):
            return [self._start_decode(node, None, indices, source)]
        first, *others = sorted(indices)
        if source is None:
            return [self._start_decode(node, index, {index}) for index in (first, *others)]
        start = self._start_decode(node, first, {first}, source)
        self._decodes[start.leg].followers.update(others)
        return [start]

    def _start_decode(
        self, node: str, index: int | None, indices: set[int], source: KVSource | None = None
    ) -> StartDecode:
        for each in indices:
            self._completions[each].tries += 1
        leg = self._next_leg("d")
        handoff = self._prefill is not None and self._kind is HandoffKind.KVFERRY
        self._decodes[leg] = DecodeLeg(node, index, set(indices), handoff, source)
        return StartDecode(leg, node, handoff, index, tuple(self._completions[index or 0].tokens), source)

    def _delta(self, event: DeltaReceived) -> list[Action]:
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
        if leg.followers:
            actions += self._start_decodes(leg.node, leg.followers)
            leg.followers = set()
        if reason is not None:
            leg.open.discard(index)
            if not leg.open:
                del self._decodes[event.leg]
            if self._all_finished():
                actions += self._finish()
        return actions

    def _lie(self, leg: DecodeLeg, delta: TokenDelta) -> str | None:
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
        if not (leg.fetches and isinstance(error, EngineError)):  # else it may be its prefiller's doing
            self._failed_decoders.add(leg.node)
        self.last_error = error
        actions: list[Action] = []
        lost: set[int] = set()
        for index in sorted(leg.open | leg.followers):
            completion = self._completions[index]
            reached = completion.end_reached(self._max_tokens, self._min_tokens, self._end_token_ids)
            if completion.finished is None and reached:
                completion.finished = reached
                actions.append(Emit(index, (), () if self._logprobs else None, reached))
            if completion.finished is None:
                lost.add(index)
        if not lost:
            return actions + (self._finish() if self._all_finished() else [])
        if not error.retryable:
            return actions + self._fail(error)
        self.retries.append(("decode", error.code))
        if leg.fetches and self._prefill is not None:  # for this leg alone
            actions.append(CancelLeg(*self._prefill))
            self._prefill = None
        return actions + self._place(lost)

    def _place(self, indices: set[int]) -> list[Action]:
        if any(self._completions[index].tries >= self._attempts for index in indices):
            return self._fail(self.last_error)
        node = self._picker.decoder(frozenset(self._failed_decoders))
        if node is not None:
            return self._start_decodes(node, indices)
        shed = isinstance(self.last_error, OverloadedError) and not self.completion_tokens
        if shed or self._waited_s >= self._limits.patience_s:
            return self._fail(self.last_error)
        running = bool(self._homeless)
        self._homeless |= indices
        if running:
            return []
        self._waited_s += self._limits.retry_pause_s
        return [StartTimer(RequestTimer.RETRY, self._limits.retry_pause_s)]

    def _stop_hit(self, index: int) -> list[Action]:
        completion = self._completions[index]
        if completion.finished is not None:
            return []
        completion.finished = FinishReason.STOP
        self._homeless.discard(index)
        actions: list[Action] = []
        for name, leg in list(self._decodes.items()):
            leg.followers.discard(index)
            if index in leg.open and all(self._completions[i].finished is not None for i in leg.open):
                del self._decodes[name]
                actions.append(CancelLeg(name, leg.node))
                if leg.followers:
                    actions += self._start_decodes(leg.node, leg.followers)
        return actions + (self._finish() if self._all_finished() else [])

    # --- ends ---

    def _timer_fired(self, timer: RequestTimer) -> list[Action]:
        if timer is RequestTimer.HANDOFF:
            return self._end_handoffs() if self._prefill is None else []
        if timer is RequestTimer.SETTLE:
            return self._end(Finish()) if self._all_finished() else []
        homeless, self._homeless = self._homeless, set()
        if not homeless:
            return []
        self._failed_decoders.clear()
        return self._place(homeless)

    def _unfinished(self) -> set[int]:
        return {index for index, completion in enumerate(self._completions) if completion.finished is None}

    def _all_finished(self) -> bool:
        return not self._unfinished()

    def _finish(self) -> list[Action]:
        if self._prefill is not None:
            return [StartTimer(RequestTimer.SETTLE, self._limits.settle_s)]
        return self._end(Finish())

    def _fail(self, error: KVFerryError) -> list[Action]:
        return self._end(Fail(error))

    def _end(self, last: Finish | Fail) -> list[Action]:
        actions: list[Action] = [CancelLeg(name, leg.node) for name, leg in self._decodes.items()]
        if self._prefill is not None:
            actions.append(CancelLeg(*self._prefill))
        self._decodes.clear()
        self._homeless.clear()
        self._prefill = self._held = None
        self.ended = True
        return [*actions, last]

    def _next_leg(self, kind: str) -> str:
        self._legs += 1
        return f"{self._id}.{kind}{self._legs}"
