"""Certificates of a test's own, for 127.0.0.1 and further addresses."""

import subprocess
from pathlib import Path


def self_signed(folder: Path, *addresses: str) -> tuple[Path, Path]:
    """The PEM files of a certificate, which is its own root, and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    names = ",".join(f"IP:{address}" for address in ("127.0.0.1", *addresses))
    how = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=kvferry-test"
    where = ["-addext", f"subjectAltName={names}", "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", *how.split(), *where], check=True, capture_output=True)
    return cert, key


def issued(folder: Path, issuer: tuple[Path, Path]) -> tuple[Path, Path]:
    """The PEM files of a certificate that the issuer signed, with the issuer's behind it, and of its key."""
    cert, key = folder / "cert.pem", folder / "key.pem"
    how = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=kvferry-issued"
    more = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=IP:127.0.0.1"]
    where = ["-CA", str(issuer[0]), "-CAkey", str(issuer[1]), "-keyout", str(key), "-out", str(cert)]
    subprocess.run(["openssl", *how.split(), *more, *where], check=True, capture_output=True)
    cert.write_text(cert.read_text() + issuer[0].read_text())
    return cert, key
