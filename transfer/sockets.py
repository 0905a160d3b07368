"""Whole messages over blocking sockets, straight from and into the caller's memory.

Owns no socket. `budget` gives the seconds that the next system call may take, or raises. Runs in threads.
"""

import contextlib
import socket
from collections.abc import Callable, Sequence

from kvcore.errors import ConfigError, PeerUnreachableError

Budget = Callable[[], float]
_IOV_MAX = 1024
_KEEPALIVE_IDLE_S, _KEEPALIVE_INTERVAL_S, _KEEPALIVE_PROBES = 15, 5, 3
_UNACKNOWLEDGED_MS = 30_000
_MAX_PORT = 65_535


def tune(sock: socket.socket) -> None:
    """No delay, and a peer that vanished without a word is noticed within half a minute.

    Buffer sizes are left to the kernel: it grows them to 4 to 6 MB, SO_RCVBUF stops at net.core.rmem_max (208 KiB).
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _KEEPALIVE_IDLE_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _KEEPALIVE_INTERVAL_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _KEEPALIVE_PROBES)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNACKNOWLEDGED_MS)


def send_views(sock: socket.socket, views: Sequence[memoryview | bytes], budget: Budget) -> None:
    """Send all of them, in order. Raises TimeoutError or OSError; then the connection is of no further use."""
    rest = [memoryview(view) for view in views if len(view)]
    first = 0
    while first < len(rest):
        sock.settimeout(budget())
        first = _advance(rest, first, sock.sendmsg(rest[first : first + _IOV_MAX]))


def recv_views(sock: socket.socket, views: Sequence[memoryview | bytearray], budget: Budget) -> None:
    """Fill all of them, in order. Raises PeerUnreachableError at the end of the stream, TimeoutError or OSError."""
    rest = [memoryview(view) for view in views if len(view)]
    first = 0
    while first < len(rest):
        sock.settimeout(budget())
        moved = sock.recvmsg_into(rest[first : first + _IOV_MAX])[0]
        if moved == 0:
            raise PeerUnreachableError("the peer closed the connection in the middle of a message")
        first = _advance(rest, first, moved)


def recv_bytes(sock: socket.socket, num_bytes: int, budget: Budget) -> bytearray:
    """Receive exactly `num_bytes`; errors as of `recv_views`. The caller has bounded `num_bytes`."""
    buffer = bytearray(num_bytes)
    recv_views(sock, [buffer], budget)
    return buffer


def shut_down(sock: socket.socket) -> None:
    """Wake every thread that waits on the socket with an error or the end of the stream. From any thread."""
    with contextlib.suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `host:port` or `[ipv6]:port`. Raises ConfigError."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or int(port) > _MAX_PORT:
        raise ConfigError(f"{address!r} is no address of the form host:port")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _advance(views: list[memoryview], first: int, moved: int) -> int:
    """Take `moved` bytes off the front of `views[first:]`; the index of the first view that has bytes left."""
    while first < len(views) and moved >= views[first].nbytes:
        moved -= views[first].nbytes
        first += 1
    if moved:
        views[first] = views[first][moved:]
    return first
