"""TCP ports: bind one of this machine or say who holds it (from /proc, as far as we may look); an address as a URL."""

import errno
import ipaddress
import os
import re
import socket
import ssl
from pathlib import Path
from urllib.parse import urlsplit

from kvcore.errors import ConfigError

_LISTENING = "0A"
_BACKLOG = 2048
_LOOPBACKS = ("127.0.0.1", "localhost", "::1")


def base_url(host: str, port: int) -> str:
    """How to reach what listens on `host`; from this machine, if that is every interface."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{reachable}:{port}"


def authorities_of(host: str, port: int) -> frozenset[str] | None:
    """What clients write into Host (in lower case) that mean what listens on `host`; None: it may have any name."""
    if host in ("0.0.0.0", "::") or port == 0:
        return None
    names = {host.lower()}
    if host in _LOOPBACKS:
        names |= set(_LOOPBACKS)
    shown = [f"[{name}]" if ":" in name else name for name in names]
    return frozenset(f"{name}:{port}" for name in shown) | (frozenset(shown) if port == 80 else frozenset())


def why_no_node_url(url: str) -> str | None:
    """Why no request is made to this URL, which a node gave as its own; None: it may be one. Whoever can name a URL
    must not have us ask more of it than a node's: no path, no password, no address of a cloud's metadata service."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        return "is no URL"
    if parts.scheme not in ("http", "https") or not host or port == 0:
        return "must be http://HOST:PORT, or https"
    if "@" in parts.netloc or parts.path not in ("", "/") or parts.query or parts.fragment or url != url.strip():
        return "must have no more than a scheme, a host and a port"
    return why_no_peer(host)


def why_no_peer(address: str) -> str | None:
    """Why no connection is made to this address; None: one may be, or it is a name."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return None
    ip = getattr(ip, "ipv4_mapped", None) or ip
    if ip.is_link_local or ip.is_multicast or ip.is_unspecified:
        return "is an address that no node has: link-local, multicast or none"
    return None


def is_loopback(host: str) -> bool:
    """Whether only processes of this machine reach what listens there."""
    return host in _LOOPBACKS or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None


def why_unreachable(error: Exception) -> str:
    """The system's word for a failed connection (`Connection refused`), else the error's own. Of TLS, whose certificate
    was refused by whom."""
    if (refused := _why_no_tls(error)) is not None:
        return refused
    if isinstance(error, OSError) and error.errno is not None and error.errno > 0:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__


def _why_no_tls(error: BaseException | None) -> str | None:
    """None: it is no failure of TLS."""
    found = None
    while error is not None:  # aiohttp's own is one of ssl's, too, and knows less
        found = error if isinstance(error, ssl.SSLError) else found
        error = error.__cause__
    if found is None:
        return None
    if isinstance(found, ssl.SSLCertVerificationError):
        return f"its certificate is refused: {found.verify_message}"
    reason = (found.reason or str(found)).lower().replace("_", " ")
    if "alert" in reason:
        return f"it refuses our certificate: {reason.partition('alert ')[2]}"
    return f"it speaks no TLS as we do ({reason}): give it the same security.tls"


def listen(host: str, port: int, *, shared: bool = False) -> socket.socket:
    """A listening, non-blocking socket on `host:port` (port 0: any free one); the caller closes it. `shared`: with
    other processes of this user that say so too; the kernel deals new connections out among them.

    Raises ConfigError naming the address, who holds it and what to do.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: the host name is unknown ({error}); set another host"
        ) from error
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.bind(address)
        bound.listen(_BACKLOG)
    except OSError as error:
        bound.close()
        raise ConfigError(_why(host, port, error)) from error
    bound.setblocking(False)
    return bound


def _why(host: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        holder = port_holder(port) or "another process"
        return f"{host}:{port} is in use by {holder}; stop it, or set another port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"cannot listen on {host}:{port}: no interface of this machine has that address; set another host"
    if error.errno == errno.EACCES:
        return f"cannot listen on {host}:{port}: ports below 1024 need privileges; set another port"
    return f"cannot listen on {host}:{port}: {error.strerror}"


def port_holder(port: int) -> str | None:
    """`pid 123 (command line)` of the process that listens on `port`, or None where we may not see it."""
    found = holder_of(port)
    return None if found is None else f"pid {found[0]} ({' '.join(found[1])[:80]})"


def holder_of(port: int) -> tuple[int, list[str]] | None:
    """Its pid, and the words of its command line."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in Path("/proc").iterdir() if inodes else ():
        if process.name.isdigit() and any(link in inodes for link in _open_files(process)):
            try:
                words = (process / "cmdline").read_bytes().decode("utf-8", "replace").rstrip("\0").split("\0")
            except OSError:  # it has just ended
                return None
            return int(process.name), words
    return None


def _listening_inodes(port: int) -> list[str]:
    inodes = []
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        lines = table.read_text().splitlines()[1:] if table.exists() else []
        for fields in map(str.split, lines):
            if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.append(fields[9])
    return inodes


def _open_files(process: Path) -> list[str]:
    links = []
    try:
        for entry in (process / "fd").iterdir():
            links.append(os.readlink(entry))  # noqa: PTH115 - the target is no path
    except OSError:  # gone, or not ours
        pass
    return links
