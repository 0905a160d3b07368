"""benchmarks.faults at a small size, judged by what holds whatever the machine does: answers, texts, what is held.

How long silences are is the benchmark's own to judge, with nothing else on the machine.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.faults import System, make_prompts, one_cell
from benchmarks.faults_cells import HANG, OF_A_CLUSTER, OF_SERVERS, Own, cell, judge, normal
from benchmarks.faults_load import Seen
from benchmarks.faults_mocks import text_after
from benchmarks.faults_own import OwnCluster, own_cluster
from benchmarks.faults_servers import servers
from benchmarks.soak import Life, Soak, is_flat

PROMPTS = make_prompts(16)
HELD_S = 30.0
FOREVER = Own(60.0, 60.0, 60.0)
OWN_CELLS = ("kill decode-0 + kill metadata-server", "error prefill-0", "leave 0.8")


async def holds(system: System, name: str, texts: list[str]) -> None:
    for _ in range(6):  # until who is struck has something to do at that moment
        seen, held, missed = await one_cell(system, cell(name), PROMPTS, HELD_S)
        if not missed or not isinstance(system, OwnCluster):  # servers of others are of use for one cell
            break
        assert await system.whole()
    assert not missed
    verdict = judge(cell(name), seen, texts, held, FOREVER)
    assert not verdict.problems and verdict.same == verdict.wanted > 0, verdict


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_a_cluster_answers_everybody_with_the_same_text_whatever_is_killed_or_sick(tmp_path: Path) -> None:
    async with own_cluster("sim", tmp_path) as system:
        texts = await system.texts(PROMPTS)
        for name in OWN_CELLS:
            await holds(system, name, texts)
            assert await system.whole(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kill decode-0", "die decode-0"])
async def test_a_router_before_servers_of_others_does_so_too(tmp_path: Path, name: str) -> None:
    async with servers("plain", tmp_path, "") as system:
        await holds(system, name, await system.texts(PROMPTS))


@pytest.mark.slow
async def test_what_hangs_is_seen_to_be_held(tmp_path: Path) -> None:
    """The instrument sees it: else a cell with a leak would pass."""
    async with servers("plain", tmp_path, "") as system:
        await asyncio.gather(*(system.strike(fault) for fault in cell("hang decode-0 + hang decode-1").faults))
        seen, held, _ = await one_cell(system, cell("leave 0.3"), PROMPTS[:1], HELD_S)
        assert seen[0].left and held == ""
        body = {"model": system.model, "prompt": PROMPTS[1], "max_tokens": 2}
        asking = asyncio.create_task(system.session.post(f"{system.url}/v1/completions", json=body))
        async with asyncio.timeout(60):
            while "requests at decode-" not in (found := await system.held()):  # noqa: ASYNC110 - another process's
                await asyncio.sleep(0.02)
        assert "1 requests at the router" in found
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


@pytest.mark.slow
async def test_a_soak_answers_everybody_and_sees_every_process(tmp_path: Path) -> None:
    async with own_cluster("sim", tmp_path) as system:
        soak = Soak(system, seed=3)
        for _ in range(8):  # as long as a busy machine takes for that much
            await soak.run(0.1)
            if soak.seen["answered"] > 20 and sum(soak.faults.values()) and soak.leases:
                break
        assert soak.seen["answered"] > 20 and not soak.seen["unanswered"] + soak.seen["other_text"], soak.examples
        names = {life.name for life in soak.lives.values()}
        assert {"router", "metadata-server", "decode-1", "decode-1 engine"} <= names
        assert sum(soak.faults.values()) and soak.leases


@pytest.mark.parametrize(
    ("last", "flat"), [((52.0, 30), True), ((66.0, 30), False), ((50.0, 60), False), ((30.0, 10), True)]
)
def test_a_process_is_flat_unless_its_memory_or_descriptors_grow(last: tuple[float, int], flat: bool) -> None:
    life = Life("router", [(20.0, 5)] * 10 + [(50.0, 30)] * 20 + [last] * 10)
    assert is_flat(life.growth()) == flat
    assert (len(life.curve()), life.curve()[0], life.curve()[-1]) == (8, 20.0, last[0])


def answers(count: int = 4) -> list[Seen]:
    return [Seen(number, number % 2 == 0, "abc", first_s=0.1, silence_s=0.1, total_s=1.0) for number in range(count)]


def test_a_cell_fails_by_each_thing_that_is_promised() -> None:
    texts, usual = ["abc"] * 4, normal(answers())
    assert judge(cell("kill decode-0"), answers(), texts, "", usual).problems == ()
    for number, change, said in (
        (0, {"problem": "broke off"}, "1 not answered (broke off)"),
        (1, {"text": "abd"}, "1 other texts"),
        (2, {"first_s": 2.2}, "first token 2.2 s, more than 2.1"),
        (2, {"silence_s": 2.2}, "gap 2.2 s, more than 2.1"),
        (3, {"total_s": 3.2}, "whole answer 3.2 s, more than 3.0"),
    ):
        seen = answers()
        seen[number] = replace(seen[number], **change)
        assert judge(cell("kill decode-0"), seen, texts, "", usual).problems == (said,)
    assert judge(cell(""), answers(), texts, "1 reservations", usual).problems == ("held: 1 reservations",)
    slow = [replace(one, first_s=7.3) for one in answers()]
    assert judge(cell("hang decode-0"), slow, texts, "", usual).problems == ()
    assert judge(cell("kill decode-0"), slow, texts, "", usual).problems[0].startswith("first token 7.3 s")
    left = [*answers(), Seen(4, streamed=True, left=True)]
    assert judge(cell("leave 0.3"), left, texts, "", usual).wanted == 4


def test_a_fault_is_judged_by_what_it_takes_itself() -> None:
    assert cell("stop decode-0 + kill decode-1").own == HANG == cell("hang prefill-0").own
    assert cell("stop metadata-server + kill store-0").own == Own() == cell("").own
    assert (cell("").name, cell("leave 0.3").leave_s, cell("stop router").own.gap_s) == ("none", 0.3, 3.0)
    names = [one.name for one in OF_A_CLUSTER]
    assert len(set(names)) == len(names) and {one.name for one in OF_SERVERS} - set(names) == {
        "die decode-0",
        "die decode-0 + die decode-1",
        "leave 0.3",
        "hang prefill-0 + leave 0.3",
        "stop prefill-0 + kill decode-0",
    }


def test_a_mock_goes_on_where_another_one_ended() -> None:
    whole = text_after("a prompt", 8)
    assert len(whole) == 8 and text_after("a prompt" + whole[:3], 5) == whole[3:]
