"""API keys at the router: who is let in to what, whose KV a request is, and what a tenant may have."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from starlette.types import ASGIApp
from support.router_fakes import Rig, make_rig, two_and_two, until

from kvcore.chunk_keys import owner_of
from kvcore.clock import ManualClock
from kvcore.config.security import KeysConfig
from kvcore.errors import RateLimitError
from kvcore.tenants.keys import KeyFile, TenantLimits, new_key
from kvcore.tenants.salts import TenantSalt, salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.secrets import Secrets
from router.admission.gate import Admission
from router.api.openai_responses.kept import KeptResponses
from router.api.responses import JsonReply
from router.requests.records import RequestLog
from router.tenants.gate import TenantGate
from router.tenants.limits import GateLimits
from router.tenants.rates import Allowance, WrongKeys

SECRETS = Secrets((bytes(range(32)),))
ASK: dict[str, Any] = {"model": "fake-model", "prompt": "hello" * 20, "max_tokens": 4}
GATEWAY = "10.0.0.1"


class Door:
    """A router whose gate has a clock of its own. `keys`: of tenants by name, `admin` is one."""

    def __init__(
        self, path: Path, limits: dict[str, TenantLimits], proved: Callable[[ASGIApp], ASGIApp] | None = None
    ) -> None:
        self.clock, self.proved = ManualClock(), proved
        made = {name: new_key(name, admin=name == "admin", created="") for name in ("a", "b", "admin")}
        self.keys = {name: key for name, (key, _) in made.items()}
        self.records = {name: record for name, (_, record) in made.items()}
        self.path, self.limits = path / "keys.json", limits
        self.write(self.records.values())
        self.source = KeySource(KeysConfig(file=str(self.path)))
        self.gates: list[TenantGate] = []

    def write(self, records: Any) -> None:
        self.path.write_bytes(msgspec.json.encode(KeyFile(tenants=self.limits, keys=list(records))))

    def guard(self, log: RequestLog, app: ASGIApp) -> ASGIApp:
        proved = self.proved(app) if self.proved is not None else None
        how: dict[str, Any] = {"gateways": [GATEWAY], "proved": proved}
        self.gates.append(TenantGate(app, self.source, salts_by(SECRETS), self.clock, **how))
        log.observers.append(self.gates[0].ended)
        return self.gates[0]

    async def rig(self, **how: Any) -> Rig:
        return await make_rig(guard=self.guard, max_body=20_000, **how)


class Client:
    """Asks one rig. `address`: that it comes from."""

    def __init__(self, rig: Rig, keys: dict[str, str], address: str = "192.0.2.7") -> None:
        transport = httpx.ASGITransport(app=rig.app, client=(address, 123))  # type: ignore[arg-type]
        self._http = httpx.AsyncClient(transport=transport, base_url="http://router")
        self._keys = keys

    async def get(self, path: str, key: str | None = None, **headers: str) -> httpx.Response:
        return await self._http.get(path, headers=self._headers(key) | headers)

    async def post(self, path: str, body: Any, key: str | None = None, **headers: str) -> httpx.Response:
        return await self._http.post(path, json=body, headers=self._headers(key) | headers)

    async def ask(self, key: str | None, **fields: Any) -> httpx.Response:
        return await self.post("/v1/completions", ASK | fields, key)

    def _headers(self, key: str | None) -> dict[str, str]:
        return {} if key is None else {"Authorization": f"Bearer {self._keys.get(key, key)}"}


def error_of(reply: httpx.Response) -> dict[str, object]:
    body = reply.json()
    assert set(body) == {"error"} and set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


@pytest.fixture
async def door(tmp_path: Path) -> Door:
    return Door(tmp_path, {})


# --- who is let in ------------------------------------------------------------------------------------------------


async def test_without_a_key_that_holds_nothing_is_answered_but_health(door):
    rig = await door.rig()
    client = Client(rig, door.keys)
    for path in ("/health", "/ping"):
        assert (await client.get(path)).status_code == 200
    assert (await client.post("/ping", {})).status_code == 200
    paths = [route.path.replace("{", "").replace("}", "") for route in _routes(rig)]
    assert len(paths) > 20
    for path in paths:
        if path in ("/health", "/ping"):
            continue
        for key in (None, "kvf_000000000000_" + "x" * 43):
            reply = await (client.get(path, key) if path.startswith("/v1/models") else client.post(path, {}, key))
            assert reply.status_code in (401, 429), path
            if path.startswith("/v1/messages"):
                assert reply.json()["error"]["type"] in ("authentication_error", "rate_limit_error")
            else:
                assert error_of(reply)["code"] in ("invalid_api_key", "rate_limit_exceeded")
        door.clock.advance(60)
    assert rig.log.total == 0


def _routes(rig: Rig) -> list[Any]:
    app: Any = rig.app
    while not hasattr(app, "routes"):
        app = getattr(app, "app", None) or app._app
    return [route for route in app.routes if hasattr(route, "path")]


async def test_a_key_lets_in_and_every_other_way_to_write_it_does_not(door):
    rig = await door.rig()
    client, key = Client(rig, door.keys), door.keys["a"]
    assert (await client.ask("a")).status_code == 200
    for headers in ({"authorization": f"bEaReR {key}"}, {"x-api-key": key}):
        reply = await client.post("/v1/completions", ASK, **headers)
        assert reply.status_code == 200
    near = (f"{key}x", key[:-1], f"{key} {key}", key.upper())
    wrong = [f"Basic {key}", key, "Bearer", *(f"Bearer {one}" for one in near)]
    for value in wrong:
        reply = await client.post("/v1/completions", ASK, authorization=value)
        assert (reply.status_code, error_of(reply)["code"]) == (401, "invalid_api_key"), value
        assert reply.headers["www-authenticate"] == "Bearer" and reply.headers["connection"] == "close"
        door.clock.advance(60)
    two = await client.post("/v1/completions", ASK, "a", **{"x-api-key": door.keys["b"]})
    assert two.status_code == 401, "of two keys none counts"


ADMINS = ["/v1/cluster", "/metrics", "/v1/cache/stats", "/v1/cache/advise", "/v1/nodes", "/v1/blend"]


@pytest.mark.parametrize("path", ADMINS)
async def test_what_tells_of_others_is_for_admins(door, path):
    client = Client(await door.rig(), door.keys)
    assert (await client.get(path, "admin")).status_code == 200
    refused = await client.get(path, "a")
    assert (refused.status_code, error_of(refused)["code"]) == (403, "admin_key_needed")


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/cluster/", "//v1/cluster", "/v1/%63luster", "/V1/cluster", "/v1/cluster?x=/v1/models"),
        *("/v1/models/../cluster", "/v1/requests/../cluster", "/v1/models/%2e%2e/cluster", "/v1/nodes/drain"),
    ],
)
async def test_however_its_path_is_written_a_tenants_key_reaches_nothing_that_is_an_admins(door, path):
    client = Client(await door.rig(), door.keys)
    for reply in (await client.get(path, "a"), await client.post(path, {"node": "p0"}, "a")):
        assert reply.status_code in (403, 404, 405), path
        assert "uptime_s" not in reply.text


async def test_a_tenant_sees_its_own_requests_alone_and_an_admin_all(door):
    rig = await door.rig()
    client = Client(rig, door.keys)
    mine = (await client.ask("a")).json()["id"]
    theirs = (await client.post("/v1/completions", ASK, "b", **{"x-request-id": "said-by-b"})).json()["id"]
    await until(lambda: rig.log.in_flight == 0)
    assert [one["id"] for one in (await client.get("/v1/requests", "a")).json()["requests"]] == [mine]
    assert {one["id"] for one in (await client.get("/v1/requests", "admin")).json()["requests"]} == {mine, theirs}
    unknown = await client.get("/v1/requests/nothing", "a")
    for name in (theirs, "said-by-b"):
        hidden = await client.get(f"/v1/requests/{name}", "a")
        assert hidden.status_code == 404
        assert hidden.text.replace(name, "nothing") == unknown.text, "a tenant learns that there is such a request"
    own = (await client.get(f"/v1/requests/{mine}", "a")).json()
    assert own["tenant"] == "a" and own["route"]["candidates"] == [], "scores tell of others' load"
    assert (await client.get(f"/v1/requests/{mine}", "admin")).json()["route"]["candidates"] != []


async def test_pages_may_ask_for_permission_without_a_key_and_read_what_they_are_refused(door):
    rig = await door.rig()
    headers = {"origin": "http://localhost:3000", "access-control-request-method": "POST"}
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        asked = await http.options("/v1/completions", headers=headers)
        refused = await http.post("/v1/completions", json=ASK, headers={"origin": "http://localhost:3000"})
    assert asked.status_code == 200 and refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "http://localhost:3000"


class Proved:
    """Answers what has the right signature, as `ProvenApp` does."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        right = (b"signature-input", b"kvferry=right") in scope["headers"]
        await (self._app if right else JsonReply({}, 401))(scope, receive, send)


