"""No field of a request is ignored in silence: each is obeyed, harmless, or refused by name. And the fields' types."""

import json
from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_fakes import MAX_CONTEXT, Rig, client_of, make_rig

from router.api.body import strict_body
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.chat_messages import ChatMessage, ContentPart
from router.api.fields.common_fields import StreamOptions
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.other_fields import HARMLESS, REFUSED

OPENAI_CHAT = """audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens
    messages metadata modalities model moderation n parallel_tool_calls prediction presence_penalty prompt_cache_key
    prompt_cache_options prompt_cache_retention reasoning_effort response_format safety_identifier seed service_tier
    stop store stream stream_options temperature tool_choice tools top_logprobs top_p user verbosity
    web_search_options"""
OPENAI_COMPLETIONS = """best_of echo frequency_penalty logit_bias logprobs max_tokens model n presence_penalty prompt
    seed stop stream stream_options suffix temperature top_p user"""
VLLM_BOTH = """model frequency_penalty logit_bias logprobs max_tokens n presence_penalty response_format seed stop
    stream stream_options temperature top_p thinking_token_budget user use_beam_search top_k min_p repetition_penalty
    watermarking length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids
    allowed_token_ids bad_words echo add_special_tokens structured_outputs priority request_id session_id
    return_tokens_as_token_ids return_token_ids routed_experts_prompt_start return_token_offsets mm_payload
    return_mm_kwargs cache_salt kv_transfer_params ec_transfer_params vllm_xargs repetition_detection
    stream_interval"""
VLLM_CHAT = """messages top_logprobs max_completion_tokens tools tool_choice reasoning_effort include_reasoning
    parallel_tool_calls add_generation_prompt continue_final_message documents chat_template chat_template_kwargs
    media_io_kwargs mm_processor_kwargs return_prompt_text"""
VLLM_COMPLETIONS = "prompt suffix prompt_embeds"
VLLM_BEFORE = """guided_json guided_regex guided_choice guided_grammar guided_decoding_backend
    guided_whitespace_pattern structural_tag best_of"""
MESSAGE = """role content name tool_calls tool_call_id refusal audio function_call annotations reasoning
    reasoning_content tools task"""
PART = "type text image_url input_audio video_url file refusal uuid prompt_cache_breakpoint"

ASK: dict[str, object] = {"model": "fake-model", "prompt": "hello", "max_tokens": 3, "temperature": 0}
CHAT: dict[str, object] = {
    "model": "fake-model",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 3,
    "temperature": 0,
}
BOTH = pytest.mark.parametrize(("path", "ask"), [("/v1/completions", ASK), ("/v1/chat/completions", CHAT)])


@pytest.fixture
async def rig() -> Rig:
    return await make_rig()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(rig) as client:
        yield client


def answer_of(reply: httpx.Response) -> object:
    assert reply.status_code == 200, reply.text
    return reply.json()["choices"], reply.json()["usage"]


def refusal_of(reply: httpx.Response) -> tuple[str, str]:
    """(the field, the message)."""
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    return error["param"], error["message"]


def test_every_field_of_openai_and_vllm_is_in_the_table() -> None:
    for kind, names in (
        (ChatRequest, (OPENAI_CHAT, VLLM_BOTH, VLLM_CHAT, VLLM_BEFORE)),
        (CompletionRequest, (OPENAI_COMPLETIONS, VLLM_BOTH, VLLM_COMPLETIONS, VLLM_BEFORE)),
    ):
        assert set(" ".join(names).split()) <= set(strict_body(kind).__struct_fields__)
    assert set(MESSAGE.split()) <= set(ChatMessage.__struct_fields__)
    assert set(PART.split()) <= set(ContentPart.__struct_fields__)
    assert {"include_usage", "continuous_usage_stats", "include_obfuscation"} == set(StreamOptions.__struct_fields__)


def test_no_field_has_two_meanings() -> None:
    obeyed_by_both = set(ChatRequest.__struct_fields__) & set(CompletionRequest.__struct_fields__)
    assert HARMLESS.keys().isdisjoint(REFUSED)
    assert obeyed_by_both.isdisjoint(HARMLESS.keys() | REFUSED.keys()), "what both obey is in no table"
    known = " ".join((OPENAI_CHAT, OPENAI_COMPLETIONS, VLLM_BOTH, VLLM_CHAT, VLLM_COMPLETIONS, VLLM_BEFORE)).split()
    assert HARMLESS.keys() | REFUSED.keys() <= set(known), "the table has no field that nobody ever had"


