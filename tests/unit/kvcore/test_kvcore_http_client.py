"""No client of ours follows a redirect: whoever answers cannot send a request's body to somebody else."""

import ast
import io
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from rich.console import Console
from support.router_fakes import serve

from kvcore.errors import KVFerryError, MetadataUnavailableError, NodeUnavailableError
from kvcore.process.http_client import RedirectedError, http_session
from kvferry.demo.client import DemoClient
from kvferry.status import run_status
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from nodeapi.http_calls import HttpCalls

ROOT = Path(__file__).parents[3]


class Redirecting:
    """A server that answers everything with a redirect to itself at /stolen, and keeps what comes there."""

    def __init__(self) -> None:
        self.status = 307
        self.stolen: list[str] = []
        self.url = ""

    def app(self) -> web.Application:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        return app

    async def _answer(self, request: web.Request) -> web.Response:
        if request.path == "/stolen":
            self.stolen.append(request.method)
            return web.Response()
        return web.Response(status=self.status, headers={"Location": f"{self.url}/stolen"})


@pytest.fixture
async def server() -> AsyncIterator[Redirecting]:
    server = Redirecting()
    async with serve(server.app()) as server.url:
        yield server


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_session_follows_no_redirect_and_says_where_it_led(server: Redirecting, status: int) -> None:
    server.status = status
    async with http_session() as session:
        for method in ("GET", "POST", "HEAD"):
            with pytest.raises(RedirectedError, match=rf"{status}, a redirect to .*/stolen, which is not followed"):
                await session.request(method, f"{server.url}/v1/info", data=b"secret", allow_redirects=True)
    assert server.stolen == []


async def test_every_client_makes_an_error_of_it_that_names_it(server: Redirecting) -> None:
    def refusal(status: int, raw: bytes, url: str) -> KVFerryError:
        raise AssertionError("no status of ours")

    calls = HttpCalls(refusal, connect_timeout_s=1.0, max_connections=1, headers={})
    with pytest.raises(NodeUnavailableError, match="307, a redirect to"):
        await calls.fetch("POST", f"{server.url}/v1/prefill", b"tokens", 5.0)
    await calls.aclose()
    transport = HttpMetadataTransport(server.url)
    with pytest.raises(MetadataUnavailableError, match="307, a redirect to"):
        await transport.call("/v1/stats", b"", 5.0)
    await transport.aclose()
    events = HttpEventSource(server.url)
    with pytest.raises(MetadataUnavailableError, match="307, a redirect to"):
        await anext(events.batches("e", 0))
    await events.aclose()
    async with DemoClient(server.url, "m", 5.0) as demo:
        with pytest.raises(KVFerryError, match="307, a redirect to"):
            await demo.chat("s", "q", max_tokens=1, on_text=print)
    console = Console(file=io.StringIO(), width=300)
    assert await run_status(server.url, server.url, as_json=False, console=console) == 1
    assert "307, a redirect to" in console.file.getvalue()  # type: ignore[attr-defined]
    assert server.stolen == []


def test_sessions_are_made_in_one_place() -> None:
    """A session made elsewhere would follow."""
    places = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name != "tests"]
    files = [file for place in places for file in place.rglob("*.py")]
    assert len(files) > 150
    made = [
        str(file.relative_to(ROOT))
        for file in files
        if "ClientSession" in (text := file.read_text())
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("ClientSession")
    ]
    assert set(made) == {"kvcore/process/http_client.py"}
