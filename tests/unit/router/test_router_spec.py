"""OpenAI's schema becomes the router's own words, its fields are checked in one order; reprs of what one debugs."""

from pathlib import Path

import httpx
import pytest
from support.router_fakes import VOCAB, make_rig
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import models

from kvcore.errors import InvalidRequestError
from kvcore.types import ChunkKey
from nodeapi.sampling import SamplingParams
from router.answering import Answerer
from router.api.body import parse
from router.api.fields.chat_fields import ChatRequest
from router.api.fields.completion_fields import CompletionRequest
from router.api.fields.openai_schema import answer_request, prompts_of
from router.api.limits import ApiLimits
from router.client_answer import AnswerLimits, ClientAnswer
from router.requests.spec import (
    AnswerRequest,
    ChatPrompt,
    FieldNames,
    Prompt,
    RequestSpec,
    ShownFields,
    TextPrompt,
    TokenPrompt,
)
from router.routing.index import PrefixIndex
from router.text.chat_template import ChatTemplate
from router.text.detokenizer import Detokenizer
from router.text.tokenizer import ByteTokenizer, FolderTokenizer, TextThreads

LIMITS = ApiLimits()


@pytest.mark.parametrize(
    ("given", "prompts"),
    [
        ('"a"', [TextPrompt("a")]),
        ("[1, 2]", [TokenPrompt([1, 2])]),
        ('["a", [3]]', [TextPrompt("a"), TokenPrompt([3])]),
    ],
)
def test_prompts_are_text_or_tokens(given: str, prompts: list[Prompt]) -> None:
    assert prompts_of(parse(b'{"model": "m", "prompt": %s}' % given.encode(), CompletionRequest), LIMITS) == prompts


def test_a_chat_becomes_a_neutral_request() -> None:
    raw = b"""{"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "n": 2,
        "max_completion_tokens": 5, "stop": "x", "seed": 3, "logprobs": true, "cache_salt": "s", "stream": true,
        "stream_options": {"include_usage": true}, "return_token_ids": true}"""
    body = parse(raw, ChatRequest)
    assert prompts_of(body, LIMITS) == [ChatPrompt([{"role": "user", "content": [{"type": "text", "text": "hi"}]}])]
    request = answer_request(body, [[1, 2]], max_context=100, request_id="r", client_request_id="theirs", limits=LIMITS)
    sampling = SamplingParams(max_tokens=5, n=2, seed=3, logprobs=0)
    assert request == AnswerRequest(
        [RequestSpec("r", [1, 2], sampling, b"s", "theirs")],
        stops=["x"],
        shown=ShownFields(token_ids=True, usage=True),
        names=request.names,
        token_prompts=False,
    )


@pytest.mark.parametrize(("given", "had"), [(5, 5), (10, 10), (50, 10), (100, 10), (101, 101)])
def test_no_more_is_generated_than_the_context_has_room_for(given: int, had: int) -> None:
    """As with vLLM. More than the whole context is refused where the nodes are known."""
    body = CompletionRequest(prompt="a", max_tokens=given)
    request = answer_request(body, [[1] * 90], max_context=100, request_id="r", client_request_id="c", limits=LIMITS)
    assert request.specs[0].sampling.max_tokens == had and request.names.max_tokens == "max_tokens"


def test_biases_are_brought_into_their_bounds_and_options_of_a_stream_may_ask_for_nothing() -> None:
    raw = b'{"prompt": "a", "logit_bias": {"1": 200, "2": -1000, "3": 5}, "stream_options": {}}'
    body = parse(raw, CompletionRequest)
    request = answer_request(body, [[1]], max_context=100, request_id="r", client_request_id="c", limits=LIMITS)
    assert request.specs[0].sampling.logit_bias == {1: 100.0, 2: -100.0, 3: 5.0}


def test_each_prompt_has_its_own_id_seed_and_room() -> None:
    body = CompletionRequest(model="m", prompt=["a", "b"])
    request = answer_request(
        body, [[1] * 90, [1] * 10], max_context=100, request_id="r", client_request_id="c", limits=LIMITS
    )
    assert [spec.request_id for spec in request.specs] == ["r", "r-1"]
    assert [spec.sampling.max_tokens for spec in request.specs] == [10, 16]
    assert request.specs[0].sampling.seed != request.specs[1].sampling.seed
    assert request.shown == ShownFields()


