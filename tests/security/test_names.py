"""Names that clients and nodes choose, where they would become headers, paths, URLs or lines of a log."""

import json
import logging
from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest
from support.metadata_words import registration
from support.router_fakes import Rig, make_rig

from kvcore.errors import MetadataProtocolError
from kvcore.process.asgi import AsgiServer
from kvcore.telemetry import log_fields
from metadata_server.bounds import check_register

ASK = {"model": "fake-model", "prompt": "hello", "max_tokens": 2}
EVIL = [
    "a\r\nX-Evil: 1",
    "a\nb",
    "../../etc/passwd",
    "a/../b",
    "%0d%0aX-Evil:%201",
    "a b",
    "\x1b[2J",
    "é" * 9,
    "a" * 200,
]
PATHS = ["/v1/models/../../etc/passwd", "/v1/requests/..%2f..%2fmetrics", "/v1/models/%2e%2e/x"]
NODE_NAMES = ["id", "cluster", "model", "control_url", "tokenizer_digest"]


@pytest.fixture
async def rig() -> Rig:
    return await make_rig()


@pytest.fixture
async def http(rig: Rig) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        yield client


@pytest.mark.parametrize("name", EVIL)
async def test_a_request_id_that_is_none_is_replaced(http: httpx.AsyncClient, name: str):
    answer = await http.post("/v1/completions", json=ASK, headers={b"X-Request-Id": name.encode()})
    assert answer.status_code == 200
    assert answer.headers["x-request-id"].isalnum() and "x-evil" not in answer.headers
    record = (await http.get(f"/v1/requests/{answer.json()['id']}")).json()
    assert record["client_request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("name", EVIL)
async def test_a_models_name_is_compared_and_nothing_else(http: httpx.AsyncClient, name: str):
    answer = await http.post("/v1/completions", json={**ASK, "model": name})
    assert answer.status_code == 404 and answer.json()["error"]["code"] == "model_not_found"
    assert "x-evil" not in answer.headers


@pytest.mark.parametrize("path", PATHS)
async def test_a_path_leads_nowhere_else(rig: Rig, path: str):
    server = AsgiServer(rig.app, "127.0.0.1", 0)
    await server.start()
    async with httpx.AsyncClient() as client:
        request = client.build_request("GET", server.url)
        request.url = request.url.copy_with(raw_path=path.encode())
        answer = await client.send(request)
    await server.aclose()
    assert answer.status_code == 404 and set(answer.json()) == {"error"}


@pytest.mark.parametrize(
    ("field", "name"),
    [(field, name) for field in NODE_NAMES for name in ("a\nb", "a\x00b", "\x1b[2J", "a" * 5000)] + [("id", "")],
)
def test_a_nodes_names_are_printable_and_short(field: str, name: str):
    request = registration("a")
    node = msgspec.structs.replace(request.node, **{field: name})
    with pytest.raises(MetadataProtocolError, match=field):
        check_register(msgspec.structs.replace(request, node=node))


@pytest.mark.parametrize("name", [*EVIL, "\u2028next", "\x9b2J", "\x7f"])
def test_a_name_stays_within_its_line_of_the_log(name: str, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        log_fields(logging.getLogger("test"), logging.INFO, "named", name=name)
    (line,) = caplog.messages
    assert line.isprintable() and len(line.splitlines()) == 1
    shown = line.removeprefix("named name=")
    assert (json.loads(shown) if shown.startswith('"') else shown) == name
