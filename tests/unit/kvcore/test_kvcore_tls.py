"""A listener's certificate: renewed while connections stand, never by half; and clients that know it by its file."""

import logging
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from starlette.responses import PlainTextResponse
from support.certificates import ELLIPTIC, RSA, issued, self_signed

from kvcore.config.file import load_config
from kvcore.config.security import TlsConfig
from kvcore.config.servers import router_url_of
from kvcore.errors import ConfigError
from kvcore.process.asgi import AsgiServer
from kvcore.process.http_client import router_session
from kvcore.trust.opening import ClusterTrust, TrustSource, trust_source
from kvcore.trust.tls import ServerCertificate, pinned_context

SIM = Path(__file__).resolve().parents[3] / "configs/sim-2p2d.yaml"


async def app(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse(scope["scheme"])(scope, receive, send)


def made(folder: Path, kind: str = ELLIPTIC) -> TlsConfig:
    folder.mkdir()
    cert, key = self_signed(folder, kind=kind)
    return TlsConfig(cert=str(cert), key=str(key))


def knowing(tls: TlsConfig) -> aiohttp.ClientSession:
    return router_session(trust=ClusterTrust(source=TrustSource(router_cert=tls.cert)))


async def get(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(url) as reply:
        return await reply.text()


def put(new: TlsConfig, over: TlsConfig) -> None:
    copy(new.cert, over.cert)
    copy(new.key, over.key)


def copy(source: str, target: str) -> None:
    Path(target).write_bytes(Path(source).read_bytes())


def remove(path: str) -> None:
    Path(path).unlink()


async def test_a_certificate_is_renewed_for_new_connections_while_old_ones_go_on(tmp_path):
    used, renewed = made(tmp_path / "used"), made(tmp_path / "new")
    before = TlsConfig(cert=str(tmp_path / "before.pem"), key=used.key)
    copy(used.cert, before.cert)
    certificate = ServerCertificate(used)
    server = AsgiServer(app, "127.0.0.1", 0, tls=certificate.context)
    await server.start()
    try:
        async with knowing(before) as old, knowing(renewed) as new:
            assert await get(old, server.url) == "https"
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await get(new, server.url)
            assert not certificate.refresh()
            put(renewed, used)
            assert certificate.refresh()
            assert await get(old, server.url) == "https", "the connection stands"
            assert await get(new, server.url) == "https"
            async with knowing(before) as late:
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await get(late, server.url)
    finally:
        await server.aclose()


async def test_another_certificate_of_the_same_issuer_is_refused_also_where_the_issuers_is_in_the_file(tmp_path):
    """With a public issuer's anybody has one."""
    issuer = made(tmp_path / "issuer")
    folders = [tmp_path / "ours", tmp_path / "theirs"]
    for folder in folders:
        folder.mkdir()
    files = [issued(folder, (Path(issuer.cert), Path(issuer.key))) for folder in folders]
    ours, theirs = (TlsConfig(cert=str(cert), key=str(key)) for cert, key in files)
    server = AsgiServer(app, "127.0.0.1", 0, tls=ServerCertificate(ours).context)
    await server.start()
    try:
        async with knowing(ours) as client, knowing(theirs) as other:
            assert await get(client, server.url) == "https"
            with pytest.raises(aiohttp.ClientConnectorCertificateError):
                await get(other, server.url)
    finally:
        await server.aclose()


async def test_what_is_half_written_changes_nothing_and_is_said_once(tmp_path, caplog):
    used, renewed = made(tmp_path / "used"), made(tmp_path / "new")
    certificate, cut = ServerCertificate(used), str(tmp_path / "cut.pem")
    (tmp_path / "cut.pem").write_text("-----BEGIN")
    with caplog.at_level(logging.INFO):
        copy(renewed.cert, used.cert)  # the key is still the old one
        assert not certificate.refresh()
        assert not certificate.refresh()
        copy(cut, used.key)
        assert not certificate.refresh()
        remove(used.key)
        assert not certificate.refresh()
        assert not certificate.refresh()
        put(renewed, used)
        assert certificate.refresh()
    assert caplog.text.count("certificate_not_reloaded") == 3
    assert caplog.text.count("certificate_reloaded") == 1


async def test_what_changes_while_it_is_read_is_not_used(tmp_path, monkeypatch):
    """A renewal that begins between the look and the end of loading: nobody gets half of it, and the next look all."""
    used, renewed = made(tmp_path / "used"), made(tmp_path / "new")
    certificate = ServerCertificate(used)
    load = ssl.SSLContext.load_cert_chain

    def slow(context: ssl.SSLContext, *files: Any, **options: Any) -> None:
        load(context, *files, **options)
        put(renewed, used)

    copy(used.cert, str(tmp_path / "same.pem"))
    copy(str(tmp_path / "same.pem"), used.cert)
    with monkeypatch.context() as patched:
        patched.setattr(ssl.SSLContext, "load_cert_chain", slow)
        assert not certificate.refresh()
    server = AsgiServer(app, "127.0.0.1", 0, tls=certificate.context)
    await server.start()
    try:
        async with knowing(TlsConfig(cert=str(tmp_path / "same.pem"), key="")) as old, knowing(renewed) as new:
            assert await get(old, server.url) == "https"
            assert certificate.refresh()
            assert await get(new, server.url) == "https"
    finally:
        await server.aclose()


@pytest.mark.parametrize("whole", [True, False], ids=["with its key", "while its key is still to come"])
async def test_a_key_of_another_kind_takes_the_olds_place_whole_or_not_at_all(tmp_path, whole):
    """OpenSSL keeps a certificate of each kind of key: loaded into the one context, a client could get either."""
    used, renewed = made(tmp_path / "used", RSA), made(tmp_path / "new")
    copy(used.cert, str(tmp_path / "old.pem"))
    certificate = ServerCertificate(used)
    put(renewed, used) if whole else copy(renewed.cert, used.cert)
    assert certificate.refresh() is whole
    server = AsgiServer(app, "127.0.0.1", 0, tls=certificate.context)
    await server.start()
    try:
        for cert, serves in ((renewed.cert, whole), (str(tmp_path / "old.pem"), not whole)):
            context = pinned_context(cert)
            context.maximum_version = ssl.TLSVersion.TLSv1_2
            context.set_ciphers("ECDHE+aECDSA+AESGCM" if cert == renewed.cert else "ECDHE+aRSA+AESGCM")
            async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=context)) as client:
                if serves:
                    assert await get(client, server.url) == "https"
                else:
                    with pytest.raises(aiohttp.ClientConnectorError):
                        await get(client, server.url)
    finally:
        await server.aclose()


