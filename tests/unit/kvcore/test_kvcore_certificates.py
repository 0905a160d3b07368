"""Certificates between the cluster's processes: who gets in, what is renewed while connections stand, what is not."""

import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.responses import PlainTextResponse
from support.certificates import cluster_certificates, process_tls

from kvcore.clock import ManualClock
from kvcore.errors import ConfigError
from kvcore.ports import why_unreachable
from kvcore.process.asgi import AsgiServer
from kvcore.process.certified_app import PEER_NAMES, CertifiedApp
from kvcore.process.http_client import http_session
from kvcore.trust import certificates
from kvcore.trust.certificates import ProcessCertificate, ca_context, named
from kvcore.trust.opening import ClusterTrust
from kvferry.certificates import run_certs


async def app(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(",".join(sorted(scope.get(PEER_NAMES) or ())))(scope, receive, send)


@asynccontextmanager
async def served(certificate: ProcessCertificate) -> AsyncIterator[str]:
    server = AsgiServer(CertifiedApp(app), "127.0.0.1", 0, tls=certificate.server)
    await server.start()
    try:
        yield server.url
    finally:
        await server.aclose()


def opened(folder: Path, name: str) -> ProcessCertificate:
    return ProcessCertificate(process_tls(folder, name), ManualClock())


async def get(certificate: ProcessCertificate | None, url: str, path: str = "/") -> tuple[int, str]:
    async with http_session(trust=ClusterTrust(certificate=certificate)) as session, session.get(url + path) as reply:
        return reply.status, await reply.text()


async def get_as(context: ssl.SSLContext, url: str, path: str = "/") -> tuple[int, str]:
    connector = aiohttp.TCPConnector(ssl=context)
    async with aiohttp.ClientSession(connector=connector) as session, session.get(url + path) as reply:
        return reply.status, await reply.text()


def shown(folder: Path, name: str, ca: Path) -> ssl.SSLContext:
    """A client's that looks at nothing of its own first, as a stranger's program would not."""
    context = ssl.create_default_context(cafile=ca)
    context.load_cert_chain(folder / f"{name}.pem", folder / f"{name}.key")
    return context


async def test_processes_know_each_other_by_their_certificates(tmp_path):
    cluster_certificates(tmp_path)
    async with served(opened(tmp_path, "metadata-server")) as url:
        assert url.startswith("https://")
        assert await get(opened(tmp_path, "decode-0"), url) == (200, "decode-0,localhost")


async def test_who_shows_no_certificate_gets_health_and_metrics_and_nothing_else(tmp_path):
    cluster_certificates(tmp_path)
    context = ca_context(process_tls(tmp_path, "client"))
    async with served(opened(tmp_path, "metadata-server")) as url:
        status, text = await get_as(context, url)
        assert status == 401 and "proof_refused" in text and "security.tls" in text
        assert [(await get_as(context, url, path))[0] for path in ("/health", "/metrics")] == [200, 200]


async def test_strangers_certificates_are_refused_and_the_log_says_why(tmp_path, caplog):
    ours, theirs, ca = tmp_path / "ours", tmp_path / "theirs", tmp_path / "ours" / "ca.pem"
    cluster_certificates(ours)
    cluster_certificates(theirs)
    cluster_certificates(ours, ["late"], days=-1)
    async with served(opened(ours, "metadata-server")) as url:
        for folder, name in ((theirs, "decode-0"), (ours, "late")):
            with pytest.raises((aiohttp.ClientError, OSError)):
                await get_as(shown(folder, name, ca), url, "/health")
        with pytest.raises((aiohttp.ClientError, OSError)):
            await get(None, url.replace("https", "http"), "/health")
    said = [line for line in caplog.messages if line.startswith("certificate_refused")]
    assert len(said) == 3
    assert "issuer" in said[0] and "expired" in said[1] and "HTTP without TLS" in said[2]


async def test_a_server_is_known_by_its_address_and_its_issuer(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    authority = cluster_certificates(ours)
    cluster_certificates(theirs)
    authority.issue(ours, "elsewhere", ["192.0.2.1"])
    whys = []
    for server in (opened(theirs, "metadata-server"), opened(ours, "elsewhere")):
        async with served(server) as url:
            with pytest.raises(aiohttp.ClientError) as caught:
                await get(opened(ours, "decode-0"), url)
            whys.append(why_unreachable(caught.value))
    plain = AsgiServer(app, "127.0.0.1", 0)
    await plain.start()
    with pytest.raises(aiohttp.ClientError) as caught:
        await get(opened(ours, "decode-0"), plain.url.replace("http", "https"))
    await plain.aclose()
    whys.append(why_unreachable(caught.value))
    assert "certificate is refused: self-signed" in whys[0] and "127.0.0.1" in whys[1]
    assert "speaks no TLS" in whys[2] and "security.tls" in whys[2]


async def test_the_whole_ca_is_changed_while_a_connection_stands(tmp_path, caplog):
    """The old CA alone, then both, then both with new certificates, then the new one alone."""
    caplog.set_level(logging.INFO)
    old, new = tmp_path / "old", tmp_path / "new"
    cluster_certificates(old)
    cluster_certificates(new)
    stranger = shown(old, "prefill-0", old / "ca.pem")
    first = shown(old, "prefill-0", old / "ca.pem")
    stranger.load_verify_locations(new / "ca.pem")
    server, client = opened(old, "metadata-server"), opened(old, "client")
    holder = ClusterTrust(certificate=client)
    async with (
        served(server) as url,
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=first)) as standing,
        http_session(trust=holder, connector=aiohttp.TCPConnector(ssl=client.client, force_close=True)) as session,
    ):

        async def both() -> list[int]:
            statuses = []
            for one in (standing, session):
                async with one.get(url) as reply:
                    statuses.append(reply.status)
            return statuses

        assert await both() == [200, 200]
        cas = (old / "ca.pem").read_bytes() + (new / "ca.pem").read_bytes()
        (old / "ca.pem").write_bytes(cas)
        assert (server.refresh(), client.refresh()) == (True, True)
        assert await both() == [200, 200]
        for name, one in (("metadata-server", server), ("client", client)):
            for kind in ("key", "pem"):
                (old / f"{name}.{kind}").write_bytes((new / f"{name}.{kind}").read_bytes())
            assert one.refresh()
            assert await both() == [200, 200]
        (old / "ca.pem").write_bytes((new / "ca.pem").read_bytes())
        assert (server.refresh(), client.refresh()) == (True, True)
        assert await both() == [200, 200], "the connection stands, though its CA is gone"
        with pytest.raises((aiohttp.ClientError, OSError)):
            await get_as(stranger, url)
    assert caplog.text.count("certificate_reloaded") == 6


