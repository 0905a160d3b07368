"""How etcd is reached: what the cluster file says, with its files read. Imports nothing of gRPC."""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from kvcore.config.records import EtcdRecordsConfig
from kvcore.errors import ConfigError

PASSWORD = "KVFERRY_ETCD_PASSWORD"
_SECTION = "metadata_server.records"


@dataclass(frozen=True)
class EtcdAccess:
    """`ca`, `cert`, `key`: PEM; `ca` None: no TLS. `prefix`: of all keys of the cluster."""

    hosts: tuple[str, ...]
    prefix: str
    timeout_s: float
    ca: bytes | None = None
    cert: bytes | None = None
    key: bytes | None = field(default=None, repr=False)
    user: str = ""
    password: str = field(default="", repr=False)


def etcd_access(config: EtcdRecordsConfig, cluster: str, environ: Mapping[str, str] = os.environ) -> EtcdAccess:
    """Raises ConfigError for an endpoint or a file that cannot be, and where etcd3aio is not installed."""
    if importlib.util.find_spec("etcd3aio") is None:
        raise ConfigError(f"{_SECTION}: kind etcd needs etcd3aio: pip install 'kvferry[etcd]'")
    schemes, hosts = zip(*map(_endpoint, config.endpoints), strict=True)
    encrypted = "https" in schemes
    if len(set(schemes)) > 1:
        raise ConfigError(f"{_SECTION}.endpoints: http and https are mixed")
    if encrypted != (config.ca is not None):
        wanted = "missing; the endpoints are https" if encrypted else "the endpoints are http; take it out"
        raise ConfigError(f"{_SECTION}.ca: {wanted}")
    if (config.cert is None) != (config.key is None) or (config.cert is not None and not encrypted):
        raise ConfigError(f"{_SECTION}.cert: it goes with a key and https endpoints")
    return EtcdAccess(
        hosts=hosts,
        prefix=f"{config.prefix}{cluster}/",
        timeout_s=config.timeout_s,
        ca=_file("ca", config.ca),
        cert=_file("cert", config.cert),
        key=_file("key", config.key),
        user=config.user or "",
        password=_password(config, environ),
    )


def _endpoint(text: str) -> tuple[str, str]:
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:  # a port that is no number, a bracket that is not closed
        parts, port = urlsplit(""), None
    fits = parts.scheme in ("http", "https") and parts.hostname and port and not parts.username
    if not fits or parts.path.rstrip("/") or parts.query or parts.fragment:
        raise ConfigError(f"{_SECTION}.endpoints: {text!r}: expected http://HOST:PORT or https://HOST:PORT")
    return parts.scheme, parts.netloc


def _password(config: EtcdRecordsConfig, environ: Mapping[str, str]) -> str:
    if config.user is None:
        if config.password_file is not None:
            raise ConfigError(f"{_SECTION}.password_file: it goes with a user")
        return ""
    found = _file("password_file", config.password_file)
    password = environ.get(PASSWORD, "") if found is None else found.decode(errors="replace").partition("\n")[0]
    if not password:
        raise ConfigError(f"{_SECTION}.user: no password; put it into {PASSWORD} or name a password_file")
    return password.strip()


def _file(name: str, path: str | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{_SECTION}.{name}: {path} cannot be read: {error.strerror}") from error