async def test_of_several_wrong_fields_the_first_in_a_fixed_order_is_named() -> None:
    """The model, the form of the answer, the prompt, stop strings, sampling, then what the nodes say."""
    wrong: list[tuple[dict[str, object], str]] = [
        ({"functions": [{}]}, "functions"),
        ({"model": "other"}, "model"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"stop": [""]}, "stop"),
        ({"min_tokens": 50}, "min_tokens"),
        ({"n": 0}, "n"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 1 << 63}, "seed"),
        ({"temperature": 3}, "temperature"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"logprobs": 30}, "logprobs"),
        ({"prompt": ""}, "prompt"),
    ]
    rig = await make_rig()
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        for place, (_, param) in enumerate(wrong):
            body: dict[str, object] = {"model": "fake-model", "prompt": "a", "max_tokens": 4}
            for change, _ in wrong[place:]:
                body |= change
            reply = await http.post("/v1/completions", json=body)
            assert reply.json()["error"]["param"] == param


async def test_prompts_beyond_the_bound_of_an_answer_are_refused_by_the_clients_name_for_it() -> None:
    rig = await make_rig()
    threads = TextThreads(1)
    answerer = Answerer(
        model="m",
        tokenizer=ByteTokenizer(VOCAB),
        dispatcher=rig.dispatcher,
        cluster=rig.cluster,
        run=threads.run,
        limits=AnswerLimits(max_choices=1),
    )
    specs = [RequestSpec(f"r{number}", [97], SamplingParams(max_tokens=4)) for number in range(2)]
    with pytest.raises(InvalidRequestError, match="candidates times the prompts must not be over 1") as caught:
        answerer.start(AnswerRequest(specs, names=FieldNames(n="candidates")))
    assert caught.value.param == "candidates"


@pytest.mark.parametrize(
    ("given", "num_ids", "refused"), [(True, 1, True), (False, VOCAB + 1, True), (False, 1, False)]
)
async def test_ids_beyond_the_vocabulary_are_looked_for_where_there_may_be_some(
    given: bool, num_ids: int, refused: bool
) -> None:
    rig = await make_rig(tokenizer=(tokenizer := ByteTokenizer(VOCAB)))
    tokenizer.num_ids = num_ids
    sampling = SamplingParams(max_tokens=4)
    request = AnswerRequest([RequestSpec("r", [97, VOCAB], sampling)], token_prompts=given)
    if refused:
        with pytest.raises(InvalidRequestError, match="outside of the vocabulary"):
            rig.answerer.start(request)
    else:
        rig.answerer.start(request).close()


async def test_what_one_meets_in_a_debugger_says_what_it_holds(tmp_path: Path) -> None:
    FastTokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>")).save(str(tmp_path / "tokenizer.json"))
    assert repr(FolderTokenizer(tmp_path)) == f"<FolderTokenizer {tmp_path} vocab_size=1, no chat template>"
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    assert repr(ChatTemplate("{{ messages }}", special)) == f"<ChatTemplate with {special}>"
    tokenizer = ByteTokenizer(VOCAB)
    assert repr(tokenizer) == "<ByteTokenizer vocab_size=512>"
    detokenizer = Detokenizer(tokenizer, [97])
    detokenizer.feed([0xE2])
    assert repr(detokenizer) == "<Detokenizer window=2 held=1 tokens>"
    index = PrefixIndex()
    index.store("d0", [ChunkKey(b"k" * 16)], "d0.1")
    assert repr(index) == "<PrefixIndex 1 chunks on 1 segments>"
    rig = await make_rig()
    answer = rig.answerer.start(AnswerRequest([RequestSpec("r", [97] * 3, SamplingParams(max_tokens=4, n=2))]))
    assert isinstance(answer, ClientAnswer)
    assert repr(answer) == "<ClientAnswer r prompts=1 choices=2 prompt_tokens=3 completion_tokens=0>"
    assert repr(rig.answerer) == "<Answerer of 'fake-model'>"
