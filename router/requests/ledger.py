"""The life of one request as a state machine: events in, actions out. No await, no clock, no socket, no text.

    event                       what comes of it (T: tokens so far)
    start(route)                StartPrefill if the route has one, StartDecode at the same time
    PrefillDone                 legs not yet decoding: EndHandoff at once if chunks were declined, else after a moment
    PrefillFailed               another prefiller while a decode leg waits; none left: EndHandoff, the decoder computes
    DeltaReceived               Emit; the last index's end: Finish (after PrefillDone or a moment: honest usage)
    DecodeFailed, T = 0         another decoder, the whole request anew (its prefill goes on; its chunks are stored)
    DecodeFailed, T > 0         another decoder continues each unfinished index after its T tokens, by a leg of its own
    DecodeFailed for good       CancelLeg all, Fail
    LegStalled                  as if it had failed, if another node is there and this has not happened too often
    StopHit                     the index ends after these tokens; its leg is cancelled once none of its indices is left
    ClientGone, DeadlinePassed  CancelLeg all, Fail
    TimerFired(RETRY)           look again for a decoder, failed ones included, until patience is at its end

Where the decode leg fetches from the prefiller (`HandoffTraits`), it does so once, for one sequence, and cannot be told
that nothing will come. So there the first index goes ahead and the others follow it into the decoder's own prefix
cache; a leg that is tried again computes by itself. Which states there are, and what leads to which, is in `states`.

Invariants: a request ends once; after that no leg runs; every token was emitted once, in order.
"""

from collections.abc import Container, Sequence

from kvcore.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    EngineError,
    KVFerryError,
    NodeStalledError,
    NodeUnavailableError,
    OverloadedError,
)
from kvcore.handoff import HandoffKind
from kvcore.types import Route
from nodeapi.messages import FinishReason, LegInfo
from router.requests.completions import Completions, PromptScores
from router.requests.decode_legs import DecodeLeg, DecodeLegs, LegNames
from router.requests.events import (
    Action,
    CancelLeg,
    ClientGone,
    DeadlinePassed,
    DecodeFailed,
    DeltaReceived,
    Emit,
    Fail,
    Finish,
    KVSource,
    LegStalled,
    OtherEvent,
    PrefillDone,
    PrefillFailed,
    RequestEvent,
    RequestTimer,
    StartTimer,
    StopHit,
    TimerFired,
)
from router.requests.limits import RequestLimits
from router.requests.placement import DecoderPlacement
from router.requests.prefill_half import Picker, PrefillHalf
from router.requests.states import RequestState, check_transition


