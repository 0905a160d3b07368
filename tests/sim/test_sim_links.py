"""A slow link between two machines, in virtual time: who would read over it is avoided, the others are used."""

import asyncio
from collections import Counter

import pytest
from support.sim_caches import CachingMachine, TraceLoad
from support.sim_load import Flow
from support.sim_loop import run_sim

from kvcore.types import Role
from metadata_server.cache_messages import NodeOrder
from router.requests.records import RequestRecord

READERS = ("d1", "d2", "d3")
CHUNKS = 16
SLOW = ("d1", "d0")
FAST, SLOWLY = 12.5e9, 12.5e9 / 40
LOAD_S = CHUNKS * 256 * 131_072 / FAST
"""Of a prompt's KV over a link that is as it should be."""


def machine(slowly: float = SLOWLY) -> CachingMachine:
    return CachingMachine(2, 4, links={SLOW: slowly, ("d2", "d0"): FAST, ("d3", "d0"): FAST})


def prompt_of(number: int) -> list[int]:
    return [number + 1] * (CHUNKS * 256) + [7] * 20


async def begun(prompts: int, slowly: float = SLOWLY) -> TraceLoad:
    """They lie in the memory of d0, which gets no request any more."""
    load = TraceLoad(machine(slowly), router={"first_token_s": None})
    await load.prober.probe()
    use(load, "d0")
    for number in range(prompts):
        assert (await load.send(Flow(0, max_tokens=2), prompt_of(number))).error is None
    use(load, *READERS)
    return load


def use(load: TraceLoad, *decoders: str) -> None:
    """Only these decode from now on."""
    away = [node.id for node in load.nodes.nodes if node.role is Role.DECODER and node.id not in decoders]
    load.cluster.on_orders([NodeOrder(node_id=name, kind="drained", since=0.0) for name in away])


async def asked(load: TraceLoad, numbers: range) -> list[RequestRecord]:
    """One after the other."""
    for number in numbers:
        assert (await load.send(Flow(0, max_tokens=2), prompt_of(number))).error is None
    return load.log.newest()[: len(numbers)]


def decoders(records: list[RequestRecord]) -> Counter[str]:
    return Counter(record.route.decoder for record in records if record.route is not None)


def test_a_node_whose_link_to_the_holder_is_slow_is_passed_over_once_that_has_shown():
    async def main() -> None:
        load = await begun(40)
        await asked(load, range(9))  # each link is tried
        rates = {name: load.cluster.nodes[name].rates.reads["d0"].per_s for name in READERS}
        assert rates["d1"] * 30 < rates["d2"] == pytest.approx(rates["d3"])
        found = await asked(load, range(9, 30))
        used = decoders(found)
        assert not used["d1"] and min(used["d2"], used["d3"]) >= 8
        for record in found:
            assert record.route is not None and record.route.ways
            assert abs(record.route.ways[0].load_s - LOAD_S) < 0.2 * LOAD_S, "as of the link that is read over"

    run_sim(main)


def test_a_link_over_which_nothing_comes_in_time_is_passed_over_too():
    """A chunk takes 10 s by it, and 5 are given: no read ever ends that could say how long it took."""

    async def main() -> None:
        load = await begun(40, 256 * 131_072 / 10.0)
        found = await asked(load, range(30))
        gave_up = [record for record in found if any(move.late_bytes for leg in record.legs for move in leg.moved)]
        assert 1 <= len(gave_up) <= 2 and decoders(gave_up).keys() == {"d1"}
        rate = load.cluster.nodes["d1"].rates.reads["d0"].per_s
        assert 0 < rate < 1.01 * LOAD_S * FAST / 5.0, "so it is at most"

    run_sim(main)


def test_a_slow_link_is_used_where_the_others_have_too_much_to_do():
    async def main() -> None:
        load = await begun(40)
        await asked(load, range(9))
        flow = Flow(0, max_tokens=200)
        busy = [asyncio.create_task(load.send(flow, prompt_of(number % 9))) for number in range(600)]
        await asyncio.gather(*busy)
        assert decoders(load.log.newest()[:600])["d1"] > 30

    run_sim(main)


def test_a_link_that_was_slow_and_is_fast_again_is_found_to_be():
    async def main() -> None:
        load = await begun(60)
        await asked(load, range(9))
        assert isinstance(load.machine, CachingMachine)
        load.machine.links[SLOW] = FAST
        assert not decoders(await asked(load, range(9, 15)))["d1"]
        await asyncio.sleep(60.0)
        found = decoders(await asked(load, range(15, 45)))
        assert found["d1"] >= 8, "it is tried, and is as good as the others"

    run_sim(main)
