"""Draws against transformers' processors, a plain reference and expected frequencies."""

import pytest
import torch
import transformers

from engines.paged.runner import SampleSpec
from engines.torch.sampler import adjust_logits, candidates, sample_rows, uniform
from nodeapi.sampling import SamplingParams

VOCAB = 3000
EOS = (7,)


def logits_of(seed: int, rows: int = 1, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def spec_of(
    *, indices: tuple[int, ...] = (0,), prompt: tuple[int, ...] = (), output: tuple[int, ...] = (), **params: object
) -> SampleSpec:
    return SampleSpec(SamplingParams(**{"max_tokens": 64, **params}), indices, prompt, output)  # type: ignore[arg-type]


def tokens(logits: torch.Tensor, *specs: SampleSpec) -> list[list[int]]:
    return [[sampled.token_id for sampled in row] for row in sample_rows(logits, specs, EOS)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_numbers_has_no_samples_and_spoils_no_other(value: float) -> None:
    logits = logits_of(0, rows=3)
    logits[0, 5] = value
    logits[2] = float("-inf")
    specs = [spec_of(temperature=0), spec_of(temperature=0), spec_of(temperature=0.7, min_p=0.1)]
    assert tokens(logits, *specs) == [[], [int(logits[1].argmax())], []]


@pytest.mark.parametrize(
    "params",
    [
        {"top_k": 40},
        {"top_p": 0.9},
        {"top_p": 0.9999},
        {"top_p": 0.0001},
        {"min_p": 0.1},
        {"top_k": 1},
        {"top_k": VOCAB + 5},
        {"top_k": 50, "top_p": 0.8, "min_p": 0.02},
    ],
)
@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_candidates_equal_those_of_transformers(params: dict[str, float], temperature: float) -> None:
    row = logits_of(1)
    scores = transformers.TemperatureLogitsWarper(temperature)(None, row)
    if "top_k" in params:
        scores = transformers.TopKLogitsWarper(int(params["top_k"]))(None, scores)
    if "top_p" in params:
        scores = transformers.TopPLogitsWarper(params["top_p"])(None, scores)
    if "min_p" in params:
        scores = transformers.MinPLogitsWarper(params["min_p"])(None, scores)
    ids, weights = candidates(row[0], spec_of(temperature=temperature, **params).params)
    differing = set(ids.tolist()) ^ set(torch.isfinite(scores[0]).nonzero()[:, 0].tolist())
    # Which of the unlikeliest are within top_p is a matter of rounding, and of the processor's way of summing.
    assert torch.softmax(row[0] / temperature, -1)[list(differing)].sum() < (1e-6 if "top_p" in params else 1e-30)
    torch.testing.assert_close(weights / weights.sum(), torch.softmax(scores[0], -1)[ids])


def test_ties_with_the_kth_stay() -> None:
    ids, _ = candidates(torch.tensor([1.0, 2.0, 1.0, 0.0]), spec_of(top_k=2).params)
    assert ids.tolist() == [0, 1, 2]


def test_repetition_penalty_equals_that_of_transformers() -> None:
    row, prompt, output = logits_of(2), (3, 3, 900), (5, 2999)
    expected = transformers.RepetitionPenaltyLogitsProcessor(1.7)(torch.tensor([prompt + output]), row)
    torch.testing.assert_close(
        adjust_logits(row[0], spec_of(repetition_penalty=1.7, prompt=prompt, output=output), EOS), expected[0]
    )


def test_presence_frequency_and_bias_look_at_the_output_only_and_leave_the_row_alone() -> None:
    row = logits_of(3)[0]
    before, expected = row.clone(), row.clone()
    output = (4, 9, 9, 9)
    for token in set(output):
        expected[token] -= 0.5 + 0.25 * output.count(token)
    expected[11] += 8.0
    spec = spec_of(presence_penalty=0.5, frequency_penalty=0.25, logit_bias={11: 8.0}, prompt=(1, 2, 4), output=output)
    torch.testing.assert_close(adjust_logits(row, spec, EOS), expected)
    assert torch.equal(row, before)


def test_min_tokens_masks_eos_and_stop_tokens_until_reached() -> None:
    logits = logits_of(4)
    logits[0, 7], logits[0, 8], logits[0, 9] = 99, 98, 97
    wanted = {"temperature": 0, "min_tokens": 2, "stop_token_ids": [8]}
    assert tokens(logits, spec_of(output=(1,), **wanted)) == [[9]]
    assert tokens(logits, spec_of(output=(1, 1), **wanted)) == [[7]]
    assert tokens(logits, spec_of(output=(1,), ignore_eos=True, **wanted)) == [[7]]


def test_logprobs_are_of_the_raw_logits_whatever_the_parameters() -> None:
    logits = logits_of(5)
    raw = torch.log_softmax(logits[0], -1)
    spec = spec_of(temperature=0.2, top_k=5, logit_bias={1: -100.0}, logprobs=3)
    (sampled,) = sample_rows(logits, [spec], EOS)[0]
    assert sampled.logprob is not None
    assert sampled.logprob.logprob == pytest.approx(float(raw[sampled.token_id]))
    values, ids = raw.topk(3)
    assert [token for token, _ in sampled.logprob.top] == ids.tolist()
    assert [value for _, value in sampled.logprob.top] == pytest.approx(values.tolist())
    (greedy,) = sample_rows(logits, [spec_of(temperature=0, logprobs=0)], EOS)[0]
    assert greedy.logprob is not None
    assert greedy.logprob.top == []


def test_draws_do_not_depend_on_the_batch() -> None:
    logits = logits_of(6, rows=6)
    specs = [
        spec_of(temperature=0.8, top_p=0.95, seed=i, output=(1,) * i, indices=(0, 1, 2)[: 1 + i % 3]) for i in range(5)
    ] + [spec_of(temperature=0)]
    together = tokens(logits, *specs)
    alone = [tokens(logits[i : i + 1], spec)[0] for i, spec in enumerate(specs)]
    assert together == alone == list(reversed(tokens(logits.flip(0), *reversed(specs))))


def test_indices_forked_or_not_draw_the_same() -> None:
    logits = logits_of(7)
    unforked = tokens(logits, spec_of(seed=3, indices=(0, 1, 2)))[0]
    forked = [tokens(logits, spec_of(seed=3, indices=(index,)))[0][0] for index in range(3)]
    assert unforked == forked
    assert len(set(unforked)) > 1


def test_random_numbers_are_a_fixed_function_of_seed_index_and_position() -> None:
    assert uniform(1, 2, 3) == uniform(1, 2, 3)
    assert len({uniform(s, i, p) for s in range(-3, 3) for i in range(3) for p in range(20)}) == 6 * 3 * 20
    values = [uniform(2**64 - 1, 0, position) for position in range(2000)]
    assert all(0 <= value < 1 for value in values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.03)


def test_frequencies_over_many_seeds_fit_the_distribution() -> None:
    row, draws = torch.tensor([[2.0, 1.0, 0.0, -1.0, 0.5]]), 4000
    expected = torch.softmax(row[0] / 0.7, -1) * draws
    counts = torch.zeros(5)
    for seed in range(draws):
        counts[tokens(row, spec_of(temperature=0.7, seed=seed))[0][0]] += 1
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0, "min_tokens": 5, "stop_token_ids": [VOCAB, 2**32 - 1]},
        {"temperature": 1e-300, "min_p": 0.5},
        {"temperature": 5e-324, "top_p": 0.5},
        {"temperature": 1e-45, "top_k": 3, "min_p": 0.5},
        {"temperature": 1.0, "repetition_penalty": 1e-300, "min_p": 0.5},
        {"temperature": 1.0, "repetition_penalty": 1e300, "min_p": 0.5},
        {"temperature": 0.7, "presence_penalty": 1e300, "min_p": 0.5},
        {"temperature": 0.7, "frequency_penalty": -1e300, "min_p": 0.5},
        {"temperature": 0.7, "logit_bias": {3: 1e300, 4: -1e300}, "min_p": 0.5},
    ],
)
def test_parameters_that_no_arithmetic_survives_fail_nobody_else(params: dict[str, float]) -> None:
    logits = logits_of(8, rows=2)
    plain = spec_of(temperature=0)
    (drawn,), (other,) = tokens(logits, spec_of(prompt=(3, 4), output=(5, 6), **params), plain)
    assert 0 <= drawn < VOCAB
    assert other == int(logits[1].argmax())
    if params["temperature"] < 1e-6:
        assert drawn == int(logits[0].argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_only_allowed_tokens_are_picked(temperature: float) -> None:
    logits = logits_of(11, rows=40)
    allowed = [5, 17, 900]
    spec = spec_of(temperature=temperature, allowed_token_ids=allowed, logit_bias={40: 100.0}, indices=(0, 1))
    drawn = tokens(logits, *[spec] * 40)
    assert {token for row in drawn for token in row} <= set(allowed)
    if temperature == 0:
        assert [row[0] for row in drawn] == [max(allowed, key=lambda token: float(row[token])) for row in logits]
    else:
        assert len({token for row in drawn for token in row}) > 1


def test_the_last_token_of_a_bad_word_is_not_picked_after_the_others() -> None:
    logits = logits_of(12)
    best = int(logits.argmax())
    for word, output, is_banned in [
        ([best], (), True),
        ([3, best], (3,), True),
        ([3, best], (1, 2, 3), True),
        ([3, best], (), False),
        ([3, best], (3, 4), False),
        ([2, 3, best], (3,), False),
        ([2, 3, best], (2, 3), True),
    ]:
        spec = spec_of(temperature=0, bad_words_token_ids=[word, [1, 2, 4]], output=output, prompt=(2, 3))
        assert (tokens(logits, spec) == [[best]]) is not is_banned, (word, output)
