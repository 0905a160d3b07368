"""The phases of a live request: the table of the docstring is the one that runs, and what it shows in a debugger."""

import pytest
from support.scheduler_half_rig import Rig, keys_of

from engines.vllm.connector import scheduler_requests
from engines.vllm.connector.scheduler_requests import TRANSITIONS, SchedulerCall


def test_the_documented_transitions_are_those_that_run() -> None:
    lines = (scheduler_requests.__doc__ or "").splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")][1:]
    documented = {(phase, call): following for phase, call, following, _ in rows}
    assert documented == {
        (phase.value, call.value): following.value for (phase, call), following in TRANSITIONS.items()
    }


def test_what_vllms_scheduler_never_does_is_a_broken_invariant() -> None:
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    rig.load()
    request = rig.half._requests["r"]
    with pytest.raises(AssertionError, match="allocated, to load while <LiveRequest r LOADING"):
        request.enter(SchedulerCall.ALLOCATED_TO_LOAD)


def test_a_half_and_its_requests_show_where_they_stand() -> None:
    rig = Rig(stored=keys_of(list(range(20))))
    rig.arrive(20)
    rig.arrive(5, name="short")
    rig.load()
    assert repr(rig.half) == "<SchedulerHalf 1 waiting, 1 loading, 0 running>"
    assert repr(rig.half._requests["r"]) == (
        "<LiveRequest r LOADING, 20 tokens, 2 chunks stored, 2 offered, load to 16>"
    )
