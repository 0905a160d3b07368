"""Prefiller and decoder over a real store, random clients, readers that leave, small pools, shuffled callbacks: every
answer is what the tokens alone say, and nothing is left over. A failing seed reproduces."""

import asyncio
import random

import msgspec
import pytest
from support.engine_fakes import (
    CHUNK,
    CONFIG,
    Cluster,
    completions,
    idle,
    prefill_request,
    prompt_of,
    read_some,
    request,
)
from support.sim_loop import run_sim
from support.slow import slow_but

from engines.sim.reference import expected_tokens
from nodeapi.messages import Handoff

CLIENTS = 15


class Clients:
    def __init__(self, seed):
        self.dice = dice = random.Random(seed)
        self.base = prompt_of(200, seed)
        self.config = msgspec.structs.replace(
            CONFIG,
            num_blocks=dice.choice([40, 64, 200]),
            max_sequences=dice.choice([1, 3, 16]),
            max_batch_tokens=dice.choice([20, 64, 300]),
        )

    def wanted(self, number):
        dice = self.dice
        prompt = self.base[: dice.randrange(1, 150)] + prompt_of(dice.randrange(60), number)
        return request(
            f"r{number}",
            prompt,
            n=dice.choice([1, 1, 2]),
            temperature=dice.choice([0.0, 1.0]),
            max_tokens=dice.randrange(1, 60),
            handoff=Handoff(num_chunks=(len(prompt) - 1) // CHUNK, wait_s=dice.choice([0.01, 1.0])),
        )

    async def one(self, number, prefiller, decoder):
        wanted = self.wanted(number)
        await asyncio.sleep(self.dice.random() * 0.5)
        leg = asyncio.create_task(prefiller.prefill(prefill_request(wanted.request_id, wanted.prompt_token_ids)))
        if self.dice.random() < 0.2:
            await read_some(decoder, wanted, self.dice.randrange(1, 5))
            leg.cancel()
            await asyncio.wait([leg])
            return
        tokens = await completions(decoder, wanted)
        assert tokens == expected_tokens(self.config, wanted.prompt_token_ids, wanted.sampling), number
        await leg


@pytest.mark.parametrize("seed", slow_but(range(12), range(40)))
def test_every_answer_is_right_and_nothing_is_left(seed):
    clients = Clients(seed)

    async def main():
        cluster = Cluster(clients.config)
        async with cluster.engine("p") as prefiller, cluster.engine("d") as decoder:
            await asyncio.gather(*(clients.one(number, prefiller, decoder) for number in range(CLIENTS)))
            await idle(prefiller)
            stats = await idle(decoder)
        await cluster.aclose()
        return asyncio.get_running_loop().time(), stats

    assert run_sim(main, seed=seed, limit_s=300) is not None
    if seed == 0:  # the whole run is a function of the seed
        clients = Clients(seed)
        first = run_sim(main, seed=seed, limit_s=300)
        clients = Clients(seed)
        assert run_sim(main, seed=seed, limit_s=300) == first
