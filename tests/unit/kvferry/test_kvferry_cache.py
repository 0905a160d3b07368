"""`kvferry cache`: what files become, what is shown, how it ends; over a fake router."""

import asyncio
import io
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from kvcore.errors import ConfigError
from kvferry.cache.arguments import _commands
from kvferry.cache.client import CacheCommandError, router_calls
from kvferry.cache.commands import CacheCommands
from kvferry.cache.inputs import read_prompts
from kvferry.cache.tables import age_text
from kvferry.cli import build_parser, main
from router.upkeep import reports as r

LIVE, STALE, THEIRS = "aa" * 16, "bb" * 16, "cc" * 16
GENERATIONS = r.GenerationsReport(
    generations=[
        r.GenerationLine(
            fingerprint=LIVE,
            state="live",
            note="qwen, bfloat16, weights 12345678",
            nodes=["d0"],
            places=[
                r.GenerationPlace(place="memory", node="d0", chunks=3, num_bytes=3 << 20),
                r.GenerationPlace(place="redis", chunks=7, num_bytes=7 << 20),
            ],
            oldest_use=0.0,
            newest_use=1e9,
        ),
        r.GenerationLine(
            fingerprint=THEIRS,
            state="marked",
            marks=[r.MarkedBy(owner="other/d9", until=9e9)],
            places=[r.GenerationPlace(place="redis", chunks=1, num_bytes=1)],
        ),
        r.GenerationLine(
            fingerprint=STALE,
            state="stale",
            places=[r.GenerationPlace(place="disk", node="d0", chunks=2, num_bytes=99)],
        ),
    ],
    incomplete=["d0: redis: the time was up"],
)
LOOKUP = r.LookupReply(
    fingerprint=LIVE,
    chunk_tokens=16,
    prompts=[
        r.PromptLookup(
            tokens=100,
            chunks=6,
            memory_tokens=32,
            memory={"d0": 32},
            tier_tokens=16,
            tiers=[r.HeldTokens(tier="redis", tokens=16)],
            new_tokens=52,
        )
    ],
)
WARMED = r.PromptWarmed(tokens=100, cached_tokens=16, computed_tokens=84, stored_tokens=96, node="p0", seconds=1.5)
ORDERED = r.OrderReply(
    prompts=1,
    tokens=100,
    chunks=6,
    places=[r.PlaceCount(place="memory", chunks=6), r.PlaceCount(place="disk", node="d0", chunks=2)],
)
CLEARED = r.ClearReport(
    cleared=[STALE], places=[r.PlaceCount(place="disk", node="d0", chunks=2)], kept={THEIRS: "used by other/d9"}
)
ANSWERS: dict[str, Any] = {
    "generations": GENERATIONS,
    "lookup": LOOKUP,
    "warm": r.WarmReply(prompts=[WARMED]),
    "clear": CLEARED,
    **dict.fromkeys(("pin", "unpin", "evict", "expire", "prefetch"), ORDERED),
}


class FakeRouter:
    """`asked`: (what, query, body) of each call."""

    def __init__(self) -> None:
        self.answers = dict(ANSWERS)
        self.asked: list[tuple[str, dict[str, str], Any]] = []
        self.refused: dict[str, str] = {}
        """Prompt -> what is said of it."""

    async def answer(self, request: web.Request) -> web.Response:
        what = request.match_info["what"]
        raw = await request.read()
        body = json.loads(raw) if raw else None
        self.asked.append((what, dict(request.query), body))
        if body and (said := self.refused.get(body.get("prompt"))):
            return web.json_response({"error": {"message": said}}, status=400)
        if what not in self.answers:
            return web.json_response({"error": {"message": f"GET /v1/cache/{what}: Not Found"}}, status=404)
        return web.Response(body=msgspec.json.encode(self.answers[what]), content_type="application/json")

    async def cluster(self, _: web.Request) -> web.Response:
        return web.json_response({"nodes": [{"id": "d0", "tiers": TIERS}]})

    @asynccontextmanager
    async def running(self, *, as_json: bool = False) -> AsyncIterator[tuple[CacheCommands, io.StringIO]]:
        app = web.Application()
        app.router.add_route("*", "/v1/cache/{what}", self.answer)
        app.router.add_get("/v1/cluster", self.cluster)
        async with TestServer(app) as server:
            out = io.StringIO()
            console = Console(file=out, width=200)
            yield CacheCommands(str(server.make_url("")).rstrip("/"), console, as_json), out


