"""Certificates of a test's own, for 127.0.0.1 and further addresses."""

import subprocess
from collections.abc import Iterable
from pathlib import Path

from kvcore.config.security import ClusterTlsConfig
from kvferry.certificates import Authority

CLUSTER_NAMES = ("metadata-server", "router", "client", "prefill-0", "prefill-1", "decode-0", "decode-1")
"""Of a `support.cluster`."""


ELLIPTIC, RSA = "ec -pkeyopt ec_paramgen_curve:prime256v1", "rsa:2048"
"""Kinds of keys."""


def self_signed(folder: Path, *addresses: str, kind: str = ELLIPTIC) -> tuple[Path, Path]:
    """The PEM files of a certificate, which is its own root, and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ",".join(f"IP:{address}" for address in ("127.0.0.1", *addresses))
    how = f"req -x509 -newkey {kind} -nodes -days 2 -subj /CN=kvferry-test"
    where = ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", *how.split(), *where], check=True, capture_output=True)
    return cert, key


def issued(folder: Path, issuer: tuple[Path, Path]) -> tuple[Path, Path]:
    """The PEM files of a certificate that the issuer signed, with the issuer's behind it, and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    how = f"req -x509 -newkey {ELLIPTIC} -nodes -days 2 -subj /CN=kvferry-issued"
    more = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-CA", str(issuer[0]), "-CAkey", str(issuer[1]), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", *how.split(), *more, *where], check=True, capture_output=True)
    cert.write_text(cert.read_text() + issuer[0].read_text())
    return cert, key


def cluster_certificates(folder: Path, names: Iterable[str] = CLUSTER_NAMES, days: float = 365.0) -> Authority:
    """A CA's and certificates of processes on this machine, in a folder; the CA's own, if it has one."""
    folder.mkdir(exist_ok=True)
    authority = Authority.read(folder) if (folder / "ca.pem").exists() else Authority.new("kvferry-test")
    authority.write(folder)
    for name in names:
        authority.issue(folder, name, days=days, age_days=2.0)
    return authority


def tls_section(folder: Path, name: str = "{name}") -> str:
    """The `security.tls` that names them."""
    return f"{{cert: '{folder}/{name}.pem', key: '{folder}/{name}.key', ca: '{folder}/ca.pem'}}"


def process_tls(folder: Path, name: str) -> ClusterTlsConfig:
    """The same, of one process."""
    return ClusterTlsConfig(
        cert=str(folder / f"{name}.pem"), key=str(folder / f"{name}.key"), ca=str(folder / "ca.pem")
    )
