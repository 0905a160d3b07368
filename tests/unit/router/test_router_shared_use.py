"""Several routers: what a tenant asks of one counts at all."""

from pathlib import Path

import httpx
import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from kvcore.clock import ManualClock
from kvcore.config.security import KeysConfig
from kvcore.errors import InvalidRequestError
from kvcore.tenants.keys import KeyFile, TenantLimits, new_key
from kvcore.tenants.source import KeySource
from router.api.responses import JsonReply
from router.tenants.limits import GateLimits
from router.tenants.shared_use import SharedUse, TenantTotals, UseReport
from router.tenants.use_exchange import PATH, UseRoute

LIMITS = TenantLimits(requests_per_minute=60, tokens_per_minute=600)


class Routers:
    """Two of them, `a` and `b`, with one file of keys and one clock."""

    def __init__(self, folder: Path, limits: GateLimits = GateLimits()) -> None:
        file = folder / "keys.json"
        _, record = new_key("t", admin=False, created="")
        file.write_bytes(msgspec.json.encode(KeyFile(tenants={"t": LIMITS}, keys=[record])))
        keys, self.clock = KeySource(KeysConfig(file=str(file))), ManualClock()
        self.a, self.b = (SharedUse(keys, self.clock, limits) for _ in range(2))

    def wait_s(self, router: SharedUse) -> tuple[float, float]:
        """How long the tenant would wait there for one request and for one token."""
        now = self.clock.now()
        use = router.uses.of("t", LIMITS, now)
        assert use.requests is not None and use.tokens is not None
        return use.requests.wait_s(1, now), use.tokens.wait_s(1, now)


@pytest.fixture
def routers(tmp_path: Path) -> Routers:
    return Routers(tmp_path)


def test_what_a_tenant_took_at_one_router_it_has_not_left_at_the_other(routers: Routers) -> None:
    routers.b.told(routers.a.report())
    routers.a.took("t", requests=60, tokens=590)
    routers.b.told(routers.a.report())
    assert routers.wait_s(routers.b) == (1.0, 0.0)
    routers.a.took("t", tokens=20)
    routers.b.told(routers.a.report())
    routers.b.told(routers.a.report())
    assert routers.wait_s(routers.b) == (1.0, pytest.approx(1.1)), "told twice it counts once"


def test_a_router_that_missed_some_reports_makes_up_for_them(routers: Routers) -> None:
    routers.b.told(routers.a.report())
    for _ in range(6):
        routers.a.took("t", requests=10)
        routers.a.report()
    routers.b.told(routers.a.report())
    assert routers.wait_s(routers.b)[0] == 1.0


def test_a_report_that_another_has_overtaken_says_nothing(routers: Routers) -> None:
    routers.b.told(routers.a.report())
    routers.a.took("t", running=1, requests=30)
    late = routers.a.report()
    routers.a.took("t", running=1, requests=15)
    routers.b.told(routers.a.report(["t"]))
    routers.b.told(late)
    routers.a.took("t", requests=15)
    routers.b.told(routers.a.report())
    assert routers.wait_s(routers.b)[0] == 1.0, "sixty: nothing is counted twice, nothing is missed"
    assert routers.b.running_elsewhere("t") == 2


def test_what_is_said_of_one_tenant_says_nothing_of_the_others(routers: Routers) -> None:
    routers.a.took("u", running=1)
    routers.b.told(routers.a.report(["t"]))
    assert routers.b.running_elsewhere("u") == 0, "who has not said all yet is not known"
    routers.b.told(routers.a.report())
    routers.a.took("t", running=1)
    routers.b.told(routers.a.report(["t"]))
    assert routers.b.running_elsewhere("u") == routers.b.running_elsewhere("t") == 1


def test_what_was_used_before_a_router_was_first_heard_is_not_taken_again(routers: Routers) -> None:
    routers.a.took("t", requests=60, tokens=600)
    routers.b.told(routers.a.report())
    assert routers.wait_s(routers.b) == (0.0, 0.0)


def test_requests_under_way_elsewhere_count_while_that_router_speaks(routers: Routers) -> None:
    routers.a.took("t", running=1)
    routers.a.took("t", running=1)
    routers.b.told(routers.a.report())
    assert routers.b.running_elsewhere("t") == 2 and routers.b.running_elsewhere("other") == 0
    routers.clock.advance(3.5)
    assert routers.b.running_elsewhere("t") == 0, "it may have died"
    routers.a.took("t", running=-1)
    routers.b.told(routers.a.report())
    assert routers.b.running_elsewhere("t") == 1


def test_a_router_does_not_count_what_it_says_itself(routers: Routers) -> None:
    routers.a.took("t", running=1, requests=30)
    routers.a.told(routers.a.report())
    assert routers.a.running_elsewhere("t") == 0 and routers.wait_s(routers.a)[0] == 0.0


def test_routers_are_bounded_and_those_that_are_gone_make_room(tmp_path: Path) -> None:
    routers = Routers(tmp_path, GateLimits(max_routers=2))
    for name in ("x", "y"):
        routers.b.told(UseReport(name, 1, {}))
    with pytest.raises(InvalidRequestError, match="more than 2 routers"):
        routers.b.told(UseReport("z", 1, {}))
    routers.clock.advance(4)
    routers.b.told(UseReport("z", 1, {"t": TenantTotals(running=3)}))
    assert routers.b.running_elsewhere("t") == 3


def test_idle_tenants_are_forgotten_and_running_ones_are_not(tmp_path: Path) -> None:
    routers = Routers(tmp_path, GateLimits(max_tenants=3))
    routers.a.took("busy", running=1)
    for number in range(10):
        routers.a.took(f"t{number}", requests=1)
    assert len(routers.a.report().tenants) == 3 and "busy" in routers.a.report().tenants


async def test_reports_come_over_http_and_all_else_is_passed_on(routers: Routers) -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await JsonReply({"passed": "on"})(scope, receive, send)

    route = UseRoute(app, routers.b, GateLimits())
    transport = httpx.ASGITransport(app=route)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        routers.a.took("t", running=2)
        told = await client.post(PATH, content=msgspec.msgpack.encode(routers.a.report()))
        assert told.status_code == 200 and routers.b.running_elsewhere("t") == 2
        routers.b.took("u", requests=3)
        asked = await client.post(PATH, content=msgspec.msgpack.encode(routers.a.report([], ["u", "nobody"])))
        said = msgspec.msgpack.decode(asked.content, type=UseReport)
        assert (said.whole, said.tenants) == (False, {"u": TenantTotals(requests=3)})
        for wrong in (b"", b"\xff", msgspec.msgpack.encode({"router": "x"})):
            assert (await client.post(PATH, content=wrong)).status_code == 400
        assert (await client.post(PATH, content=b"x" * (5 << 20))).status_code == 413
        assert (await client.get(PATH)).json() == {"passed": "on"}
