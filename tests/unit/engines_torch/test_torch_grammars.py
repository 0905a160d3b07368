"""Draws held to a grammar: no token that it does not allow, whatever the parameters; logprobs are of before."""

import asyncio
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from llguidance import LLMatcher

from engines.paged.runner import SampleSpec
from engines.torch.sampler import sample_rows
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.grammars.vocabulary import byte_vocabulary
from nodeapi.sampling import SamplingParams

VOCAB, EOS = 600, 0


def matcher_of(regex: str) -> GrammarMatcher:
    async def at_once(work: Callable[[], LLMatcher]) -> LLMatcher:
        return work()

    grammars = Grammars(partial(byte_vocabulary, VOCAB, EOS), [EOS], beside=at_once)
    return asyncio.run(grammars.matcher(Grammar(kind=GrammarKind.REGEX, text=regex)))


def logits_of(seed: int, rows: int = 1) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def answer(regex: str, seed: int, **params: object) -> tuple[str, int]:
    """(the text drawn step by step from made-up logits, its number of tokens)."""
    matcher, output = matcher_of(regex), []
    sampling = SamplingParams(max_tokens=64, seed=seed, **params)  # type: ignore[arg-type]
    for step in range(64):
        spec = SampleSpec(sampling, (0,), (7,), list(output), matcher=matcher)
        ((drawn,),) = sample_rows(logits_of(1000 * seed + step), [spec], [EOS])
        output.append(drawn.token_id)
        if drawn.token_id in (EOS, *sampling.stop_token_ids):
            return bytes(output[:-1]).decode(), len(output)
    raise AssertionError("it did not end")


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.0},
        {"temperature": 2.0, "top_k": 3},
        {"top_p": 0.0001},
        {"top_p": 0.9999, "min_p": 0.5},
        {"top_k": VOCAB},
        {"logit_bias": {ord("x"): 100.0, EOS: 100.0}},
        {"logit_bias": dict.fromkeys(range(VOCAB), -100.0)},
        {"repetition_penalty": 5.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"min_tokens": 60},
        {"ignore_eos": True},
        {"stop_token_ids": [ord("5"), ord("x")]},
    ],
    ids=str,
)
def test_whatever_the_parameters_the_answer_follows(params: dict[str, object]) -> None:
    for seed in range(5):
        text, length = answer("[0-9]{8}", seed, **params)
        assert text.isdigit() and len(text) == 8 and length == 9


def test_where_it_may_end_it_may_go_on_until_min_tokens() -> None:
    for seed in range(5):
        text, _ = answer("[0-9]{2,20}", seed, min_tokens=12, logit_bias={EOS: 50.0})
        assert len(text) == 12, "the bias ends it as soon as it may"


def test_one_row_under_a_grammar_changes_no_other_and_logprobs_are_of_the_raw_logits() -> None:
    logits = logits_of(3, rows=3)
    sampling = SamplingParams(max_tokens=8, seed=2, logprobs=2)
    free = SampleSpec(sampling, (0,), (), [])
    held = SampleSpec(sampling, (0, 1), (), [], matcher=matcher_of("[ab]+"))
    alone = [sample_rows(logits[row : row + 1], [free], [EOS])[0] for row in (0, 2)]
    first, middle, last = sample_rows(logits, [free, held, free], [EOS])
    assert [first, last] == alone
    raw = torch.log_softmax(logits[1], dim=-1)
    for drawn in middle:
        assert drawn.token_id in (ord("a"), ord("b")) and drawn.logprob is not None
        assert drawn.logprob.logprob == pytest.approx(float(raw[drawn.token_id]))
        assert [token for token, _ in drawn.logprob.top] == raw.topk(2).indices.tolist()


def test_the_same_draw_comes_from_a_matcher_that_was_there_and_from_one_that_catches_up() -> None:
    sampling, regex = SamplingParams(max_tokens=32, seed=9), "(ab|cd|ef){6}"
    there, output = matcher_of(regex), []
    for step in range(12):
        spec = partial(SampleSpec, sampling, (0,), (), list(output))
        specs = [spec(matcher=there), spec(matcher=matcher_of(regex))]
        (one,), (other,) = sample_rows(logits_of(step).repeat(2, 1), specs, [EOS])
        assert one == other
        output.append(one.token_id)


def test_a_grammar_that_lets_nothing_come_fails_its_own_row_only() -> None:
    stuck = matcher_of("[ab]")
    stuck.mask([ord("z")], [EOS])
    sampling = SamplingParams(max_tokens=8, temperature=0.0)
    logits = logits_of(4, rows=2)
    specs = [SampleSpec(sampling, (0,), (), [ord("z")], matcher=stuck), SampleSpec(sampling, (0,), (), [])]
    held, free = sample_rows(logits, specs, [EOS])
    assert held == [] and free[0].token_id == int(np.argmax(logits[1].numpy()))
