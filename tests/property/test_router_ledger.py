"""Random orders of everything that can happen to a request: it ends once, its tokens are exact, no leg is left."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.machines import more_examples

from kvcore.errors import EngineError, InvalidRequestError, NodeStalledError, NodeUnavailableError, OverloadedError
from kvcore.handoff import HandoffKind
from kvcore.types import Route
from nodeapi.messages import FinishReason, LegInfo, PrefillResult, TokenDelta
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
    PrefillDone,
    PrefillFailed,
    RequestTimer,
    StartDecode,
    StartPrefill,
    StartTimer,
    StopHit,
    TimerFired,
)
from router.requests.ledger import RequestMachine
from router.requests.limits import RequestLimits

MAX_TOKENS = 4


@dataclass
class World:
    """Plays nodes, timers and client to one machine, and keeps the books that the machine must not fool."""

    draw: st.DrawFn
    n: int
    kind: HandoffKind = HandoffKind.KVFERRY
    machine: RequestMachine = field(init=False)
    prefills: dict[str, str] = field(default_factory=dict)
    decodes: dict[str, tuple[StartDecode, dict[int, int]]] = field(default_factory=dict)
    """Leg -> its start, and how many tokens each of its open indices has."""
    timers: set[RequestTimer] = field(default_factory=set)
    emitted: list[list[int]] = field(init=False)
    finished: dict[int, FinishReason] = field(default_factory=dict)
    ends: list[Finish | Fail] = field(default_factory=list)
    stopped: set[int] = field(default_factory=set)
    fetched: set[str] = field(default_factory=set)
    """Prefill legs whose KV a decode leg was sent for."""
    models: dict[str, bytes] = field(default_factory=lambda: {"d0": b"A", "d1": b"A"})
    """What each decoder's engine is now, and in `reported` what the router last heard of it."""
    reported: dict[str, bytes] = field(default_factory=lambda: {"d0": b"A", "d1": b"A"})
    leg_models: dict[str, bytes] = field(default_factory=dict)
    model: bytes = b""
    """Of the answer's first token."""

    def __post_init__(self) -> None:
        self.emitted = [[] for _ in range(self.n)]
        self.machine = RequestMachine(
            "r", self, n=self.n, max_tokens=MAX_TOKENS, attempts=3, num_chunks=2, handoff=self.kind
        )

    def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
        return self.draw(st.sampled_from([None, *[p for p in ("p0", "p1") if p not in exclude]]))

    def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
        fitting = [d for d in ("d0", "d1") if d not in exclude and fingerprint in (b"", self.reported[d])]
        return self.draw(st.sampled_from([None, *fitting]))

    def fingerprint(self, node: str) -> bytes:
        return self.reported[node]

    def carry_out(self, actions: list[Action]) -> None:
        for action in actions:
            assert not self.ends, "nothing follows the end"
            match action:
                case StartPrefill():
                    self.prefills[action.leg] = action.node
                case StartDecode():
                    self._check_source(action)
                    self.leg_models[action.leg] = self.models[action.node]
                    assert not self.model or self.reported[action.node] == self.model, "as far as the router can know"
                    indices = range(self.n) if action.index is None else [action.index]
                    assert action.index is None or list(action.output_token_ids) == self.emitted[action.index]
                    assert action.index is not None or self.n > 1 or list(action.output_token_ids) == self.emitted[0]
                    at = len(action.output_token_ids)
                    self.decodes[action.leg] = (action, dict.fromkeys(indices, at))
                case CancelLeg():
                    gone = self.prefills.pop(action.leg, None) or self.decodes.pop(action.leg, None)
                    assert gone, "only running legs are cancelled"
                case EndHandoff():
                    assert self.decodes[action.leg][0].handoff
                case Emit():
                    assert action.index not in self.finished and action.index not in self.stopped
                    self.emitted[action.index] += action.token_ids
                    if action.finish_reason is not None:
                        self.finished[action.index] = action.finish_reason
                case StartTimer():
                    self.timers.add(action.timer)
                case Finish() | Fail():
                    self.ends.append(action)
        self.machine.check_invariants()

    def _check_source(self, start: StartDecode) -> None:
        assert not start.handoff or (self.kind is HandoffKind.KVFERRY and start.source is None)
        if self.kind is HandoffKind.NIXL:
            assert not self.prefills, "no decode leg beside a prefill leg"
        if (source := start.source) is not None:
            assert source.leg not in self.fetched, "KV is fetched once"
            assert start.index is not None or self.n == 1, "by one sequence"
            assert not start.output_token_ids
            self.fetched.add(source.leg)
            assert source.params == (b"" if self.prefills.get(source.leg) else source.leg.encode())

    def step(self) -> None:
        choices = ["stop"] if not self.decodes else ["delta"] * 6 + ["decode_failed", "stop", "violate", "abort"]
        if self.prefills:
            choices += ["prefill_done", "prefill_failed"]
        if self.decodes or self.prefills:
            choices += ["stalled"]
        choices += ["timer"] * bool(self.timers) + ["stale"]
        if self.kind is HandoffKind.KVFERRY:  # vLLM servers that are not ours say nothing of their weights
            choices += ["upgrade", "report"]
        choices += ["gone", "deadline"] if self.draw(st.integers(0, 9)) == 0 else []
        getattr(self, "_" + self.draw(st.sampled_from(choices)))()

    def _delta(self) -> None:
        leg = self.draw(st.sampled_from(sorted(self.decodes)))
        start, at = self.decodes[leg]
        index = self.draw(st.sampled_from(sorted(at)))
        count = self.draw(st.integers(0, MAX_TOKENS - at[index]))
        tokens = [100 * index + at[index] + i for i in range(count)]
        at[index] += count
        reason = FinishReason.LENGTH if at[index] == MAX_TOKENS and self.draw(st.booleans()) else None
        model = self.leg_models[leg]
        foreign = self.model not in (b"", model)
        if reason and not foreign:
            del at[index]
        if not at:
            del self.decodes[leg]
        wire_index = index if start.index is None else 0
        info = LegInfo(cached_tokens=8, computed_tokens=1, fingerprint=model)
        delta = TokenDelta(index=wire_index, token_ids=tokens, finish_reason=reason, info=info)
        if tokens:
            self.model = self.model or model
        before = [list(emitted) for emitted in self.emitted]
        self.carry_out(self.machine.handle(DeltaReceived(leg, delta)))
        if foreign:
            assert leg not in self.decodes and self.emitted == before, "one answer, one model"

    def _upgrade(self) -> None:
        """A decoder starts anew, with other weights or the same."""
        self.models[self.draw(st.sampled_from(["d0", "d1"]))] = self.draw(st.sampled_from([b"A", b"B"]))

    def _report(self) -> None:
        self.reported = dict(self.models)

    def _violate(self) -> None:
        leg = self.draw(st.sampled_from(sorted(self.decodes)))
        violations = [TokenDelta(index=7, token_ids=[1])]
        if not self.stopped:
            violations.append(TokenDelta(index=0, token_ids=[1] * (MAX_TOKENS + 1)))
        self.carry_out(self.machine.handle(DeltaReceived(leg, self.draw(st.sampled_from(violations)))))
        assert leg not in self.decodes, "its leg is cancelled"

    def _abort(self) -> None:
        leg = self.draw(st.sampled_from(sorted(self.decodes)))
        index = 0 if self.decodes[leg][0].index is not None else sorted(self.decodes[leg][1])[0]
        delta = TokenDelta(index=index, finish_reason=FinishReason.ABORT)
        self.carry_out(self.machine.handle(DeltaReceived(leg, delta)))

    def _decode_failed(self) -> None:
        leg = self.draw(st.sampled_from(sorted(self.decodes)))
        del self.decodes[leg]
        errors = [NodeUnavailableError("gone"), OverloadedError("full"), EngineError("bad"), InvalidRequestError("no")]
        lost = self.draw(st.booleans())
        self.carry_out(self.machine.handle(DecodeFailed(leg, self.draw(st.sampled_from(errors)), lost)))

    def _prefill_done(self) -> None:
        leg, _ = self.prefills.popitem()
        stored = self.draw(st.integers(0, 2))
        params = leg.encode() if self.kind is HandoffKind.NIXL and self.draw(st.booleans()) else b""
        result = PrefillResult(
            request_id=leg, cached_tokens=4, computed_tokens=28, stored_chunks=stored, handoff_params=params
        )
        self.carry_out(self.machine.handle(PrefillDone(leg, result)))

    def _prefill_failed(self) -> None:
        leg, _ = self.prefills.popitem()
        error = self.draw(st.sampled_from([NodeUnavailableError("gone"), InvalidRequestError("no")]))
        self.carry_out(self.machine.handle(PrefillFailed(leg, error)))

    def _stalled(self) -> None:
        """A leg that is given up goes on at another node; one that is not goes on where it is."""
        leg = self.draw(st.sampled_from(sorted([*self.decodes, *self.prefills])))
        stalls, ended = self.machine.stalls(), len(self.ends)
        actions = self.machine.handle(LegStalled(leg, NodeStalledError("silent")))
        self.carry_out(actions)
        assert bool(actions) == (leg not in self.decodes and leg not in self.prefills)
        assert self.machine.stalls() <= min(stalls + 1, RequestLimits().most_stalls)
        assert not any(isinstance(end, Fail) for end in self.ends[ended:]), "a stall alone fails no request"

    def _stop(self) -> None:
        index = self.draw(st.integers(0, self.n - 1))
        if index not in self.finished:
            self.stopped.add(index)
        self.carry_out(self.machine.handle(StopHit(index, self.cut(index))))

    def cut(self, index: int) -> int:
        """Forget tokens after a stop string, which is found when they are read; returns how many are left."""
        num_tokens = self.draw(st.integers(0, len(self.emitted[index])))
        del self.emitted[index][num_tokens:]
        return num_tokens

    def _timer(self) -> None:
        timer = self.draw(st.sampled_from(sorted(self.timers)))
        self.timers.discard(timer)
        self.carry_out(self.machine.handle(TimerFired(timer)))

    def _stale(self) -> None:
        before = [list(tokens) for tokens in self.emitted]
        self.carry_out(self.machine.handle(DeltaReceived("r.d99", TokenDelta(token_ids=[1]))))
        self.carry_out(self.machine.handle(PrefillFailed("r.p99", NodeUnavailableError("late"))))
        self.carry_out(self.machine.handle(DecodeFailed("r.d99", NodeUnavailableError("late"))))
        assert self.emitted == before

    def _gone(self) -> None:
        self.carry_out(self.machine.handle(ClientGone()))

    def _deadline(self) -> None:
        self.carry_out(self.machine.handle(DeadlinePassed()))