async def test_a_process_of_the_cluster_needs_no_key_and_nobody_else_is_taken_for_one(tmp_path):
    door = Door(tmp_path, {}, proved=Proved)
    rig = await door.rig()
    client = Client(rig, door.keys)
    right, wrong = {"signature-input": "kvferry=right"}, {"signature-input": "kvferry=wrong"}
    assert (await client.get("/v1/cluster", **right)).status_code == 200
    for path in ("/v1/cluster", "/v1/requests", "/v1/models"):
        assert (await client.get(path, **wrong)).status_code == 401
        assert (await client.get(path, **{"signature-input": "other=right"})).status_code == 401
    assert (await client.get("/v1/models", "a", **{"signature-input": "other=right"})).status_code == 200, "a proxy's"
    tenants = await client.get("/v1/cluster", "a", **right)
    assert tenants.status_code == 403, "whose a request is is said by its key"
    assert (await client.post("/v1/completions", ASK, **right)).status_code == 200
    assert salts_of(rig) and set(salts_of(rig)) == {b""}
    await client.post("/v1/completions", ASK, **right, **{"x-kvferry-tenant": "b"})
    assert salts_of(rig)[-1] == salts_by(SECRETS)("b").of(b"")


async def test_the_log_says_by_which_key_an_order_was_given(door, caplog):
    client = Client(await door.rig(), door.keys)
    with caplog.at_level("INFO", "audit"):
        await client.post("/v1/nodes/drain", {"node": "d0"}, "admin")
    said = [record.getMessage() for record in caplog.records if record.name == "audit"]
    assert f'audit who="192.0.2.7:123 key {door.records["admin"].id}" what="nodes drain" on=d0' in said[-1]
    assert door.keys["admin"] not in "".join(said)


