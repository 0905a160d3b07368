"""Processes that know each other by certificates: what strangers and nodes with another's certificate get to do."""

import asyncio
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest
from support.attacks import OVER_HTTP, secret_override, stranger
from support.certificates import cluster_certificates, process_tls, tls_section
from support.cluster import ClusterHandle, cluster
from support.metadata_words import registration
from support.ports import free_ports
from support.process_plans import started

from kvcore.clock import SystemClock
from kvcore.config.file import load_config
from kvcore.errors import MetadataProtocolError, ProofError
from kvcore.process.asgi import AsgiServer
from kvcore.process.certified_app import CertifiedApp
from kvcore.telemetry import Metrics
from kvcore.trust.certificates import ProcessCertificate, ca_context
from kvcore.trust.opening import ClusterTrust
from kvferry.launch.processes import plan_processes
from metadata_server.bounds import check_speaker, speaker_of
from metadata_server.cache_messages import NodeOrderRequest
from metadata_server.client import MetadataClient
from metadata_server.endpoints import ENDPOINTS, REGISTER
from metadata_server.http_transport import HttpMetadataTransport
from metadata_server.messages import HeartbeatRequest, LeaveRequest
from metadata_server.service import create_core
from metadata_server.shell.app import create_app

PROMPT = list(range(3, 203))
SIM = Path(__file__).resolve().parents[2] / "configs/sim-2p2d.yaml"


@pytest.fixture
async def metadata(tmp_path: Path) -> AsyncIterator[str]:
    """The URL of a metadata server that lets nodes speak for themselves alone."""
    cluster_certificates(tmp_path)
    clock = SystemClock()
    core = create_core(load_config(SIM), clock)
    app = CertifiedApp(create_app(core, clock, Metrics(), 1 << 20), names_matter=True)
    own = ProcessCertificate(process_tls(tmp_path, "metadata-server"))
    server = AsgiServer(app, "127.0.0.1", 0, tls=own.server)
    await server.start()
    yield server.url
    await server.aclose()


def client(url: str, folder: Path, name: str) -> MetadataClient:
    trust = ClusterTrust(certificate=ProcessCertificate(process_tls(folder, name)))
    return MetadataClient(HttpMetadataTransport(url.replace("https", "http"), trust=trust), SystemClock(), 20.0)


async def test_a_nodes_certificate_is_no_other_nodes(metadata: str, tmp_path: Path):
    own, other = client(metadata, tmp_path, "prefill-0"), client(metadata, tmp_path, "decode-0")
    mine, name = registration("prefill-0"), "prefill-0"
    await own.register(mine)
    for call in (
        other.register(registration("prefill-0", incarnation=2)),
        other.leave(LeaveRequest(node_id=name, incarnation=1)),
        other.heartbeat(HeartbeatRequest(node_id=name, incarnation=1)),
    ):
        with pytest.raises(MetadataProtocolError, match=r"prefill-0's, .* has the names decode-0, localhost"):
            await call
    assert (await own.heartbeat(HeartbeatRequest(node_id=name, incarnation=1))).known
    assert [node.id for node in (await other.nodes()).nodes] == ["prefill-0"]
    await own.aclose()
    await other.aclose()


def test_whoever_speaks_in_a_nodes_name_is_asked_for_it():
    """All requests with a node's name in them, but for orders about a node."""
    named = {row.request for row in ENDPOINTS if row.request and "node_id" in row.request.__struct_fields__}
    named -= {NodeOrderRequest}
    assert len(named) > 8
    for kind in named:
        request = kind(**dict.fromkeys(kind.__struct_fields__) | {"node_id": "decode-0"})
        assert speaker_of(request) == "decode-0", kind
        with pytest.raises(ProofError, match="decode-0"):
            check_speaker(request, frozenset({"prefill-0"}))
        check_speaker(request, frozenset({"decode-0"}))
        check_speaker(request, None)
    assert REGISTER.request is not None and speaker_of(registration("a")) == "a"


def security(folder: Path) -> list[str]:
    return [f"security.tls={tls_section(folder)}"]


def of_another_ca(folder: Path, ca: Path) -> ssl.SSLContext:
    cluster_certificates(folder)
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(folder / "decode-0.pem", folder / "decode-0.key")
    return context


async def worked(handle: ClusterHandle, context: ssl.SSLContext) -> tuple[set[str], set[str]]:
    """What a stranger with these certificates, or none, was let do; and the errors that he got."""
    done = set()
    async with stranger(handle, aiohttp.TCPConnector(ssl=context)) as it:
        for attack in OVER_HTTP:
            try:
                if await attack(it):
                    done.add(attack.__name__)
            except (aiohttp.ClientError, OSError):
                it.refusals.append("no connection")
        return done, set(it.refusals)