@BOTH
async def test_harmless_fields_change_nothing_whatever_they_hold(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    plain = answer_of(await http.post(path, json=ask))
    for value in ("x", 1, {"a": [1]}, None):
        assert answer_of(await http.post(path, json={**ask, **dict.fromkeys(HARMLESS, value)})) == plain


@BOTH
async def test_refused_fields_are_named_with_what_to_do(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    obeyed = (ChatRequest if "chat" in path else CompletionRequest).__struct_fields__
    for name, refused in REFUSED.items():
        if name in obeyed:
            continue
        param, message = refusal_of(await http.post(path, json={**ask, name: {"some": "thing"}}))
        assert param == name and message.startswith(f"{name} is not supported") and refused.instead in message


@BOTH
async def test_values_that_ask_for_nothing_are_taken(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    plain = answer_of(await http.post(path, json=ask))
    obeyed = (ChatRequest if "chat" in path else CompletionRequest).__struct_fields__
    nothing = {name: refused.neutral[0] if refused.neutral else None for name, refused in REFUSED.items()}
    assert answer_of(await http.post(path, json={**nothing, **ask})) == plain
    for name in (*obeyed, *REFUSED):
        if name not in ("prompt", "messages", "max_tokens", "temperature"):
            assert answer_of(await http.post(path, json={**ask, name: None})) == plain, f"{name} null"


@BOTH
async def test_an_unknown_field_is_refused_and_a_slip_of_the_pen_told(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    param, message = refusal_of(await http.post(path, json={**ask, "max_token": 5}))
    assert param == "max_token" and "did you mean max_tokens?" in message
    param, message = refusal_of(await http.post(path, json={**ask, "zzz": None}))
    assert param == "zzz" and "leave it out" in message
    options = {"stream": True, "stream_options": {"include_usages": True}}
    assert refusal_of(await http.post(path, json={**ask, **options}))[0] == "stream_options.include_usages"


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"prefix": True}, "messages[0].prefix"),
        ({"tools": [{}]}, "messages[0].tools"),
        ({"audio": {"id": "a"}}, "messages[0].audio"),
        ({"refusal": "no"}, "messages[0].refusal"),
        ({"content": [{"type": "text", "text": "a", "lang": "en"}]}, "messages[0].content[0].lang"),
        ({"content": [{"type": "text", "text": "a", "image_url": {}}]}, "messages[0].content.image_url"),
        ({"content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
    ],
)
async def test_so_in_messages(http: httpx.AsyncClient, message: dict[str, object], param: str) -> None:
    body = {**CHAT, "messages": [{"role": "user", "content": "hello", **message}]}
    assert refusal_of(await http.post("/v1/chat/completions", json=body))[0] == param


async def test_an_answer_can_be_sent_back_as_clients_dump_it(http: httpx.AsyncClient) -> None:
    empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "tool_calls", "name"))
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    layers = ("provider_specific_fields", "reasoning_details", "reasoning_items", "thinking_blocks")
    empty |= {name: [{"a": 1}] for name in layers}
    dumped = [turns[0], {**turns[1], **empty, "annotations": []}, {**turns[2], "cache_control": {"type": "ephemeral"}}]
    plain, sent = [
        answer_of(await http.post("/v1/chat/completions", json={**CHAT, "messages": messages}))
        for messages in (turns, dumped)
    ]
    assert plain == sent


async def test_the_model_may_be_left_out(http: httpx.AsyncClient) -> None:
    for path, ask in (("/v1/completions", ASK), ("/v1/chat/completions", CHAT)):
        for model in ({}, {"model": None}, {"model": ""}):
            body = {name: value for name, value in ask.items() if name != "model"} | model
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.json()["model"]) == (200, "fake-model")


