"""`/metadata` over HTTP: Mooncake's own words and statuses, keys, tokens, TLS, bounds."""

import asyncio
import base64
import json
import socket
import ssl
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from support.certificates import self_signed
from support.metadata_words import new_state
from support.mooncake_dialect import AT_ONCE, RAM, RPC, dialect_rig, ram, rpc
from support.ports import free_ports

from kvcore.config.file import load_config
from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from kvcore.errors import ConfigError, RecordsUnavailableError
from kvcore.process.asgi import AsgiServer
from kvcore.process.service import Lifecycle
from kvcore.telemetry import Metrics
from metadata_server.core import MetadataCore
from metadata_server.mooncake.http_shell import MooncakeApp, MooncakePort
from metadata_server.mooncake.opening import tls_of, token_of
from metadata_server.service import main
from metadata_server.shell.app import create_app
from metadata_server.shell.metrics import register_mooncake

DEFAULT = MooncakeMetadataConfig()
SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"


class Http:
    """Calls of one server's `/metadata`; an answer is (status, text)."""

    def __init__(self, rig, url, session):
        self.rig, self.url, self.session = rig, url, session

    async def __call__(self, method, key=None, body=None, *, path="/metadata", **more):
        params = {} if key is None else {"key": key}
        async with self.session.request(method, self.url + path, params=params, data=body, **more) as response:
            return response.status, await response.text()


@asynccontextmanager
async def served(config=DEFAULT, limits=AT_ONCE, *, token=None, tls=None, whole=False):
    """On a port of its own, or (`whole`) in a metadata server's application."""
    async with AsyncExitStack() as stack:
        rig = await stack.enter_async_context(dialect_rig(config, limits))
        metrics = Metrics()
        app = MooncakeApp(rig.dialect, rig.clock, register_mooncake(rig.dialect, metrics), token, limits)
        core = MetadataCore(new_state(), rig.clock)
        outer = create_app(core, rig.clock, metrics, 1 << 20, mooncake=app) if whole else MooncakePort(app)
        server = AsgiServer(outer, "127.0.0.1", 0, tls=tls)
        await server.start()
        stack.push_async_callback(server.aclose)
        timeout = aiohttp.ClientTimeout(total=10)
        session = await stack.enter_async_context(aiohttp.ClientSession(timeout=timeout))
        yield Http(rig, server.url, session)


@pytest.fixture
async def http():
    async with served() as http:
        yield http


@pytest.mark.parametrize("whole", [False, True])
async def test_each_status_and_text(whole):
    async with served(whole=whole) as http:
        assert await http("GET", RAM) == (404, "metadata not found")
        assert await http("PUT", RPC, rpc()) == (200, "metadata updated")
        assert await http("PUT", RPC, rpc()) == (200, "metadata updated")
        assert await http("PUT", RAM, ram()) == (200, "metadata updated")
        assert await http("GET", RAM) == (200, ram().decode())
        http.rig.ports.open(16426)
        status, text = await http("PUT", RPC, rpc(15001))
        assert status == 400 and text.startswith("Duplicate rpc_meta key not allowed: a live client at ")
        assert await http("DELETE", RPC) == (200, "metadata deleted")
        assert await http("DELETE", RPC) == (404, "metadata not found")
        for method in ("GET", "PUT", "DELETE"):
            assert await http(method) == await http(method, "") == (400, "Missing key parameter")
        assert await http("POST", RPC, b"{}") == (405, "Method not allowed")


async def test_the_openapi_document_has_each_status_that_is_answered():
    async with served(whole=True) as http:
        described = json.loads((await http("GET", path="/openapi.json"))[1])["paths"]["/metadata"]
    statuses = {method: set(described[method]["responses"]) for method in ("get", "put", "delete")}
    common = {"200", "400", "401", "503"}
    assert statuses["get"] == statuses["delete"] == common | {"404"}
    assert statuses["put"] == common | {"408", "413", "415"}


