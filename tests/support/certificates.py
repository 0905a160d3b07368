"""A certificate of a test's own, for 127.0.0.1 and further addresses."""

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
