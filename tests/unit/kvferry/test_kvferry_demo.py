import io
import json

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from rich.console import Console

from kvcore.errors import KVFerryError
from kvferry import cli
from kvferry.demo.client import ChatResult, DemoClient
from kvferry.demo.document import document
from kvferry.demo.run import describe, sum_moved, summarise
from kvferry.launch.display import Display
from kvferry.launch.launcher import LauncherEvent
from kvferry.launch.supervised import ProcessState
from nodeapi.messages import Moved

MOVED = [
    Moved(transport="shm", direction="put", num_bytes=1000, seconds=0.5),
    Moved(transport="shm", direction="put", num_bytes=500, seconds=0.5),
    Moved(transport="tcp", direction="get", num_bytes=10, seconds=0.0),
]


def chunk(text: str | None = None, **more: object) -> dict[str, object]:
    choices = [] if text is None else [{"index": 0, "delta": {"content": text}, "finish_reason": None}]
    return {"id": "r1", "object": "chat.completion.chunk", "choices": choices, **more}


USAGE = {"prompt_tokens": 100, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 64}}


class FakeRouter:
    """Streams `events`; its record of the request is `running` once, then ended."""

    def __init__(self, events: list[dict[str, object]], status: int = 200) -> None:
        self.events, self.status = events, status
        self.asked: list[dict[str, object]] = []
        self.polls = 0
        app = web.Application()
        app.router.add_post("/v1/chat/completions", self.chat)
        app.router.add_get("/v1/requests/r1", self.record)
        self.server = TestServer(app)

    async def chat(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(await request.json())
        reply = web.StreamResponse(status=self.status, headers={"Content-Type": "text/event-stream"})
        await reply.prepare(request)
        for event in self.events:
            await reply.write(f"data: {json.dumps(event)}\n\n".encode())
        await reply.write(b": keep-alive\n\ndata: [DONE]\n\n")
        return reply

    async def record(self, _: web.Request) -> web.Response:
        self.polls += 1
        leg = {
            "node": "d",
            "kind": "decode",
            "moved": [{"transport": "shm", "direction": "get", "num_bytes": 7, "seconds": 1}],
        }
        route = {"prefiller": None, "decoder": "d", "reason": "short"}
        return web.json_response(
            {"id": "r1", "state": "ok" if self.polls > 1 else "running", "route": route, "legs": [leg]}
        )


@pytest.fixture
async def ask():
    servers = []

    async def ask(router: FakeRouter, **more: object) -> tuple[ChatResult, list[str]]:
        await router.server.start_server()
        servers.append(router.server)
        pieces: list[str] = []
        async with DemoClient(str(router.server.make_url("")).rstrip("/"), "m", 10.0) as client:
            return await client.chat("sys", "q", max_tokens=5, on_text=pieces.append, **more), pieces

    yield ask
    for server in servers:
        await server.close()


async def test_a_refused_request_says_what_the_router_said(ask):
    with pytest.raises(KVFerryError, match="HTTP 503: data"):
        await ask(FakeRouter([{"error": {"message": "no decoder"}}], status=503))


async def test_an_error_in_the_stream_is_raised(ask):
    with pytest.raises(KVFerryError, match="broke off: the decoder died"):
        await ask(FakeRouter([chunk("a"), {"error": {"message": "the decoder died", "code": "x"}}]))


async def test_a_stream_without_usage_is_an_error(ask):
    with pytest.raises(KVFerryError, match="without a usage"):
        await ask(FakeRouter([chunk("a")]))


async def test_a_chat_is_streamed_counted_and_looked_up_once_it_has_ended(ask):
    router = FakeRouter([chunk(""), chunk("Hel"), chunk("lo"), chunk(None, usage=USAGE)])
    answer, pieces = await ask(router)
    assert (answer.text, pieces, router.polls) == ("Hello", ["Hel", "lo"], 2)
    assert (answer.prompt_tokens, answer.cached_tokens, answer.completion_tokens) == (100, 64, 2)
    assert (answer.prefiller, answer.decoder, answer.moved[0].num_bytes) == (None, "d", 7)
    assert 0 < answer.ttft_s <= answer.total_s
    assert "documents" not in router.asked[0]
    assert router.asked[0]["temperature"] == 0 and router.asked[0]["stream_options"] == {"include_usage": True}


async def test_documents_are_named_in_the_request_and_what_was_reused_of_them_is_told(ask):
    details = {"cached_tokens": 30, "approximate_tokens": 50}
    router = FakeRouter([chunk("Hi"), chunk(None, usage={**USAGE, "prompt_tokens_details": details})])
    answer, _ = await ask(router, documents=[{"title": "t", "text": "one"}])
    assert router.asked[0]["documents"] == [{"title": "t", "text": "one"}]
    assert (answer.cached_tokens, answer.approximate_tokens) == (30, 50)
    assert "20 computed, 30 reused, 50 of documents that stood elsewhere" in describe(answer)


def result(ttft_s: float, cached_tokens: int, moved: list[Moved]) -> ChatResult:
    return ChatResult("t", ttft_s, 2.0, 100, cached_tokens, 5, "p", "d", moved)


def test_the_result_has_the_promised_keys():
    summary = summarise([result(1.0, 0, MOVED), result(0.1, 64, [])], 3.0)
    assert summary == {
        "first": {"ttft_s": 1.0, "prompt_tokens": 100, "cached_tokens": 0},
        "second": {"ttft_s": 0.1, "prompt_tokens": 100, "cached_tokens": 64},
        "moved_bytes": 1510,
        "transport": "shm",
        "up_s": 3.0,
    }
    assert summarise([result(1.0, 0, []), result(1.0, 0, [])], 3.0)["transport"] is None


def test_moves_are_summed_and_described_even_when_they_took_no_time():
    assert sum_moved(MOVED)["shm", "put"].num_bytes == 1500
    text = describe(result(1.0, 64, MOVED))
    assert "36 computed, 64 reused" in text and "KV put: 1.5 KiB by shm at 0.00 GB/s" in text
    assert text.endswith("KV get: 10 B by tcp")


def test_the_document_is_long_and_has_one_line_a_paragraph():
    paragraphs = document().split("\n\n")
    assert len(document().split()) > 1100 and len(paragraphs) > 8 and "\n" not in "".join(paragraphs)


def test_without_a_terminal_progress_is_plain_lines():
    out = io.StringIO()
    with Display(Console(file=out, width=40)) as display:
        display.on_event(LauncherEvent("d", ProcessState.READY, 7, 1.25))
        display.on_line("d", "[red]not markup[/] " + "x" * 60)
        display.write("a [b] ")
        display.write("c\n")
    assert out.getvalue().splitlines() == [
        "d                 ready pid 7 after 1.2 s",
        "d               | [red]not markup[/] " + "x" * 60,
        "a [b] c",
    ]


def test_a_config_error_is_one_line_and_exit_code_2(tmp_path, capsys):
    assert cli.main(["up", str(tmp_path / "no.yaml")]) == 2
    assert capsys.readouterr().err == f"kvferry: error: {tmp_path / 'no.yaml'}: no such file\n"
