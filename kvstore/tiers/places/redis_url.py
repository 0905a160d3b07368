"""`tiers.redis.url`: one server, the sentinels of a service, or nodes of a cluster; and as whom to speak to them. Pure.

A password is in the URL or in the environment, and is never shown.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal
from urllib.parse import SplitResult, unquote, urlsplit

from kvcore.errors import ConfigError

_FORM = "redis://[USER:PASSWORD@]HOST[:PORT][/DB], or rediss:// for TLS"
_SENTINEL_FORM = "redis-sentinel://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]/SERVICE[/DB]"
_CLUSTER_FORM = "redis-cluster://[USER:PASSWORD@]HOST[:PORT][,HOST[:PORT]...]"
_KINDS: dict[str, tuple[Literal["server", "sentinel", "cluster"], bool]] = {
    "redis": ("server", False),
    "valkey": ("server", False),
    "rediss": ("server", True),
    "valkeys": ("server", True),
    "redis-sentinel": ("sentinel", False),
    "rediss-sentinel": ("sentinel", True),
    "redis-cluster": ("cluster", False),
    "rediss-cluster": ("cluster", True),
}
"""Scheme -> what it names, and whether over TLS."""
REDIS_SCHEMES = tuple(_KINDS)
PASSWORDS = ("KVFERRY_REDIS_PASSWORD", "REDIS_PASSWORD")
SENTINEL_PASSWORD = "KVFERRY_SENTINEL_PASSWORD"
SERVICE = "REDIS_SERVICE_NAME"


@dataclass(frozen=True, slots=True)
class RespServer:
    """Where a server is, and as whom to speak to it."""

    host: str
    port: int
    database: int
    user: str
    password: str = field(repr=False)
    encrypted: bool

    @property
    def shown(self) -> str:
        """For people: without user and password."""
        return f"{'rediss' if self.encrypted else 'redis'}://{self.place}/{self.database}"

    @property
    def place(self) -> str:
        """`HOST:PORT`."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    async def find(self, timeout_s: float) -> "RespServer":
        """Itself: see `ServerPlace`."""
        return self

    def forget(self) -> None:
        """It stays where it is."""


@dataclass(frozen=True, slots=True)
class RedisPlaces:
    """Several servers that lead to those with the chunks: the sentinels of `service`, or nodes of a cluster."""

    kind: Literal["sentinel", "cluster"]
    servers: tuple[RespServer, ...]
    """With user, password and database of the servers that have the chunks."""
    service: str = ""
    sentinel_password: str = field(default="", repr=False)

    @property
    def shown(self) -> str:
        """For people: without user and password."""
        scheme = f"{'rediss' if self.servers[0].encrypted else 'redis'}-{self.kind}"
        places = ",".join(server.place for server in self.servers)
        return f"{scheme}://{places}" + (f"/{self.service}" if self.service else "")


def parse_redis_url(url: str, environ: Mapping[str, str] = os.environ) -> RespServer | RedisPlaces:
    """What `tiers.redis.url` names. Raises ConfigError, which shows no password."""
    scheme = url.partition("://")[0].strip().lower()
    kind, encrypted = _KINDS.get(scheme, ("server", False))
    form = {"server": _FORM, "sentinel": _SENTINEL_FORM, "cluster": _CLUSTER_FORM}[kind]
    wrong = ConfigError(f"tiers.redis.url names no server; write {form}")  # without the url: a password may be in it
    try:
        split = urlsplit(url.strip())
        places = split.netloc.rpartition("@")[2].split(",")
        if kind == "server" and len(places) > 1:
            raise ConfigError("tiers.redis.url: several servers: write redis-sentinel:// or redis-cluster://")
        hosts = [_host_and_port(place, 26379 if kind == "sentinel" else 6379) for place in places]
    except ValueError:
        raise wrong from None
    if scheme not in _KINDS or split.query or split.fragment:
        raise wrong
    service, database = _path(split, kind, environ, wrong)
    in_environment = next((environ[name] for name in PASSWORDS if environ.get(name)), "")
    user, _, password = split.netloc.rpartition("@")[0].partition(":")
    password = unquote(password) or in_environment
    servers = tuple(RespServer(host, port, database, unquote(user), password, encrypted) for host, port in hosts)
    if kind == "server":
        return servers[0]
    return RedisPlaces(kind, servers, service, environ.get(SENTINEL_PASSWORD, "") if kind == "sentinel" else "")


def parse_server(url: str, environ: Mapping[str, str] = os.environ) -> RespServer:
    """The one server that a URL names. Raises ConfigError, for several too."""
    place = parse_redis_url(url, environ)
    if isinstance(place, RedisPlaces):
        raise ConfigError(f"{place.shown} names several servers")
    return place


def at(server: RespServer, host: str, port: int) -> RespServer:
    """Another server, spoken to as to this one."""
    return replace(server, host=host, port=port)


def _host_and_port(place: str, usual: int) -> tuple[str, int]:
    """Raises ValueError."""
    split = urlsplit(f"//{place}")
    if not split.hostname or place != split.netloc:
        raise ValueError(place)
    split.hostname.encode("idna")  # as it will be looked up
    return split.hostname, split.port or usual


def _path(split: SplitResult, kind: str, environ: Mapping[str, str], wrong: ConfigError) -> tuple[str, int]:
    """The service and the database."""
    words = [unquote(word) for word in split.path.strip("/").split("/") if word]
    service = ""
    if kind == "sentinel":
        service = words.pop(0) if words else environ.get(SERVICE, "")
        if not service:
            raise ConfigError(
                f"tiers.redis.url: it names no service of the sentinels; write {_SENTINEL_FORM}, or set {SERVICE}"
            )
    if len(words) > (0 if kind == "cluster" else 1) or not all(word.isdecimal() for word in words):
        raise wrong
    return service, int(words[0]) if words else 0
