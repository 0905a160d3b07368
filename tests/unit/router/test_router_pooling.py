"""Paths of models that pool: handed on to servers that may know them, and refused by name where nobody does."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from support.fake_vllm_server import FakeVllm, servers, serving
from support.plain_vllm import plain_config, running_router, write_model_folder
from support.router_fakes import make_rig

from kvcore.handoff import HandoffKind
from router.tenants.paths import POOLING

BODY = {"model": "fake-model", "input": ["a", "b"], "any_field": {"of": "vLLM's"}}


class PoolingVllm(FakeVllm):
    """Serves a model that pools, too."""

    def app(self) -> web.Application:
        self.asked: list[tuple[str, Any]] = []
        app = super().app()
        for path in sorted(POOLING - {"/classify"}):
            app.router.add_post(path, self._pool)
        return app

    async def _pool(self, request: web.Request) -> web.Response:
        self._cut_if_dead(request)
        self.asked.append((request.path, await request.json()))
        if request.path == "/score":
            error = {"message": "queries is missing", "type": "BadRequestError", "param": "queries", "code": 400}
            return web.json_response({"error": error}, status=400)
        return web.json_response({"object": "list", "by": self.name, "data": [{"embedding": [0.5]}]})


@pytest.mark.parametrize("path", sorted(POOLING))
async def test_engines_that_generate_refuse_them_by_name(path: str) -> None:
    rig = await make_rig()
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as http:
        reply = await http.post(path, json=BODY)
        error = reply.json()["error"]
        assert (reply.status_code, error["code"]) == (404, "unknown_route")
        assert error["message"].startswith(f"POST {path}: ") and "handoff: nixl" in error["message"]


@pytest.fixture
async def pooling(tmp_path: Path) -> AsyncIterator[tuple[aiohttp.ClientSession, dict[str, Any]]]:
    fakes: dict[str, Any] = {
        name: PoolingVllm(name, fake.role, fake.world) for name, fake in servers(HandoffKind.NIXL, decoders=2).items()
    }
    async with serving(fakes), running_router(plain_config(fakes, write_model_folder(tmp_path))) as http:
        yield http, fakes


async def answered(http: aiohttp.ClientSession, path: str) -> str:
    async with http.post(path, json=BODY) as reply:
        assert reply.status == 200, await reply.text()
        return str((await reply.json())["by"])


async def test_vllm_servers_are_asked_in_turn_and_as_the_client_asks(pooling: Any) -> None:
    http, fakes = pooling
    assert {await answered(http, "/v1/embeddings") for _ in range(6)} == {"p0", "d0", "d1"}
    assert fakes["d0"].asked[0] == ("/v1/embeddings", BODY)
    fakes["d0"].dead = True
    assert {await answered(http, "/rerank") for _ in range(6)} == {"p0", "d1"}, "it need not be known yet that one died"


async def test_what_such_a_server_refuses_is_refused_by_its_name(pooling: Any) -> None:
    http, _ = pooling
    async with http.post("/score", json=BODY) as reply:
        error = (await reply.json())["error"]
        assert (reply.status, error["param"], error["message"]) == (400, "queries", "queries is missing")
    async with http.post("/classify", json=BODY) as reply:
        error = (await reply.json())["error"]
        assert reply.status == 404 and error["message"].startswith("/classify: the servers behind this router"), error