def test_files_that_are_no_certificate_are_refused(tmp_path):
    used, other = made(tmp_path / "used"), made(tmp_path / "other")
    for tls in (TlsConfig(cert=used.cert, key=other.key), TlsConfig(cert=used.key, key=used.key)):
        with pytest.raises(ConfigError, match="no certificate with its key"):
            ServerCertificate(tls)
    with pytest.raises(ConfigError, match="No such file"):
        ServerCertificate(TlsConfig(cert=str(tmp_path / "none"), key=used.key))
    with pytest.raises(ConfigError, match="cannot be used"):
        pinned_context(used.key)
    assert pinned_context(used.cert).verify_mode is ssl.CERT_REQUIRED


def test_the_cluster_file_says_where_it_is(tmp_path):
    (tmp_path / "cluster.yaml").write_text(
        SIM.read_text().replace("router: {", "router: {tls: {cert: c.pem, key: k.pem}, ")
    )
    config = load_config(tmp_path / "cluster.yaml")
    assert config.router.tls == TlsConfig(cert=str(tmp_path / "c.pem"), key=str(tmp_path / "k.pem"))
    assert router_url_of(config) == "https://127.0.0.1:8000"
    assert trust_source(config).router_cert == str(tmp_path / "c.pem")
    assert router_url_of(load_config(SIM)) == "http://127.0.0.1:8000"