# --- whose KV -----------------------------------------------------------------------------------------------------


def salts_of(rig: Rig) -> list[bytes]:
    """Of all legs so far, prefills too; the newest ones last."""
    legs = [leg for node in rig.nodes.nodes for leg in (*node.prefills, *node.generates)]
    order = [record.id for record in rig.log.newest()][::-1]
    legs.sort(key=lambda leg: order.index(leg.request_id.partition(".")[0]))
    return [leg.cache_salt for leg in legs]


async def test_an_answer_that_is_kept_is_its_tenants_alone(door):
    client = Client(await door.rig(kept=KeptResponses(door.clock)), door.keys)
    body = {"input": "hello", "max_output_tokens": 4}
    kept = (await client.post("/v1/responses", body, "a")).json()["id"]
    assert (await client.get(f"/v1/responses/{kept}", "a")).json()["id"] == kept
    going_on = {**body, "previous_response_id": kept}
    for key, headers in (("b", {}), ("admin", {}), ("b", {"x-kvferry-tenant": "a"})):
        for refused in (
            await client.get(f"/v1/responses/{kept}", key, **headers),
            await client.post("/v1/responses", going_on, key, **headers),
            await client.post(f"/v1/responses/{kept}/cancel", {}, key, **headers),
        ):
            assert (refused.status_code, error_of(refused)["code"]) == (404, "response_not_found")
    assert (await client.post("/v1/responses", going_on, "a")).status_code == 200
    assert (await client.get(f"/v1/responses/{kept}", "admin", **{"x-kvferry-tenant": "a"})).status_code == 200


