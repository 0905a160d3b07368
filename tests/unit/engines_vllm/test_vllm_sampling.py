"""What vLLM is asked for, and how its answers are read."""

from dataclasses import dataclass

import msgspec
import pytest

from engines.vllm.arguments import command_line
from engines.vllm.connector.orders import LegParams
from engines.vllm.sampling import finish, prompt_logprobs, sampling_arguments, token_logprobs
from kvcore.config.schema import ModelConfig
from kvcore.errors import EngineError
from nodeapi.messages import FinishReason, GenerateRequest
from nodeapi.prompt_logprobs import MOST_ENTRIES, PromptRow
from nodeapi.sampling import SamplingParams


@dataclass
class _Entry:
    logprob: float
    rank: int | None


def _request(output: list[int], **sampling: object) -> GenerateRequest:
    return GenerateRequest(
        request_id="r",
        prompt_token_ids=[1, 2, 3],
        output_token_ids=output,
        sampling=SamplingParams(max_tokens=10, **sampling),
        deadline_s=1.0,
    )


def test_a_continued_request_asks_for_what_is_left() -> None:
    arguments = sampling_arguments(_request([7, 8], min_tokens=5), LegParams(leg="r"))
    assert (arguments["max_tokens"], arguments["min_tokens"]) == (8, 3)


def test_min_tokens_are_never_negative_once_enough_were_sent() -> None:
    assert sampling_arguments(_request([7, 8], min_tokens=1), LegParams(leg="r"))["min_tokens"] == 0


def test_greedy_needs_no_seed_and_a_continuation_does_not_draw_the_first_draws_again() -> None:
    leg = LegParams(leg="r")
    assert sampling_arguments(_request([], temperature=0.0, seed=5), leg)["seed"] is None
    fresh = sampling_arguments(_request([], seed=5), leg)["seed"]
    continued = sampling_arguments(_request([7], seed=5), leg)["seed"]
    assert fresh == 5 and continued not in (None, 5)
    assert sampling_arguments(_request([9], seed=5), leg)["seed"] == continued, "as docs/vllm.md says: by their number"


def test_of_several_greedy_completions_one_is_computed() -> None:
    leg = LegParams(leg="r")
    assert sampling_arguments(_request([], temperature=0.0, n=3), leg)["n"] == 1
    assert sampling_arguments(_request([], temperature=0.5, n=3), leg)["n"] == 3


def test_the_leg_travels_in_the_extra_arguments() -> None:
    leg = LegParams(leg="r", salt="00ff", handoff_chunks=0, wait_until=2.5, tail=True)
    extra = sampling_arguments(_request([]), leg)["extra_args"]
    assert isinstance(extra, dict)
    assert msgspec.convert(extra["kv_transfer_params"]["kvferry"], LegParams) == leg


def test_logprobs_are_the_tokens_own_and_the_likeliest_in_order() -> None:
    position = {5: _Entry(-2.0, 3), 1: _Entry(-0.5, 1), 2: _Entry(-1.0, 2)}
    (entry,) = token_logprobs([5], [position], SamplingParams(max_tokens=1, logprobs=2)) or []
    assert entry.logprob == -2.0
    assert entry.top == [(1, -0.5), (2, -1.0)]


def test_no_alternatives_are_given_where_none_were_asked_for() -> None:
    assert token_logprobs([5], [{5: _Entry(-2.0, 1)}], SamplingParams(max_tokens=1)) is None
    (entry,) = token_logprobs([5], [{5: _Entry(-2.0, 1)}], SamplingParams(max_tokens=1, logprobs=0)) or []
    assert entry.top == []


def test_a_missing_logprob_is_an_error_not_a_guess() -> None:
    with pytest.raises(EngineError, match="0 positions for 1 tokens"):
        token_logprobs([5], None, SamplingParams(max_tokens=1, logprobs=1))


