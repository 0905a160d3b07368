"""Prompts with documents in any order, prefiller and decoder, plain requests among them, readers that leave, pools of
all sizes, shuffled callbacks: answers are what some reuse of the documents gives, and those of plain prompts are what
their tokens alone say. A failing seed reproduces."""

import asyncio
import itertools
import random
from collections.abc import Iterator

import msgspec
import pytest
from support.engine_fakes import CHUNK, CONFIG, Cluster, completions, idle, prompt_of, read_some, request
from support.sim_loop import run_sim

from engines.sim.reference import expected_tokens
from nodeapi.documents import Documents
from nodeapi.messages import GenerateRequest, Handoff, PrefillRequest

CLIENTS = 12


class Clients:
    def __init__(self, seed: int) -> None:
        self.dice = dice = random.Random(seed)
        self.header = prompt_of(dice.choice([0, 5, CHUNK, 50]), seed)
        self.texts = [prompt_of(dice.choice([1, 9, CHUNK, 70]), 100 + at) for at in range(4)]
        self.tight = dice.random() < 0.5
        self.config = msgspec.structs.replace(
            CONFIG,
            num_blocks=dice.choice([48, 64, 96]) if self.tight else 1024,
            max_sequences=dice.choice([1, 3, 16]),
            max_batch_tokens=dice.choice([20, 64, 300]),
        )

    def wanted(self, number: int) -> GenerateRequest:
        dice, prompt, spans = self.dice, list(self.header), list[tuple[int, int]]()
        for text in dice.sample(self.texts, dice.randrange(1, 4)):
            prompt += [7] * dice.choice([0, 1, 6])
            spans.append((len(prompt), len(prompt) + len(text)))
            prompt += text
        prompt += prompt_of(dice.randrange(0, 30), number)
        said = Documents(header=len(self.header), spans=spans, k=dice.choice([0, 1, 4, 16]))
        params = {"n": dice.choice([1, 1, 2]), "temperature": dice.choice([0.0, 1.0])}
        asked = request(f"r{number}", prompt, max_tokens=dice.randrange(1, 40), **params)
        handoff = Handoff(num_chunks=len(self.header) // CHUNK, wait_s=dice.choice([0.01, 1.0]))
        return msgspec.structs.replace(
            asked,
            documents=said if dice.random() < 0.8 else None,
            handoff=handoff if dice.random() < 0.5 else None,
        )

    async def one(self, number, prefiller, decoder) -> None:
        wanted = self.wanted(number)
        await asyncio.sleep(self.dice.random() * 0.5)
        prefill = PrefillRequest(
            request_id=wanted.request_id,
            prompt_token_ids=wanted.prompt_token_ids,
            documents=wanted.documents,
            deadline_s=100.0,
        )
        leg = asyncio.create_task(prefiller.prefill(prefill))
        if self.dice.random() < 0.2:
            await read_some(decoder, wanted, self.dice.randrange(1, 5))
            leg.cancel()
            await asyncio.wait([leg])
            return
        tokens = await completions(decoder, wanted)
        if wanted.documents is None:
            assert tokens == expected_tokens(self.config, wanted.prompt_token_ids, wanted.sampling), number
        elif not self.tight:  # there what is found may be evicted, and found no more after a preemption or a fork
            assert tokens in list(self.possible(wanted, wanted.documents)), number
        await leg

    def possible(self, wanted: GenerateRequest, said: Documents) -> Iterator[list[list[int]]]:
        """The answers with each choice of documents that are reused."""
        prompt, last = wanted.prompt_token_ids, len(wanted.prompt_token_ids) - 1
        for chosen in itertools.product([True, False], repeat=len(said.spans)):
            spans = [(start, min(stop, last)) for start, stop in itertools.compress(said.spans, chosen)]
            kept = msgspec.structs.replace(said, spans=[span for span in spans if span[0] < span[1]])
            yield expected_tokens(self.config, prompt, wanted.sampling, documents=kept)


@pytest.mark.parametrize("seed", range(10))
def test_every_answer_is_one_that_reuse_explains_and_nothing_is_left(seed: int) -> None:
    clients = Clients(seed)

    async def main() -> None:
        cluster = Cluster(clients.config)
        async with cluster.engine("p") as prefiller, cluster.engine("d") as decoder:
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(clients.one(number, prefiller, decoder))
            for engine in (prefiller, decoder):
                await idle(engine)
        await cluster.aclose()

    run_sim(main, limit_s=1000, seed=seed)
