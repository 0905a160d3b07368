"""`echo`, logprobs of prompts and of listed tokens: in vLLM's form, each once, whatever dies."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from support.router_fakes import Rig, expected, make_rig, prompt_rows, two_and_two

from nodeapi.messages import TokenDelta
from nodeapi.prompt_logprobs import PromptLogprobs, PromptRow
from router.api.limits import ApiLimits
from router.requests.completions import Completions, PromptScores
from router.requests.limits import RequestLimits

PROMPT = "hello, wörld"
IDS = list(PROMPT.encode())
ASK: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 3, "temperature": 0}
SAID = bytes(expected(IDS, 3)).decode()
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "temperature": 0}
BEGUN = {"role": "assistant", "content": [{"type": "text", "text": "I am"}, "so"]}
GOES_ON: dict[str, Any] = {**CHAT, "messages": [*CHAT["messages"], BEGUN]}


@pytest.fixture
async def rig() -> Rig:
    return await make_rig()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(rig) as http:
        yield http


def client_of(rig: Rig) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router")  # type: ignore[arg-type]


async def body_of(http: httpx.AsyncClient, ask: dict[str, Any], path: str = "/v1/completions") -> dict[str, Any]:
    reply = await http.post(path, json=ask)
    assert reply.status_code == 200, reply.text
    found: dict[str, Any] = reply.json()
    return found


async def events_of(http: httpx.AsyncClient, ask: dict[str, Any], path: str = "/v1/completions") -> list[Any]:
    reply = await http.post(path, json={**ask, "stream": True})
    assert reply.status_code == 200 and reply.text.endswith("data: [DONE]\n\n"), reply.text
    return [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]


def shown(row: PromptRow) -> dict[str, object]:
    """What `prompt_logprobs` must show of it, but for the tokens' names."""
    told = {str(row.token_id): (row.logprob, row.rank)}
    for rank, (token, logprob) in enumerate(row.top, 1):
        told[str(token)] = (logprob, rank)
    return told


@pytest.mark.parametrize("top", [0, 4])
async def test_prompt_logprobs_have_a_dict_a_token_the_prompt_s_own_first(http: httpx.AsyncClient, top: int) -> None:
    body = await body_of(http, {**ASK, "prompt_logprobs": top})
    (choice,) = body["choices"]
    assert choice["text"] == SAID and choice["logprobs"] is None
    first, *others = choice["prompt_logprobs"]
    assert first is None and len(others) == len(IDS) - 1
    for told, row in zip(others, prompt_rows(IDS, top), strict=True):
        assert {token: (one["logprob"], one["rank"]) for token, one in told.items()} == shown(row)
        assert next(iter(told)) == str(row.token_id)
    names = [told[str(token)]["decoded_token"] for told, token in zip(others, IDS[1:], strict=True)]
    assert "h" + "".join(names) == PROMPT, "a character of two bytes is named where it ends"
    assert "" in names


async def test_a_chat_has_them_beside_its_choices(http: httpx.AsyncClient) -> None:
    body = await body_of(http, {**CHAT, "prompt_logprobs": 1, "n": 2, "return_token_ids": True}, "/v1/chat/completions")
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(body["prompt_token_ids"]) == body["usage"]["prompt_tokens"]
    assert all("prompt_logprobs" not in choice for choice in body["choices"])
    assert "prompt_logprobs" not in await body_of(http, CHAT, "/v1/chat/completions")


async def test_echo_begins_the_text_and_its_logprobs_with_the_prompt(http: httpx.AsyncClient) -> None:
    (choice,) = (await body_of(http, {**ASK, "echo": True, "logprobs": 2}))["choices"]
    assert choice["text"] == PROMPT + SAID
    logprobs, rows = choice["logprobs"], prompt_rows(IDS, 2)
    assert "".join(logprobs["tokens"]) == PROMPT + SAID
    assert logprobs["token_logprobs"] == [None, *(row.logprob for row in rows), -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"][0] is None and len(logprobs["top_logprobs"]) == len(IDS) + 3
    for top, row, name in zip(logprobs["top_logprobs"][1:], rows, logprobs["tokens"][1:], strict=False):
        assert top[name] == row.logprob and len(top) <= 3
    ends = [offset + len(token) for offset, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)]
    assert [0, *ends[:-1]] == logprobs["text_offset"]
    assert len(choice["prompt_logprobs"]) == len(IDS), "vLLM shows them, too"


