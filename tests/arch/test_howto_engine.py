"""docs/how-to/engine.md is followed: its engine serves requests, alone, from its own cache and over a store."""

import asyncio
import re
from pathlib import Path
from typing import Any

from support.engine_fakes import completions, prefill_request, request
from support.sim_loop import LoopClock, run_sim
from support.store_fakes import World

from transfer.inproc import InprocTransfer

PAGE = Path(__file__).resolve().parents[2] / "docs/how-to/engine.md"
CHUNK = 16
PROMPT = [7 * number % 1000 for number in range(1, 70)]


def page() -> dict[str, Any]:
    """The page's code, both blocks as one module."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    assert len(blocks) == 2
    names: dict[str, Any] = {"__name__": "page"}
    exec(compile("\n".join(blocks), str(PAGE), "exec"), names)
    return names


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % 1000)
    return tokens[len(prompt) :]


def test_the_pages_engine_answers_and_reuses_what_it_has():
    async def main():
        clock = LoopClock(asyncio.get_running_loop())
        async with page()["build_cipher_engine"](CHUNK, None, clock) as engine:
            for name in ("cold", "warm"):
                answer = await completions(engine, request(name, PROMPT, max_tokens=12))
                assert answer == [expected(PROMPT, 12)]
            assert (await engine.stats()).counters["cached_tokens"] == len(PROMPT) // CHUNK * CHUNK
            several = await completions(engine, request("several", PROMPT, max_tokens=5, n=3))
            assert several == [expected(PROMPT, 5)] * 3

    run_sim(main)


def test_kv_that_one_of_them_computed_is_what_another_goes_on_from():
    async def main():
        build, clock = page()["build_cipher_engine"], LoopClock(asyncio.get_running_loop())
        world, spec = World(), page()["CipherRunner"](CHUNK).info.kv_spec
        world.use(clock)
        for node in ("a", "b"):
            world.add_node(node)
        stores = [world.store(node, InprocTransfer(world.memory), spec=spec)[0] for node in ("a", "b")]
        async with build(CHUNK, stores[0], clock) as first, build(CHUNK, stores[1], clock) as second:
            done = await first.prefill(prefill_request("p", PROMPT))
            assert done.stored_chunks == len(PROMPT) // CHUNK
            answer = await completions(second, request("d", PROMPT, max_tokens=9))
            assert answer == [expected(PROMPT, 9)]
            assert (await second.stats()).counters["cached_tokens"] == done.stored_chunks * CHUNK
        await world.aclose()

    run_sim(main)


def test_the_page_is_narrow_enough_to_read():
    assert all(len(line) <= 160 for line in PAGE.read_text().splitlines())
