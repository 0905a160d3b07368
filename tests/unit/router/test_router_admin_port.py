"""A router whose operators have a port of their own: what is answered where, to whom; and questions that are shared."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp
from support.router_fakes import Rig, make_rig

from kvcore.clock import ManualClock
from kvcore.config.checks import heard_elsewhere
from kvcore.config.file import load_config
from kvcore.config.security import KeysConfig
from kvcore.config.servers import operators_url_of, router_url_of
from kvcore.errors import ConfigError, InvalidRequestError, OverloadedError
from kvcore.process.certified_app import PEER_NAMES
from kvcore.tenants.keys import KeyFile, new_key
from kvcore.tenants.salts import salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.secrets import Secrets
from router.admin.looks import SharedLooks
from router.tenants.gate import TenantGate
from router.tenants.paths import POOLING
from router.tenants.sides import ClientsSide, OperatorsSide

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
ASK: dict[str, Any] = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
CLIENTS = {"/health", "/v1/models", "/v1/models/{name}", "/v1/chat/completions", "/v1/completions"}
CLIENTS |= {"/ping", "/version", "/tokenize", "/detokenize", "/v1/messages", "/v1/messages/count_tokens"}
CLIENTS |= {"/inference/v1/generate", "/v1/chat/completions/batch"}
CLIENTS |= {"/v1/responses", "/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"}
CLIENTS |= POOLING
RECORDS = {"/v1/requests", "/v1/requests/{request_id}"}


class Certified:
    """What comes by a connection that has shown a certificate."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        scope[PEER_NAMES] = frozenset({"client"})
        await self._app(scope, receive, send)


def asking(app: ASGIApp, key: str = "") -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
    return httpx.AsyncClient(transport=transport, base_url="http://router", headers=headers)


async def with_keys(path: Path) -> tuple[Rig, dict[str, str]]:
    """A router with the keys of tenant `a` and of an admin, whose operators come apart."""
    made = {name: new_key(name, admin=name == "admin", created="") for name in ("a", "admin")}
    records = [record for _, record in made.values()]
    (path / "keys.json").write_bytes(msgspec.json.encode(KeyFile(tenants={}, keys=records)))
    source, salts = KeySource(KeysConfig(file=str(path / "keys.json"))), salts_by(Secrets((bytes(range(32)),)))

    def guard(_: Any, app: ASGIApp) -> ASGIApp:
        return ClientsSide(TenantGate(app, source, salts, ManualClock(), apart=True), has_keys=True)

    return await make_rig(guard=guard), {name: key for name, (key, _) in made.items()}


async def without_keys() -> Rig:
    return await make_rig(guard=lambda _, app: ClientsSide(app, has_keys=False))


async def statuses(http: httpx.AsyncClient, paths: set[str], *, kept: set[str]) -> dict[str, int]:
    """Of a GET and a POST of each path, what is not 404; those of `kept` whatever they are."""
    found = {}
    for path in paths:
        for method in ("GET", "POST"):
            plain = path.replace("{name}", "x").replace("{request_id}", "x")
            reply = await http.request(method, plain)
            if reply.status_code != 404 or "admin_port" not in reply.text:
                found[path] = reply.status_code
    return {path: status for path, status in found.items() if path not in kept}


async def test_operators_paths_are_answered_on_their_port_alone(tmp_path: Path):
    rig, keys = await with_keys(tmp_path)
    async with asking(rig.app, keys["admin"]) as public, asking(OperatorsSide(rig.app), keys["admin"]) as own:
        paths = set((await own.get("/openapi.json")).json()["paths"]) | {"/metrics"}
        assert len(paths) > 20
        assert await statuses(public, paths, kept=CLIENTS | RECORDS) == {}
        assert (await public.get("/v1/nodes/")).status_code == 404
        assert (await public.request("HEAD", "/v1/cluster")).status_code == 404
        for path in ("/metrics", "/v1/cluster", "/v1/nodes", "/v1/cache/stats", "/v1/requests", "/health"):
            assert (await own.get(path)).status_code == 200, path
        for one in (public, own):
            assert (await one.post("/v1/completions", json=ASK)).status_code == 200


