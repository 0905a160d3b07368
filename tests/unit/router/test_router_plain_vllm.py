"""The router in front of vLLM servers that are not ours, over real sockets, with both of their handoffs.

Failures first. Whatever happens, the fake servers hold every request against the connectors' contracts.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support.fake_vllm_server import MODEL, FakeVllm, servers, serving
from support.plain_vllm import nodes, plain_config, record, running_router, write_model_folder
from support.ports import free_ports
from support.router_fakes import expected, prompt_rows, until

from kvcore.handoff import HandoffKind

PROMPT = list(range(97, 117))
ANSWER = expected(PROMPT, 8)
BOTH = pytest.mark.parametrize("kind", [HandoffKind.NIXL, HandoffKind.MOONCAKE])
Fakes = dict[str, FakeVllm]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model_folder(tmp_path_factory.mktemp("model"))


@asynccontextmanager
async def routed(
    fakes: Fakes, model: Path, *, healthy: bool = True, **router: object
) -> AsyncIterator[aiohttp.ClientSession]:
    async with serving(fakes), running_router(plain_config(fakes, model, **router), healthy=healthy) as session:
        yield session


async def ask(session: aiohttp.ClientSession, **more: object) -> dict:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True, **more}
    async with session.post("/v1/completions", json=body) as reply:
        answer = await reply.json()
        return answer | {"status": reply.status, "headers": reply.headers}


async def stream(session: aiohttp.ClientSession, **more: object) -> list[dict]:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True, **more}
    async with session.post("/v1/completions", json=body | {"stream": True}) as reply:
        lines = [line async for line in reply.content if line.startswith(b"data: ")]
    assert lines.pop().strip() == b"data: [DONE]"
    return [json.loads(line[6:]) for line in lines]


def ids(answer: dict, index: int = 0) -> list[int]:
    return answer["choices"][index]["token_ids"]


def streamed_ids(events: list[dict], index: int = 0) -> list[int]:
    choices = [choice for event in events for choice in event["choices"] if choice["index"] == index]
    return [token for choice in choices for token in choice["token_ids"]]


# --- where a prompt goes ---


@BOTH
async def test_a_prompt_goes_where_its_beginning_was_computed_before(kind: HandoffKind, model: Path) -> None:
    """Servers tell nothing of their caches: the router remembers what it has sent them."""
    fakes = servers(kind, prefillers=2, decoders=2)
    async with routed(fakes, model, min_prefill_tokens=16) as session:
        others = [list(range(300 + number, 364 + number)) for number in range(4)]
        system = list(range(200, 264))
        routes = []
        for prompt in (system + [7] * 40, *others, system + [8] * 40, system + [9] * 40, system + [8] * 40 + [6]):
            await ask(session, prompt=prompt)
            routes.append((await record(session))["route"])
    first, last = routes[0], routes[-1]
    assert len({route["decoder"] for route in routes[:5]}) == 2
    assert {(route["prefiller"], route["decoder"]) for route in (first, *routes[5:7])} == {
        (first["prefiller"], first["decoder"])
    }
    assert [route["reason"] for route in routes] == [*["no_prefix"] * 5, "prefix_hit", "prefix_hit", "short_rest"]
    assert last["prefiller"] is None


# --- failures ---


@BOTH
async def test_a_dead_prefiller_is_replaced_by_the_next(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind, prefillers=2)
    async with routed(fakes, model) as session:
        for fake in fakes.values():
            fake.gate = asyncio.Event()
        asked = asyncio.create_task(ask(session))
        await until(lambda: any(fake.running for name, fake in fakes.items() if name.startswith("p")))
        first = next(fake for name, fake in fakes.items() if name.startswith("p") and fake.running)
        first.dead = True
        for fake in fakes.values():
            fake.gate.set()
        answer = await asked
        assert ids(answer) == ANSWER
        assert fakes["d0"].fetched[-1], "its KV came from the other"
        assert {name: len(fakes[name].prefills) for name in ("p0", "p1")} == {"p0": 1, "p1": 1}
        assert (await record(session))["retried_legs"] == [["prefill", "node_unavailable"]]


@BOTH
@pytest.mark.parametrize("failure", [(500, "engine"), (503, "full"), (400, "no")])
async def test_without_a_prefiller_that_works_the_decoder_prefills(
    kind: HandoffKind, failure: tuple[int, str], model: Path
) -> None:
    fakes = servers(kind, prefillers=2)
    fakes["p0"].refusal = fakes["p1"].refusal = failure
    async with routed(fakes, model) as session:
        assert ids(await ask(session)) == ANSWER
        assert not fakes["d0"].fetched[-1]
        assert ids(await ask(session, n=2, temperature=1.0, seed=3), 1) != ANSWER


@BOTH
async def test_a_cluster_of_decoders_alone_serves_and_says_why_the_prefiller_is_not_used(
    kind: HandoffKind, model: Path
) -> None:
    fakes = servers(kind)
    fakes["p0"].dead = True
    async with routed(fakes, model, healthy=False) as session:
        await serves(session)
        assert ids(await ask(session)) == ANSWER and fakes["d0"].fetched == [False]
        shown = await nodes(session)
        assert shown["d0"]["healthy"] and "cannot be reached or broke off" in str(shown["p0"]["reason"])


async def serves(session: aiohttp.ClientSession) -> None:
    async with asyncio.timeout(60):
        while True:
            async with session.get("/health") as reply:
                if reply.status == 200:
                    return
            await asyncio.sleep(0.01)


@BOTH
async def test_a_decoder_that_dies_before_its_first_byte_is_replaced(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind, decoders=2)
    for fake in fakes.values():
        fake.die_after = 0
    async with routed(fakes, model) as session:
        asked = asyncio.create_task(ask(session))
        await until(lambda: bool(fakes["d0"].generates and fakes["d1"].generates))
        for fake in fakes.values():
            fake.die_after = None
        assert ids(await asked) == ANSWER
        fetched = fakes["d0"].fetched + fakes["d1"].fetched
        assert fetched.count(True) == 1, "KV is fetched once; who comes after computes"


@BOTH
@pytest.mark.parametrize("how", ["die_after", "abort_after"])
async def test_a_stream_that_breaks_off_is_continued_exactly_once(kind: HandoffKind, how: str, model: Path) -> None:
    fakes = servers(kind, decoders=2)
    for fake in fakes.values():
        setattr(fake, how, 3)
    async with routed(fakes, model) as session:
        whole = await stream(session, max_tokens=12)
    assert streamed_ids(whole) == expected(PROMPT, 12)
    bodies = sorted((b for f in fakes.values() for b in f.generates), key=lambda body: len(body["prompt"]))
    assert [len(body["prompt"]) for body in bodies] == [20, 23, 26, 29]
    assert [body["max_tokens"] for body in bodies] == [12, 9, 6, 3]
    assert [("kv_transfer_params" in body) for body in bodies] == [True, False, False, False]


FORM = {"regex": "[a-z]+", "disable_any_whitespace": True}


@BOTH
async def test_servers_are_told_of_a_form_and_one_that_sent_nothing_is_replaced(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind, decoders=2)
    for fake in fakes.values():
        fake.die_after = 0
    async with routed(fakes, model) as session:
        asking = asyncio.create_task(stream(session, structured_outputs=FORM))
        await until(lambda: bool(fakes["d0"].generates and fakes["d1"].generates))
        for fake in fakes.values():
            fake.die_after = None
        assert streamed_ids(await asking) == ANSWER
        refused = await ask(session, structured_outputs={"json": "{"})
    asked = [body for fake in fakes.values() for body in fake.generates]
    assert all((body["structured_outputs"], body["prompt"]) == (FORM, PROMPT) for body in asked)
    assert (refused["status"], refused["error"]["param"]) == (400, "structured_outputs.json")


@BOTH
async def test_a_form_that_a_server_began_is_not_begun_anew_by_another(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind, decoders=2)
    for fake in fakes.values():
        fake.die_after = 3
    async with routed(fakes, model) as session:
        body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0, "return_token_ids": True}
        async with session.post("/v1/completions", json=body | {"stream": True, "structured_outputs": FORM}) as reply:
            *told, last = [json.loads(line[6:]) async for line in reply.content if line.startswith(b"data: ")]
    assert streamed_ids(told) == ANSWER[:3] and last["error"]["code"] == "form_cut"
    assert sum(len(fake.generates) for fake in fakes.values()) == 1


async def last_leg(session: aiohttp.ClientSession) -> tuple[object, object]:
    legs = (await record(session))["legs"]
    assert isinstance(legs, list)
    return legs[-1]["node"], legs[-1]["in_need"]


@BOTH
async def test_without_a_decoder_a_prefiller_decodes(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    fakes["d0"].die_after = 3
    async with routed(fakes, model) as session:
        assert streamed_ids(await stream(session, max_tokens=12)) == expected(PROMPT, 12)
        (body,) = fakes["p0"].generates
        assert "kv_transfer_params" not in body, "a kv_producer cannot fetch"
        fakes["d0"].dead = True
        assert ids(await ask(session)) == ANSWER
        assert await last_leg(session) == ("p0", True)
        assert len(fakes["p0"].prefills) <= 2, "nothing is handed to itself"
        fakes["d0"].dead, fakes["d0"].die_after = False, None
        async with asyncio.timeout(60):
            while not (await nodes(session))["d0"]["healthy"]:  # noqa: ASYNC110 - over HTTP
                await asyncio.sleep(0.01)
        assert ids(await ask(session)) == ANSWER
        assert await last_leg(session) == ("d0", False), "it is back"


@BOTH
async def test_a_continued_sequence_does_not_draw_its_first_numbers_again(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind, decoders=2)
    fakes["d0"].die_after = fakes["d1"].die_after = 2
    async with routed(fakes, model) as session:
        await stream(session, max_tokens=4, temperature=0.7, seed=5)
    seeds = [body["seed"] for name in ("d0", "d1") for body in fakes[name].generates]
    assert 5 in seeds and len(set(seeds)) == len(seeds)


@BOTH
@pytest.mark.parametrize("hanging", ["p0", "p1", "d0", "d1"])
async def test_a_server_that_hangs_is_given_up_in_time(kind: HandoffKind, hanging: str, model: Path) -> None:
    fakes = servers(kind, prefillers=2, decoders=2)
    fakes[hanging].gate = asyncio.Event()
    async with routed(fakes, model, prefill_timeout_s=0.2) as session:
        answers = await asyncio.gather(ask(session), ask(session, prompt=PROMPT[::-1]))
        assert [ids(answer) for answer in answers] == [ANSWER, expected(PROMPT[::-1], 8)]
        await until(lambda: fakes[hanging].running == 0)
        assert fakes[hanging].dropped >= 1


async def test_a_decoder_does_not_wait_for_the_kv_of_a_prefiller_that_is_lost(model: Path) -> None:
    """Mooncake's prefiller answers before its KV goes out; if it dies then, the decoder would wait for nine minutes."""
    fakes = servers(HandoffKind.MOONCAKE)
    fakes["p0"].sends = False
    async with routed(fakes, model, connect_timeout_s=0.2) as session:
        asked = asyncio.create_task(ask(session))
        await until(lambda: len(fakes["d0"].generates) == 1 and fakes["p0"].prefills != [] and not fakes["p0"].running)
        fakes["p0"].dead = True
        assert ids(await asked) == ANSWER and fakes["d0"].fetched == [True, False]
        assert (await nodes(session))["d0"]["breaker"] == "closed"
        assert (await record(session))["retried_legs"] == [["decode", "engine_error"]]