async def test_no_two_tenants_and_no_two_salts_share_kv_whatever_clients_say(door):
    rig = await door.rig()
    client = Client(rig, door.keys)
    said = [None, "x", "y", salts_by(SECRETS)("b").of(b"").decode(), salts_by(SECRETS)("b").of(b"x").decode()]
    seen: dict[tuple[str, str | None], bytes] = {}
    for tenant in ("a", "b", "admin"):
        for salt in said:
            before = len(salts_of(rig))
            assert (await client.ask(tenant, **({} if salt is None else {"cache_salt": salt}))).status_code == 200
            (seen[tenant, salt],) = set(salts_of(rig)[before:])
    assert len(set(seen.values())) == len(seen) and b"" not in seen.values()
    for tenant in ("a", "b", "admin"):
        owners = {owner_of(salt) for (name, _), salt in seen.items() if name == tenant}
        assert owners == {salts_by(SECRETS)(tenant).owner}, "a client's salt gives it no other quota"
    again = (await client.ask("a", cache_salt="x")).status_code
    assert again == 200 and salts_of(rig)[-1] == seen["a", "x"], "the same salt finds its own"


def test_the_published_salt_holds():
    salt = TenantSalt(bytes(range(32)))
    tenant = b"kvt1.52eedc6a1f5ad501c76c1aab43be66ff"
    assert salt.of(b"") == tenant + b".998a42ab8c2f73720ca09aa767726feb"
    assert salt.of(b"x") == tenant + b".e8ed296343d573e67d39dc452724ddd7"
    assert salt.owner.hex() == "8c054951623cbf9b"
    assert owner_of(salt.of(b"x")) == owner_of(salt.of(b"")) == salt.owner == owner_of(salt.of(b"")[:37])
    assert owner_of(b"kvt1.") != owner_of(b"kvt1") and owner_of(salt.of(b"").replace(b".", b"-")) != salt.owner


async def test_an_admin_may_ask_in_a_tenants_name_and_a_tenant_in_nobodys(door):
    rig = await door.rig()
    client = Client(rig, door.keys)
    of_b = {"x-kvferry-tenant": "b"}
    await client.ask("b")
    of_tenant = salts_of(rig)[-1]
    await client.post("/v1/completions", ASK, "admin", **of_b)
    assert salts_of(rig)[-1] == of_tenant
    await client.post("/v1/completions", ASK, "a", **of_b)
    assert salts_of(rig)[-1] != of_tenant
    bad = await client.post("/v1/completions", ASK, "admin", **{"x-kvferry-tenant": "b;c"})
    assert bad.status_code == 400


# --- how much -----------------------------------------------------------------------------------------------------


async def test_requests_a_minute_are_held_and_retry_after_says_when(tmp_path):
    door = Door(tmp_path, {"a": TenantLimits(requests_per_minute=2)})
    client = Client(await door.rig(), door.keys)
    assert [(await client.ask("a")).status_code for _ in range(3)] == [200, 200, 429]
    refused = await client.ask("a")
    assert error_of(refused)["code"] == "rate_limit_exceeded" and error_of(refused)["type"] == "requests"
    assert refused.headers["retry-after"] == "30"
    assert (await client.ask("b")).status_code == 200, "another tenant's limit is its own"
    assert (await client.get("/v1/models", "a")).status_code == 200
    door.clock.advance(30)
    assert [(await client.ask("a")).status_code for _ in range(2)] == [200, 429]


async def test_making_tokens_of_texts_is_a_request_too_and_the_load_of_others_is_no_tenants(tmp_path):
    door = Door(tmp_path, {"a": TenantLimits(requests_per_minute=2)})
    client = Client(await door.rig(), door.keys)
    asked = [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]}), ("/tokenize", {"prompt": "a"})]
    assert [(await client.post(path, body, "a")).status_code for path, body in asked] == [200, 200, 429]
    assert (await client.ask("a")).status_code == 429
    assert (await client.get("/version", "a")).status_code == 200
    assert (await client.get("/load", "a")).status_code == 403, "how many others ask now"
    assert (await client.get("/load", "admin")).json() == {"server_load": 0}


