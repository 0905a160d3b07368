"""Requests that name documents, from a client's body to the legs: what nodes are told, and what the client is."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send
from support.router_fakes import CHUNK_TOKENS, FakeNode, Rig, make_rig, two_and_two

from kvcore.config.kv.settings import BlendConfig
from nodeapi.documents import Documents
from nodeapi.messages import GenerateRequest, TokenDelta
from router.documents.legs import LegDocuments
from router.documents.named import NamedDocuments

ON = BlendConfig(mode="first_k", k=2)
TEXTS = ["a text of some length, " * 3, "another one, " * 4, "short"]
QUESTION = {"role": "user", "content": "what is it?"}
CHAT: dict[str, Any] = {
    "model": "fake-model",
    "max_tokens": 4,
    "messages": [{"role": "system", "content": "be brief " * 4}, QUESTION],
    "documents": TEXTS,
}


async def rig_of(blend: BlendConfig = ON, *, lacking: tuple[str, ...] = ()) -> Rig:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.takes_documents = node.id not in lacking
    return await make_rig(nodes, blend=blend, min_prefill_tokens=8)


async def ask(rig: Rig, path: str = "/v1/chat/completions", **fields: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        return await http.post(path, json={**CHAT, **fields})


async def record(rig: Rig, reply: httpx.Response) -> dict[str, Any]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        return dict((await http.get(f"/v1/requests/{reply.json()['id']}")).json())


def legs(rig: Rig) -> tuple[list[Any], list[Any]]:
    nodes: list[FakeNode] = list(rig.nodes.values()) if isinstance(rig.nodes, dict) else rig.nodes.nodes
    return [one for node in nodes for one in node.prefills], [one for node in nodes for one in node.generates]


async def test_both_legs_are_told_where_documents_stand() -> None:
    rig = await rig_of()
    reply = await ask(rig)
    assert reply.status_code == 200, reply.text
    (prefill,), (generate,) = legs(rig)
    said: Documents = generate.documents
    assert prefill.documents == said and said.k == 2
    prompt = bytes(generate.prompt_token_ids).decode()
    assert [prompt[start:stop] for start, stop in said.spans] == [text.strip() for text in TEXTS]
    assert prompt[: said.header].endswith("<user>")
    assert generate.handoff.num_chunks == said.header // CHUNK_TOKENS, "what is between documents is not handed over"


async def test_the_client_is_told_what_is_approximate_and_why_nothing_is() -> None:
    rig = await rig_of()
    reply = await ask(rig)
    (_,), (generate,) = legs(rig)
    turned = sum(stop - start - 2 for start, stop in generate.documents.spans[1:])
    usage = reply.json()["usage"]
    assert usage["prompt_tokens_details"] == {
        "cached_tokens": 0,
        "approximate_tokens": turned,
        "computed_tokens": usage["prompt_tokens"] - turned,
    }
    assert reply.headers["x-kvferry-approximate"] == "true"
    told = await record(rig, reply)
    assert told["approximate_tokens"] == turned
    assert told["documents"] == {
        "named_by": "field",
        "count": 3,
        "tokens": sum(len(text.strip()) for text in TEXTS),
        "header_tokens": generate.documents.header,
        "k": 2,
        "why_computed": "",
    }
    assert [leg["approximate_tokens"] for leg in told["legs"]] == [None, turned]
    shown = rig.metrics.metrics.render().decode()
    assert f"kvferry_router_approximate_tokens_total {float(turned)}" in shown
    assert 'kvferry_router_document_prompts_total{named_by="field",use="reuse"} 1.0' in shown


SEPARATED = {"role": "user", "content": "read: # # a text of some length # # another one # # what is it?"}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [SEPARATED], "stream_options": {"include_usage": True}}),
        ("/v1/responses", {"input": [SEPARATED]}),
        ("/v1/messages", {"messages": [SEPARATED], "max_tokens": 4}),
    ],
)
async def test_each_api_tells_what_is_exact_what_is_approximate_and_what_was_computed(
    path: str, body: dict[str, Any], stream: bool
) -> None:
    rig = await rig_of(msgspec.structs.replace(ON, separator=" # # ".strip()))
    if not stream:
        body = {name: value for name, value in body.items() if name != "stream_options"}
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        reply = await http.post(path, json={"model": "fake-model", "stream": stream, **body})
    assert reply.status_code == 200 and reply.headers["x-kvferry-approximate"] == "true", reply.text
    (generate,) = legs(rig)[1]
    turned, size = sum(stop - start - 2 for start, stop in generate.documents.spans), len(generate.prompt_token_ids)
    turned += 2 * sum(start == generate.documents.header for start, _ in generate.documents.spans)
    assert turned > 0
    usage = usage_in(reply, stream=stream)
    said = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    if said is None:
        assert usage["input_tokens"] == size == usage["approximate_input_tokens"] + usage["computed_input_tokens"]
        assert (usage["approximate_input_tokens"], usage["cache_read_input_tokens"]) == (turned, 0)
    else:
        assert (said["cached_tokens"], said["approximate_tokens"], said["computed_tokens"]) == (
            0,
            turned,
            size - turned,
        )


def usage_in(reply: httpx.Response, *, stream: bool) -> dict[str, Any]:
    """The last one that the answer tells."""
    if not stream:
        return dict(reply.json()["usage"])
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    told = [event.get("usage") or event.get("response", {}).get("usage") for event in events]
    return [usage for usage in told if usage][-1]


@pytest.mark.parametrize("fields", [{}, {"documents": None}, {"documents": [{"title": "Ferries", "text": "a text"}]}])
async def test_tokenize_makes_of_documents_what_the_other_routes_do(fields: dict[str, Any]) -> None:
    chat = {name: value for name, value in (CHAT | fields).items() if name != "max_tokens"}
    completion = {"model": "fake-model", "prompt": "what is it?", "documents": chat["documents"]}
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        rig = await rig_of()
        transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
            counted = await http.post("/tokenize", json=body)
            assert (await http.post(path, json={**body, "max_tokens": 4})).status_code == 200
        assert counted.json().get("tokens") == legs(rig)[1][0].prompt_token_ids, counted.text


async def test_with_mode_off_the_prompt_is_the_same_and_no_node_is_told() -> None:
    on, off = await rig_of(), await rig_of(BlendConfig())
    await ask(on)
    reply = await ask(off)
    prefills, generates = legs(off)
    assert generates[0].prompt_token_ids == legs(on)[1][0].prompt_token_ids
    assert all(leg.documents is None for leg in [*prefills, *generates])
    assert reply.headers["x-kvferry-approximate"] == "false"
    assert reply.json()["usage"]["prompt_tokens_details"]["approximate_tokens"] == 0
    told = await record(off, reply)
    assert told["documents"]["why_computed"] == "kv.blend.mode is off"


async def test_a_request_without_documents_is_sent_and_answered_as_ever() -> None:
    on, off = await rig_of(), await rig_of(BlendConfig())
    replies = [await ask(rig, documents=None) for rig in (on, off)]
    (first, second) = (legs(rig) for rig in (on, off))
    for one, other in zip([*first[0], *first[1]], [*second[0], *second[1]], strict=True):
        same = {"request_id": "", "deadline_s": 1.0} | (
            {"sampling": other.sampling} if hasattr(one, "sampling") else {}
        )
        assert msgspec.structs.replace(one, **same) == msgspec.structs.replace(other, **same)
    assert all("x-kvferry-approximate" not in reply.headers for reply in replies)
    assert [set(reply.json()["usage"]["prompt_tokens_details"]) for reply in replies] == [{"cached_tokens"}] * 2


async def test_a_stream_says_so_in_its_head_and_its_usage() -> None:
    rig = await rig_of()
    reply = await ask(rig, stream=True, stream_options={"include_usage": True})
    assert reply.headers["x-kvferry-approximate"] == "true"
    assert '"approximate_tokens":' in reply.text


@pytest.mark.parametrize(("blend", "said"), [(ON, "true"), (BlendConfig(), "false")])
async def test_the_head_of_a_stream_calls_nothing_exact_that_may_still_be_approximate(
    blend: BlendConfig, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two prompts the node of the second says nothing before the head is out."""
    rig = await rig_of(msgspec.structs.replace(blend, separator=" # # "))
    begun, answered = asyncio.Event(), FakeNode.generate

    async def generate(node: FakeNode, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        if b" # # " in bytes(request.prompt_token_ids):
            await begun.wait()
        async for delta in answered(node, request):
            yield delta

    monkeypatch.setattr(FakeNode, "generate", generate)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def sent(message: Message) -> None:
            begun.set()
            await send(message)

        await rig.app(scope, receive, sent)  # type: ignore[operator]

    body = {
        "model": "fake-model",
        "max_tokens": 2,
        "prompt": ["none", "h # # one # # and # # two # # q"],
        "stream": True,
    }
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://r") as http:
        reply = await http.post("/v1/completions", json=body)
    assert reply.headers["x-kvferry-approximate"] == said and "[DONE]" in reply.text


async def test_a_decoder_that_takes_over_in_mid_stream_is_told_too() -> None:
    rig = await rig_of()
    rig.nodes["d0"].die_after = rig.nodes["d1"].die_after = 2
    reply = await ask(rig, max_tokens=3)
    assert reply.status_code == 200, reply.text
    _, generates = legs(rig)
    generates.sort(key=lambda leg: len(leg.output_token_ids))
    assert len(generates) > 1 and generates[-1].output_token_ids
    assert all(leg.documents == generates[0].documents for leg in generates) and generates[0].documents


@pytest.mark.parametrize("lacking", [("d0", "d1"), ("p0", "p1"), ("p0", "p1", "d0", "d1")])
async def test_both_legs_are_told_or_neither_and_the_record_says_why(lacking: tuple[str, ...]) -> None:
    rig = await rig_of(lacking=lacking)
    reply = await ask(rig)
    prefills, generates = legs(rig)
    assert [leg.documents for leg in [*prefills, *generates]] == [None, None]
    assert generates[0].handoff.num_chunks == (len(generates[0].prompt_token_ids) - 1) // CHUNK_TOKENS
    told = await record(rig, reply)
    assert all("knows no documents" in leg["documents_computed"] for leg in told["legs"])
    assert reply.headers["x-kvferry-approximate"] == "false"


@pytest.mark.parametrize("why", ["", "off"])
def test_a_decoder_that_is_handed_documents_still_has_the_rest_to_compute(why: str) -> None:
    named = NamedDocuments("field", 32, [(32, 40), (50, 70)], k=4, why=why)
    legs = LegDocuments(named, lambda node: "")
    assert legs.computed_by_decoder(100) == (0 if why else 100 - 32 - 8 - 20)
    assert LegDocuments(None, lambda node: "").computed_by_decoder(100) == 0
    assert legs.num_chunks("p", "d", 16) == (None if why else 2 + 1 + 2)


async def test_where_logprobs_of_the_prompt_are_wanted_all_of_it_is_computed() -> None:
    rig = await rig_of()
    reply = await ask(rig, prompt_logprobs=1)
    assert reply.status_code == 200, reply.text
    assert all(leg.documents is None for kind in legs(rig) for leg in kind)
    assert "logprobs" in (await record(rig, reply))["documents"]["why_computed"]


async def test_a_prompt_that_was_cut_has_no_documents() -> None:
    rig = await rig_of()
    reply = await ask(rig, truncate_prompt_tokens=40)
    assert reply.status_code == 200, reply.text
    assert all(leg.documents is None for kind in legs(rig) for leg in kind)
    assert "truncate_prompt_tokens" in (await record(rig, reply))["documents"]["why_computed"]


async def test_completions_name_documents_too_and_each_prompt_has_its_own() -> None:
    rig = await rig_of(msgspec.structs.replace(ON, separator=" # # "))
    body = {"messages": None, "documents": None, "prompt": ["h # # one # # q", "no documents"]}
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://r") as http:
        fields = {key: value for key, value in {**CHAT, **body}.items() if value is not None}
        reply = await http.post("/v1/completions", json=fields)
    assert reply.status_code == 200, reply.text
    told = {bytes(leg.prompt_token_ids).decode(): leg.documents for leg in legs(rig)[1]}
    assert told["no documents"] is None
    said = told["h # # one # # q"]
    assert said is not None and "h # # one # # q"[slice(*said.spans[0])] == "one"
    assert reply.headers["x-kvferry-approximate"] == "false", "the one document is right behind its header"


@pytest.mark.parametrize(
    ("path", "field"), [("/v1/responses", "input"), ("/v1/messages", "messages")], ids=["responses", "messages"]
)
async def test_the_separator_names_documents_on_other_surfaces_and_the_head_says_so(path: str, field: str) -> None:
    rig = await rig_of(msgspec.structs.replace(ON, separator=" # # "))
    said = [{"role": "user", "content": "h # # one # # and # # two, a longer one # # q"}]
    body = {"model": "fake-model", field: said, "max_tokens" if field == "messages" else "max_output_tokens": 16}
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        reply = await http.post(path, json=body)
    assert reply.status_code == 200, reply.text
    assert reply.headers["x-kvferry-approximate"] == "true"
    assert all(leg.documents is not None for leg in legs(rig)[1])
