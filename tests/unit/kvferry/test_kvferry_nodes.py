"""`kvferry nodes`: what is asked and shown, and how it ends; over a fake router."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console
from support.metadata_rigs import until

from kvferry.cache.client import CacheCommandError, router_calls
from kvferry.cli import main
from kvferry.nodes.commands import NodesCommands
from kvferry.nodes.rebalance import RebalanceCommand
from kvferry.nodes.role import RoleCommand
from metadata_server.cache_messages import RebalanceReply, SegmentFill
from router.admin import reports as r

ROWS = [
    r.NodeRow(
        id="d0",
        role="decoder",
        state="draining",
        since=0.0,
        used_bytes=3 << 20,
        size_bytes=4 << 20,
        requests=2,
        release="1.2.3",
        weights="v7",
        url="http://d0",
    ),
    r.NodeRow(id="p0", role="prefiller", state="lost", why="nobody answers"),
]


class FakeRouter:
    """`asked`: (path, body) of each call."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []
        self.report = r.NodesReport(nodes=ROWS)
        self.ordered = r.NodeOrdered(node=ROWS[0], note="no other decoder can be used: prefillers decode")
        self.refusal = ""

    async def answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        self.asked.append((request.path, json.loads(raw) if raw else None))
        if self.refusal:
            return web.json_response({"error": {"message": self.refusal}}, status=400)
        value = self.ordered if raw else self.report
        return web.Response(body=msgspec.json.encode(value), content_type="application/json")

    @asynccontextmanager
    async def running(self, *, as_json: bool = False) -> AsyncIterator[tuple[NodesCommands, io.StringIO]]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        async with TestServer(app) as server:
            out = io.StringIO()
            yield NodesCommands(str(server.make_url("")).rstrip("/"), Console(file=out, width=200), as_json), out


async def run(commands: NodesCommands, *words: Any) -> int:
    async with router_calls(commands.url) as router:
        return await (commands.give(router, *words) if words else commands.show(router))


async def test_nodes_are_a_row_each_and_what_could_not_be_asked_is_said(capsys):
    fake = FakeRouter()
    async with fake.running() as (commands, out):
        assert await run(commands) == 0
        fake.report.problems = ["metadata server: away"]
        assert await run(commands) == 1
    first, second = (" ".join(line.split()) for line in out.getvalue().splitlines()[1:3])
    assert first.startswith("d0 decoder draining ") and first.endswith("3.0 MiB of 4.0 MiB (75%) 2 1.2.3 v7")
    assert second == "p0 prefiller lost nobody answers"
    assert "metadata server: away" in capsys.readouterr().err


async def test_an_order_says_what_holds_now_and_what_follows_from_it():
    fake = FakeRouter()
    async with fake.running() as (commands, out):
        assert await run(commands, "drain", r.NodeOrderBody(node="d0")) == 0
    assert fake.asked == [("/v1/nodes/drain", {"node": "d0", "move": False, "force": False})]
    said = out.getvalue().splitlines()
    assert said[0].startswith("d0 is drained") and said[1:] == ["2 requests are under way there", fake.ordered.note]


async def test_a_drain_waits_until_nothing_is_under_way_or_its_time_is_up():
    fake = FakeRouter()
    async with fake.running() as (commands, out):
        drain, orders = r.NodeOrderBody(node="d0"), replace(commands, poll_s=0.001)
        async with router_calls(commands.url) as router:
            assert await orders.give(router, "drain", drain, wait_s=0.05) == 1
            waiting = asyncio.create_task(orders.give(router, "drain", drain, wait_s=60))
            await until(lambda: len(fake.asked) > 8)
            fake.report.nodes = [msgspec.structs.replace(ROWS[0], state="drained", requests=0)]
            assert await waiting == 0
    assert "2 requests are under way there" in out.getvalue().splitlines()[1]


async def test_json_is_one_line(capsys):
    fake = FakeRouter()
    async with fake.running(as_json=True) as (commands, _):
        assert await run(commands) == await run(commands, "remove", r.NodeOrderBody(node="d0", force=True)) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert json.loads(first)["nodes"][0]["id"] == "d0" and json.loads(second)["node"]["state"] == "draining"


