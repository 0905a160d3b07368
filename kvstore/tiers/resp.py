"""Redis' protocol (RESP2) over one connection, for threads: values go from and into the caller's memory, uncopied.

Owns one socket and what was read ahead of the reader. Invariant: after any exception the connection stands at an
unknown place and must be closed. What a server refuses is a value, `RespRefusal`; see https://redis.io/docs/reference/protocol-spec.
"""

import contextlib
import select
import socket
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.errors import PeerUnreachableError
from transfer.blocking import BatchDeadline
from transfer.tcp.sockets import limit_waits, recv_views, send_views

_READ_AHEAD = 16 << 10
_CLOSED = "the server closed the connection"
_LONGEST_STRING = 1 << 20  # chunks come by `bulk`
_REFUSALS = 256  # of different texts: a cluster's node has one for each slot that it has no longer
_DEEPEST = 8  # of arrays in arrays: nothing that is asked for has more than one


class RespError(Exception):
    """The connection cannot go on: it was closed, or what came is not RESP2."""


@dataclass(frozen=True, slots=True)
class RespRefusal:
    """An error that the server answered, as it wrote it: `OOM command not allowed when used memory > 'maxmemory'.`"""

    text: str

    @property
    def code(self) -> str:
        """Its first word: `OOM`, `NOAUTH`, `MOVED`, `ERR`, ..."""
        return self.text.partition(" ")[0]


RespValue = int | bytes | None | RespRefusal | list["RespValue"]
"""An integer, a string (simple or bulk), nil, an error, an array."""


def command(*words: bytes) -> bytes:
    """One command as it is sent."""
    return b"*%d\r\n" % len(words) + b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in words)


class RespConnection:
    """One connection, used by one thread at a time; `stop` alone may be called by another.

    All methods wait until `deadline` at most, and raise OSError, TransferTimeoutError or RespError.
    """

    def __init__(self, sock: socket.socket, deadline: BatchDeadline, *, encrypted: bool = False) -> None:
        self.deadline = deadline
        """Of its present user."""
        self.owed = 0
        """Replies to come."""
        self.refusals: dict[str, RespRefusal] = {}
        """That its present user got, each once, by their texts; a few."""
        self._sock, self._encrypted = sock, encrypted
        if not encrypted:
            sock.settimeout(None)
        self._raw = bytearray(_READ_AHEAD)
        self._ahead = memoryview(self._raw)
        self._low = self._high = 0

    def __repr__(self) -> str:
        return f"<RespConnection fd {self._sock.fileno()}, {self.owed} replies to come>"

    @property
    def quiet(self) -> bool:
        """Whether nothing is to come and nothing came: neither a reply nor the other side's goodbye."""
        poll = select.poll()
        poll.register(self._sock, select.POLLIN)
        return not self.owed and self._low == self._high and not poll.poll(0)

    def send(self, parts: Sequence[bytes | memoryview], replies: int) -> None:
        """All of the parts, which hold so many commands."""
        self.owed += replies
        if self._encrypted:  # has no sendmsg
            for part in parts:
                self._sock.settimeout(self.deadline.remaining())
                self._sock.sendall(part)
            return
        try:
            send_views(self._sock, parts, lambda: limit_waits(self._sock, send_s=self.deadline.remaining()))
        except BlockingIOError:
            raise self.deadline.error() from None

    def reply(self) -> RespValue:
        """The next reply, whole."""
        self.owed -= 1
        value = self._value(_DEEPEST)
        if isinstance(value, RespRefusal):
            self._note(value)
        return value

    def bulk(self) -> int | RespRefusal | None:
        """The length of the next reply, a bulk string, in bytes; all of them are then to be taken by `fill` and `skip`,
        and `end_bulk` is called. None, or a refusal: nothing is to be taken."""
        self.owed -= 1
        line = self._line()
        if line[:1] == b"-":
            refusal = RespRefusal(line[1:].decode(errors="replace"))
            self._note(refusal)
            return refusal
        if line[:1] != b"$":
            raise RespError(f"{line[:40]!r} came in place of a value")
        length = _number(line)
        return None if length < 0 else length

    def fill(self, view: memoryview) -> None:
        """The next bytes of a bulk string, as many as the view has."""
        done = min(len(view), self._high - self._low)
        view[:done] = self._ahead[self._low : self._low + done]
        self._low += done
        while self._encrypted and done < len(view):
            done += self._receive(view[done:])
        try:
            recv_views(self._sock, [view[done:]], lambda: limit_waits(self._sock, receive_s=self.deadline.remaining()))
        except BlockingIOError:
            raise self.deadline.error() from None
        except PeerUnreachableError:
            raise RespError(_CLOSED) from None

    def skip(self, num_bytes: int) -> None:
        """Throw away the next bytes of a bulk string."""
        scratch = memoryview(bytearray(min(num_bytes, _READ_AHEAD)))
        while num_bytes:
            part = scratch[: min(num_bytes, len(scratch))]
            self.fill(part)
            num_bytes -= len(part)

    def end_bulk(self) -> None:
        """What stands behind a bulk string."""
        end = bytearray(2)
        self.fill(memoryview(end))
        if end != b"\r\n":
            raise RespError("a value is longer than its length says")

    def stop(self) -> None:
        """Make whoever waits in it get an error at once. From any thread."""
        with contextlib.suppress(OSError):  # it is closed already
            socket.socket.shutdown(self._sock, socket.SHUT_RDWR)  # past TLS, which may be in use now

    def close(self) -> None:
        """Idempotent. By its user only."""
        self._sock.close()

    def _note(self, refusal: RespRefusal) -> None:
        if len(self.refusals) < _REFUSALS:
            self.refusals[refusal.text] = refusal

    def _value(self, deepest: int) -> RespValue:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b"-":
            return RespRefusal(rest.decode(errors="replace"))
        if kind == b":":
            return _number(line)
        if kind == b"$":
            return self._string(_number(line))
        if kind == b"*" and deepest:
            return [self._value(deepest - 1) for _ in range(_number(line))]
        raise RespError(f"{line[:40]!r} is no RESP2")

    def _string(self, length: int) -> bytes | None:
        if length < 0:
            return None
        if length > _LONGEST_STRING:
            raise RespError(f"a string of {length} bytes came unasked")
        value = bytearray(length)
        self.fill(memoryview(value))
        self.end_bulk()
        return bytes(value)

    def _line(self) -> bytes:
        while True:
            end = self._raw.find(b"\r\n", self._low, self._high)
            if end >= 0:
                line = bytes(self._ahead[self._low : end])
                self._low = end + 2
                return line
            held = bytes(self._ahead[self._low : self._high])
            if len(held) == _READ_AHEAD:
                raise RespError(f"{held[:40]!r}... has no end")
            self._ahead[: len(held)] = held
            self._low, self._high = 0, len(held)
            self._high += self._receive(self._ahead[self._high :])

    def _receive(self, view: memoryview) -> int:
        """Some bytes, one at least."""
        left_s = self.deadline.remaining()
        if self._encrypted:
            self._sock.settimeout(left_s)
        else:  # a limit of Python's own would be one more system call for each
            limit_waits(self._sock, receive_s=left_s)
        try:
            got = self._sock.recv_into(view)
        except BlockingIOError:
            raise self.deadline.error() from None
        if not got:
            raise RespError(_CLOSED)
        return got


def _number(line: bytes) -> int:
    try:
        return int(line[1:])
    except ValueError as error:
        raise RespError(f"{line[:40]!r} has no number") from error
