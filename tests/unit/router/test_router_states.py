"""The tables of states are what their docstring says, and what the ledger does."""

import asyncio
import re

import pytest
from support.router_fakes import make_rig

from kvcore.errors import EngineError
from kvcore.types import Route
from nodeapi.messages import PrefillResult
from nodeapi.sampling import SamplingParams
from router.requests import states
from router.requests.events import ClientGone, DecodeFailed, PrefillDone
from router.requests.ledger import RequestMachine
from router.requests.leg_requests import RequestSpec
from router.requests.states import LEG_TRANSITIONS, REQUEST_TRANSITIONS, LegState, RequestState, check_transition


def test_the_request_table_is_what_its_prose_says() -> None:
    prose: dict[tuple[RequestState, str], set[RequestState]] = {}
    for state, event, after in re.findall(r"^    (\w+) +([A-Z]\w+) +([a-z_ ]+)$", states.__doc__ or "", re.M):
        for each in RequestState if state == "any" else [RequestState(state)]:
            prose[each, event] = {RequestState(name) for name in after.split()}
    assert prose == {(state, event.__name__): after for (state, event), after in REQUEST_TRANSITIONS.items()}


def test_the_leg_table_is_what_its_prose_says() -> None:
    rows = re.findall(r"^    (\w+) +[^;\n]*; then ([a-z ]+)$", states.__doc__ or "", re.M)
    prose = {LegState(state): {LegState(name) for name in after.split(" or ")} for state, after in rows}
    assert prose == LEG_TRANSITIONS


def test_what_the_table_does_not_know_is_a_bug() -> None:
    check_transition(RequestState.DECODING, ClientGone(), RequestState.ENDED)
    with pytest.raises(AssertionError, match="decoding by PrefillDone to settling"):
        done = PrefillDone(
            "r.p1", PrefillResult(request_id="r.p1", cached_tokens=0, computed_tokens=0, stored_chunks=0)
        )
        check_transition(RequestState.DECODING, done, RequestState.SETTLING)


async def test_a_machine_says_what_it_is() -> None:
    rig = await make_rig()

    class Nobody:
        def prefiller(self, decoder: str, exclude: frozenset[str]) -> str | None:
            return None

        def decoder(self, exclude: frozenset[str], fingerprint: bytes, full: frozenset[str]) -> str | None:
            return None

        def fingerprint(self, node: str) -> bytes:
            return b""

    machine = RequestMachine("r", Nobody(), n=1, max_tokens=2, attempts=4)
    assert machine.state is RequestState.NEW
    machine.start(Route(prefiller="p0", decoder="d0", expected_cached_tokens=0, reason="x"))
    assert repr(machine) == "<RequestMachine r decoding: prefill r.p1 on p0, 1 decode legs, 0 tokens, 0 retries>"
    machine.handle(DecodeFailed("r.d2", EngineError("no")))
    assert machine.state is RequestState.UNPLACED
    assert repr(rig.cluster) == "<Cluster 4 of 4 nodes usable, 0 keys>"
    assert repr(rig.cluster.nodes["d0"]) == "<KnownNode decoder d0 usable: 0 sequences, 0 to prefill>"
    assert repr(rig.dispatcher) == "<Dispatcher 0 running, 0 opened, 0 control calls>"


async def test_running_requests_are_described_by_a_line_each() -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.prefill_gate = node.generate_gate = asyncio.Event()
    run = rig.dispatcher.open(RequestSpec("r", list(range(100)), SamplingParams(max_tokens=2)))
    assert rig.dispatcher.describe() == []
    async with run:
        (line,) = rig.dispatcher.describe()
        assert "<RequestRun r running p1>d1, legs: r.d2 r.p1, 0 tokens, 0 unread>" in line
        assert "<RequestMachine r decoding: prefill r.p1 on p1, 1 decode legs" in line
    await rig.dispatcher.aclose()
