"""The simulated model reads its blocks: one wrong byte anywhere is another token. And how long its steps take."""

import asyncio

import msgspec
import numpy as np
import pytest
from support.engine_fakes import CHUNK, CONFIG, prompt_of
from support.sim_loop import SimDeadlockError, SimTimeLimitError, run_sim

from engines.paged.runner import SampleSpec, StepSlice
from engines.sim.arithmetic import Arithmetic
from engines.sim.reference import expected_tokens
from engines.sim.runner import SimRunner
from nodeapi.adapters import ServedAdapter
from nodeapi.sampling import SamplingParams

PROMPT = prompt_of(21)
CONFIG_WIDE = msgspec.structs.replace(CONFIG, vocab_size=1 << 30)
SPEC = SampleSpec(SamplingParams(max_tokens=9, temperature=0.0), (0,), PROMPT, [])


async def next_token(damage_at=None):
    runner = SimRunner(CONFIG_WIDE, "m", CHUNK)
    await runner.execute([StepSlice(PROMPT[:20], 0, [5, 2, 9])])
    if damage_at is not None:
        block, offset = divmod(damage_at, len(runner.block_view(0)))
        runner.block_view([5, 2, 9][block])[offset] ^= 1
    return (await runner.execute([StepSlice(PROMPT[20:], 20, [5, 2, 9], SPEC)])).samples[0][0].token_id


@pytest.mark.parametrize("damage_at", [0, 31, 8 * 32 - 1, 8 * 32, 19 * 32, 20 * 32 - 1])
def test_a_flipped_byte_anywhere_changes_the_token(damage_at):
    assert run_sim(next_token) != run_sim(lambda: next_token(damage_at))


def test_bytes_after_the_sequence_do_not_matter():
    assert run_sim(next_token) == run_sim(lambda: next_token(22 * 32))


def test_steps_take_the_time_that_the_configuration_says():
    config = msgspec.structs.replace(CONFIG, prefill_tokens_per_s=100.0, inter_token_s=0.5, batch_slowdown=0.1)
    runner = SimRunner(config, "m", CHUNK)
    prefill, decode = StepSlice(PROMPT[:20], 0, [1, 2, 3]), StepSlice(PROMPT[:1], 20, [1, 2, 3], SPEC)
    assert runner.step_seconds([prefill]) == pytest.approx(0.2)
    assert runner.step_seconds([decode]) == pytest.approx(0.5)
    assert runner.step_seconds([prefill, decode]) == pytest.approx(0.7 * 1.1)


def test_virtual_time_jumps_and_says_when_nothing_can_happen():
    async def sleeper():
        await asyncio.sleep(1e6)
        return asyncio.get_running_loop().time()

    async def stuck():
        await asyncio.Event().wait()

    assert run_sim(sleeper) == pytest.approx(1e6)
    with pytest.raises(SimTimeLimitError):
        run_sim(sleeper, limit_s=10)
    with pytest.raises(SimDeadlockError):
        run_sim(stuck)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_tokens_that_may_be_drawn_are(temperature: float) -> None:
    arithmetic = Arithmetic("v1", 16, 512)
    for digest in range(200):
        free = arithmetic.draw(digest, SamplingParams(max_tokens=9, temperature=temperature), 0, [5, 6])
        banned = [[free], [6, (free + 1) % 512], [5, (free + 2) % 512], [9, 6, (free + 3) % 512]]
        params = SamplingParams(max_tokens=9, temperature=temperature, bad_words_token_ids=banned)
        assert arithmetic.draw(digest, params, 0, [5, 6]) == (free + 2) % 512, "that one is banned after 5 alone"
        allowed = SamplingParams(max_tokens=9, temperature=temperature, allowed_token_ids=[3, 8])
        assert arithmetic.draw(digest, allowed, 0, []) in (3, 8)
        mask = np.zeros(512, dtype=bool)
        mask[[8, 40]] = True
        assert arithmetic.draw(digest, allowed, 0, [], mask) == 8


def test_an_adapter_is_another_model_and_its_kv_turns_as_the_models_does():
    alone, one, two = (Arithmetic("v1", 32, 1 << 30, adapter) for adapter in ("", "one", "two"))
    records = [each.record(b"", 7, 3) for each in (alone, one, two)]
    assert len(set(records)) == 3
    assert alone.turned(records[1], 3, 9) == one.record(b"", 7, 9)


async def first_token(adapter: str) -> int:
    served = [ServedAdapter(name=name, identity=name) for name in ("one", "two")]
    runner = SimRunner(CONFIG_WIDE, "m", CHUNK, adapters=served)
    item = StepSlice(PROMPT, 0, [5, 2, 9], SPEC, adapter=adapter)
    return (await runner.execute([item])).samples[0][0].token_id


def test_tokens_are_the_adapters_and_those_that_the_reference_expects():
    tokens = [run_sim(lambda adapter=adapter: first_token(adapter)) for adapter in ("", "one", "two")]
    expected = [
        expected_tokens(CONFIG_WIDE, PROMPT, SPEC.params, adapter=adapter)[0][0] for adapter in ("", "one", "two")
    ]
    assert tokens == expected and len(set(tokens)) == 3
