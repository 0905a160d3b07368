"""Mooncake's own metadata server and ours answer the calls of its clients with the same statuses and texts."""

import importlib.util
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import aiohttp
import pytest
from aiohttp.test_utils import TestServer
from support.mooncake_dialect import RAM, RPC, dialect_rig, ram, rpc

from kvcore.process.asgi import AsgiServer
from metadata_server.mooncake.http_shell import MooncakeApp, MooncakePort

HAS_MOONCAKE = importlib.util.find_spec("mooncake") is not None
THEIRS = pytest.param(
    "mooncake",
    marks=pytest.mark.skipif(not HAS_MOONCAKE and not os.environ.get("CI"), reason="no mooncake package here"),
)


@asynccontextmanager
async def server(whose: str) -> AsyncIterator[str]:
    """Its URL; of ours, one port answers."""
    async with AsyncExitStack() as stack:
        if whose == "mooncake":
            from mooncake.http_metadata_server import KVBootstrapServer  # the package may be missing

            theirs = await stack.enter_async_context(TestServer(KVBootstrapServer(port=0).app))
            yield str(theirs.make_url("")).rstrip("/")
            return
        rig = await stack.enter_async_context(dialect_rig())
        rig.ports.open(16426)
        ours = AsgiServer(MooncakePort(MooncakeApp(rig.dialect, rig.clock)), "127.0.0.1", 0)
        await ours.start()
        stack.push_async_callback(ours.aclose)
        yield ours.url


@pytest.mark.parametrize("whose", ["ours", THEIRS])
async def test_a_clients_life_as_captured(whose: str) -> None:
    async with server(whose) as url, aiohttp.ClientSession() as session:

        async def call(method: str, key: str, body: bytes | None = None) -> tuple[int, str]:
            headers = {"Accept": "*/*", **({"Content-Type": "application/json"} if body is not None else {})}
            async with session.request(
                method, f"{url}/metadata", params={"key": key}, data=body, headers=headers
            ) as got:
                return got.status, await got.text()

        assert await call("PUT", RPC, rpc()) == (200, "metadata updated")
        assert await call("GET", RAM) == (404, "metadata not found")
        for length in (0, 16777216, 67108864):
            assert await call("PUT", RAM, ram(length=length)) == (200, "metadata updated")
        assert await call("GET", RPC) == (200, rpc().decode())
        assert await call("GET", RAM) == (200, ram(length=67108864).decode())
        status, text = await call("PUT", RPC, rpc(15001))
        assert status == 400 and text.startswith("Duplicate rpc_meta key not allowed")
        for key in (RPC, RAM):
            assert await call("DELETE", key) == (200, "metadata deleted")
            assert await call("DELETE", key) == await call("GET", key) == (404, "metadata not found")
        assert await call("PUT", RPC, rpc(15001)) == (200, "metadata updated")
        assert await call("PUT", "mooncake/c1/rpc_meta/10.99.0.1:17777", rpc()) == (200, "metadata updated")
        assert (await call("GET", ""))[0] == (await call("PUT", "", b"x"))[0] == (await call("DELETE", ""))[0] == 400
        assert (await call("POST", RPC, b"x"))[0] == 405