TIERS = [{"name": "disk", "shared": False, "num_chunks": 12, "counts": {"saved": 14}}]


async def shown(work: str, *arguments: Any, fake: FakeRouter | None = None, as_json: bool = False) -> tuple[int, str]:
    async with (fake or FakeRouter()).running(as_json=as_json) as (commands, out):
        async with router_calls(commands.url) as router:
            code = await getattr(commands, work)(router, *arguments)
        return code, out.getvalue()


@pytest.fixture
def prompt(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("once upon a time\n")
    return str(path)


def test_a_text_is_a_prompt_json_is_a_body_and_jsonl_one_a_line(tmp_path, monkeypatch):
    chat = {"messages": [{"role": "user", "content": "hi"}]}
    batch = {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "b"}}
    files = {
        "a.txt": "a text\n",
        "code.c": "{ not json\n}\n",
        "one.json": json.dumps(chat, indent=1),
        "unnamed": json.dumps(chat),
        "many.jsonl": json.dumps({"prompt": "x"}) + "\n\n" + json.dumps(batch) + "\n",
        "many": json.dumps({"prompt": "x"}) + "\n" + json.dumps(batch) + "\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("grüß".encode())))

    def bodies(name: str) -> list[tuple[str, Any]]:
        return [(one.source.removeprefix(f"{tmp_path}/"), one.body) for one in read_prompts([name])]

    assert bodies(f"{tmp_path}/a.txt") == [("a.txt", {"prompt": "a text\n"})]
    assert bodies(f"{tmp_path}/code.c") == [("code.c", {"prompt": "{ not json\n}\n"})]
    assert bodies(f"{tmp_path}/one.json") == [("one.json", chat)]
    assert bodies(f"{tmp_path}/unnamed") == [("unnamed", chat)]
    for name in ("many.jsonl", "many"):
        expected = [(f"{name}:1", {"prompt": "x"}), (f"{name}:{3 if '.' in name else 2}", {"prompt": "b"})]
        assert bodies(f"{tmp_path}/{name}") == expected
    assert bodies("-") == [("stdin", {"prompt": "grüß"})]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.txt", None, "No such file"),
        ("empty.txt", b" \n", "is empty: give a text"),
        ("latin.txt", b"gr\xfc\xdf", "is no UTF-8"),
        ("bad.json", b'{"prompt": ', "is no JSON object"),
        ("list.json", b"[1]", "is no JSON object"),
        ("bad.jsonl", b'{"prompt": "a"}\n\nnot\n', "bad.jsonl:3: is no JSON object"),
    ],
)
def test_a_file_that_is_no_prompt_is_named(tmp_path, name, content, words):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_prompts([str(tmp_path / name)])


async def test_generations_are_a_row_each_and_what_was_not_seen_is_said(capsys):
    code, out = await shown("ls")
    lines = out.splitlines()
    assert code == 1 and "redis: the time was up" in capsys.readouterr().err
    assert lines[1].startswith("aaaaaaaaaaaa  live") and "memory d0 3 (3.0 MiB), redis 7 (7.0 MiB)" in lines[1]
    assert "qwen, bfloat16" in lines[1] and "marked, by other/d9" in lines[2] and "disk d0 2 (99 B)" in lines[3]


async def test_a_lookup_has_a_row_a_prompt(prompt):
    fake = FakeRouter()
    code, out = await shown("lookup", [prompt, prompt], fake=fake)
    assert code == 0 and len(out.splitlines()) == 3
    assert out.splitlines()[1].split()[1:] == ["100", "32", "16", "52", "d0", "32,", "redis", "16"]
    assert fake.asked == [("lookup", {}, {"prompt": "once upon a time\n"})] * 2