class RequestMachine:
    """One request. Every method returns the actions to carry out, in order, before the next event."""

    last_error: KVFerryError = NodeUnavailableError("no node can decode")

    def __init__(
        self,
        request_id: str,
        picker: Picker,
        *,
        n: int,
        max_tokens: int,
        attempts: int,
        num_chunks: int = 0,
        end_token_ids: Container[int] = frozenset(),
        min_tokens: int = 0,
        logprobs: bool = False,
        scores: PromptScores | None = None,
        handoff: HandoffKind = HandoffKind.KVFERRY,
        limits: RequestLimits = RequestLimits(),
    ) -> None:
        self._limits, self._id, self._attempts = limits, request_id, attempts
        self.completions = Completions(n, max_tokens, min_tokens, end_token_ids, logprobs=logprobs, scores=scores)
        names = LegNames(request_id)
        self._decodes = DecodeLegs(self.completions, names, picker)
        self.retries: list[tuple[str, str]] = []
        """(`prefill` or `decode`, code of the failure) of each leg that was tried again."""
        self.prefill = PrefillHalf(
            self.completions,
            self._decodes,
            picker,
            names,
            self.retries,
            attempts=attempts,
            num_chunks=num_chunks,
            handoff=handoff.traits,
            limits=limits,
        )
        self._placement = DecoderPlacement(picker, limits)
        self.decode_info: LegInfo | None = None
        self.state = RequestState.NEW
        self.ended = False

    def __repr__(self) -> str:
        prefill = f"prefill {leg.id} on {leg.node}" if (leg := self.prefill.running) else "no prefill"
        done = f"{len(self._decodes.running)} decode legs, {self.completion_tokens} tokens, {len(self.retries)} retries"
        return f"<RequestMachine {self._id} {self.state}: {prefill}, {done}>"

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that nobody had to compute: the lesser of both legs' counts, as a decoder also counts as cached
        what the prefiller had just computed for it. A leg without a count is left out."""
        counts = [leg.cached_tokens for leg in (self.prefill.result, self.decode_info) if leg is not None]
        return min(counts, default=0)

    @property
    def completion_tokens(self) -> int:
        """Tokens emitted, over all indices."""
        return self.completions.num_tokens

    @property
    def complete(self) -> bool:
        """Whether every index has ended."""
        return not self.completions.unfinished

    def stalls(self, kind: str = "") -> int:
        """Legs that were given up as their nodes were silent; of this kind only, if given."""
        return sum([code == NodeStalledError.code and of.startswith(kind) for of, code in self.retries])

    def runs(self, leg: str) -> bool:
        """Whether events of this decode leg still matter."""
        return leg in self._decodes.running

    def fetches_from(self, leg: str) -> str | None:
        """The prefiller whose KV this decode leg may still be waiting for."""
        found = self._decodes.running.get(leg)
        return found.source.node if found is not None and found.source is not None and found.fetches else None

    def start(self, route: Route) -> list[Action]:
        """The first actions. Called once."""
        assert self.state is RequestState.NEW, "a request starts once"
        actions = self.prefill.start(route.prefiller, route.decoder) if route.prefiller is not None else []
        if self.prefill.awaited_by is None:
            actions += self._start_decodes(route.decoder, self.completions.unfinished, self.prefill.source)
        self._set_state(route)
        return actions

    def handle(self, event: RequestEvent) -> list[Action]:
        """The actions that follow. Those of legs that have ended are ignored; after the end all but StopHit."""
        if self.ended and type(event) is not StopHit:
            return []
        if isinstance(event, DeltaReceived):
            actions = self._delta_received(event)
            only = actions[0] if len(actions) == 1 else None
            if not actions or (type(only) is Emit and only.finish_reason is None):
                return actions  # a delta that only adds tokens changes no state
        else:
            actions = self._actions_of(event)
        self._set_state(event)
        return actions

    def check_invariants(self) -> None:
        """Assert what must hold between any two events."""
        unplaced, prefill = self._placement.unplaced, self.prefill
        assert self.state is self._state_of_now()
        if self.ended:
            assert not (self._decodes.running or prefill.running or prefill.awaited_by or unplaced)
            return
        if prefill.awaited_by is not None:
            assert prefill.running and not (self._decodes.running or unplaced), "awaits its prefill leg"
            return
        served = self._decodes.check_invariants()
        assert unplaced.isdisjoint(served)
        assert self.completions.unfinished <= unplaced | served, "an unfinished index is served or unplaced"
        self.completions.check_invariants()

    def _actions_of(self, event: OtherEvent) -> list[Action]:
        match event:
            case PrefillDone() | PrefillFailed():
                return self._prefill_ended(event)
            case DecodeFailed():
                leg = self._decodes.failed(event)
                return self._decode_failed(leg, event.error) if leg is not None else []
            case LegStalled():
                return self._leg_stalled(event)
            case StopHit():
                return self._stop_hit(event.index, event.num_tokens)
            case TimerFired():
                return self._timer_fired(event.timer)
            case ClientGone():
                return self._end(Fail(CancelledByPeerError("the client closed the connection")))
            case DeadlinePassed():
                late = bool(self.completions.unfinished)  # else only the prefill's reply was still waited for
                why = event.why or DeadlineExceededError("the request's time ran out")
                return self._end(Fail(why) if late else Finish())

    def _set_state(self, event: RequestEvent | Route) -> None:
        before, self.state = self.state, self._state_of_now()
        check_transition(before, event, self.state)

    def _state_of_now(self) -> RequestState:
        if self.ended:
            return RequestState.ENDED
        if self._placement.unplaced:
            return RequestState.UNPLACED
        if not self.completions.unfinished:
            return RequestState.SETTLING
        return RequestState.AWAITING_PREFILL if self.prefill.awaited_by is not None else RequestState.DECODING

    # --- prefill ---

    def _prefill_ended(self, event: PrefillDone | PrefillFailed) -> list[Action]:
        if (leg := self.prefill.running) is None or leg.id != event.leg:
            return []
        ended = self.prefill.done(event.result) if isinstance(event, PrefillDone) else self.prefill.failed(event.error)
        return ended + self._finish_if_complete()

    # --- decode ---

    def _start_decodes(self, node: str, indices: set[int], source: KVSource | None = None) -> Sequence[Action]:
        return self._decodes.start(node, indices, source=source, handoff=self.prefill.saves)

    def _delta_received(self, event: DeltaReceived) -> list[Action]:
        """Five cases:

        1. Its leg has ended: ignored.
        2. It breaks the protocol, or is of another model: nothing of it counts, and its leg fails.
        3. It says that the node gave up: its tokens count, and its leg fails.
        4. It is the first of a leg that others follow: their legs start.
        5. It ends an index: with the last of its leg the leg ends, with the last of all the request.

        Tokens of an index that a stop string has ended are dropped (`Completions.append`).
        """
        delta, leg = event.delta, self._decodes.running.get(event.leg)
        if leg is None:
            return []
        index = delta.index if leg.index is None else leg.index
        expected = leg.open if leg.index is None else {0}
        if (violation := self.completions.protocol_violation(delta, index, expected)) is not None:
            return self._cancel_failed(leg, EngineError(f"node {leg.node} broke the protocol: {violation}"))
        leg.speak(delta.info)
        if leg.fingerprint and (changed := self._placement.model_changed(leg, delta)) is not None:
            return self._cancel_failed(leg, changed)
        gave_up = delta.finish_reason is FinishReason.ABORT
        reason = None if gave_up else delta.finish_reason
        self.decode_info = self.decode_info or delta.info
        emit = self.completions.append(index, delta, reason)
        actions: list[Action] = [] if emit is None else [emit]
        if gave_up:
            return actions + self._cancel_failed(leg, NodeUnavailableError(f"node {leg.node} gave the request up"))
        if leg.followers:
            actions += self._start_decodes(leg.node, leg.followers)
            leg.followers = set()
        if reason is not None:
            leg.open.discard(index)
            if not leg.open:
                self._decodes.remove(leg)
            actions += self._finish_if_complete()
        return actions

    def _cancel_failed(self, leg: DecodeLeg, error: KVFerryError) -> list[Action]:
        return [CancelLeg(leg.id, leg.node), *self._decode_failed(leg, error)]

    def _leg_stalled(self, event: LegStalled) -> list[Action]:
        """Nothing comes of it where nobody is there to take over, and when it has happened too often: between nodes
        that are all slow a request would go to and fro, and each time begin anew."""
        if self.stalls() >= self._limits.most_stalls:
            return []
        if (leg := self._decodes.running.get(event.leg)) is None:
            return self.prefill.stalled(event.leg, event.error)
        tired = self.completions.tired(leg.indices, self._attempts)
        return [] if tired or not self._placement.could_leave(leg.node) else self._cancel_failed(leg, event.error)

    def _decode_failed(self, leg: DecodeLeg, error: KVFerryError) -> list[Action]:
        """What becomes of the completions that the leg served:

        1. Some had all their tokens, and lacked only the finish reason: they end.
        2. None is left unfinished: the request ends with the last.
        3. The failure is the request's own fault: the request fails.
        4. Else they are placed anew. A prefill leg whose KV only this leg would have fetched is cancelled.
        """
        fetching = leg.fetches
        self.last_error = error = self._placement.failed(leg, error)
        self._decodes.remove(leg)
        actions: list[Action] = []
        for index in sorted(leg.indices):
            actions += self.completions.finish_if_complete(index)
        if not (unfinished := leg.indices & self.completions.unfinished):
            return actions + self._finish_if_complete()
        if not error.retryable:
            return actions + self._end(Fail(error))
        self.retries.append(("decode", error.code))
        if fetching:
            actions += self.prefill.cancel()
        return actions + self._place(unfinished)

    def _place(self, indices: set[int]) -> list[Action]:
        """Find a decoder for completions that lost theirs:

        1. One of them was tried too often without getting anywhere: the request fails, or waits for one more try.
        2. There is a decoder: it continues them.
        3. There is none, because all are full and nothing was emitted, or there has been none for too long: it fails.
        4. Else they wait.
        """
        tired = self.completions.tired(indices, self._attempts)
        if tired and not self._placement.one_more(self.last_error):
            return self._end(Fail(self.last_error))
        self.completions.untry(tired)
        if not tired and (node := self._placement.decoder()) is not None:
            return [*self._start_decodes(node, indices)]
        shed = isinstance(self.last_error, OverloadedError) and not self.completion_tokens
        if shed or self._placement.out_of_patience:
            return self._end(Fail(self._placement.why_none(self.last_error)))
        return list(self._placement.wait(indices))

    def _stop_hit(self, index: int, num_tokens: int) -> list[Action]:
        if not self.completions.stop(index, num_tokens) or self.ended:
            return []
        self._placement.unplaced.discard(index)
        return [*self._decodes.stop(index, handoff=self.prefill.saves), *self._finish_if_complete()]

    # --- timers and ends ---

    def _timer_fired(self, timer: RequestTimer) -> list[Action]:
        match timer:
            case RequestTimer.HANDOFF:
                return self.prefill.end_handoffs() if self.prefill.running is None else []
            case RequestTimer.SETTLE:
                return self._end(Finish()) if not self.completions.unfinished else []
            case RequestTimer.RETRY:
                return self._place(unplaced) if (unplaced := self._placement.take_unplaced()) else []

    def _finish_if_complete(self) -> list[Action]:
        """End with the last completion, or wait a moment for what a prefill leg under way says of cached tokens."""
        if self.completions.unfinished:
            return []
        if self.prefill.running is not None:
            return [StartTimer(RequestTimer.SETTLE, self._limits.settle_s)]
        return self._end(Finish())

    def _end(self, last: Finish | Fail) -> list[Action]:
        actions = [*self._decodes.cancel_all(), *self.prefill.cancel(), last]
        self._placement.unplaced.clear()
        self.ended = True
        return actions
