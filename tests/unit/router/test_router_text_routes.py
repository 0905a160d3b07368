"""`/tokenize`, `/detokenize`, `/ping`, `/version` and `/load`, as clients of a vLLM server ask them."""

from collections.abc import AsyncIterator

import httpx
import pytest
from support.router_fakes import MAX_CONTEXT, Rig, make_rig

from kvcore.release import release


@pytest.fixture
async def http() -> AsyncIterator[httpx.AsyncClient]:
    rig = await make_rig()
    async with client(rig) as http:
        yield http


def client(rig: Rig) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://router")  # type: ignore[arg-type]


async def test_a_prompt_has_the_tokens_that_an_answer_counts(http: httpx.AsyncClient) -> None:
    made = (
        await http.post("/tokenize", json={"model": "fake-model", "prompt": "höre", "return_token_strs": True})
    ).json()
    assert made["tokens"] == list("höre".encode())
    assert (made["count"], made["max_model_len"]) == (5, MAX_CONTEXT)
    assert made["token_strs"][0] == "h" and len(made["token_strs"]) == 5
    asked = {"model": "fake-model", "prompt": made["tokens"], "max_tokens": 1}
    assert (await http.post("/v1/completions", json=asked)).json()["usage"]["prompt_tokens"] == 5
    assert (await http.post("/detokenize", json={"tokens": made["tokens"]})).json() == {"prompt": "höre"}


@pytest.mark.parametrize(
    "options", [{}, {"add_generation_prompt": False}, {"continue_final_message": True, "add_generation_prompt": False}]
)
async def test_a_chat_has_the_tokens_that_its_answer_counts(http: httpx.AsyncClient, options: dict[str, bool]) -> None:
    chat = {"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "well"}], **options}
    made = (await http.post("/tokenize", json=chat)).json()
    assert made["token_strs"] is None
    asked = {**chat, "return_token_ids": True, "max_tokens": 1}
    answer = (await http.post("/v1/chat/completions", json=asked)).json()
    assert answer["prompt_token_ids"] == made["tokens"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "a", "promt": "b"}, "promt"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
        ("/detokenize", {"tokens": [1 << 40]}, "tokens"),
        ("/detokenize", {"tokens": "abc"}, "tokens"),
    ],
)
async def test_what_is_wrong_is_named(http: httpx.AsyncClient, path: str, body: dict[str, object], param: str) -> None:
    reply = await http.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param), reply.text


async def test_another_model_is_not_here(http: httpx.AsyncClient) -> None:
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        assert (await http.post(path, json={"model": "other", **body})).status_code == 404


async def test_what_a_vllm_server_says_of_itself(http: httpx.AsyncClient) -> None:
    for ask in (http.get, http.post):
        reply = await ask("/ping")
        assert (reply.status_code, reply.json()) == (200, {"status": "ok"})
    assert (await http.get("/version")).json() == {"version": release()}
    assert (await http.get("/load")).json() == {"server_load": 0}


async def test_ping_says_why_nothing_can_be_served() -> None:
    rig = await make_rig()
    for node in rig.nodes.nodes:
        node.down = True
    await rig.prober.probe()
    async with client(rig) as http:
        reply = await http.get("/ping")
    assert reply.status_code == 503 and reply.json()["error"]["message"]


async def test_a_model_may_have_several_names() -> None:
    rig = await make_rig(aliases=["small", "org/fake"])
    async with client(rig) as http:
        listed = (await http.get("/v1/models")).json()["data"]
        assert [model["id"] for model in listed] == ["fake-model", "small", "org/fake"]
        assert {model["root"] for model in listed} == {"fake-model"}
        assert (await http.get("/v1/models/org/fake")).json()["id"] == "org/fake"
        assert (await http.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"
        answer = await http.post("/v1/completions", json={"model": "small", "prompt": "a", "max_tokens": 1})
        assert (answer.status_code, answer.json()["model"]) == (200, "fake-model")
