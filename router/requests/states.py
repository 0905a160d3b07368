"""The states of a request and of a decode leg, and what leads from one to the next. The ledger asserts on both tables.

A request (tests hold this table to REQUEST_TRANSITIONS; an event that is not listed changes no state):

    state             event           next states
    new               Route           awaiting_prefill decoding
    awaiting_prefill  PrefillDone     decoding
    awaiting_prefill  PrefillFailed   awaiting_prefill decoding
    awaiting_prefill  LegStalled      awaiting_prefill decoding
    awaiting_prefill  StopHit         awaiting_prefill settling
    decoding          DeltaReceived   decoding unplaced settling ended
    decoding          DecodeFailed    decoding unplaced settling ended
    decoding          LegStalled      decoding unplaced settling ended
    decoding          StopHit         decoding settling ended
    unplaced          DeltaReceived   unplaced ended
    unplaced          DecodeFailed    unplaced ended
    unplaced          StopHit         unplaced decoding settling ended
    unplaced          TimerFired      unplaced decoding ended
    settling          PrefillDone     ended
    settling          PrefillFailed   ended
    settling          TimerFired      settling ended
    any               ClientGone      ended
    any               DeadlinePassed  ended

    new               not started
    awaiting_prefill  its decode leg starts when the prefill leg has ended
    decoding          each unfinished completion is served by a decode leg
    unplaced          some unfinished completion waits for a decoder to be there
    settling          every completion has ended; the prefill leg's reply is waited for a moment
    ended             no leg runs

A decode leg, from one event to the next (LEG_TRANSITIONS):

    awaiting_kv  silent, and may be waiting for what a prefill leg computes; then streaming or ended
    computing    silent, and waits for nobody; then streaming or ended
    streaming    it has spoken; then ended
"""

from enum import StrEnum

from kvcore.types import Route
from router.requests.events import (
    ClientGone,
    DeadlinePassed,
    DecodeFailed,
    DeltaReceived,
    LegStalled,
    PrefillDone,
    PrefillFailed,
    RequestEvent,
    StopHit,
    TimerFired,
)


class RequestState(StrEnum):
    """Where a request is."""

    NEW = "new"
    AWAITING_PREFILL = "awaiting_prefill"
    DECODING = "decoding"
    UNPLACED = "unplaced"
    SETTLING = "settling"
    ENDED = "ended"


class LegState(StrEnum):
    """Where a decode leg is."""

    AWAITING_KV = "awaiting_kv"
    COMPUTING = "computing"
    STREAMING = "streaming"
    ENDED = "ended"


_S = RequestState
_NEXT: dict[tuple[RequestState, type], set[RequestState]] = {
    (_S.NEW, Route): {_S.AWAITING_PREFILL, _S.DECODING},
    (_S.AWAITING_PREFILL, PrefillDone): {_S.DECODING},
    (_S.AWAITING_PREFILL, PrefillFailed): {_S.AWAITING_PREFILL, _S.DECODING},
    (_S.AWAITING_PREFILL, LegStalled): {_S.AWAITING_PREFILL, _S.DECODING},
    (_S.AWAITING_PREFILL, StopHit): {_S.AWAITING_PREFILL, _S.SETTLING},
    (_S.DECODING, DeltaReceived): {_S.DECODING, _S.UNPLACED, _S.SETTLING, _S.ENDED},
    (_S.DECODING, DecodeFailed): {_S.DECODING, _S.UNPLACED, _S.SETTLING, _S.ENDED},
    (_S.DECODING, LegStalled): {_S.DECODING, _S.UNPLACED, _S.SETTLING, _S.ENDED},
    (_S.DECODING, StopHit): {_S.DECODING, _S.SETTLING, _S.ENDED},
    (_S.UNPLACED, DeltaReceived): {_S.UNPLACED, _S.ENDED},
    (_S.UNPLACED, DecodeFailed): {_S.UNPLACED, _S.ENDED},
    (_S.UNPLACED, StopHit): {_S.UNPLACED, _S.DECODING, _S.SETTLING, _S.ENDED},
    (_S.UNPLACED, TimerFired): {_S.UNPLACED, _S.DECODING, _S.ENDED},
    (_S.SETTLING, PrefillDone): {_S.ENDED},
    (_S.SETTLING, PrefillFailed): {_S.ENDED},
    (_S.SETTLING, TimerFired): {_S.SETTLING, _S.ENDED},
}
_ENDING = {(state, event): {_S.ENDED} for state in _S for event in (ClientGone, DeadlinePassed)}
REQUEST_TRANSITIONS: dict[tuple[RequestState, type], set[RequestState]] = _NEXT | _ENDING
LEG_TRANSITIONS: dict[LegState, set[LegState]] = {
    LegState.AWAITING_KV: {LegState.STREAMING, LegState.ENDED},
    LegState.COMPUTING: {LegState.STREAMING, LegState.ENDED},
    LegState.STREAMING: {LegState.ENDED},
}


def check_transition(before: RequestState, event: RequestEvent | Route, after: RequestState) -> None:
    """Assert that the table allows it. An event of a leg that has ended changes no state."""
    allowed = before is after or after in REQUEST_TRANSITIONS.get((before, type(event)), ())
    assert allowed, f"{before} by {type(event).__name__} to {after}"