async def test_tokens_a_minute_are_of_prompts_and_completions(tmp_path):
    door = Door(tmp_path, {"a": TenantLimits(tokens_per_minute=300)})
    rig = await door.rig()
    client = Client(rig, door.keys)
    assert (await client.ask("a")).status_code == 200  # 100 and 4
    assert (await client.ask("a", prompt="x" * 190)).status_code == 200
    refused = await client.ask("a")
    assert (refused.status_code, error_of(refused)["type"]) == (429, "tokens")
    await until(lambda: rig.log.in_flight == 0)
    # 300 - 104 - 194 = 2 are there, and 98 more come in 19.6 s.
    assert refused.headers["retry-after"] == "20"
    door.clock.advance(20)
    assert (await client.ask("a")).status_code == 200
    assert (await client.ask("a", prompt="x" * 2000, max_tokens=1)).status_code == 429
    door.clock.advance(62)
    longer = await client.ask("a", prompt="x" * 2000, max_tokens=1)
    assert longer.status_code == 200, "what is longer than a minute's worth passes once all of that is there"
    assert (await client.ask("a", prompt="x")).status_code == 429


async def test_what_is_refused_or_leaves_before_its_turn_costs_no_tokens(tmp_path):
    door = Door(tmp_path, {"a": TenantLimits(tokens_per_minute=300)})
    rig = await door.rig(nodes=two_and_two())
    client, came = Client(rig, door.keys), asyncio.Event()

    async def full(*_: object) -> None:
        raise RateLimitError("full")

    async def waits(*_: object) -> None:
        came.set()
        await asyncio.Event().wait()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "admit", full)
        for _ in range(4):
            assert error_of(await client.ask("a"))["message"] == "full"
        patch.setattr(Admission, "admit", waits)
        asked = asyncio.create_task(client.ask("a", prompt="x" * 290))
        await came.wait()
        assert error_of(await client.ask("a"))["type"] == "tokens", "what waits counts"
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
    assert [(await client.ask("a")).status_code for _ in range(2)] == [200, 200]
    await until(lambda: rig.log.in_flight == 0)
    assert door.gates[0]._shared.report().tenants["a"].tokens == 2 * 104


async def test_what_an_admin_asks_in_a_tenants_name_counts_for_that_tenant_alone(tmp_path):
    door = Door(tmp_path, {"b": TenantLimits(tokens_per_minute=300), "admin": TenantLimits(tokens_per_minute=300)})
    rig = await door.rig()
    client = Client(rig, door.keys)
    for _ in range(2):
        assert (await client.post("/v1/completions", ASK, "admin", **{"x-kvferry-tenant": "b"})).status_code == 200
        await until(lambda: rig.log.in_flight == 0)
    refused = await client.ask("b")
    assert (refused.status_code, error_of(refused)["type"]) == (429, "tokens")
    assert [(await client.ask("admin")).status_code for _ in range(2)] == [200, 200]


async def test_so_many_at_a_time_and_a_place_is_free_when_one_has_ended_or_was_refused(tmp_path):
    door = Door(tmp_path, {"a": TenantLimits(concurrency=1)})
    nodes = two_and_two()
    rig = await door.rig(nodes=nodes)
    client = Client(rig, door.keys)
    gate = asyncio.Event()
    for node in nodes.nodes:
        node.generate_gate = gate
    first = asyncio.create_task(client.ask("a"))
    await until(lambda: rig.log.in_flight == 1)
    second = await client.ask("a")
    assert (second.status_code, error_of(second)["type"]) == (429, "requests")
    gate.set()
    assert (await first).status_code == 200
    assert (await client.ask("a", max_tokens=-1)).status_code == 400
    assert (await client.ask("a")).status_code == 200


