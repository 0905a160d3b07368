"""vLLM's /inference/v1/generate: tokens in, tokens out."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.router_fakes import MAX_CONTEXT, Rig, expected, make_rig

from router.text.model_habits import SamplingDefaults

PATH = "/inference/v1/generate"
PROMPT = [5, 6, 7]


@pytest.fixture
async def rig() -> Rig:
    return await make_rig(sampling=SamplingDefaults(temperature=0.5, top_k=3, max_new_tokens=9))


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router") as client:  # type: ignore[arg-type]
        yield client


def body_of(sampling: dict[str, Any] | None = None, **fields: object) -> dict[str, Any]:
    return {"token_ids": PROMPT, "sampling_params": {"max_tokens": 4, "temperature": 0, **(sampling or {})}, **fields}


def events_of(reply: httpx.Response) -> list[dict[str, Any]]:
    assert reply.status_code == 200, reply.text
    *events, last, _ = reply.text.split("\n\n")
    assert last == "data: [DONE]"
    return [json.loads(event[6:]) for event in events]


def asked(rig: Rig) -> Any:
    (sampling,) = [request.sampling for node in rig.nodes.nodes for request in node.generates]
    return sampling


async def test_tokens_come_out_as_vllm_shows_them(http: httpx.AsyncClient) -> None:
    reply = (await http.post(PATH, json=body_of({"n": 2, "temperature": 1}, request_id="mine"))).json()
    assert reply["request_id"] == "generate-tokens-mine" and reply["model"] == "fake-model"
    assert [choice["token_ids"] for choice in reply["choices"]] == [expected(PROMPT, 4, index) for index in (0, 1)]
    assert reply["usage"] | {"prompt_tokens_details": None} == {
        "prompt_tokens": 3,
        "completion_tokens": 8,
        "total_tokens": 11,
        "prompt_tokens_details": None,
    }
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None and choice["logprobs"] is None
    assert reply["output_mode"] == "tokens" and "text" not in choice
    assert reply["prompt_token_ids"] is None and reply["kv_transfer_params"] is None


async def test_the_text_comes_beside_them_where_it_is_wanted(http: httpx.AsyncClient) -> None:
    text = bytes(expected(PROMPT, 4)).decode()
    reply = (await http.post(PATH, json=body_of({"logprobs": 2}, output_mode="text", return_token_ids=True))).json()
    assert reply["prompt_token_ids"] == PROMPT and reply["output_mode"] == "text"
    assert reply["choices"][0]["text"] == text
    entries = reply["choices"][0]["logprobs"]["content"]
    assert "".join(entry["token"] for entry in entries) == text and len(entries[0]["top_logprobs"]) == 2


async def test_logprobs_are_by_token_id_with_the_token_itself_first(http: httpx.AsyncClient) -> None:
    tokens = expected(PROMPT, 4)
    reply = (await http.post(PATH, json=body_of({"logprobs": 2}))).json()
    for token, entry in zip(tokens, reply["choices"][0]["logprobs"]["content"], strict=True):
        own = {"token_id": token, "logprob": -0.5, "rank": 1}
        assert entry == {**own, "top_logprobs": [own, {"token_id": token + 1, "logprob": -1.5, "rank": 2}]}


async def test_logprobs_of_the_prompt_are_as_those_of_a_completion(http: httpx.AsyncClient) -> None:
    told = (await http.post(PATH, json=body_of({"prompt_logprobs": 2}))).json()["prompt_logprobs"]
    asked = {"prompt": PROMPT, "max_tokens": 4, "prompt_logprobs": 2}
    as_completion = (await http.post("/v1/completions", json=asked)).json()["choices"][0]["prompt_logprobs"]
    assert told == as_completion and len(told) == len(PROMPT) and told[0] is None
    assert (await http.post(PATH, json=body_of({}))).json()["prompt_logprobs"] is None


async def test_a_stream_has_the_prompt_once_and_usage_at_its_end(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    fields = {"stream": True, "stream_options": options, "return_token_ids": True}
    events = events_of(await http.post(PATH, json=body_of({"logprobs": 0}, **fields)))
    assert [event.get("prompt_token_ids") for event in events] == [PROMPT, None, None, None, None]
    choices = [choice for event in events for choice in event["choices"]]
    assert [choice["token_ids"] for choice in choices] == [[token] for token in expected(PROMPT, 4)]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert all(len(choice["logprobs"]["content"]) == 1 for choice in choices)
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == 4
    assert all(event["usage"] is None for event in events[:-1])
    options["continuous_usage_stats"] = True
    events = events_of(await http.post(PATH, json=body_of(**fields)))
    assert [event["usage"]["completion_tokens"] for event in events] == [1, 2, 3, 4, 4]
    texts = [event["choices"][0]["text"] for event in events_of(await http.post(PATH, json=TEXTS))]
    assert "".join(texts) == bytes(expected(PROMPT, 4)).decode()


TEXTS = body_of(stream=True, output_mode="text")


async def test_the_models_own_defaults_count_for_max_tokens_alone(http: httpx.AsyncClient, rig: Rig) -> None:
    """As in vLLM's endpoint, whose sampling parameters have defaults of their own."""
    assert (await http.post(PATH, json={"token_ids": PROMPT, "sampling_params": {}})).status_code == 200
    sampling = asked(rig)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k) == (9, 1.0, 0)