def test_files_are_looked_at_when_a_connection_is_made_and_not_too_often(tmp_path):
    cluster_certificates(tmp_path)
    clock = ManualClock()
    certificate = ProcessCertificate(process_tls(tmp_path, "client"), clock, look_s=1.0)
    before = certificate.current()
    cluster_certificates(tmp_path, ["client"])
    assert certificate.current() is before
    clock.advance(1.0)
    assert certificate.current() is not before


def test_what_is_no_good_changes_nothing_and_is_said_once_for_each_change(tmp_path, caplog):
    authority, other = cluster_certificates(tmp_path), tmp_path / "other"
    cluster_certificates(other)
    certificate = opened(tmp_path, "client")
    before, cert = certificate.current(), tmp_path / "client.pem"
    good = cert.read_bytes()
    cert.write_bytes((other / "client.pem").read_bytes())  # another's, to our key
    assert not certificate.refresh() and not certificate.refresh()
    cert.write_text("-----BEGIN")
    assert not certificate.refresh()
    authority.issue(tmp_path, "client", days=-1)
    assert not certificate.refresh()
    cert.unlink()
    assert not certificate.refresh() and not certificate.refresh()
    assert certificate.current() is before
    cert.write_bytes(good)
    (tmp_path / "client.key").chmod(0o644)
    assert not certificate.refresh()
    assert caplog.text.count("certificate_not_reloaded") == 5
    assert "expired" in caplog.text and "mode 0644" in caplog.text


def test_one_that_is_not_valid_yet_by_our_clock_is_taken_later(tmp_path, monkeypatch, caplog):
    cluster_certificates(tmp_path)
    clock = ManualClock()
    certificate = ProcessCertificate(process_tls(tmp_path, "client"), clock, again_s=10.0)
    early = ssl.SSLCertVerificationError()
    early.verify_message = "certificate is not yet valid"

    def refuse(*_: Any) -> None:
        raise early

    with monkeypatch.context() as patched:
        patched.setattr(certificates, "_meet", refuse)
        cluster_certificates(tmp_path, ["client"])
        for _ in range(3):
            assert not certificate.refresh()
            clock.advance(10.0)
    assert certificate.refresh()
    assert caplog.text.count("certificate_not_reloaded") == 1 and "not yet valid" in caplog.text
    clock.advance(100.0)
    assert not certificate.refresh()


def test_a_key_that_was_refused_for_its_mode_is_taken_once_that_is_right(tmp_path):
    cluster_certificates(tmp_path)
    certificate, key = opened(tmp_path, "client"), tmp_path / "client.key"
    cluster_certificates(tmp_path, ["client"])
    key.chmod(0o644)
    assert not certificate.refresh()
    key.chmod(0o600)
    assert certificate.refresh()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ("missing", "No such file"),
        ("expired", "certificate has expired"),
        ("foreign", "unable to get local issuer"),
        ("mixed", "no certificate with its key"),
        ("readable", "mode 0644 lets others at it"),
        ("no ca", "has no certificate"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name_at_start(tmp_path, wrong, said):
    ours, other = tmp_path / "ours", tmp_path / "other"
    cluster_certificates(ours)
    cluster_certificates(other)
    cert, key, ca = ours / "client.pem", ours / "client.key", ours / "ca.pem"
    if wrong == "missing":
        key.unlink()
    elif wrong == "expired":
        cluster_certificates(ours, ["client"], days=-1)
    elif wrong == "foreign":
        ca.write_bytes((other / "ca.pem").read_bytes())
    elif wrong == "mixed":
        cert.write_bytes((other / "client.pem").read_bytes())
    elif wrong == "readable":
        key.chmod(0o644)
    else:
        ca.write_text("")
    with pytest.raises(ConfigError, match=said) as caught:
        opened(ours, "client")
    assert caught.value.message.startswith("security.tls") and str(ours) in caught.value.message


def test_one_file_of_the_cluster_serves_processes_of_all_names(tmp_path):
    config = process_tls(tmp_path, "{name}")
    assert named(config, "decode-0") == process_tls(tmp_path, "decode-0")


def test_no_certificate_is_made_that_speaks_for_another_node_too(tmp_path):
    """A node is known by its certificate's DNS names, and so is the host that it is at."""
    sim = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"
    file = tmp_path / "cluster.yaml"
    elsewhere = sim.read_text().replace("prefill-0: {", "prefill-0: {host: prefill-1, ")
    file.write_text(f"{elsewhere}\nsecurity: {{open: true}}\n")
    with pytest.raises(ConfigError, match="prefill-0 is at the host prefill-1, which is another process's name"):
        run_certs(tmp_path / "certs", file, 1.0)
    assert not (tmp_path / "certs").exists()