@pytest.mark.parametrize(("priority", "taken"), [("low", 5), ("normal", 9), ("high", 10)])
async def test_who_is_of_low_priority_is_refused_first(tmp_path, priority, taken):
    door = Door(tmp_path, {"a": TenantLimits(priority=priority)})
    rig = await door.rig(max_requests=10)
    client = Client(rig, door.keys)
    rig.log.in_flight = taken - 1
    assert (await client.ask("a")).status_code == 200
    rig.log.in_flight = taken
    assert (await client.ask("a")).status_code == 503


def test_an_allowance_gives_no_more_than_its_rate_and_what_was_saved():
    allowance, now, given = Allowance(60, 1.0, 0.0), 0.0, 0
    while now < 600:
        if not allowance.wait_s(7, now):
            allowance.take(7, now)
            given += 7
        now += 0.5
    assert 600 <= given <= 660
    allowance.take(500, now)
    assert allowance.wait_s(1, now) > 400, "a debt is made up for first"


# --- wrong keys ---------------------------------------------------------------------------------------------------


async def test_an_address_with_many_wrong_keys_is_not_listened_to_for_a_time(door):
    rig = await door.rig()
    thief, other = Client(rig, door.keys), Client(rig, door.keys, "198.51.100.1")
    codes = [(await thief.ask(f"kvf_{n:012x}_{'x' * 43}")).status_code for n in range(20)]
    assert codes == [401] * 10 + [429] * 10
    right = await thief.ask("a")
    assert right.status_code == 429, "else a right guess would be told from a wrong one"
    assert int(right.headers["retry-after"]) == 6
    assert (await other.ask("a")).status_code == 200
    door.clock.advance(6)
    assert (await thief.ask("a")).status_code == 200
    assert [(await thief.ask("wrong")).status_code for _ in range(2)] == [401, 429]
    assert (await thief.get("/health")).status_code == 200


async def test_behind_a_gateway_addresses_are_those_that_it_says_and_no_client_can_say_one(door):
    rig = await door.rig()
    gateway, direct = Client(rig, door.keys, GATEWAY), Client(rig, door.keys)
    for n in range(11):
        await gateway.post("/v1/completions", ASK, "wrong", **{"x-forwarded-for": f"10.9.9.{n}, 203.0.113.5"})
    blocked = await gateway.post("/v1/completions", ASK, "a", **{"x-forwarded-for": "10.9.9.99, 203.0.113.5"})
    assert blocked.status_code == 429, "what the client itself says of its address does not count"
    free = await gateway.post("/v1/completions", ASK, "a", **{"x-forwarded-for": "203.0.113.6"})
    assert free.status_code == 200
    codes = [
        (await direct.post("/v1/completions", ASK, "wrong", **{"x-forwarded-for": f"10.9.9.{n}"})).status_code
        for n in range(11)
    ]
    assert codes == [401] * 10 + [429]


def test_wrong_keys_are_counted_by_machine_and_only_so_many_are_remembered():
    wrong = WrongKeys(GateLimits(wrong_keys=1, max_addresses=2))
    wrong.note("2001:db8::1", 0.0)
    assert wrong.wait_s("2001:db8::2", 0.0) and not wrong.wait_s("2001:db8:0:1::1", 0.0)
    wrong.note("::ffff:192.0.2.1", 0.0)
    assert wrong.wait_s("192.0.2.1", 0.0)
    wrong.note("not an address", 0.0)
    assert not wrong.wait_s("2001:db8::1", 0.0) and wrong.wait_s("not an address", 0.0)


async def test_a_key_that_is_revoked_or_made_counts_once_the_file_is_read_again(door):
    client = Client(await door.rig(), door.keys)
    revoked = msgspec.structs.replace(door.records["a"], revoked="now")
    made, record = new_key("c", admin=False, created="")
    door.write([revoked, door.records["b"], record])
    assert (await client.ask("a")).status_code == 200
    assert door.source.refresh() and not door.source.refresh()
    assert [(await client.ask(key)).status_code for key in ("a", "b", made)] == [401, 200, 200]
