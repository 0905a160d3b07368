"""`kvferry janitor`: what is said, what is asked, and how it ends; over a fake router."""

import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, get_args

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from kvferry.cache.client import router_calls
from kvferry.cli import main
from kvferry.janitor.command import _WORDS, JanitorCommand
from metadata_server.account_messages import Orphan, OrphanKind, OrphansOfKind
from router.admin.reports import JanitorRemoved, JanitorReport

OLD = [Orphan(id=f"n{n}@1.0", name=f"n{n} (drained)", age_s=2 * 86_400.0) for n in range(7)]
ORDERS = OrphansOfKind(kind="node_orders", count=9, oldest_s=2 * 86_400.0, listed=OLD)
LEFT = OrphansOfKind(kind="doctor_records", count=1, oldest_s=None, listed=[Orphan(id="doctor/1@5", name="doctor/1")])


class FakeRouter:
    """`asked`: the query of each look, the body of each removal. It removes all but the last of a kind's orders."""

    def __init__(self, *kinds: OrphansOfKind, **report: Any) -> None:
        self.report = JanitorReport(kinds=list(kinds), **report)
        self.asked: list[Any] = []
        self.problems: list[str] = []

    async def answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        self.asked.append(json.loads(raw) if raw else dict(request.query))
        ids = json.loads(raw)["ids"] if raw else []
        done = JanitorRemoved(removed=ids[:-1] or ids, problems=self.problems)
        return web.Response(body=msgspec.json.encode(done if raw else self.report), content_type="application/json")

    async def run(self, *, apply: bool = False, as_json: bool = False) -> tuple[int, list[str]]:
        async with self.running() as url, router_calls(url) as router:
            out = io.StringIO()
            command = JanitorCommand(url, Console(file=out, width=200), 60.0, as_json)
            return await command.look(router, apply=apply), out.getvalue().splitlines()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        async with TestServer(app) as server:
            yield str(server.make_url("")).rstrip("/")


async def test_without_apply_it_says_what_is_orphaned_and_asks_for_nothing_to_be_removed():
    fake = FakeRouter(ORDERS, LEFT)
    code, lines = await fake.run()
    assert code == 1 and fake.asked == [{"older_s": "60.0"}]
    assert lines[0] == (
        "9 drains and removals of nodes that nobody knows, the oldest of 2 d: "
        "n0 (drained), n1 (drained), n2 (drained), n3 (drained), n4 (drained), ..."
    )
    assert lines[1] == "   --apply forgets them: such a node is used if it comes"
    assert lines[2] == "1 records of doctors that were cut off: doctor/1"


async def test_with_apply_exactly_what_was_listed_is_removed_and_what_stayed_is_said():
    fake = FakeRouter(ORDERS, LEFT)
    code, lines = await fake.run(apply=True)
    assert fake.asked[1:] == [
        {"kind": "node_orders", "ids": [orphan.id for orphan in OLD], "older_s": 60.0},
        {"kind": "doctor_records", "ids": ["doctor/1@5"], "older_s": 60.0},
    ]
    stayed = "1 stayed: no longer orphaned, or not to be told"
    assert lines[1] == f"   removed 6; {stayed}; 2 more were not shown: run it again"
    assert lines[3] == "   removed 1" and code == 1, "there are two more"


async def test_nothing_orphaned_is_0_and_all_of_it_removed_too():
    assert await FakeRouter().run() == (0, ["nothing is orphaned"])
    assert (await FakeRouter(LEFT).run(apply=True))[0] == 0


async def test_stale_generations_are_left_to_the_command_that_removes_them():
    fake = FakeRouter(stale_generations=["0a1b2c3d4e5f"])
    for apply in (False, True):
        code, lines = await fake.run(apply=apply)
        assert code == 1 and lines[0].endswith("no live node uses: 0a1b2c3d") and "cache clear --stale" in lines[1]
    assert fake.asked == [{"older_s": "60.0"}] * 2


async def test_what_cannot_be_told_is_2_and_what_can_is_said_all_the_same(capsys):
    fake = FakeRouter(LEFT, problems=["pins: d1 does not answer"])
    code, lines = await fake.run()
    assert code == 2 and "doctors" in lines[0]
    assert capsys.readouterr().err == "kvferry: cannot tell: pins: d1 does not answer\n"
    fake = FakeRouter(LEFT)
    fake.problems = ["metadata server: nodes are still to be heard"]
    assert (await fake.run(apply=True))[0] == 2


async def test_json_is_one_line(capsys):
    assert await FakeRouter(LEFT).run(as_json=True) == (1, [])
    assert await FakeRouter(LEFT).run(apply=True, as_json=True) == (0, [])
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["found"]["kinds"][0]["count"] == 1 and first["removed"] is None
    assert second["removed"] == {"doctor_records": ["doctor/1@5"]}


def test_a_cluster_that_is_down_cannot_tell(capsys):
    assert main(["janitor", "--apply", "--older", "1h", "--url", "http://127.0.0.1:1"]) == 2
    assert "the router at http://127.0.0.1:1 is not there" in capsys.readouterr().err


@pytest.mark.parametrize("kind", get_args(OrphanKind))
def test_every_kind_has_words(kind):
    assert kind in _WORDS
