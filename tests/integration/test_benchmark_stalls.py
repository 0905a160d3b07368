"""benchmarks.stalls at a small size: a router's process, what others wait for, what its result is called."""

import pytest

from benchmarks.stalls import cases, run
from kvferry.demo.model import prepare_demo_model


@pytest.mark.slow
async def test_what_stalls_is_measured_and_named() -> None:
    prepare_demo_model()
    found = await run(1, "chat_1mb_turns")
    assert found.keys() == {"idle_ms", "stall_ms", "took_ms"}
    assert found["stall_ms"].keys() == found["took_ms"].keys() == {"chat_1mb_turns"}
    assert found["idle_ms"] > 0 and 0 < found["stall_ms"]["chat_1mb_turns"] <= found["took_ms"]["chat_1mb_turns"] + 50


def test_every_case_is_a_body_of_its_own() -> None:
    small = [case.body for name, case in cases().items() if name.startswith("n128")]
    assert all(body(1) != body(2) for body in small) and len({body(1) for body in small}) == 2
