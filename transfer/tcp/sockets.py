"""Whole messages over sockets, straight from and into the caller's memory, in few and large system calls.

Owns no socket. The `*_now` functions never wait, and run on an event loop. The others need a blocking socket and run in
threads; their caller ends them by `shut_down`, or bounds them by `limit_waits`. `check` is called before each system
call and raises when there is no time left.
"""

import contextlib
import socket
import struct
from collections.abc import Callable, Sequence

from kvcore.errors import ConfigError, PeerUnreachableError
from transfer.tcp.limits import TcpLimits

Check = Callable[[], object]
_IOV_MAX = 1024
_MAX_PORT = 65_535
_TIMEVAL = struct.Struct("@ll")
_WAKE_BYTES = 1 << 20
"""A thread that waits for more than this is woken once for so many bytes, not by each packet: a sixth to a quarter less
processor time for 64 MiB over loopback, and the sender loses its core less often."""


def tune(sock: socket.socket, limits: TcpLimits) -> None:
    """No delay, and a peer that vanished without a word, or takes nothing for so long, is noticed within 6 seconds
    (`limits.unacknowledged_s`).

    Buffer sizes are left to the kernel: it grows them to 4 to 6 MB, SO_RCVBUF stops at net.core.rmem_max (208 KiB).
    """
    sock.setblocking(True)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, limits.keepalive_idle_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, limits.keepalive_interval_s)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, limits.keepalive_probes)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.unacknowledged_s * 1000))


def limit_waits(sock: socket.socket, *, receive_s: float | None = None, send_s: float | None = None) -> None:
    """Make system calls raise BlockingIOError when they move nothing for so long. These are the kernel's timeouts:
    unlike `settimeout`, they cost no further system call each time."""
    for option, seconds in ((socket.SO_RCVTIMEO, receive_s), (socket.SO_SNDTIMEO, send_s)):
        if seconds is not None:
            whole = int(seconds)
            sock.setsockopt(socket.SOL_SOCKET, option, _TIMEVAL.pack(whole, max(1, int((seconds - whole) * 1e6))))


def send_views(sock: socket.socket, views: Sequence[memoryview | bytes], check: Check) -> None:
    """Send all of them, in order. Raises what `check` does or OSError; then the connection is of no further use."""
    rest = not_empty(views)
    while rest:
        check()
        _advance(rest, sock.sendmsg(rest[:_IOV_MAX]))


def send_now(sock: socket.socket, rest: list[memoryview]) -> bool:
    """Send what the kernel takes at once off the front of `rest`; whether that was all. Raises OSError."""
    while rest:
        try:
            _advance(rest, sock.sendmsg(rest[:_IOV_MAX], (), socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
    return True


def recv_views(sock: socket.socket, views: Sequence[memoryview | bytearray], check: Check, *, behind: int = 0) -> None:
    """Fill all of them, in order. Raises PeerUnreachableError at the stream's end, what `check` does, or OSError.

    `behind`: bytes of the same message that follow and are received by later calls.
    """
    rest = not_empty(views)
    left = sum(view.nbytes for view in rest) + behind
    wake_bytes = 1
    try:
        while rest:
            if wake_bytes != (wanted := _WAKE_BYTES if left >= 2 * _WAKE_BYTES else 1):
                wake_bytes = wanted
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wake_bytes)
            check()
            # Each call leaves at least `wake_bytes` for the next: the kernel would not wake us for fewer.
            moved = _recv(sock, _front(rest, left - wake_bytes) if wake_bytes > 1 else rest, socket.MSG_WAITALL)
            left -= moved
            _advance(rest, moved)
    finally:
        if wake_bytes != 1:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


def recv_now(sock: socket.socket, rest: list[memoryview]) -> bool:
    """Receive what is there into the front of `rest`; whether that was all. Errors as of `recv_views`."""
    while rest:
        try:
            _advance(rest, _recv(sock, rest, socket.MSG_DONTWAIT))
        except BlockingIOError:
            return False
    return True


def recv_bytes(sock: socket.socket, num_bytes: int, check: Check) -> bytearray:
    """Receive exactly `num_bytes`; errors as of `recv_views`. The caller has bounded `num_bytes`."""
    buffer = bytearray(num_bytes)
    recv_views(sock, [buffer], check)
    return buffer


class Inbox:
    """The receiving side of a connection, which reads ahead a little: a small message is then one system call."""

    def __init__(self, sock: socket.socket, ahead_bytes: int) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(ahead_bytes))
        self._start = self._end = 0

    @property
    def num_bytes(self) -> int:
        """Read ahead and not taken yet."""
        return self._end - self._start

    def wait(self) -> bool:
        """Wait for the first bytes of a message, unless there are some. False at the end of the stream."""
        if not self.num_bytes:
            self._start, self._end = 0, self._sock.recv_into(self._buffer)
        return self.num_bytes > 0

    def fill(self, views: Sequence[memoryview | bytearray], check: Check, *, behind: int = 0) -> None:
        """As `recv_views`, beginning with what was read ahead."""
        rest = not_empty(views)
        while rest and self.num_bytes:
            moved = min(self.num_bytes, rest[0].nbytes)
            rest[0][:moved] = self._buffer[self._start : self._start + moved]
            self._start += moved
            _advance(rest, moved)
        recv_views(self._sock, rest, check, behind=behind)

    def take(self, num_bytes: int, check: Check) -> bytearray:
        """As `recv_bytes`, beginning with what was read ahead."""
        buffer = bytearray(num_bytes)
        self.fill([buffer], check)
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


def not_empty(views: Sequence[memoryview | bytes | bytearray]) -> list[memoryview]:
    """Those that have bytes, as a list for `send_now` and `recv_now` to use up."""
    return [memoryview(view) for view in views if len(view)]


def _recv(sock: socket.socket, views: list[memoryview], flags: int) -> int:
    one = len(views) == 1
    moved = sock.recv_into(views[0], 0, flags) if one else sock.recvmsg_into(views[:_IOV_MAX], 0, flags)[0]
    if moved == 0:
        raise PeerUnreachableError("the peer closed the connection in the middle of a message")
    return moved


def _front(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """The first `num_bytes` of `views`, more than 0, as views; less, if they are more views than one call takes."""
    front = []
    for view in views[:_IOV_MAX]:
        front.append(view[:num_bytes])
        num_bytes -= front[-1].nbytes
        if not num_bytes:
            break
    return front


def _advance(views: list[memoryview], moved: int) -> None:
    """Take `moved` bytes off the front."""
    whole = 0
    while whole < len(views) and moved >= views[whole].nbytes:
        moved -= views[whole].nbytes
        whole += 1
    del views[:whole]
    if moved:
        views[0] = views[0][moved:]