async def test_a_refusal_is_the_routers_sentence():
    fake = FakeRouter()
    fake.refusal = "node d0 is alive at http://d0"
    async with fake.running() as (commands, _):
        with pytest.raises(CacheCommandError, match="is alive"):
            await run(commands, "remove", r.NodeOrderBody(node="d0"))


@pytest.mark.parametrize(
    "words",
    [
        ["ls"],
        ["rebalance"],
        ["drain", "d0"],
        ["undrain", "d0"],
        ["resume", "d0"],
        ["role", "d0", "decoder"],
        ["remove", "--force", "d0"],
    ],
)
def test_a_cluster_that_is_down_is_one_line(capsys, words):
    first = [] if words[0] in ("resume", "role") else ["nodes"]
    assert main([*first, *words, "--url", "http://127.0.0.1:1"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("kvferry: error: the router at") and len(err.splitlines()) == 1


# --- role ---------------------------------------------------------------------------------------------------------


class RoleRouter(FakeRouter):
    """A node that takes the role that it is told, unless it is `deaf`. `then`: what happens to it right after that."""

    def __init__(self, **row: Any) -> None:
        super().__init__()
        self.deaf = False
        self.then: dict[str, Any] = {}
        self.row = r.NodeRow(id="d0", role="decoder", **{"state": "ready", "serves": True, "requests": 0} | row)

    async def answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        what = request.path.rsplit("/", 1)[1]
        if raw:
            self.asked.append((what, json.loads(raw).get("role")))
            changes: dict[str, Any] = {"drain": {"state": "drained"}, "undrain": {"state": "ready"}}.get(what, {})
            if what == "role" and not self.deaf:
                changes = {"role": json.loads(raw)["role"], "ordered_role": json.loads(raw)["role"]} | self.then
            self.row = msgspec.structs.replace(self.row, **changes)
        self.report, self.ordered = r.NodesReport(nodes=[self.row]), r.NodeOrdered(node=self.row)
        return web.Response(body=msgspec.json.encode(self.ordered if raw else self.report))


async def change_role(fake: RoleRouter) -> tuple[int, str]:
    async with fake.running() as (commands, out), router_calls(commands.url) as router:
        quick = replace(commands, poll_s=0.001)
        code = await RoleCommand(quick, "d0", "prefiller", wait_s=0.05, take_s=0.05).change(router)
    return code, out.getvalue()


async def test_a_node_is_drained_takes_its_role_and_is_used_again():
    fake = RoleRouter()
    code, said = await change_role(fake)
    assert code == 0 and fake.asked == [("drain", None), ("role", "prefiller"), ("undrain", None)]
    assert said.splitlines() == [
        "d0 is drained",
        "d0 serves as a prefiller, whatever its file says: write it there, too",
    ]
    assert await change_role(fake) == (0, "d0 serves as a prefiller already\n") and len(fake.asked) == 3


async def test_one_that_was_drained_stays_drained_and_one_that_is_deaf_is_said(capsys):
    fake = RoleRouter(state="draining", requests=2)
    code, said = await change_role(fake)
    assert code == 0 and fake.asked == [("role", "prefiller")]
    assert "2 requests go on there" in said and "stays drained, as it was, until whoever drained it" in said
    deaf = RoleRouter()
    deaf.deaf = True
    assert (await change_role(deaf))[0] == 1 and deaf.row.state == "drained"
    assert "has not taken the role in 0.05 s: drained; it stays drained" in capsys.readouterr().err
    deaf.row.id = "another"
    with pytest.raises(CacheCommandError, match="there is no node d0: known are another"):
        await change_role(deaf)


async def test_of_two_role_changes_the_last_holds_and_each_says_what_is_so(capsys):
    """The second finds the node drained by the first, which used it again although it was another's by then."""
    first = RoleRouter()
    first.then = {"ordered_role": "decoder"}  # it has taken the role, and is told the next one
    assert (await change_role(first))[0] == 1 and ("undrain", None) not in first.asked
    why = "d0 was told to serve as a decoder meanwhile, and not as a prefiller any more; it stays drained"
    assert why in capsys.readouterr().err
    second = RoleRouter(state="drained")
    second.then = {"state": "ready"}  # whoever drained it has resumed it
    code, said = await change_role(second)
    assert code == 0 and said.splitlines()[1:] == [
        "d0 serves as a prefiller, whatever its file says: write it there, too"
    ]


# --- rebalance ----------------------------------------------------------------------------------------------------


def report(moved: int, *, number: int = 1, end: str = "") -> RebalanceReply:
    fills = [SegmentFill(segment_id=f"{name}.1", node_id=name, used_bytes=used, size_bytes=1000) for name, used in USED]
    return RebalanceReply(
        number=number,
        running=not end,
        end=end,
        most_bytes=300,
        moved_bytes=100 * moved,
        moved_chunks=moved,
        share=0.5,
        to_move_bytes=300,
        segments=fills,
    )


USED = [("a", 200), ("b", 800)]


class FakeRebalance(FakeRouter):
    """Answers each call with the next of `reports`, the last again and again."""

    def __init__(self, *reports: RebalanceReply) -> None:
        super().__init__()
        self.reports = list(reports)

    async def answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        self.asked.append((request.method, json.loads(raw) if raw else None))
        value = self.reports.pop(0) if len(self.reports) > 1 else self.reports[0]
        return web.Response(body=msgspec.json.encode(value), content_type="application/json")

    async def run(self, *, dry_run: bool = False, as_json: bool = False, most: int = 0) -> tuple[int, list[str]]:
        async with self.running() as (commands, out), router_calls(commands.url) as router:
            it = RebalanceCommand(commands.console, as_json, poll_s=0.01)
            code = await (it.plan(router, most) if dry_run else it.even_out(router, most))
            return code, out.getvalue().splitlines()


async def test_rebalance_shows_how_it_goes_and_ends_when_segments_are_even():
    fake = FakeRebalance(report(0), report(1), report(1), report(3, end="no segment can shed more"))
    code, lines = await fake.run(most=300)
    assert code == 0 and fake.asked[0] == ("POST", {"action": "start", "most_bytes": 300})
    assert [line.split(" moved")[0] for line in lines[:3]] == ["0 B of 300 B", "100 B of 300 B", "300 B of 300 B"]
    assert lines[3:] == ["b: 80% of 1000 B", "a: 20% of 1000 B", "all together: 50%", "no segment can shed more"]


async def test_a_rebalance_that_ends_otherwise_is_1_and_says_why(capsys):
    assert (await FakeRebalance(report(0), report(1, end="nothing was moved for 60 s")).run())[0] == 1
    assert (await FakeRebalance(report(0), report(1, number=0, end="none was begun")).run())[0] == 1
    assert "the metadata server was started again" in capsys.readouterr().err


async def test_a_dry_run_orders_nothing_and_says_what_would_be_moved(capsys):
    fake = FakeRebalance(report(0, number=0, end="none was begun"))
    code, lines = await fake.run(dry_run=True, most=200)
    assert code == 0 and fake.asked == [("GET", None)] and lines[-1] == "at most 200 B would be moved"
    assert (await fake.run(dry_run=True, as_json=True))[1] == []
    assert json.loads(capsys.readouterr().out)["to_move_bytes"] == 300


async def test_ctrl_c_stops_the_run():
    fake = FakeRebalance(report(1))
    running = asyncio.create_task(fake.run())
    await until(lambda: len(fake.asked) >= 3)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert fake.asked[-1] == ("POST", {"action": "stop", "most_bytes": 0})


@pytest.mark.parametrize("size", ["x", "0", "-1"])
def test_a_size_that_is_none_is_a_wrong_command_line(size):
    with pytest.raises(SystemExit):
        main(["nodes", "rebalance", f"--most={size}"])