async def test_no_logprobs_and_none_of_the_likeliest_is_no_contradiction(http: httpx.AsyncClient) -> None:
    reply = await http.post("/v1/chat/completions", json={**CHAT, "logprobs": False, "top_logprobs": 0})
    assert reply.json()["choices"][0]["logprobs"] is None
    body = {**CHAT, "logprobs": False, "top_logprobs": 1}
    assert refusal_of(await http.post("/v1/chat/completions", json=body))[0] == "top_logprobs"


@BOTH
async def test_usage_so_far_is_in_every_chunk_if_asked_for(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    for so_far in (True, False, None):
        options = {"include_usage": True, "continuous_usage_stats": so_far, "include_obfuscation": None}
        reply = await http.post(path, json={**ask, "stream": True, "stream_options": options})
        usages = [json.loads(event[6:])["usage"] for event in reply.text.split("\n\n")[:-2]]
        counts = [usage and usage["completion_tokens"] for usage in usages]
        begin = [0] if "chat" in path else []
        assert counts == ([*begin, 1, 2, 3, 3] if so_far else [None] * (len(counts) - 1) + [3])
    alone = {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    assert '"usage"' not in (await http.post(path, json={**ask, **alone})).text, "only beside include_usage, as vLLM"


@BOTH
async def test_numbers_may_be_texts_and_true_is_one(http: httpx.AsyncClient, path: str, ask: dict[str, object]) -> None:
    """As vLLM reads them; what is no number of the field's kind is refused all the same."""
    odd: dict[str, object] = {
        "max_tokens": "2",
        "temperature": "0",
        "n": True,
        "stop_token_ids": ["65"],
        "ignore_eos": 1,
    }
    reply = await http.post(path, json={**ask, **odd})
    assert reply.status_code == 200 and reply.json()["usage"]["completion_tokens"] == 2
    assert refusal_of(await http.post(path, json={**ask, "n": True, "seed": "1.5"}))[0] == "seed"
    assert refusal_of(await http.post(path, json={**ask, "ignore_eos": 2}))[0] == "ignore_eos"


NUMBERS = ("max_tokens", "n", "seed", "top_k", "min_tokens", "temperature", "top_p")


@BOTH
async def test_wrong_types_are_refused_by_name(http: httpx.AsyncClient, path: str, ask: dict[str, object]) -> None:
    for name in (*NUMBERS, "stop_token_ids", "stop"):
        for value in ("three", {}, [True], [[1]], 1.5e300):
            if (name, value) == ("stop", "three"):
                continue
            param, _ = refusal_of(await http.post(path, json={**ask, name: value}))
            assert param.startswith(name), (name, value)
        for raw in ("1e400", "NaN", "-Infinity", "01"):
            text = json.dumps({**ask, name: "@"}).replace('"@"', raw)
            param, message = refusal_of(await http.post(path, content=text))
            assert param == name or (param is None and "not valid JSON" in message)


@BOTH
async def test_a_number_is_whole_however_it_is_written(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    plain = answer_of(await http.post(path, json={**ask, "n": 2, "seed": 7, "stop_token_ids": [1]}))
    body = {**ask, "n": 2.0, "seed": 7.0, "max_tokens": 3.0, "stop_token_ids": [1.0], "temperature": 0.0}
    assert answer_of(await http.post(path, json=body)) == plain
    digits = json.dumps({**ask, "max_tokens": 1}).replace('"max_tokens": 1', '"max_tokens": ' + "9" * 6000)
    reply = await http.post(path, content=digits)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "prompt",
    [3, True, {}, [True], [1, True], [None], [[True]], [["a"]], [[1, "a"]], [1.5], [[1.5]], [-1], [1 << 40], [[]]],
)
async def test_a_prompt_is_text_or_token_ids(http: httpx.AsyncClient, prompt: object) -> None:
    assert refusal_of(await http.post("/v1/completions", json={**ASK, "prompt": prompt}))[0].startswith("prompt")


async def test_token_ids_may_be_written_as_floats(http: httpx.AsyncClient) -> None:
    replies = [await http.post("/v1/completions", json={**ASK, "prompt": ids}) for ids in ([65, 66], [65.0, 66.0])]
    assert answer_of(replies[0]) == answer_of(replies[1])


async def test_the_models_list_says_how_long_a_request_may_be(rig: Rig, http: httpx.AsyncClient) -> None:
    (listed,) = (await http.get("/v1/models")).json()["data"]
    assert listed == (await http.get("/v1/models/fake-model")).json()
    assert (listed["id"], listed["root"], listed["parent"]) == ("fake-model", "fake-model", None)
    assert listed["max_model_len"] == rig.answerer.max_context


@BOTH
async def test_both_names_of_the_bound_mean_the_same(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    """Load generators send both to both endpoints; the newer name counts."""
    for bounds, count in (({"max_completion_tokens": 2}, 2), ({"max_tokens": None, "max_completion_tokens": 4}, 4)):
        assert (await http.post(path, json={**ask, **bounds})).json()["usage"]["completion_tokens"] == count


async def test_a_prompt_is_shortened_if_asked_for(http: httpx.AsyncClient) -> None:
    async def prompt_of(**more: object) -> list[int]:
        body = {**ASK, "prompt": "abcdef", "max_tokens": 3, "return_token_ids": True, **more}
        reply = await http.post("/v1/completions", json=body)
        assert reply.status_code == 200, reply.text
        (choice,) = reply.json()["choices"]
        assert reply.json()["usage"]["prompt_tokens"] == len(choice["prompt_token_ids"])
        return list(choice["prompt_token_ids"])

    for limit, side, text in (
        (2, None, b"ef"),
        (2, "left", b"ef"),
        (2, "right", b"ab"),
        (6, "left", b"abcdef"),
        (-1, "right", b"abcdef"),
        (None, "right", b"abcdef"),
    ):
        assert await prompt_of(truncate_prompt_tokens=limit, truncation_side=side) == list(text)
    long = "x" * MAX_CONTEXT + "y"
    assert await prompt_of(prompt=long, truncate_prompt_tokens=-1) == list(long[-(MAX_CONTEXT - 3) :].encode())
    most = {"prompt": long, "max_tokens": None, "truncate_prompt_tokens": -1}
    assert len(await prompt_of(**most)) == MAX_CONTEXT - 16, "the room of a completion's default"
    for wrong, param in (
        ({"truncate_prompt_tokens": -2}, "truncate_prompt_tokens"),
        ({"truncate_prompt_tokens": MAX_CONTEXT + 1}, "truncate_prompt_tokens"),
        ({"truncation_side": "middle"}, "truncation_side"),
        ({"truncate_prompt_tokens": 0}, "prompt"),
    ):
        assert refusal_of(await http.post("/v1/completions", json={**ASK, **wrong}))[0] == param
    no_room = await http.post(
        "/v1/completions", json={**ASK, "max_tokens": MAX_CONTEXT + 1, "truncate_prompt_tokens": -1}
    )
    assert no_room.json()["error"]["code"] == "context_length_exceeded"


async def test_logprobs_name_tokens_by_their_ids_if_asked_for(http: httpx.AsyncClient) -> None:
    ask = {**CHAT, "logprobs": True, "top_logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = (await http.post("/v1/chat/completions", json=ask)).json()["choices"]
    names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    entries = choice["logprobs"]["content"]
    assert [entry["token"] for entry in entries] == [entry["top_logprobs"][0]["token"] for entry in entries] == names
    assert bytes(byte for entry in entries for byte in entry["bytes"]).decode() == choice["message"]["content"]
    ask = {**ASK, "logprobs": 1, "return_token_ids": True, "return_tokens_as_token_ids": True}
    (choice,) = (await http.post("/v1/completions", json=ask)).json()["choices"]
    names = [f"token_id:{token_id}" for token_id in choice["token_ids"]]
    assert choice["logprobs"]["tokens"] == names
    assert choice["logprobs"]["text_offset"] == [0, 1, 2], "of the text, which is not made of names"
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [[name] for name in names]


@BOTH
async def test_a_salt_that_keeps_nothing_apart_is_refused(
    http: httpx.AsyncClient, path: str, ask: dict[str, object]
) -> None:
    for salt in ("", "x" * 1025):
        assert refusal_of(await http.post(path, json={**ask, "cache_salt": salt}))[0] == "cache_salt"
    assert (await http.post(path, json={**ask, "cache_salt": "x" * 1024})).status_code == 200
