"""The life of a request whose KV vLLM's own connectors hand over: who is started when, and with what."""

from kvcore.errors import EngineError, NodeUnavailableError
from kvcore.handoff import HandoffKind
from kvcore.types import Route
from nodeapi.messages import FinishReason, LegInfo, PrefillResult, TokenDelta
from router.requests.events import (
    CancelLeg,
    ClientGone,
    DecodeFailed,
    DeltaReceived,
    Fail,
    Finish,
    KVSource,
    PrefillDone,
    PrefillFailed,
    RequestTimer,
    StartDecode,
    StartPrefill,
    TimerFired,
)
from router.requests.ledger import RequestMachine

GONE = NodeUnavailableError("gone")
ROUTE = Route(prefiller="p0", decoder="d0", expected_cached_tokens=0, reason="x")


class Nodes:
    """A Picker with two of each."""

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        return next((name for name in ("p0", "p1") if name not in exclude), None)

    def fingerprint(self, node: str) -> bytes:
        return b""

    def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
        return next((name for name in ("d0", "d1") if name not in exclude), None)


def begin(kind: HandoffKind, n: int = 1):
    machine = RequestMachine("r", Nodes(), n=n, max_tokens=2, attempts=4, handoff=kind)
    return machine, machine.start(ROUTE)


def answered(leg: str, params: bytes = b"{}", cached: int = 7) -> PrefillDone:
    result = PrefillResult(
        request_id=leg, cached_tokens=cached, computed_tokens=1, stored_chunks=0, handoff_params=params
    )
    return PrefillDone(leg, result)


def token(leg: str, *, last: bool = False, info: LegInfo | None = None) -> DeltaReceived:
    reason = FinishReason.LENGTH if last else None
    return DeltaReceived(leg, TokenDelta(token_ids=[5], finish_reason=reason, info=info))


def test_nixl_decodes_after_the_prefill_with_what_it_answered():
    machine, first = begin(HandoffKind.NIXL)
    assert first == [StartPrefill("r.p1", "p0", "d0")]
    (start,) = machine.handle(answered("r.p1", b'{"a":1}'))
    assert start == StartDecode("r.d2", "d0", False, source=KVSource("r.p1", "p0", b'{"a":1}'))
    machine.handle(token("r.d2"))
    last = machine.handle(token("r.d2", last=True, info=LegInfo(cached_tokens=30, computed_tokens=1)))
    assert last[-1] == Finish() and machine.cached_tokens == 7


def test_nixl_tries_the_next_prefiller_before_any_decoder_is_asked():
    machine, _ = begin(HandoffKind.NIXL)
    assert machine.handle(PrefillFailed("r.p1", GONE)) == [StartPrefill("r.p2", "p1", "d0")]
    assert machine.handle(PrefillFailed("r.p2", GONE)) == [StartDecode("r.d3", "d0", False)]
    assert machine.retries == [("prefill", "node_unavailable")]


def test_nixl_without_params_lets_the_decoder_prefill():
    machine, _ = begin(HandoffKind.NIXL, n=2)
    assert machine.handle(answered("r.p1", b"")) == [StartDecode("r.d2", "d0", False)]


def test_a_client_that_leaves_before_any_decode_leg_cancels_the_prefill():
    machine, _ = begin(HandoffKind.NIXL)
    actions = machine.handle(ClientGone())
    assert actions[0] == CancelLeg("r.p1", "p0") and isinstance(actions[1], Fail)


def test_one_sequence_fetches_and_the_others_follow_it():
    for kind in (HandoffKind.NIXL, HandoffKind.MOONCAKE):
        machine, actions = begin(kind, n=3)
        if kind is HandoffKind.NIXL:
            actions = machine.handle(answered("r.p1"))
        assert isinstance(actions[-1], StartDecode) and actions[-1].index == 0 and actions[-1].source
        followers = [action for action in machine.handle(token("r.d2")) if isinstance(action, StartDecode)]
        assert [(start.index, start.node, start.source) for start in followers] == [(1, "d0", None), (2, "d0", None)]
        machine.check_invariants()


def test_a_decoder_that_dies_while_it_fetches_is_replaced_without_params_and_takes_its_followers_along():
    machine, _ = begin(HandoffKind.NIXL, n=2)
    machine.handle(answered("r.p1"))
    starts = machine.handle(DecodeFailed("r.d2", GONE))
    assert starts == [StartDecode("r.d3", "d1", False)]


def test_an_engine_that_could_not_fetch_is_asked_again_itself():
    """Its prefiller may have died: with one decoder there is no other to ask, and it has done nothing wrong."""
    machine, _ = begin(HandoffKind.NIXL)
    machine.handle(answered("r.p1"))
    assert machine.handle(DecodeFailed("r.d2", EngineError("no KV"))) == [StartDecode("r.d3", "d0", False)]


def test_a_stream_that_breaks_off_is_continued_without_params():
    machine, _ = begin(HandoffKind.NIXL)
    machine.handle(answered("r.p1"))
    machine.handle(token("r.d2"))
    (start,) = machine.handle(DecodeFailed("r.d2", GONE))
    assert start == StartDecode("r.d3", "d1", False, output_token_ids=(5,))


def test_mooncake_sends_both_legs_and_needs_no_word_between_them():
    machine, first = begin(HandoffKind.MOONCAKE)
    source = KVSource("r.p1", "p0")
    assert first == [StartPrefill("r.p1", "p0", "d0"), StartDecode("r.d2", "d0", False, source=source)]
    assert machine.handle(answered("r.p1", b"")) == []


def test_mooncake_starts_both_anew_when_the_prefill_fails():
    """The decoder waits for a transfer that will never come; it cannot be told, so its leg is dropped."""
    machine, _ = begin(HandoffKind.MOONCAKE, n=2)
    actions = machine.handle(PrefillFailed("r.p1", GONE))
    source = KVSource("r.p3", "p1")
    assert actions == [
        StartPrefill("r.p3", "p1", "d0"),
        CancelLeg("r.d2", "d0"),
        StartDecode("r.d4", "d0", False, index=0, source=source),
    ]
    machine.check_invariants()
    actions = machine.handle(PrefillFailed("r.p3", GONE))
    assert actions == [CancelLeg("r.d4", "d0"), StartDecode("r.d5", "d0", False)]


def test_mooncake_leaves_a_decoder_alone_that_has_spoken():
    machine, _ = begin(HandoffKind.MOONCAKE)
    machine.handle(token("r.d2"))
    assert machine.handle(PrefillFailed("r.p1", GONE)) == []


def test_mooncake_cancels_the_prefill_whose_decoder_died():
    machine, _ = begin(HandoffKind.MOONCAKE)
    actions = machine.handle(DecodeFailed("r.d2", GONE))
    assert actions == [CancelLeg("r.p1", "p0"), StartDecode("r.d3", "d1", False)]


def test_a_fetching_leg_that_has_no_other_decoder_waits_for_one():
    class Alone(Nodes):
        def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
            return None if "d0" in exclude else "d0"

    machine = RequestMachine("r", Alone(), n=1, max_tokens=2, attempts=4, handoff=HandoffKind.NIXL)
    machine.start(ROUTE)
    machine.handle(answered("r.p1"))
    (timer,) = machine.handle(DecodeFailed("r.d2", GONE))
    assert machine.handle(TimerFired(RequestTimer.RETRY)) == [StartDecode("r.d3", "d0", False)], timer