async def test_without_any_default_an_answer_may_fill_the_context() -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.eos = expected(PROMPT, 1)[0]
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router") as http:  # type: ignore[arg-type]
        reply = await http.post(PATH, json={"token_ids": PROMPT, "sampling_params": {"temperature": 0}})
    assert reply.json()["choices"][0]["finish_reason"] == "stop"
    assert asked(rig).max_tokens == MAX_CONTEXT - len(PROMPT)


async def test_sampling_parameters_reach_the_engine_by_their_names(http: httpx.AsyncClient, rig: Rig) -> None:
    given: dict[str, Any] = {
        "temperature": 0.25,
        "top_p": 0.5,
        "top_k": 7,
        "min_p": 0.125,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "stop_token_ids": [200],
        "ignore_eos": True,
        "logprobs": 1,
        "logit_bias": {"9": 2.0},
        "allowed_token_ids": [1, 2],
        "bad_words": ["a"],
        "extra_args": {"x": 1},
        "output_kind": 2,
        "skip_clone": True,
    }
    reply = await http.post(PATH, json=body_of(given, priority=-4, cache_salt="s"))
    assert reply.status_code == 200, reply.text
    sampling = asked(rig)
    same = given.keys() - {"logit_bias", "output_kind", "skip_clone"}
    assert {name: getattr(sampling, name) for name in same} == {name: given[name] for name in same}
    assert sampling.logit_bias == {9: 2.0} and sampling.bad_words_token_ids == [[97]]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"token_ids": []}, "token_ids"),
        ({"token_ids": [-1]}, "token_ids"),
        ({"token_ids": [512]}, "token_ids"),
        ({"token_ids": "text"}, "token_ids"),
        ({"output_mode": "audio"}, "output_mode"),
        ({"features": {"mm_hashes": {}}}, "features"),
        ({"content_parts": [{"type": "image_url"}]}, "content_parts"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"zzz": 1}, "zzz"),
        ({"sampling_params": {"zzz": 1}}, "sampling_params.zzz"),
        ({"sampling_params": {"prompt_logprobs": 21}}, "sampling_params.prompt_logprobs"),
        ({"sampling_params": {"prompt_logprobs": []}}, "sampling_params.prompt_logprobs"),
        ({"sampling_params": {"prompt_logprobs": 1}, "stream": True}, "sampling_params.prompt_logprobs"),
        ({"sampling_params": {"extra_args": {"x": 1}, "structured_outputs": {}}}, "sampling_params.structured_outputs"),
        ({"sampling_params": {"structured_outputs": {"regex": "["}}}, "sampling_params.structured_outputs.regex"),
        ({"sampling_params": {"trace_decode_token_ids": [1]}}, "sampling_params.trace_decode_token_ids"),
        ({"sampling_params": {"detokenize": False, "stop": "a"}}, "sampling_params.stop"),
        ({"sampling_params": {"detokenize": False}, "output_mode": "text"}, "output_mode"),
        ({"sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
        ({"sampling_params": {"max_tokens": 0}}, "sampling_params.max_tokens"),
        ({"model": "other"}, "model"),
    ],
)
async def test_what_it_cannot_do_is_refused_by_name(http: httpx.AsyncClient, body: dict[str, Any], param: str) -> None:
    reply = await http.post(PATH, json=body_of() | body)
    assert reply.status_code == (404 if param == "model" else 400), reply.text
    assert reply.json()["error"]["param"] == param