async def test_a_decoder_that_cannot_fetch_computes_and_is_not_blamed(model: Path) -> None:
    """Its prefiller may have died after it had answered: with nixl the KV lies there."""
    fakes = servers(HandoffKind.NIXL)
    fakes["d0"].load_fails = True
    async with routed(fakes, model) as session:
        for number in range(4):
            prompt = [number, *PROMPT]
            assert ids(await ask(session, prompt=prompt)) == expected(prompt, 8)
        assert fakes["d0"].fetched == [True, False] * 4
        assert (await nodes(session))["d0"]["breaker"] == "closed"


@BOTH
async def test_a_client_that_leaves_takes_both_legs_along(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    async with routed(fakes, model) as session:
        fakes["p0"].gate = asyncio.Event()
        asked = asyncio.create_task(ask(session))
        await until(lambda: fakes["p0"].running == 1)
        asked.cancel()
        await until(lambda: fakes["p0"].running == 0 and fakes["d0"].running == 0)
        assert fakes["p0"].dropped == 1
        fakes["p0"].gate.set()
        fakes["d0"].gate = asyncio.Event()
        asked = asyncio.create_task(ask(session))
        await until(lambda: fakes["d0"].running == 1)
        asked.cancel()
        await until(lambda: fakes["d0"].running == 0)
        assert fakes["d0"].dropped >= 1


@pytest.mark.parametrize(
    ("refusal", "status", "code"),
    [
        ((400, "top_k must be something else"), 400, "invalid_request_error"),
        ((400, "This model's maximum context length is 5 tokens"), 400, "context_length_exceeded"),
        ((404, "The model does not exist"), 404, "model_not_found"),
        ((429, "slow down"), 503, "overloaded"),
        ((503, "full"), 503, "overloaded"),
        ((500, "boom"), 500, "engine_error"),
    ],
)
async def test_what_every_decoder_refuses_is_told_to_the_client(
    refusal: tuple[int, str], status: int, code: str, model: Path
) -> None:
    fakes = servers(HandoffKind.NIXL)
    fakes["d0"].refusal = refusal
    async with routed(fakes, model, attempts=2) as session:
        answer = await ask(session)
        assert (answer["status"], answer["error"]["code"]) == (status, code)
        assert refusal[1] in answer["error"]["message"]
        assert ("Retry-After" in answer["headers"]) is (status == 503)


async def test_an_error_in_the_stream_before_the_first_token_is_the_requests_and_later_the_servers(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    fakes["d0"].late_error = (400, "logprobs over the server's max_logprobs")
    async with routed(fakes, model) as session:
        assert (await ask(session))["status"] == 400


async def test_a_server_of_another_model_or_that_is_ill_is_not_used(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL, decoders=3)
    fakes["d1"].model = "other"
    fakes["d2"].health = 503
    async with routed(fakes, model, healthy=False) as session:
        await serves(session)
        shown = await nodes(session)
        assert "serves other, not fake-model" in str(shown["d1"]["reason"])
        assert "/health answered 503" in str(shown["d2"]["reason"])
        assert ids(await ask(session)) == ANSWER


async def test_mooncakes_prefiller_is_not_used_without_its_bootstrap_server(model: Path) -> None:
    fakes = servers(HandoffKind.MOONCAKE)
    async with serving(fakes):
        fakes["p0"].bootstrap_port = free_ports(1)[0]
        async with running_router(plain_config(fakes, model), healthy=False) as session:
            await serves(session)
            assert ids(await ask(session)) == ANSWER and fakes["d0"].fetched == [False]
            assert "/query" in str((await nodes(session))["p0"]["reason"])


async def test_a_prefiller_without_a_connector_is_reported_and_the_decoder_prefills(model: Path, caplog) -> None:
    fakes = servers(HandoffKind.NIXL)
    fakes["p0"].connector = False
    async with routed(fakes, model) as session:
        assert ids(await ask(session)) == ids(await ask(session)) == ANSWER
    assert caplog.text.count("prefiller_hands_nothing_over") == 1


async def test_a_stream_whose_usage_never_comes_ends_all_the_same(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    fakes["d0"].shy = True
    async with routed(fakes, model) as session:
        assert ids(await ask(session)) == ANSWER
        fakes["d0"].stop.set()


# --- the plain case ---


@BOTH
async def test_prompt_and_kv_go_from_prefiller_to_decoder(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    fakes["p0"].cached_tokens, fakes["d0"].cached_tokens = 5, 19
    async with routed(fakes, model) as session:
        answer = await ask(session)
        assert ids(answer) == ANSWER and answer["choices"][0]["finish_reason"] == "length"
        assert answer["choices"][0]["text"] == bytes(ANSWER).decode()
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 5, "the prefiller's truth"
        assert fakes["d0"].fetched == [True]
        other = [1, *PROMPT]
        assert streamed_ids(await stream(session, prompt=other)) == expected(other, 8)
        kept = await record(session)
        assert [leg["kind"] for leg in kept["legs"]] == ["prefill", "decode"]  # type: ignore[index, attr-defined]
        async with session.get("/v1/cluster") as reply:
            shown = await reply.json()
        assert shown["handoff"] == kind.value and shown["metadata_connected"] is None
        async with session.get("/metrics") as reply:
            assert "router_index_connected" not in await reply.text()


async def test_a_short_prompt_needs_no_prefiller_and_then_the_decoder_says_what_was_cached(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    fakes["d0"].cached_tokens = 3
    async with routed(fakes, model, min_prefill_tokens=50) as session:
        answer = await ask(session)
        assert not fakes["p0"].prefills and answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 3
        fakes["d0"].details = False
        assert (await ask(session))["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


@BOTH
async def test_one_of_several_sequences_fetches_and_the_others_follow(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    async with routed(fakes, model) as session:
        answer = await ask(session, n=3, temperature=1.0, seed=4)
        assert sorted(fakes["d0"].fetched) == [False, False, True]
        assert len({tuple(ids(answer, index)) for index in range(3)}) == 3, "each draws by its own seed"
        events = await stream(session, n=2)
        assert streamed_ids(events, 0) == streamed_ids(events, 1) == ANSWER, "greedy ones are equal"
        answer = await ask(session, n=2, prompt=PROMPT[:5])  # without a prefiller: one leg for both
        assert ids(answer, 0) == ids(answer, 1) == expected(PROMPT[:5], 8) and fakes["d0"].generates[-1]["n"] == 1


@BOTH
async def test_chat_both_whole_and_streamed(kind: HandoffKind, model: Path) -> None:
    fakes = servers(kind)
    prompt = list(b"user:tell me about rivers;")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "tell me about rivers"}], "max_tokens": 6}
    async with routed(fakes, model) as session:
        async with session.post("/v1/chat/completions", json=body | {"temperature": 0}) as reply:
            answer = await reply.json()
        assert answer["choices"][0]["message"]["content"] == bytes(expected(prompt, 6)).decode()
        assert fakes["d0"].generates[0]["prompt"] == prompt
        async with session.post("/v1/chat/completions", json=body | {"temperature": 0, "stream": True}) as reply:
            events = [json.loads(line[6:]) async for line in reply.content if line.startswith(b"data: {")]
        text = "".join(event["choices"][0]["delta"].get("content", "") for event in events)
        assert text == answer["choices"][0]["message"]["content"]


async def test_logprobs_by_token_ids(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    async with routed(fakes, model) as session:
        answer = await ask(session, logprobs=2)
        logprobs = answer["choices"][0]["logprobs"]
        assert logprobs["token_logprobs"] == [-5.0] * 8
        assert [sorted(top.values()) for top in logprobs["top_logprobs"]] == [[-5.0, -0.2, -0.1]] * 8
        alone = (await ask(session, logprobs=0))["choices"][0]["logprobs"]["top_logprobs"]
        assert alone == [{text: -5.0} for text in logprobs["tokens"]]


async def test_logprobs_of_a_prompt_are_handed_through_and_need_no_prefiller(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    async with routed(fakes, model) as session:
        plain = await ask(session)
        answer = await ask(session, prompt_logprobs=2)
        told = answer["choices"][0].pop("prompt_logprobs")
        assert answer["choices"] == plain["choices"]
        expected_rows = [
            {row.token_id: (row.logprob, row.rank)} | {t: (lp, rank) for rank, (t, lp) in enumerate(row.top, 1)}
            for row in prompt_rows(PROMPT, 2)
        ]
        assert told[0] is None and len(told) == len(PROMPT)
        assert [{int(t): (one["logprob"], one["rank"]) for t, one in row.items()} for row in told[1:]] == expected_rows
        assert len(fakes["p0"].prefills) == 1 and not fakes["d0"].fetched[-1]
        (echoed,) = (await ask(session, echo=True, logprobs=1, max_tokens=0))["choices"]
        assert echoed["logprobs"]["token_logprobs"] == [None, *(row.logprob for row in prompt_rows(PROMPT, 1))]


async def test_listed_tokens_are_told_in_their_order(model: Path) -> None:
    async with routed(servers(HandoffKind.NIXL), model) as session:
        answer = await ask(session, logprobs=0, logprob_token_ids=[66, 65])
        for top in answer["choices"][0]["logprobs"]["top_logprobs"]:
            assert list(top.values()) == pytest.approx([-5.0, -0.1, -0.2]) and list(top)[1:] == ["B", "A"]


async def test_a_stop_token_ends_the_text_before_it(model: Path) -> None:
    fakes = servers(HandoffKind.NIXL)
    async with routed(fakes, model) as session:
        stop = ANSWER[3]
        first = ANSWER.index(stop)
        answer = await ask(session, stop_token_ids=[stop])
        assert answer["choices"][0]["finish_reason"] == "stop"
        assert answer["choices"][0]["text"] == bytes(ANSWER[:first]).decode() and ids(answer) == ANSWER[: first + 1]
        fakes["d0"].tokens = lambda tokens, seed: 0  # the model's end-of-sequence token
        answer = await ask(session)
        assert (answer["choices"][0]["finish_reason"], answer["choices"][0]["text"]) == ("stop", "")
        text = bytes(ANSWER).decode()
        fakes["d0"].tokens = lambda tokens, seed: ANSWER[len(tokens) - len(PROMPT)]
        assert (await ask(session, stop=text[2:4]))["choices"][0]["text"] == text[:2]