async def test_max_tokens_0_gives_the_prompt_alone_and_counts_one_token_as_vllm_does(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "echo": True, "logprobs": 1, "max_tokens": 0, "stop": SAID[0], "stop_token_ids": IDS}
    body = await body_of(http, ask)
    (choice,) = body["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == (PROMPT, "length", None)
    assert len(choice["logprobs"]["token_logprobs"]) == len(IDS)
    usage = body["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(IDS), 1)
    events = await events_of(http, ask)
    assert "".join(event["choices"][0]["text"] for event in events) == PROMPT
    assert events[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_stream_tells_the_same_in_pieces(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "echo": True, "logprobs": 2, "n": 2, "temperature": 1, "seed": 5}
    whole = (await body_of(http, ask))["choices"]
    events = await events_of(http, ask)
    for index in range(2):
        mine = [event["choices"][0] for event in events if event["choices"][0]["index"] == index]
        assert "".join(choice["text"] for choice in mine) == whole[index]["text"]
        for name, told in whole[index]["logprobs"].items():
            assert [one for choice in mine if choice["logprobs"] for one in choice["logprobs"][name]] == told
        assert max(len(choice["logprobs"]["tokens"]) for choice in mine if choice["logprobs"]) <= 3, "bounded"


async def test_several_prompts_of_all_kinds_are_echoed_each_to_its_own_choices(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "prompt": ["ab", [99, 100, 101], "x"], "echo": True, "logprobs": 0, "n": 2}
    choices = (await body_of(http, ask))["choices"]
    assert [choice["text"][:-3] for choice in choices] == ["ab", "ab", "cde", "cde", "x", "x"]
    assert [len(choice["logprobs"]["tokens"]) for choice in choices] == [5, 5, 6, 6, 4, 4]
    (one,) = (await body_of(http, {**ASK, "prompt": [99, 100], "echo": True}))["choices"]
    assert one["text"].startswith("cd") and one["logprobs"] is None and "prompt_logprobs" not in one
    (silent,) = (await body_of(http, {**ASK, "echo": True, "return_token_ids": True}))["choices"]
    assert silent["text"] == SAID and silent["prompt_token_ids"] == IDS, "as vLLM's server"


async def test_tokens_can_be_called_by_their_ids(http: httpx.AsyncClient) -> None:
    ask = {**ASK, "echo": True, "logprobs": 1, "return_tokens_as_token_ids": True}
    (choice,) = (await body_of(http, ask))["choices"]
    assert choice["logprobs"]["tokens"][: len(IDS)] == [f"token_id:{token}" for token in IDS]
    assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"][1:] for name in top)


async def test_a_chat_echoes_its_last_message_where_the_answer_goes_on_with_it(http: httpx.AsyncClient) -> None:
    path = "/v1/chat/completions"
    for ask, begin in ((CHAT, ""), (GOES_ON, "I am\nso"), ({**CHAT, "add_generation_prompt": False}, "hi")):
        plain = (await body_of(http, ask, path))["choices"][0]["message"]["content"]
        body = await body_of(http, {**ask, "echo": True}, path)
        assert body["choices"][0]["message"]["content"] == begin + plain
        assert len(body["prompt_logprobs"]) == body["usage"]["prompt_tokens"], "as vLLM's, with no others"
        events = await events_of(http, {**ask, "echo": True}, path)
        assert "".join(event["choices"][0]["delta"].get("content") or "" for event in events) == begin + plain


async def test_listed_tokens_are_told_at_each_place_instead_of_the_likeliest(http: httpx.AsyncClient, rig: Rig) -> None:
    (choice,) = (await body_of(http, {**ASK, "logprobs": 0, "logprob_token_ids": [65, 66, 65]}))["choices"]
    for name, top in zip(choice["logprobs"]["tokens"], choice["logprobs"]["top_logprobs"], strict=True):
        assert list(top) == [name, "A", "B"]
    chat = {**CHAT, "logprobs": True, "logprob_token_ids": [66, 65]}
    (choice,) = (await body_of(http, chat, "/v1/chat/completions"))["choices"]
    for entry in choice["logprobs"]["content"]:
        assert [other["token"] for other in entry["top_logprobs"]] == [entry["token"], "B", "A"]
    asked = [request.sampling.logprob_token_ids for node in rig.nodes.nodes for request in node.generates]
    assert sorted(asked) == [[65, 66, 65], [66, 65]]


async def test_the_decoder_computes_all_of_the_prompt_and_no_prefiller_is_asked() -> None:
    rig = await make_rig()
    async with client_of(rig) as http:
        ask = {**ASK, "prompt": PROMPT * 20}
        await body_of(http, ask)
        assert rig.log.newest()[0].route.prefiller is not None  # type: ignore[union-attr]
        await body_of(http, {**ask, "prompt_logprobs": 0})
        route = rig.log.newest()[0].route
        assert route is not None and (route.prefiller, route.reason) == (None, "prompt_logprobs")
        assert rig.log.newest()[0].cached_tokens == 0


@pytest.mark.parametrize("pieces", [0, 1, 3])
async def test_none_is_lost_or_told_twice_when_a_decoder_dies_among_them(pieces: int) -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        if node.id.startswith("d"):
            node.die_in_prompt = pieces
    rig = await make_rig(nodes)
    async with client_of(rig) as http:
        for ask in ({**ASK, "prompt_logprobs": 2}, {**ASK, "echo": True, "logprobs": 2, "max_tokens": 0}):
            nodes["d0"].die_in_prompt = nodes["d1"].die_in_prompt = None
            whole = (await body_of(http, ask))["choices"]
            nodes["d0"].die_in_prompt = nodes["d1"].die_in_prompt = pieces
            assert (await body_of(http, ask))["choices"] == whole
            assert rig.log.newest()[0].retries >= 1


async def test_a_leg_that_goes_on_after_tokens_tells_none_again() -> None:
    nodes = two_and_two()
    nodes["d0"].die_after = nodes["d1"].die_after = 1
    rig = await make_rig(nodes)
    async with client_of(rig) as http:
        (choice,) = (await body_of(http, {**ASK, "echo": True, "logprobs": 1}))["choices"]
    assert choice["text"] == PROMPT + SAID and len(choice["logprobs"]["tokens"]) == len(IDS) + 3
    asked = [request.sampling.prompt_logprobs for node in nodes.nodes for request in node.generates]
    assert asked.count(1) == 1 and None in asked


async def test_too_many_logprobs_of_prompts_are_refused_by_name() -> None:
    rig = await make_rig(api_limits=ApiLimits(max_scores=len(IDS) * 3), limits=RequestLimits(max_scores=len(IDS) * 2))
    async with client_of(rig) as http:
        await body_of(http, {**ASK, "prompt_logprobs": 1})
        refused = await http.post("/v1/completions", json={**ASK, "prompt_logprobs": 1, "n": 2})
        assert refused.status_code == 400 and refused.json()["error"]["param"] == "prompt_logprobs"
        busy = await http.post("/v1/completions", json={**ASK, "prompt_logprobs": 2})
        assert busy.status_code == 503 and "prompts" in busy.json()["error"]["message"]
        assert rig.dispatcher.under_way.scores == 0


ROWS = prompt_rows(IDS, 1)


def piece(start: int, end: int, top: int = 1) -> PromptLogprobs:
    return PromptLogprobs.pack(start, top, prompt_rows(IDS, top)[start - 1 : end - 1])


def test_pieces_that_overlap_give_each_token_once() -> None:
    scores, told = PromptScores(IDS, 1), []
    for start, end in ((1, 4), (1, 3), (2, 7), (5, 7), (4, len(IDS))):
        assert scores.violation(piece(start, end)) is None and not scores.complete
        new = scores.take(piece(start, end))
        told += [] if new is None else list(new.rows())
    assert told == ROWS and scores.complete


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        (piece(2, 4), "not all"),
        (piece(1, 4, top=2), "belong together"),
        (PromptLogprobs.pack(1, 1, []), "belong together"),
        (PromptLogprobs.pack(1, 1, ROWS[1:3]), "another prompt"),
        (PromptLogprobs.pack(1, 1, [*ROWS, ROWS[0]]), "another prompt"),
        (PromptLogprobs(start=1, top=1, token_ids=b"1234", logprobs=b"12345678", ranks=b"1234"), "belong together"),
    ],
)
def test_a_piece_that_is_not_the_next_one_of_this_prompt_is_a_broken_protocol(wrong: PromptLogprobs, says: str) -> None:
    violation = PromptScores(IDS, 1).violation(wrong)
    assert violation is not None and says in violation
    nobody_asked = Completions(1, 4, 0, frozenset(), logprobs=False, scores=None)
    assert nobody_asked.protocol_violation(TokenDelta(prompt_logprobs=piece(1, 4)), 0, {0}) is not None
