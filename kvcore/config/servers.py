"""The metadata servers that a cluster file names. Pure."""

import msgspec

from kvcore.config.schema import ClusterConfig, MetadataServerConfig
from kvcore.errors import ConfigError
from kvcore.ports import base_url


def metadata_servers(server: MetadataServerConfig) -> list[tuple[str, int]]:
    """(host, port) of each: the first, then the standbys in the file's order. Raises ValueError for what is neither."""
    return [(server.host, server.port), *(_host_and_port(text) for text in server.standbys)]


def metadata_urls(server: MetadataServerConfig) -> list[str]:
    """http://host:port of each, in the same order."""
    return [base_url(host, port) for host, port in metadata_servers(server)]


def as_server_at(config: ClusterConfig, address: str) -> ClusterConfig:
    """The file as the metadata server at `address` (HOST:PORT) sees it: that is where it listens, and the others are
    its standbys. Raises ConfigError if the file names no such server."""
    server = config.metadata_server
    named = [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in metadata_servers(server)]
    if address not in named:
        raise ConfigError(f"--at {address}: the file's metadata servers are {', '.join(named)}")
    host, port = _host_and_port(address)
    others = [name for name in named if name != address]
    seen = msgspec.structs.replace(server, host=host, port=port, standbys=others)
    return msgspec.structs.replace(config, metadata_server=seen)


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{text}: expected HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)