async def test_what_cannot_be_asked_is_said_and_is_no_success(prompt, capsys):
    fake = FakeRouter()
    fake.answers["lookup"] = msgspec.structs.replace(LOOKUP, problems=["d0: redis: left alone"])
    code, _ = await shown("lookup", [prompt], fake=fake)
    assert code == 1 and capsys.readouterr().err == "kvferry: d0: redis: left alone\n"


async def test_orders_say_what_they_met_and_a_time_goes_with_them(prompt):
    fake = FakeRouter()
    code, out = await shown("order", "pin", "pinned", [prompt, prompt], fake=fake)
    assert code == 0
    assert out.splitlines() == [
        "prompts: 2, full chunks: 12", "memory: 12 chunks pinned", "disk of d0: 4 chunks pinned",
    ]  # fmt: skip
    await shown("order", "expire", "given their time", [prompt], 5400.0, fake=fake)
    assert fake.asked[-1][:2] == ("expire", {"ttl_s": "5400"})


async def test_a_warm_up_tells_of_each_prompt_and_of_all(prompt):
    code, out = await shown("warm", [prompt])
    assert code == 0 and "100 tokens, 16 cached, 84 computed, 96 in the store (p0, 1.5 s)" in out
    assert out.splitlines()[-1] == "prompts: 1, 84 tokens computed, 16 cached before"
    fake = FakeRouter()
    fake.answers["warm"] = r.WarmReply(prompts=[msgspec.structs.replace(WARMED, no_room=True)])
    code, out = await shown("warm", [prompt], fake=fake)
    assert code == 1 and "the store was full" in out


async def test_the_prompt_that_is_refused_is_named_and_ends_the_rest(tmp_path):
    lines = [json.dumps({"prompt": text}) for text in ("good", "bad", "good")]
    (tmp_path / "many.jsonl").write_text("\n".join(lines))
    fake = FakeRouter()
    fake.refused["bad"] = "prompt must not be bad"
    with pytest.raises(CacheCommandError, match=r"many\.jsonl:2: prompt must not be bad"):
        await shown("warm", [str(tmp_path / "many.jsonl")], fake=fake)


@pytest.mark.parametrize("work", ["ls", "lookup", "warm", "stat", "advise"])
async def test_json_is_one_line_that_others_read(work, prompt, capsys):
    fake = FakeRouter()
    fake.answers |= {"stats": {"start": {"requests": 3}}, "advise": {"prompts": 3}}
    _, out = await shown(work, *([[prompt]] if work in ("lookup", "warm") else []), fake=fake, as_json=True)
    printed = capsys.readouterr().out
    assert out == "" and len(printed.splitlines()) == 1 and json.loads(printed)


async def test_stat_has_the_hit_rate_and_a_line_a_tier(capsys):
    fake = FakeRouter()
    fake.answers["stats"] = {"start": {"requests": 3, "prompt_tokens": 10}, "problem": "too little room"}
    code, out = await shown("stat", fake=fake)
    assert code == 0 and "hit rate" in out and "problem: too little room" in out and "disk" in out.splitlines()[-1]
    fake.answers["stats"] = {}
    _, out = await shown("stat", fake=fake)
    assert "no request was answered yet" in out


async def test_advice_is_in_words():
    fake = FakeRouter()
    fake.answers["advise"] = {"prompts": 9, "advice": ["chunks of 32 tokens"]}
    assert await shown("advise", fake=fake) == (0, "chunks of 32 tokens\n")
    fake.answers["advise"] = {}
    assert "nothing to learn from" in (await shown("advise", fake=fake))[1]


async def test_an_older_router_and_one_that_is_none_are_named():
    fake = FakeRouter()
    del fake.answers["generations"]
    with pytest.raises(CacheCommandError, match=r"knows no GET /v1/cache/generations: it is no router"):
        await shown("ls", fake=fake)
    fake.answers["generations"] = {"generations": 3}
    with pytest.raises(CacheCommandError, match="does not understand"):
        await shown("ls", fake=fake)


