"""The table of endpoints is all that a call is made from: server, client, document and metrics follow it."""

import inspect

import httpx
import msgspec
import pytest
from support.metadata_words import new_state

from kvcore.clock import SystemClock
from kvcore.telemetry import Metrics
from metadata_server import protocol
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.endpoints import ENDPOINTS, EndpointSpec
from metadata_server.shell import app, calls, openapi
from metadata_server.shell.app import create_app


class EchoRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    number: int


class EchoReply(msgspec.Struct, frozen=True, kw_only=True):
    objects: int
    number: int


ECHO = EndpointSpec(
    "/v1/echo",
    EchoRequest,
    EchoReply,
    lambda core: lambda request, now: EchoReply(objects=core.state.num_objects, number=request.number),
    "Say it again",
)


async def test_a_row_of_the_table_is_a_new_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (protocol, calls, app, openapi):
        monkeypatch.setattr(module, "ENDPOINTS", (*ENDPOINTS, ECHO))
    openapi.document.cache_clear()
    clock, metrics = SystemClock(), Metrics()
    served = create_app(MetadataCore(new_state(), clock), clock, metrics, 1 << 20)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=served), base_url="http://m") as http:

        class Asgi:
            async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
                return (await http.post(path, content=body)).content

            async def aclose(self) -> None:
                pass

        client = MetadataClient(Asgi(), clock, 5.0)
        assert await client._call(ECHO, EchoRequest(number=7), None) == EchoReply(objects=0, number=7)
        document = (await http.get("/openapi.json")).json()
        refused = await http.post("/v1/echo", json={"number": "seven"})
    openapi.document.cache_clear()
    assert document["paths"]["/v1/echo"]["post"]["summary"] == "Say it again"
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "number"
    assert b'/v1/echo"} 1.0' in metrics.render()


def test_the_client_has_one_method_a_row() -> None:
    methods = inspect.getmembers(MetadataClient, inspect.iscoroutinefunction)
    public = {name for name, _ in methods if not name.startswith("_")} - {"aclose", "greet"}
    assert public == {row.path.rpartition("/")[2] for row in ENDPOINTS}


def test_paths_are_given_once_and_every_row_says_what_it_is() -> None:
    assert len({row.path for row in ENDPOINTS}) == len(ENDPOINTS)
    assert all(row.summary and row.path.startswith("/v1/") for row in ENDPOINTS)