def test_listed_tokens_take_the_place_of_the_likeliest() -> None:
    leg, wanted = LegParams(leg="r"), {"logprobs": 1, "logprob_token_ids": [9, 2]}
    arguments = sampling_arguments(_request([], **wanted), leg)
    assert (arguments["logprobs"], arguments["logprob_token_ids"]) == (None, [9, 2])
    assert sampling_arguments(_request([], logprobs=1), leg)["logprob_token_ids"] is None
    position = {5: _Entry(-2.0, 3), 9: _Entry(-0.5, 1), 2: _Entry(-1.0, 2)}
    (entry,) = token_logprobs([5], [position], SamplingParams(max_tokens=1, **wanted)) or []  # type: ignore[arg-type]
    assert entry.top == [(9, -0.5), (2, -1.0)]


def test_logprobs_of_the_prompt_come_in_pieces_with_each_token_s_own_rank() -> None:
    top, prompt = 2, [3 + n % 5 for n in range(1000)]
    positions = [None, *({token: _Entry(-4.0, 9), 1: _Entry(-1.0, 1), 2: _Entry(-2.0, 2)} for token in prompt[1:])]
    positions[1] = {prompt[1]: _Entry(-1.5, 2), 1: _Entry(-1.0, 1)}  # it is one of the likeliest itself
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=top)
    pieces = list(prompt_logprobs(prompt, positions, sampling))
    assert len(pieces) > 1 and all(len(piece) * (1 + top) <= MOST_ENTRIES for piece in pieces)
    rows = [row for piece in pieces for row in piece.rows()]
    assert [row.token_id for row in rows] == prompt[1:]
    assert rows[0] == PromptRow(prompt[1], -1.5, 2, [(1, -1.0), (prompt[1], -1.5)])
    assert rows[-1] == PromptRow(prompt[-1], -4.0, 9, [(1, -1.0), (2, -2.0)])
    assert list(prompt_logprobs(prompt, None, SamplingParams(max_tokens=1))) == []


@pytest.mark.parametrize("positions", [None, [None], [None, None], [None, {4: _Entry(-1.0, 1)}]])
def test_a_missing_logprob_of_the_prompt_is_an_error(positions: list[dict[int, _Entry] | None] | None) -> None:
    with pytest.raises(EngineError, match="vLLM"):
        list(prompt_logprobs([3, 4], positions, SamplingParams(max_tokens=1, prompt_logprobs=2)))


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [
        ("stop", None, (FinishReason.STOP, 9)),
        ("stop", 4, (FinishReason.STOP, 4)),
        ("length", None, (FinishReason.LENGTH, None)),
        ("abort", None, (FinishReason.ABORT, None)),
    ],
)
def test_finish_reasons(reason: str, stop: int | None, expected: tuple[FinishReason, int | None]) -> None:
    assert finish(reason, stop, [8, 9]) == expected


def test_a_failure_inside_vllm_is_told() -> None:
    with pytest.raises(EngineError, match="'error'"):
        finish("error", None, [])


def test_arguments_become_a_command_line_and_ours_come_last() -> None:
    args = {"max_num_seqs": 4, "enforce-eager": True, "enable-prefix-caching": False, "seed": None, "x": {"a": 1}}
    words = command_line(args, ModelConfig(path="m", name="n", dtype="bfloat16", max_context=64), "/models/m")
    assert words[:6] == ["--max-num-seqs", "4", "--enforce-eager", "--no-enable-prefix-caching", "--x", '{"a": 1}']
    assert words[6:] == [
        *("--model", "/models/m", "--served-model-name", "n", "--dtype", "bfloat16", "--max-model-len", "64"),
        "--disable-hybrid-kv-cache-manager",
    ]


def test_masks_and_extra_arguments_are_handed_down_and_ours_stay_ours() -> None:
    leg = LegParams(leg="r")
    plain = sampling_arguments(_request([]), leg)
    assert plain["allowed_token_ids"] is None and plain["_bad_words_token_ids"] is None
    asked = _request(
        [],
        allowed_token_ids=[1, 2],
        bad_words_token_ids=[[3, 4]],
        thinking_token_budget=7,
        extra_args={"a": 1, "kv_transfer_params": "mine"},
    )
    arguments = sampling_arguments(asked, leg)
    assert arguments["allowed_token_ids"] == [1, 2] and arguments["_bad_words_token_ids"] == [[3, 4]]
    assert arguments["thinking_token_budget"] == 7
    assert arguments["extra_args"] == {"a": 1, **plain["extra_args"]}  # type: ignore[dict-item]
