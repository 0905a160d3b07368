"""What vLLM servers are sent, and what is made of their answers: lies and breaks first, then the translation."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from support.delta_readers import Collected, deltas_of
from support.fake_vllm_server import MODEL, FakeVllm, World
from support.plain_vllm import plain_config, write_model_folder
from support.router_fakes import serve

from kvcore.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineError,
    InvalidRequestError,
    KVFerryError,
    ModelLoadError,
    ModelNotFoundError,
    NodeUnavailableError,
    OverloadedError,
    PayloadTooLargeError,
)
from kvcore.handoff import HandoffKind
from kvcore.types import Role
from nodeapi.grammars.grammar import Grammar, GrammarKind
from nodeapi.messages import FinishReason, GenerateRequest, PrefillRequest
from nodeapi.sampling import SamplingParams
from router.nodes.vllm_client import VllmClient
from router.nodes.vllm_model import read_model_facts
from router.nodes.vllm_replies import MAX_EVENT_BYTES, CompletionStream, prefill_result, prompt_scores, refusal
from router.nodes.vllm_requests import decode_body, mooncake_decode_params, prefill_body

PREFILL = PrefillRequest(request_id="r.p1", prompt_token_ids=[1, 2, 3], deadline_s=5)
GENERATE = GenerateRequest(
    request_id="r.d2", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=4), deadline_s=5
)
URL = "http://h:1"


def event(body: object) -> bytes:
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def choice(index: int = 0, tokens: list[int] | None = None, **more: object) -> dict[str, object]:
    return {"index": index, "text": "x", "token_ids": [5] if tokens is None else tokens, "finish_reason": None, **more}


def chunks(*choices: dict[str, object]) -> bytes:
    return b"".join(event({"id": "cmpl-x", "choices": [each]}) for each in choices)


# --- lies and breaks ---


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"data: {\n\n", NodeUnavailableError),
        (b"data: []\n\n", NodeUnavailableError),
        (b'data: {"choices": [{"index": "0"}]}\n\n', NodeUnavailableError),
        (chunks({"index": 0, "text": "x"}), EngineError),
        (chunks(choice(finish_reason="error")), EngineError),
        (chunks(choice(logprobs={"token_logprobs": [-1.0], "top_logprobs": [{"the": -1.0}]})), NodeUnavailableError),
        (chunks(choice(tokens=[-1])), NodeUnavailableError),
        (chunks(choice(tokens=[1 << 32])), NodeUnavailableError),
        (
            chunks(choice(logprobs={"token_logprobs": [-1], "top_logprobs": [{"token_id:4294967296": -1}]})),
            NodeUnavailableError,
        ),
        (chunks(choice(1)), EngineError),
        (chunks(choice(-1)), EngineError),
        (chunks(choice(finish_reason="stop"), choice()), EngineError),
        (chunks(choice(finish_reason="stop"), choice(finish_reason="stop")), EngineError),
        (event({"error": {"message": "dead", "code": 500}}), EngineError),
        (event({"error": {"message": "later", "code": 503}}), OverloadedError),
        (event({"error": {"message": "no", "code": 400}}), InvalidRequestError),
        (chunks(choice()) + event({"error": {"message": "EngineCore has died", "code": 400}}), EngineError),
    ],
)
def test_a_stream_that_is_wrong_becomes_an_error_of_ours(body: bytes, kind: type[KVFerryError]) -> None:
    with pytest.raises(KVFerryError) as caught:
        CompletionStream(n=1, logprobs=1, url=URL).feed(body)
    assert type(caught.value) is kind and (URL in caught.value.message or kind is InvalidRequestError)


@pytest.mark.parametrize("body", [b'{"error": {"message": "out of disk"}}', b": x\n\n<p>out of disk</p>\n<p>x</p>\n"])
def test_an_answer_that_is_no_stream_is_told_in_its_own_words(body: bytes) -> None:
    stream = CompletionStream(n=1, logprobs=None, url=URL)
    assert stream.feed(body) == []
    with pytest.raises(NodeUnavailableError, match=f"{URL} answered no stream of events, but .*out of disk"):
        stream.check_broken_off()


def test_a_stream_that_breaks_off_is_a_stream_all_the_same() -> None:
    for body in (b"", b"data: {", b": x\n\nevent: y\r\nid: 1\nretry: 5\n\r\n", chunks(choice()) + b"<p>"):
        stream = CompletionStream(n=1, logprobs=None, url=URL)
        stream.feed(body)
        stream.check_broken_off()


@pytest.mark.parametrize("cached", [-7, 4, 10**15])
def test_a_count_of_cached_tokens_that_cannot_be_is_none(cached: int) -> None:
    usage = {"prompt_tokens": -3, "prompt_tokens_details": {"cached_tokens": cached}}
    stream = CompletionStream(n=1, logprobs=None, url=URL, told=(3, 0))
    (last,) = stream.feed(chunks(choice(finish_reason="stop")) + event({"choices": [], "usage": usage}))
    assert last.finish_reason is FinishReason.STOP and last.info is None
    result = prefill_result(json.dumps({"usage": usage}).encode(), PREFILL, URL)
    assert (result.cached_tokens, result.computed_tokens) == (0, 3)


def test_of_an_answer_that_goes_on_the_prompt_alone_is_cached() -> None:
    usage = {"prompt_tokens": 8, "prompt_tokens_details": {"cached_tokens": 7}}
    stream = CompletionStream(n=1, logprobs=None, url=URL, told=(3, 5))
    (last,) = stream.feed(chunks(choice(finish_reason="stop")) + event({"choices": [], "usage": usage}))
    assert last.info is not None and (last.info.cached_tokens, last.info.computed_tokens) == (3, 0)


@pytest.mark.parametrize(
    ("token", "rank", "logprob"), [(-1, 1, -1.0), (1 << 32, 1, -1.0), (7, -1, -1.0), (7, 1, -1e300)]
)
def test_logprobs_of_a_prompt_that_no_number_of_ours_can_hold_are_unreadable(
    token: int, rank: int, logprob: float
) -> None:
    row = {"5": {"logprob": -0.5, "rank": rank}, str(token): {"logprob": logprob, "rank": 2}}
    raw = json.dumps({"choices": [{"prompt_logprobs": [None, row]}]}).encode()
    with pytest.raises(NodeUnavailableError, match="cannot be read"):
        list(prompt_scores(raw, [5, 5], 2, URL))


def test_an_event_without_end_is_cut_off() -> None:
    stream = CompletionStream(n=1, logprobs=None, url=URL)
    stream.feed(b"data: " + b"x" * (MAX_EVENT_BYTES - 6))
    with pytest.raises(NodeUnavailableError, match="more than"):
        stream.feed(b"x")


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (400, b'{"error": {"message": "bad top_k", "param": "top_k", "code": 400}}', InvalidRequestError),
        (422, b'{"error": {"message": "bad", "code": 422}}', InvalidRequestError),
        (400, b'{"error": {"message": "Client disconnected", "code": 400}}', NodeUnavailableError),
        (400, b'{"message": "maximum context length is 5"}', ContextLengthError),
        (401, b'{"error": "Unauthorized"}', NodeUnavailableError),
        (404, b'{"error": {"message": "no model"}}', ModelNotFoundError),
        (413, b"", PayloadTooLargeError),
        (429, b"", OverloadedError),
        (503, b"\xff", OverloadedError),
        (500, b"[]", EngineError),
        (501, b'{"error": {"message": "not implemented"}}', EngineError),
        (502, b"<html>", NodeUnavailableError),
    ],
)
def test_each_refusal_has_its_error(status: int, body: bytes, kind: type[KVFerryError]) -> None:
    error = refusal(status, body, URL)
    assert type(error) is kind and error.message
    assert error.param == ("top_k" if b"top_k" in body else "model" if status == 404 else None)


@pytest.mark.parametrize("raw", [b"", b"{}", b'{"usage": 5}', b"\xff"])
def test_a_prefill_answer_that_cannot_be_read_is_an_unavailable_node(raw: bytes) -> None:
    with pytest.raises(NodeUnavailableError, match="cannot be read"):
        prefill_result(raw, PREFILL, URL)


def app_that(answers: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.Application:
    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answers)
    return app


@pytest.fixture
async def client_of(tmp_path: Path):
    """Makes clients of one decoder at a URL."""
    made: list[VllmClient] = []
    folder = write_model_folder(tmp_path / "m")

    def make(url: str, api_key: str | None = None) -> VllmClient:
        fake = FakeVllm("d0", Role.DECODER, World(HandoffKind.NIXL), url=url)
        config = plain_config({"d0": fake}, folder)
        made.append(VllmClient(config, read_model_facts(config), max_connections=4, api_key=api_key))
        return made[-1]

    yield make
    for client in made:
        await client.aclose()
        await client.aclose()


async def test_a_stream_that_says_nothing_more_is_late(client_of) -> None:
    async def answers(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(chunks(choice()))
        await request.content.readany()
        await asyncio.Event().wait()
        return response

    got = Collected()
    async with serve(app_that(answers)) as url:
        with pytest.raises(DeadlineExceededError):
            await client_of(url).generate(url, GENERATE, got, first_s=20.0, gap_s=0.2)
    assert got.token_ids == [5]


async def test_a_stream_that_ends_early_ends_without_a_finish(client_of) -> None:
    async def answers(request: web.Request) -> web.Response:
        return web.Response(body=chunks(choice()))

    async with serve(app_that(answers)) as url:
        deltas = await deltas_of(client_of(url), url, GENERATE, 2)
    assert [delta.finish_reason for delta in deltas] == [None]


@pytest.mark.parametrize(
    ("models", "wrong"),
    [
        ('{"data": [{"id": "a"}, {"id": "b"}]}', f"serves a, b, not {MODEL}: model.name must be"),
        ('{"data": []}', "serves none"),
        (json.dumps({"data": [{"id": MODEL}]}), "gives no max_model_len"),
        ('{"models": []}', "is not what vLLM answers"),
    ],
)
async def test_a_server_that_is_not_the_right_one_is_told_why(client_of, models: str, wrong: str) -> None:
    async def answers(request: web.Request) -> web.Response:
        return web.Response(text=models, content_type="application/json")

    async with serve(app_that(answers)) as url:
        with pytest.raises(NodeUnavailableError, match=wrong):
            await client_of(url).info(url, timeout_s=2)


async def test_the_servers_key_goes_with_every_call(client_of) -> None:
    seen: list[str | None] = []

    async def answers(request: web.Request) -> web.Response:
        seen.append(request.headers.get("Authorization"))
        return web.json_response({"data": [{"id": MODEL, "max_model_len": 7}]})

    async with serve(app_that(answers)) as url:
        report = await client_of(url, "secret").info(url, timeout_s=2)
        assert report.engine is not None and report.engine.max_context == 7
        await client_of(url).info(url, timeout_s=2)
    assert seen == ["Bearer secret"] * 2 + [None] * 2


async def test_what_does_not_change_while_a_server_lives_is_asked_once(client_of) -> None:
    asked: list[str] = []
    health = 200

    async def answers(request: web.Request) -> web.Response:
        asked.append(request.path)
        if request.path == "/health":
            return web.Response(status=health)
        return web.json_response({"data": [{"id": MODEL, "max_model_len": 7 + len(asked)}]})

    async with serve(app_that(answers)) as url:
        client = client_of(url)
        reports = [await client.info(url, timeout_s=2) for _ in range(2)]
        assert reports[0] == reports[1] and asked == ["/health", "/v1/models", "/health"]
        health = 503
        with pytest.raises(OverloadedError):
            await client.info(url, timeout_s=2)
        health = 200
        again = await client.info(url, timeout_s=2)
        assert again.engine != reports[0].engine, "it may have been restarted with other arguments"


def test_a_model_folder_that_says_too_little_is_refused(tmp_path: Path) -> None:
    folder = write_model_folder(tmp_path)
    config = plain_config({"d0": FakeVllm("d0", Role.DECODER, World(HandoffKind.NIXL), url=URL)}, folder)
    (folder / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError, match="has no num_attention_heads"):
        read_model_facts(config)
    (folder / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json is missing"):
        read_model_facts(config)


# --- translation ---


def test_what_an_event_carries_wherever_it_is_cut() -> None:
    body = (
        b": keep-alive\r\n\r\n"
        + chunks(choice(1, [7, 8]), choice(0, [5]), choice(1, [], finish_reason="length"))
        + chunks(choice(0, [9], finish_reason="stop", stop_reason=9))
        + event({"choices": [], "usage": {"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}}})
        + b"data: [DONE]\n\n"
    )
    for size in (1, 7, len(body)):
        stream = CompletionStream(n=2, logprobs=None, url=URL, told=(9, 0))
        deltas = [delta for at in range(0, len(body), size) for delta in stream.feed(body[at : at + size])]
        assert stream.ended and not stream.holds
        assert [(delta.index, delta.token_ids) for delta in deltas] == [(1, [7, 8]), (0, [5]), (1, []), (0, [9])]
        assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.LENGTH, FinishReason.STOP]
        assert deltas[-1].stop_token_id == 9 and deltas[-1].info is not None
        assert (deltas[-1].info.cached_tokens, deltas[-1].info.computed_tokens) == (4, 5)


@pytest.mark.parametrize("usage", [{"prompt_tokens": 9}, {"prompt_tokens": 9, "prompt_tokens_details": None}])
def test_usage_without_details_ends_the_stream_too(usage: dict[str, object]) -> None:
    stream = CompletionStream(n=1, logprobs=None, url=URL)
    assert stream.feed(chunks(choice(finish_reason="stop"))) == [] and stream.holds
    (last,) = stream.feed(event({"choices": [], "usage": usage}))
    assert last.info is None and last.stop_token_id == 5, "the end-of-sequence token has no stop_reason"


def test_the_likeliest_tokens_come_without_the_sampled_one_that_is_none_of_them() -> None:
    top = {"token_id:5": -4.0, "token_id:8": -0.5, "token_id:9": -1.5}
    logprobs = {"token_logprobs": [-4.0], "top_logprobs": [top], "tokens": ["token_id:5"], "text_offset": [0]}
    (delta,) = CompletionStream(n=1, logprobs=2, url=URL).feed(chunks(choice(logprobs=logprobs)))
    assert delta.logprobs is not None and delta.logprobs[0].top == [(8, -0.5), (9, -1.5)]
    assert delta.logprobs[0].logprob == -4.0


def test_what_the_prefill_leg_answers_reaches_the_decode_leg_to_the_byte() -> None:
    params = b'{"do_remote_prefill": true, "remote_block_ids": [[1, 2]],  "x": 1e3}'
    usage = b'{"prompt_tokens": 3, "prompt_tokens_details": {"cached_tokens": 2}}'
    result = prefill_result(b'{"usage": ' + usage + b', "kv_transfer_params": ' + params + b"}", PREFILL, URL)
    assert (result.cached_tokens, result.computed_tokens, result.handoff_params) == (2, 1, params)
    request = msgspec.structs.replace(GENERATE, handoff_params=result.handoff_params)
    assert b'"kv_transfer_params":' + params in decode_body(MODEL, request)
    assert prefill_result(b'{"usage": {}, "kv_transfer_params": null}', PREFILL, URL).handoff_params == b""


def test_the_bodies_of_both_legs() -> None:
    body = json.loads(prefill_body(MODEL, HandoffKind.NIXL, msgspec.structs.replace(PREFILL, cache_salt=b"s")))
    assert body["cache_salt"] == "s" and body["kv_transfer_params"]["do_remote_decode"] is True
    body = json.loads(prefill_body(MODEL, HandoffKind.MOONCAKE, PREFILL))
    assert body["kv_transfer_params"]["transfer_id"] == "xfer-r.p1" and "cache_salt" not in body
    params = json.loads(mooncake_decode_params({"remote_engine_id": "e"}, "r.p1"))
    assert params == {
        "do_remote_prefill": True,
        "do_remote_decode": False,
        "remote_engine_id": "e",
        "transfer_id": "xfer-r.p1",
    }


@pytest.mark.parametrize("salt", ["s" * 129, "a/b", "a@b", "a\\b", "a\0b"])
def test_a_salt_that_vllm_refuses_reaches_it_as_its_hash(salt: str) -> None:
    sent = [msgspec.structs.replace(PREFILL, cache_salt=text.encode()) for text in (salt, salt + "!")]
    first, other = [json.loads(prefill_body(MODEL, HandoffKind.NIXL, one))["cache_salt"] for one in sent]
    assert len(first) == 64 and first.isalnum() and first != other


def test_every_sampling_parameter_is_sent() -> None:
    sampling = SamplingParams(
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=11,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        repetition_penalty=1.1,
        logit_bias={5: -1.0},
        max_tokens=9,
        min_tokens=4,
        stop_token_ids=[3],
        ignore_eos=True,
        logprobs=2,
        n=2,
    )
    body = json.loads(decode_body(MODEL, msgspec.structs.replace(GENERATE, sampling=sampling)))
    for name, value in msgspec.to_builtins(sampling, str_keys=True).items():
        assert body.pop(name) == value, name
    assert body == {
        "model": MODEL,
        "prompt": [1, 2, 3],
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }


def test_a_continued_sequence_has_its_tokens_in_the_prompt_and_the_rest_to_go() -> None:
    sampling = SamplingParams(max_tokens=9, min_tokens=4, seed=11)
    request = msgspec.structs.replace(GENERATE, sampling=sampling, output_token_ids=[8, 9])
    body = json.loads(decode_body(MODEL, request))
    assert body["prompt"] == [1, 2, 3, 8, 9] and (body["max_tokens"], body["min_tokens"]) == (7, 2)
    assert body["seed"] != 11
    greedy = msgspec.structs.replace(request, sampling=SamplingParams(max_tokens=9, temperature=0.0))
    assert "seed" not in json.loads(decode_body(MODEL, greedy))


@pytest.mark.parametrize(
    ("grammar", "field"),
    [
        (Grammar(kind=GrammarKind.JSON, text="{}"), {"json": "{}"}),
        (Grammar(kind=GrammarKind.JSON, text="{}", whitespace=" "), {"json": "{}", "whitespace_pattern": " "}),
        (Grammar(kind=GrammarKind.REGEX, text="a", whitespace=""), {"regex": "a", "disable_any_whitespace": True}),
        (Grammar(kind=GrammarKind.CHOICE, text='["a", "b"]'), {"choice": ["a", "b"]}),
        (Grammar(kind=GrammarKind.GRAMMAR, text="start: A", after=((7,),)), {"grammar": "start: A"}),
        (Grammar(kind=GrammarKind.STRUCTURAL_TAG, text="{}"), {"structural_tag": "{}"}),
    ],
)
def test_a_form_is_sent_in_vllms_words(grammar: Grammar, field: dict[str, object]) -> None:
    sampling = msgspec.structs.replace(GENERATE.sampling, grammar=grammar)
    body = json.loads(decode_body(MODEL, msgspec.structs.replace(GENERATE, sampling=sampling)))
    assert body["structured_outputs"] == field


def test_masks_and_more_are_sent_as_the_server_knows_them() -> None:
    plain = json.loads(decode_body(MODEL, GENERATE))
    fields = {"allowed_token_ids": [1, 2], "bad_words": ["a b"], "thinking_token_budget": 0}
    assert plain.keys().isdisjoint({*fields, "vllm_xargs"})
    sampling = msgspec.structs.replace(
        GENERATE.sampling,
        allowed_token_ids=[1, 2],
        bad_words=["a b"],
        bad_words_token_ids=[[3, 4]],
        thinking_token_budget=0,
        extra_args={"x": 1.5},
    )
    body = json.loads(decode_body(MODEL, msgspec.structs.replace(GENERATE, sampling=sampling)))
    assert body == plain | fields | {"vllm_xargs": {"x": 1.5}}