REQUESTS = given(st.data(), st.integers(1, 3), st.sampled_from([None, "p0"]), st.sampled_from(HandoffKind))


@settings(max_examples=100, deadline=None)
@REQUESTS
def test_every_request_ends_once_with_exact_tokens_and_no_leg_left(
    data: st.DataObject, n: int, prefiller: str, kind: HandoffKind
) -> None:
    world = World(data.draw, n, kind)
    route = Route(prefiller=prefiller, decoder="d0", expected_cached_tokens=0, reason="x")
    world.carry_out(world.machine.start(route))
    for _ in range(80):
        if world.ends:
            break
        assert world.decodes or world.timers or world.prefills, "a request that has not ended has something to wait for"
        world.step()
    if not world.ends:
        world.carry_out(world.machine.handle(DeadlinePassed()))
    assert len(world.ends) == 1
    assert not world.prefills and not world.decodes, "no leg left uncancelled"
    for index, tokens in enumerate(world.emitted):
        assert tokens == [100 * index + i for i in range(len(tokens))], "once each, in order"
    if isinstance(world.ends[0], Finish):
        assert set(world.finished) | world.stopped == set(range(n)) and world.machine.complete
    late = data.draw(st.integers(0, n - 1))
    assert world.machine.handle(StopHit(late, world.cut(late))) == [], "the rest was read after the end"
    assert world.machine.completion_tokens == sum(map(len, world.emitted))
    assert world.machine.handle(ClientGone()) == []


test_more_requests = more_examples(
    test_every_request_ends_once_with_exact_tokens_and_no_leg_left, REQUESTS, max_examples=400
)


@pytest.mark.parametrize(("prefill", "expected"), [(4, 4), (30, 8)])
def test_cached_tokens_is_the_lesser_of_both_legs(prefill: int, expected: int) -> None:
    machine = RequestMachine("r", World(lambda _: None, 1), n=1, max_tokens=1, attempts=1)
    machine.start(Route(prefiller="p0", decoder="d0", expected_cached_tokens=0, reason="x"))
    machine.handle(
        PrefillDone("r.p1", PrefillResult(request_id="r.p1", cached_tokens=prefill, computed_tokens=1, stored_chunks=9))
    )
    info = LegInfo(cached_tokens=8, computed_tokens=1)
    machine.handle(DeltaReceived("r.d2", TokenDelta(token_ids=[5], finish_reason=FinishReason.LENGTH, info=info)))
    assert machine.ended and machine.cached_tokens == expected
