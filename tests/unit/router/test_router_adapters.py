"""Names of adapters: whom a request with one is sent to, under what salt, and what answers call it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.fake_vllm_server import MODEL, servers, serving
from support.plain_vllm import plain_config, running_router, write_model_folder
from support.router_fakes import CHUNK_TOKENS, FakeNode, FakeNodes, Rig, make_rig, spec

from kvcore.chunk_keys import adapted_salt, adapter_identity, prompt_keys
from kvcore.errors import NodeUnavailableError
from kvcore.handoff import HandoffKind
from kvcore.tenants.salts import TenantSalt
from kvcore.types import Role
from nodeapi.adapters import ServedAdapter
from nodeapi.sampling import SamplingParams
from router.adapters import AdapterNames
from router.requests.spec import AnswerRequest, RequestSpec
from router.tenants.callers import Caller

PROMPT = [5] * 100
SQL, NEW_SQL, CHAT = (
    ServedAdapter(name=name, identity=adapter_identity(name, files), path=f"/adapters/{name}")
    for name, files in (("sql", b"old"), ("sql", b"new"), ("org/chat", b""))
)
DECLARED = {"sql": "/adapters/sql"}


def nodes(**adapters: list[ServedAdapter]) -> FakeNodes:
    """Prefillers begin with p."""
    roles = {"d": Role.DECODER, "p": Role.PREFILLER}
    return FakeNodes([FakeNode(name, roles[name[0]], adapters=served) for name, served in adapters.items()])


@asynccontextmanager
async def client(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=rig.app), base_url="http://r") as http:  # type: ignore[arg-type]
        yield http


def legs(fakes: FakeNodes) -> list[tuple[str, bytes]]:
    return [(node.id, leg.cache_salt) for node in fakes.nodes for leg in (*node.prefills, *node.generates)]


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": PROMPT, "max_tokens": 3},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 3},
    "/v1/chat/completions/batch": {"messages": [[{"role": "user", "content": "x" * 100}]], "max_tokens": 3},
    "/v1/responses": {"input": "x" * 100, "max_output_tokens": 3},
    "/v1/messages": {"messages": [{"role": "user", "content": "x" * 100}], "max_tokens": 3},
    "/inference/v1/generate": {"token_ids": PROMPT, "sampling_params": {"max_tokens": 3}},
}


@pytest.mark.parametrize("path", BODIES)
async def test_on_every_surface_it_goes_to_nodes_that_serve_it_under_its_own_salt(path: str) -> None:
    fakes = nodes(p0=[], p1=[SQL], d0=[], d1=[SQL, CHAT], d2=[CHAT])
    rig = await make_rig(fakes, adapters=DECLARED)
    async with client(rig) as http:
        for salt in (None, "tenant"):
            body = BODIES[path] | {"model": "sql"} | ({"cache_salt": salt} if salt else {})
            reply = await http.post(path, json=body)
            assert (reply.status_code, reply.json()["model"]) == (200, "sql"), reply.text
        assert {node for node, _ in legs(fakes)} == {"p1", "d1"}
        assert {salt for _, salt in legs(fakes)} == {adapted_salt(SQL.identity, own) for own in (b"", b"tenant")}
        reply = await http.post(path, json=BODIES[path] | {"model": "other"})
        assert reply.status_code == 404 and "other" in reply.text
        await http.post(path, json=BODIES[path] | {"model": "fake-model"})
        assert legs(fakes)[-1][1] == b"" or any(salt == b"" for _, salt in legs(fakes))


async def test_the_record_of_a_request_says_whose_answer_it_is() -> None:
    async with client(await make_rig(nodes(d0=[SQL]))) as http:
        for name in ("sql", "fake-model"):
            await http.post("/v1/completions", json=BODIES["/v1/completions"] | {"model": name})
        newest = (await http.get("/v1/requests")).json()["requests"]
    assert [one["adapter"] for one in newest] == ["", "sql"]


async def test_texts_are_made_tokens_by_its_name_too() -> None:
    async with client(await make_rig(nodes(d0=[SQL]))) as http:
        asked = [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [97]})]
        asked.append(("/v1/messages/count_tokens", {"messages": [{"role": "user", "content": "a"}]}))
        for path, body in asked:
            assert (await http.post(path, json={"model": "sql", **body})).status_code == 200
            assert (await http.post(path, json={"model": "other", **body})).status_code == 404


async def test_models_are_listed_with_their_parents() -> None:
    async with client(await make_rig(nodes(d0=[SQL, CHAT]), adapters=DECLARED, aliases=["small"])) as http:
        listed = {one["id"]: one for one in (await http.get("/v1/models")).json()["data"]}
        assert list(listed) == ["fake-model", "small", "sql", "org/chat"]
        assert {listed[name]["parent"] for name in ("fake-model", "small")} == {None}
        assert (listed["sql"]["root"], listed["sql"]["parent"]) == ("/adapters/sql", "fake-model")
        assert (await http.get("/v1/models/org/chat")).json() == listed["org/chat"]
        assert (await http.get("/v1/models/other")).status_code == 404


async def test_one_of_the_file_that_nobody_serves_just_now_is_unavailable_and_comes_back() -> None:
    fakes = nodes(p0=[], d0=[])
    rig = await make_rig(fakes, adapters=DECLARED)
    async with client(rig) as http:
        body = BODIES["/v1/completions"] | {"model": "sql"}
        reply = await http.post("/v1/completions", json=body)
        assert reply.status_code == 503 and "serves the adapter 'sql'" in reply.json()["error"]["message"]
        fakes["d0"].adapters = [SQL]
        await rig.prober.probe()
        assert (await http.post("/v1/completions", json=body)).status_code == 200
        assert {node for node, _ in legs(fakes)} == {"d0"}, "no prefiller serves it"


async def test_a_salt_of_a_client_that_looks_like_an_adapters_is_refused() -> None:
    async with client(await make_rig(nodes(d0=[SQL]))) as http:
        for salt in (f"kva1.{SQL.identity}.", "kva1.x"):
            reply = await http.post("/v1/completions", json=BODIES["/v1/completions"] | {"cache_salt": salt})
            assert (reply.status_code, reply.json()["error"]["param"]) == (400, "cache_salt")


async def test_while_its_files_change_requests_go_to_what_most_nodes_have() -> None:
    fakes = nodes(d0=[SQL], d1=[SQL], d2=[NEW_SQL], p0=[NEW_SQL])
    rig = await make_rig(fakes)
    names = AdapterNames(rig.cluster, {})
    assert names.identity("sql") == SQL.identity
    fakes["d1"].adapters, fakes["d0"].down = [NEW_SQL], True
    await rig.prober.probe()
    assert names.identity("sql") == NEW_SQL.identity
    fakes["d1"].down = fakes["d2"].down = True
    await rig.prober.probe()
    assert names.identity("sql") == NEW_SQL.identity, "the prefiller decodes in need"
    with pytest.raises(NodeUnavailableError, match="'org/chat'"):
        names.identity("org/chat")


async def test_an_answer_goes_on_where_the_same_files_are() -> None:
    fakes = nodes(d0=[SQL], d1=[NEW_SQL], d2=[SQL])
    fakes["d0"].die_after = fakes["d2"].die_after = 2
    fakes["d0"].stays_dead = fakes["d2"].stays_dead = True
    rig = await make_rig(fakes)
    async with client(rig) as http:
        await http.post("/v1/completions", json=BODIES["/v1/completions"] | {"model": "sql"})
    assert fakes["d1"].generates == [] and fakes["d0"].generates and fakes["d2"].generates


def test_a_tenants_salt_is_within_the_adapters() -> None:
    own = TenantSalt(bytes(32))
    sampling = SamplingParams(max_tokens=1)
    salts = [adapted_salt(adapter, b"mine") for adapter in ("", SQL.identity, CHAT.identity)]
    request = AnswerRequest([RequestSpec("r", PROMPT, sampling, cache_salt=salt) for salt in salts])
    salted = [one.cache_salt for one in Caller(tenant="t", salt=own, public_chunks=lambda _: 2).salted(request).specs]
    assert salted == [adapted_salt(adapter, own.of(b"mine", 2)) for adapter in ("", SQL.identity, CHAT.identity)]
    keys = [set(prompt_keys(spec().fingerprint, salt, PROMPT, CHUNK_TOKENS)) for salt in salted]
    assert sum(map(len, keys)) == len(set.union(*keys))


async def test_what_is_known_of_the_cache_is_the_adapters_own() -> None:
    fakes = nodes(p0=[SQL], p1=[], d0=[SQL])
    rig = await make_rig(fakes, adapters=DECLARED)
    keys = prompt_keys(spec().fingerprint, adapted_salt(SQL.identity, b""), PROMPT, CHUNK_TOKENS)
    rig.cluster.index.store("p0", keys, "p0.1")
    async with client(rig) as http:
        for name, found in (("sql", 6 * CHUNK_TOKENS), ("fake-model", 0)):
            reply = await http.post("/v1/cache/lookup", json={"model": name, "prompt": PROMPT})
            assert reply.json()["prompts"][0]["memory_tokens"] == found
        for _ in range(3):
            await http.post("/v1/cache/warm", json={"model": "sql", "prompt": PROMPT})
        assert {node for node, _ in legs(fakes)} == {"p0"}
        fakes["p0"].adapters = []
        await rig.prober.probe()
        reply = await http.post("/v1/cache/warm", json={"model": "sql", "prompt": PROMPT})
        assert reply.status_code == 503 and "serves the adapter" in reply.text


@pytest.mark.parametrize("kind", [HandoffKind.NIXL, HandoffKind.MOONCAKE])
async def test_servers_that_run_already_say_which_adapters_they_have(kind: HandoffKind, tmp_path: Path) -> None:
    fakes = servers(kind)
    serve = [next(fake for fake in fakes.values() if fake.role is role) for role in (Role.PREFILLER, Role.DECODER)]
    for fake in serve:
        fake.adapters = {"sql": "/adapters/sql"}
    model = write_model_folder(tmp_path / "m")
    async with serving(fakes), running_router(plain_config(fakes, model)) as session:
        body = {"model": "sql", "prompt": list(range(97, 117)), "max_tokens": 4, "cache_salt": "tenant"}
        for _ in range(3):
            async with session.post("/v1/completions", json=body) as reply:
                assert (reply.status, (await reply.json())["model"]) == (200, "sql")
        async with session.get("/v1/models") as reply:
            cards = {one["id"]: (one["root"], one["parent"]) for one in (await reply.json())["data"]}
        assert cards == {MODEL: (MODEL, None), "sql": ("/adapters/sql", MODEL)}
    for fake in fakes.values():
        sent = [*fake.prefills, *fake.generates]
        assert bool(sent) == (fake in serve)
        assert {(one["model"], one["cache_salt"]) for one in sent} <= {("sql", "tenant")}