async def test_a_value_is_json_and_any_spelling_of_a_key_is_one_key(http):
    for spelling in ("mooncake%2Fram%2F10.99.0.1%3A1", "mooncake%2fram%2f10.99.0.1%3a1", "mooncake/ram/10.99.0.1:1"):
        async with http.session.put(f"{http.url}/metadata?key={spelling}", data=spelling.encode()) as response:
            assert response.status == 200
        async with http.session.get(f"{http.url}/metadata?key=mooncake/ram/10.99.0.1:1") as response:
            assert response.content_type == "application/json"
            assert await response.read() == spelling.encode()
    assert http.rig.dialect.num_keys == 1
    assert await http("PUT", "mooncake/c/1/rpc_meta/h:1", rpc()) == (200, "metadata updated")
    assert await http.rig.keys() == {"mooncake/ram/10.99.0.1:1", "mooncake/c/1/rpc_meta/h:1"}


async def test_health_and_nothing_else_on_a_port_of_its_own(http):
    assert await http("GET", path="/health") == (200, "OK")
    assert (await http("POST", path="/v1/objects/match"))[0] == 404


async def test_beside_the_cluster_the_calls_and_health_are_as_ever():
    async with served(whole=True) as http:
        assert (await http("GET", path="/health"))[0] == (await http("GET", path="/v1/stats"))[0] == 200
        await http("PUT", RPC, rpc())
        metrics = (await http("GET", path="/metrics"))[1]
        assert "kvferry_metadata_mooncake_keys 1.0" in metrics
        assert "kvferry_metadata_mooncake_seconds_count 1.0" in metrics


async def test_bounds_of_keys_and_values():
    config, limits = MooncakeMetadataConfig(max_keys=1, max_value=1000), replace(AT_ONCE, body_s=0.1)
    async with served(config, limits) as http:
        assert (await http("PUT", "k" * 385, b""))[0] == 400
        assert (await http("GET", "%FF", b""))[0] == 404
        async with http.session.get(f"{http.url}/metadata?key=%FF") as response:
            assert response.status == 400
        assert (await http("PUT", RAM, b"x" * 1001))[0] == 413

        async def endless():
            for _ in range(10):
                yield b"x" * 200

        with suppress(aiohttp.ClientConnectionError):  # it may be cut while it is still sending
            assert (await http("PUT", RAM, endless()))[0] == 413
        assert (await http("PUT", RAM, b"x", headers={"Content-Encoding": "gzip"}))[0] == 415
        assert (await http("PUT", RAM, b"x" * 1000))[0] == 200
        assert (await http("PUT", RPC, b"x"))[0] == 503
        assert await http.rig.keys() == {RAM}


async def test_a_value_that_does_not_come_is_given_up():
    async with served(limits=replace(AT_ONCE, body_s=0.05)) as http:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(http.url.rpartition(":")[2]))
        writer.write(b"PUT /metadata?key=a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nx")
        async with asyncio.timeout(60):
            assert b" 408 " in await reader.readline()
        writer.close()
        assert await http.rig.keys() == set()


async def test_records_that_cannot_be_written_are_said_and_nothing_is_kept(http):
    async def refuse(*_, **__):
        raise RecordsUnavailableError("the disk is full")

    http.rig.records.put = refuse
    assert await http("PUT", RPC, rpc()) == (503, "the disk is full")
    assert await http("GET", RPC) == (404, "metadata not found")


async def test_our_own_fault_is_a_500_without_a_traceback(http):
    async def fail(_):
        raise ZeroDivisionError("secret")

    http.rig.records.get = fail
    assert await http("GET", RPC) == (500, "internal error; see the log")


def basic(user, password):
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


async def test_with_a_token_all_must_bring_it():
    async with served(token="s3cret") as http:
        wrong = ("Bearer", "Bearer no", "Bearer s3cret2", "s3cret", basic("s3cret", "no"), "Basic !", "Digest s3cret")
        for given in (None, *wrong):
            headers = {} if given is None else {"Authorization": given}
            for method in ("GET", "PUT", "DELETE", "POST"):
                assert await http(method, RPC, headers=headers) == (401, "a token is needed")
        for given in ("Bearer s3cret", "bearer s3cret", basic("any", "s3cret")):
            assert (await http("GET", RPC, headers={"Authorization": given}))[0] == 404
        assert await http("GET", path="/health") == (200, "OK")