async def test_an_admin_is_a_tenant_among_others_on_the_clients_port(tmp_path: Path):
    rig, keys = await with_keys(tmp_path)
    async with asking(rig.app, keys["a"]) as tenant, asking(rig.app, keys["admin"]) as public:
        theirs = (await tenant.post("/v1/completions", json=ASK)).json()["id"]
        reply = await public.post("/v1/completions", json=ASK, headers={"X-KVFerry-Tenant": "a"})
        assert reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, "it is not the tenant's KV"
        assert [one["id"] for one in (await public.get("/v1/requests")).json()["requests"]] == [reply.json()["id"]]
        assert (await public.get(f"/v1/requests/{theirs}")).status_code == 404
    async with asking(OperatorsSide(rig.app), keys["admin"]) as own, asking(OperatorsSide(rig.app), keys["a"]) as other:
        assert (await own.get(f"/v1/requests/{theirs}")).status_code == 200
        assert len((await own.get("/v1/requests")).json()["requests"]) == 2
        assert (await other.get("/v1/nodes")).status_code == 403


async def test_without_keys_nobody_is_shown_requests_on_the_clients_port():
    rig = await without_keys()
    async with asking(rig.app) as public, asking(OperatorsSide(rig.app)) as own:
        asked = (await public.post("/v1/completions", json=ASK)).json()["id"]
        paths = set((await own.get("/openapi.json")).json()["paths"]) | {"/metrics"}
        assert await statuses(public, paths, kept=CLIENTS) == {}
        assert (await own.get(f"/v1/requests/{asked}")).status_code == 200


async def test_a_certificate_makes_an_operator_on_the_operators_port_alone(tmp_path: Path):
    rig, _ = await with_keys(tmp_path)
    async with asking(Certified(OperatorsSide(rig.app))) as own, asking(Certified(rig.app)) as public:
        assert (await own.get("/v1/nodes")).status_code == 200
        assert (await public.post("/v1/completions", json=ASK)).status_code == 401
        assert (await public.get("/v1/requests")).status_code == 401


# --- questions that are shared ------------------------------------------------------------------------------------


async def test_what_many_ask_at_the_same_time_is_asked_once():
    looks, calls, go = SharedLooks(), 0, asyncio.Event()

    async def look() -> int:
        nonlocal calls
        calls += 1
        await go.wait()
        return calls

    asked = [asyncio.create_task(looks.of("nodes", look)) for _ in range(50)]
    await asyncio.sleep(0)
    asked[0].cancel()
    go.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert isinstance(answers[0], asyncio.CancelledError) and set(answers[1:]) == {1}
    assert await looks.of("nodes", look) == 2, "what is asked later is asked anew"


async def test_other_questions_are_bounded_and_a_failure_is_everybodys():
    looks, go = SharedLooks(most=2), asyncio.Event()

    async def fails() -> None:
        await go.wait()
        raise InvalidRequestError("no")

    asked = [asyncio.create_task(looks.of(what, fails)) for what in ("a", "b", "a")]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await looks.of("c", fails)
    go.set()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    assert [type(answer) for answer in answers] == [InvalidRequestError] * 3
    assert "none under way" in repr(looks)


async def test_the_routers_questions_to_others_are_shared():
    rig, calls, go = await make_rig(), 0, asyncio.Event()

    async def report() -> dict[str, str]:
        nonlocal calls
        calls += 1
        await go.wait()
        return {}

    rig.admin.report = report  # type: ignore[method-assign,assignment]
    async with asking(rig.app) as http:
        asked = [asyncio.create_task(http.get("/v1/nodes")) for _ in range(20)]
        for _ in range(1000):  # turns of the loop: all of them have come by then
            await asyncio.sleep(0)
        assert calls == 1
        go.set()
        assert {reply.status_code for reply in await asyncio.gather(*asked)} == {200}


# --- where it is ----------------------------------------------------------------------------------------------------


def test_commands_ask_at_the_operators_port():
    config = load_config(SIM, ["router.admin_port=8999"])
    assert operators_url_of(config) == "http://127.0.0.1:8999"
    assert operators_url_of(load_config(SIM)) == router_url_of(config)
    tls = "security.tls={cert: a, key: b, ca: c}"
    assert operators_url_of(load_config(SIM, ["router.admin_port=8999", tls])) == "https://127.0.0.1:8999"
    assert router_url_of(load_config(SIM, ["router.admin_port=8999", tls])).startswith("http://")


def test_the_operators_port_is_one_of_its_own_and_counts_where_others_reach_it():
    with pytest.raises(ConfigError, match=r"router\.admin_port"):
        load_config(SIM, [f"router.admin_port={load_config(SIM).router.port}"])
    apart = ["router.admin_port=8999", "router.admin_host=192.0.2.1"]
    with pytest.raises(ConfigError, match=r"router\.admin_host: 192\.0\.2\.1 is reached from other machines"):
        load_config(SIM, apart)
    opened = load_config(SIM, [*apart, "security.open=true"])
    assert heard_elsewhere(opened) == [("router.admin_host", "192.0.2.1")]