async def test_clearing_shows_what_it_would_clear_and_says_what_it_did():
    fake = FakeRouter()
    async with fake.running() as (commands, out), router_calls(commands.url) as router:
        chosen: list[str] = []
        await commands._preview(router, r.ClearOrder(stale=True), chosen)
        assert chosen == [STALE] and "stale" in out.getvalue() and "live" not in out.getvalue()
        for order, expected in (
            (r.ClearOrder(), [LIVE, STALE]),
            (r.ClearOrder(force=True), [LIVE, THEIRS, STALE]),
            (r.ClearOrder(fingerprints=["bb"]), [STALE]),
            (r.ClearOrder(stale=True, fingerprints=["aa"]), []),
        ):
            chosen = []
            await commands._preview(router, order, chosen)
            assert chosen == expected
        assert await commands._clear(router, r.ClearOrder(stale=True)) == 0
        assert fake.asked[-1][2] == {"stale": True, "fingerprints": None, "force": False}
        said = out.getvalue().splitlines()[-3:]
        assert said == ["generations cleared: 1", "disk of d0: 2 chunks removed", "kept cccccccccccc: used by other/d9"]


def test_clearing_without_a_terminal_asks_nobody_and_a_no_clears_nothing(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n"))
    assert main(["cache", "clear", "--url", "http://127.0.0.1:1"]) == 2
    assert "give --yes" in capsys.readouterr().err
    cleared = []
    monkeypatch.setattr(CacheCommands, "run", lambda self, work: cleared.append(work) or 0)

    async def preview(self, _router, _order, chosen):
        chosen.append(STALE)
        return 0

    monkeypatch.setattr(CacheCommands, "_preview", preview)
    commands = CacheCommands("http://x", Console(file=io.StringIO()))

    def run_preview(self, work):
        cleared.append(work)
        return asyncio.run(work(None))

    monkeypatch.setattr(CacheCommands, "run", run_preview)
    for answer in ("n", "", "what"):
        cleared.clear()
        assert commands.clear(r.ClearOrder(), yes=False, ask=lambda _, answer=answer: answer) == 1
        assert len(cleared) == 1, "it was shown, and no more"


def test_an_adapters_kv_is_asked_for_by_its_name_unless_a_body_names_one(tmp_path, prompt):
    bodies = tmp_path / "bodies.jsonl"
    bodies.write_text('{"prompt": "a"}\n{"model": "other", "prompt": "b"}\n')
    asked = [one.body for one in read_prompts([prompt, str(bodies)], "sql")]
    assert [body["model"] for body in asked] == ["sql", "sql", "other"]
    assert not any("model" in one.body for one in read_prompts([prompt]))
    given = build_parser().parse_args(["cache", "lookup", prompt, "--model", "sql", "--url", "http://x"])
    assert _commands(given).model == "sql"


def test_a_cluster_that_is_down_is_one_line(capsys, prompt):
    for words in (["ls"], ["stat"], ["lookup", prompt], ["warm", prompt], ["clear", "--yes"], ["advise"]):
        assert main(["cache", *words, "--url", "http://127.0.0.1:1"]) == 1
        err = capsys.readouterr().err
        assert len(err.splitlines()) == 1 and "http://127.0.0.1:1 is not there" in err and "is the cluster up?" in err


@pytest.mark.parametrize("given", ["soon", "-1", "0", "inf", "3w", ""])
def test_a_time_that_is_none_is_refused(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["cache", "ttl", "--for", given, "x"])
    assert ended.value.code == 2 and ("no time" in capsys.readouterr().err or given == "-1")


def test_ages_are_read_at_a_glance():
    assert [age_text(seconds) for seconds in (-1, 5, 119, 7300, 200_000)] == ["0 s", "5 s", "2 min", "2 h", "2 d"]
