"""Servers by their origin: what their URL says, and the addresses that it stands for."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from aiohappyeyeballs import AddrInfoType

from kvcore.http.connection import HttpConnection
from kvcore.http.errors import BrokenCallError
from kvcore.ports import why_no_peer

_PORTS = {"http": 80, "https": 443}


@dataclass(slots=True, eq=False)
class Origin:
    """A server. `authority`: as Host has it."""

    url: str
    host: str
    port: int
    encrypted: bool
    authority: str
    coming: int = 0
    """Calls that wait for a connection."""
    busy: set[HttpConnection] = field(default_factory=set)
    idle: list[HttpConnection] = field(default_factory=list)
    """The one that was used last is the last."""


def origin_of(base: str) -> Origin:
    """Of a URL without path. Raises BrokenCallError."""
    try:
        parts = urlsplit(base)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise BrokenCallError(f"{base} is no URL") from error
    if parts.scheme not in _PORTS or not host:
        raise BrokenCallError(f"{base} is not at http:// or https://")
    if not host.isascii():
        host = host.encode("idna").decode("ascii")
    shown = f"[{host}]" if ":" in host else host
    default = _PORTS[parts.scheme]
    authority = shown if port in (None, default) else f"{shown}:{port}"
    return Origin(base, host, port or default, parts.scheme == "https", authority)


async def addresses(host: str, port: int) -> Sequence[AddrInfoType]:
    """Where it can be reached; a name is looked up. Raises OSError."""
    if why := why_no_peer(host):
        raise OSError(f"{host} {why}")
    try:
        family = socket.AF_INET6 if ipaddress.ip_address(host).version == 6 else socket.AF_INET
    except ValueError:
        return await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    address = (host, port) if family == socket.AF_INET else (host, port, 0, 0)
    return [(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", address)]


def peer_socket(address: AddrInfoType) -> socket.socket:
    """For a connection to an address that a name stands for, or that was given as one. Raises OSError."""
    family, kind, protocol, _, where = address
    if (why := why_no_peer(str(where[0]))) is not None:
        raise OSError(f"{where[0]} {why}")
    return socket.socket(family=family, type=kind, proto=protocol)