def test_the_token_is_in_the_environment(monkeypatch):
    config = MooncakeMetadataConfig(token_env="KV_TEST_TOKEN")
    for value in (None, "", "  ", "gr\u00fcn"):
        monkeypatch.delenv("KV_TEST_TOKEN", raising=False)
        if value is not None:
            monkeypatch.setenv("KV_TEST_TOKEN", value)
        with pytest.raises(ConfigError, match="KV_TEST_TOKEN"):
            token_of(config)
    monkeypatch.setenv("KV_TEST_TOKEN", "s3cret\n")
    assert token_of(config) == "s3cret" and token_of(DEFAULT) is None


async def test_over_tls(tmp_path):
    cert, key = self_signed(tmp_path)
    tls = tls_of(MooncakeMetadataConfig(port=0, cert=str(cert), key=str(key)))
    assert tls is not None
    trusting = ssl.create_default_context(cafile=str(cert))
    async with served(tls=tls.context) as http:
        assert http.url.startswith("https://")
        assert await http("PUT", RPC, rpc(), ssl=trusting) == (200, "metadata updated")
        with pytest.raises(aiohttp.ClientConnectorCertificateError):
            await http("GET", RPC)
        with pytest.raises(aiohttp.ClientConnectionError):
            await http.session.get(http.url.replace("https", "http") + "/metadata?key=a")
        assert await http("GET", RPC, ssl=trusting) == (200, rpc().decode())
        self_signed(tmp_path)
        assert tls.refresh()
        renewed = ssl.create_default_context(cafile=str(cert))
        assert await http("GET", RPC, ssl=renewed) == (200, rpc().decode()), "a new connection has the new one"


class _Over(Exception):  # noqa: N818 - ends the TaskGroup
    pass


@pytest.mark.slow
async def test_the_server_follows_the_files_of_its_certificate(tmp_path):
    cert, key = self_signed(tmp_path)
    own, port = free_ports(2)
    mooncake = f"{{enabled: true, port: {port}, cert: '{cert}', key: '{key}'}}"
    config = load_config(SIM, [f"metadata_server.port={own}", f"metadata_server.mooncake={mooncake}"])

    async def status():
        """Of who trusts the certificate that is in the file now."""
        trusting = ssl.create_default_context(cafile=str(cert))
        async with aiohttp.ClientSession() as session, asyncio.timeout(60):
            while True:
                with suppress(aiohttp.ClientConnectorError):
                    return (await session.get(f"https://127.0.0.1:{port}/metadata?key=a", ssl=trusting)).status
                await asyncio.sleep(0.02)

    with pytest.raises(ExceptionGroup) as ended:
        async with asyncio.TaskGroup() as tasks, AsyncExitStack() as stack:
            lifecycle = Lifecycle(stack, tasks)
            serving = tasks.create_task(main(config, lifecycle))
            assert await status() == 404
            self_signed(tmp_path)
            assert await status() == 404
            lifecycle.stopping.set()
            await serving
            await stack.aclose()
            raise _Over
    assert ended.value.subgroup(lambda error: not isinstance(error, ExceptionGroup | _Over)) is None


def test_certificates_that_cannot_be_used_are_told_at_start(tmp_path):
    cert, key = self_signed(tmp_path)
    (tmp_path / "other").mkdir()
    _, other = self_signed(tmp_path / "other")
    nothing = tmp_path / "nothing.pem"
    nothing.write_text("nothing")
    for pair in ((cert, other), (cert, tmp_path / "missing"), (nothing, key), (key, key)):
        config = MooncakeMetadataConfig(port=0, cert=str(pair[0]), key=str(pair[1]))
        with pytest.raises(ConfigError, match=r"metadata_server\.mooncake\.cert"):
            tls_of(config)
    assert tls_of(DEFAULT) is None


async def test_a_client_that_leaves_in_the_midst_of_its_value_changes_nothing(http):
    with socket.create_connection(("127.0.0.1", int(http.url.rpartition(":")[2]))) as leaving:
        leaving.sendall(b"PUT /metadata?key=a HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nx")
        assert (await http("GET", "a"))[0] == 404
    assert (await http("GET", "a"))[0] == 404
