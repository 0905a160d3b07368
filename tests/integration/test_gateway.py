"""configs/nginx.conf in front of two routers of a running cluster: streams, a leaving client, a router that dies."""

import asyncio
import json
import os
import re
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import aiohttp
import pytest
from support.cluster import POLL_S, cluster
from support.ports import free_ports

from kvcore.config.schema import RouterConfig

CONF = (Path(__file__).resolve().parents[2] / "configs/nginx.conf").read_text()
NGINX = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(180),
    pytest.mark.skipif(NGINX is None and not os.environ.get("CI"), reason="no nginx (apt install nginx)"),
]
LONG = {"model": "sim", "max_tokens": 2000, "stream": True, "ignore_eos": True, "prompt": [7] * 20}
SHORT = {"model": "sim", "max_tokens": 4, "prompt": [7] * 20}


def conf_for(listen: int, routers: list[int]) -> str:
    """The shipped file on other ports, with temporary files in nginx's prefix."""
    ports = {"8080": listen, "8000": routers[0], "8001": routers[1]}
    text = re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[found[1]]}", CONF)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    folders = "".join(f"{kind}_temp_path {kind};" for kind in kinds)
    return "pid nginx.pid; daemon off;\n" + text.replace("http {", f"http {{ access_log off; {folders}", 1)


@asynccontextmanager
async def running(*command: str, cwd: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(*command, cwd=cwd)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await asyncio.wait_for(process.wait(), 30)


async def until_ok(session: aiohttp.ClientSession, url: str) -> None:
    async with asyncio.timeout(60):
        while True:
            try:
                async with session.get(url) as reply:
                    if reply.status == 200:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(POLL_S)


async def test_the_gateway_streams_passes_a_leaving_client_on_and_survives_a_router(tmp_path: Path) -> None:
    assert NGINX is not None, "in continuous integration nginx is there"
    async with AsyncExitStack() as stack:
        handle = await stack.enter_async_context(cluster(tmp_path, prefillers=1, decoders=1))
        first = int(handle.url.rpartition(":")[2])
        second, listen = free_ports(2)
        router = [sys.executable, "-m", "router", "--config", str(tmp_path / "cluster.yaml")]
        other = await stack.enter_async_context(
            running(*router, f"--set=router.port={second}", "--set=router.drain_s=60", cwd=Path(__file__).parents[2])
        )
        prefix = tmp_path / "nginx"
        prefix.mkdir()
        (prefix / "nginx.conf").write_text(conf_for(listen, [first, second]))
        await stack.enter_async_context(
            running(NGINX, "-p", f"{prefix}/", "-c", "nginx.conf", "-e", "stderr", cwd=prefix)
        )
        session = await stack.enter_async_context(aiohttp.ClientSession())
        gateway, routers = f"http://127.0.0.1:{listen}", [f"http://127.0.0.1:{port}" for port in (first, second)]
        for url in routers:
            await until_ok(session, f"{url}/health")
        await until_ok(session, f"{gateway}/v1/models")

        for path in ("/v1/requests", "/v1/cluster", "/metrics", "/health"):
            async with session.get(gateway + path) as reply:
                assert reply.status == 404, path

        chat = {"model": "sim", "max_tokens": 8, "stream": True, "messages": [{"role": "user", "content": "hello"}]}
        async with session.post(f"{gateway}/v1/chat/completions", json=chat) as reply:
            assert (await reply.text()).strip().endswith("data: [DONE]")

        origin = {"Origin": "http://localhost:3000", "Access-Control-Request-Method": "POST"}
        async with session.options(f"{gateway}/v1/chat/completions/", headers=origin) as reply:
            assert (reply.status, reply.headers["Access-Control-Allow-Origin"]) == (200, origin["Origin"])

        async def record(request_id: str) -> dict:
            for url in routers:
                async with session.get(f"{url}/v1/requests/{request_id}") as reply:
                    if reply.status == 200:
                        return await reply.json()
            raise AssertionError(f"no router knows {request_id}")

        async with session.post(f"{gateway}/v1/completions", json=LONG) as reply:
            assert (await reply.content.readline()).startswith(b"data: ")
            request_id = reply.headers["X-Request-Id"]
            assert (await record(request_id))["state"] == "running"  # its first event came while it ran
            reply.close()

        async def ended() -> str | None:
            state = (await record(request_id))["state"]
            return None if state == "running" else state

        assert await handle.until(ended, 60) == "cancelled"

        async with session.post(f"{routers[1]}/v1/completions", json=LONG) as reply:
            assert (await reply.content.readline()).startswith(b"data: ")
            other.terminate()
            async with asyncio.timeout(60):
                while True:
                    async with session.get(f"{routers[1]}/health") as health:
                        if "stopping" in await health.text():
                            break
            for _ in range(6):
                async with session.post(f"{gateway}/v1/completions", json=SHORT) as short:
                    assert short.status == 200, await short.text()
            assert await reply.content.readline(), "and its own streams go on"
        other.kill()
        await other.wait()
        for _ in range(6):
            async with session.post(f"{gateway}/v1/completions", json=SHORT) as reply:
                assert reply.status == 200, await reply.text()
                assert json.loads(await reply.text())["usage"]["completion_tokens"] == 4


def test_its_bounds_fit_the_routers() -> None:
    seconds = {name: int(value) for name, value in re.findall(r"(\w+) (\d+)s;", CONF)}
    defaults = RouterConfig()
    assert seconds["proxy_read_timeout"] > defaults.request_timeout_s
    assert f"client_max_body_size {defaults.max_body >> 20}m;" in CONF
    asgi = (Path(__file__).resolve().parents[2] / "kvcore/process/asgi.py").read_text()
    (idle,) = re.findall(r"timeout_keep_alive=(\d+)", asgi)
    assert seconds["keepalive_timeout"] < int(idle)
    assert "non_idempotent" not in CONF