@pytest.mark.slow
@pytest.mark.timeout(240)
@pytest.mark.parametrize("with_secret", [True, False], ids=["secret", "no_secret"])
async def test_strangers_can_do_nothing_and_the_clusters_own_can_all(tmp_path, with_secret):
    certs = tmp_path / "certs"
    cluster_certificates(certs)
    (admin_port,) = free_ports(1)
    own_port = f"router.admin_port={admin_port}"
    overrides = [*security(certs), secret_override(tmp_path) if with_secret else own_port]
    async with cluster(tmp_path, overrides=overrides, transport="tcp") as handle:
        assert handle.metadata_url.startswith("https://")
        before = await handle.complete(PROMPT, max_tokens=4, temperature=0, return_token_ids=True)
        bare = ca_context(process_tls(certs, "client"))
        assert await worked(handle, bare) == (set(), {"proof_refused"})
        theirs = of_another_ca(tmp_path / "theirs", certs / "ca.pem")
        done, refusals = await worked(handle, theirs)
        assert not done and refusals <= {"no connection", "proof_refused"} and "no connection" in refusals
        after = await handle.complete(PROMPT, max_tokens=4, temperature=0, return_token_ids=True)
        assert after["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert (await handle.stats()).objects > 0
        if not with_secret:
            assert handle.operators_url == f"https://127.0.0.1:{admin_port}"
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=bare)) as session:
                ports = {handle.url: 404, handle.operators_url: 401}
                assert {url: (await session.get(f"{url}/v1/cluster")).status for url in ports} == ports
        given = f"security: {{secret: {{file: {tmp_path / 'secret'}}}, tls: {tls_section(certs)}}}\n"
        if not with_secret:
            given = f"security: {{tls: {tls_section(certs)}}}\n"
        text = (tmp_path / "cluster.yaml").read_text() + given
        text = text if with_secret else text.replace("router:\n", f"router:\n  admin_port: {admin_port}\n")
        (tmp_path / "cluster.yaml").write_text(text)
        drain = ["nodes", "drain", "decode-1", "--config"]
        for command in (["status", "--config"], ["doctor"] if with_secret else drain):
            words = [sys.executable, "-P", "-m", "kvferry", *command, str(tmp_path / "cluster.yaml")]
            asked = await asyncio.to_thread(subprocess.run, words, capture_output=True, text=True, check=False)
            assert asked.returncode == 0, asked.stdout + asked.stderr
    logs = [log.read_text() for log in (tmp_path / "logs").glob("*.log")]
    assert any("certificate_refused" in log for log in logs)
    assert not [log for log in logs if "PRIVATE KEY" in log]


@pytest.mark.slow
@pytest.mark.timeout(240)
async def test_nodes_without_a_certificate_of_ours_are_refused_by_name_and_serving_goes_on(tmp_path):
    """In the midst of an upgrade: one node has none, one has another CA's."""
    certs, other = tmp_path / "certs", tmp_path / "other"
    cluster_certificates(certs)
    cluster_certificates(other)
    mine = [*security(certs), secret_override(tmp_path)]
    changed = {"prefill-1": "security.tls=null", "decode-1": security(other)[0]}
    whys = {"prefill-1": "speaks no TLS", "decode-1": "its certificate is refused"}
    async with cluster(tmp_path, overrides=mine, without=list(changed)) as handle:
        plans = {plan.name: plan for plan in plan_processes(handle.config, tmp_path / "cluster.yaml", mine)}
        with ExitStack() as stack:
            for name, override in changed.items():
                stack.enter_context(started(plans[name], tmp_path / f"{name}.log", "--set", override))

            async def told() -> bool:
                nodes = {node["id"]: node["reason"] or "" for node in (await handle.status())["nodes"]}
                return all(why in nodes[name] for name, why in whys.items())

            await handle.until(told, 60.0)
            answers = await asyncio.gather(*(handle.complete(PROMPT, max_tokens=4) for _ in range(8)))
            legs = [leg["node"] for answer in answers for leg in (await handle.explain(answer["id"]))["legs"]]
            assert legs and not set(legs) & set(changed)
        assert not {node.id for node in (await handle.stats()).nodes} & set(changed)
        assert "HTTP without TLS" in (tmp_path / "logs" / "metadata-server.log").read_text()
        assert "its certificate is refused" in (tmp_path / "decode-1.log").read_text()
