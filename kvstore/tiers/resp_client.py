"""Connections to one Redis or Valkey, used from threads: made when they are needed, dropped when anything went wrong.

Owns its connections and the threads that wait in them. Invariant: a connection that any exception passed through, that
still owes a reply, or that leads to where the server was before, is never used again.
"""

import asyncio
import socket
import ssl
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvcore.errors import TransferError, TransferTimeoutError
from kvstore.tiers.places.discovery import ServerPlace
from kvstore.tiers.places.redis_url import PASSWORDS, RespServer
from kvstore.tiers.resp import RespConnection, RespError, RespRefusal, command
from transfer.blocking import BatchDeadline, BlockingPool

ELSEWHERE = frozenset({"MOVED", "ASK"})
"""A cluster's node refuses so what another one has."""
_DEMOTED = frozenset({"READONLY", "MASTERDOWN", "CLUSTERDOWN"})
"""Whoever refuses with this is not, or not now, the server that is looked for."""


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A server, and the addresses of its name."""

    server: RespServer
    addresses: list[tuple[socket.AddressFamily, tuple[Any, ...]]]


@dataclass(slots=True)
class _Use:
    """A connection while one job has it. `stopped`: the job is to end."""

    connection: RespConnection | None = None
    stopped: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, connection: RespConnection) -> None:
        with self.lock:
            self.connection = connection
            if self.stopped:
                connection.stop()

    def leave(self) -> None:
        with self.lock:
            self.connection = None

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            if self.connection is not None:
                self.connection.stop()


class RespClient:
    """At most `connections` at once, each with a thread; more work waits in line, within its time."""

    def __init__(self, server: ServerPlace, connections: int) -> None:
        self.server = server
        self.on_elsewhere: Callable[[str], None] | None = None
        """Told of each `MOVED SLOT HOST:PORT` and `ASK ...` of a cluster's node, which are no problem then. On the
        loop."""
        self._pool = BlockingPool("redis-tier", connections)
        self._idle: list[tuple[RespServer, RespConnection]] = []
        self._resolved: _Resolved | None = None
        self._tls: ssl.SSLContext | None = None

    def __repr__(self) -> str:
        return f"<RespClient {self.server.shown}, {len(self._idle)} idle connections>"

    @property
    def closed(self) -> bool:
        """Whether `aclose` was called."""
        return self._pool.closed

    @property
    def idle(self) -> int:
        """How many pieces of work would begin at once, one at least."""
        return self._pool.idle

    async def run(self, work: Callable[[RespConnection], None], timeout_s: float) -> str | None:
        """Have `work` done in a thread, over a connection whose replies it takes all. None; or what went wrong, for
        people: the server cannot be reached, was late, or refused something of it. Either way `work` has ended; so it
        has when this is cancelled."""
        use, deadline = _Use(), BatchDeadline(timeout_s)
        try:
            resolved = await self._resolve(deadline)
            refusals = await self._pool.run(lambda: self._job(use, work, resolved, deadline), use.stop, deadline)
        except (OSError, TransferError, RespError) as error:
            self._forget()
            return f"{self.server.shown}: {_text_of(error)}"
        if self.on_elsewhere is not None:
            for refusal in refusals:
                if refusal.code in ELSEWHERE:
                    self.on_elsewhere(refusal.text)
            refusals = [refusal for refusal in refusals if refusal.code not in ELSEWHERE]
        if any(refusal.code in _DEMOTED for refusal in refusals):
            self._forget()
        return f"{self.server.shown}: {told(refusals[-1])}" if refusals else None

    async def aclose(self) -> None:
        """Idempotent. Work under way ends with an error."""
        await self._pool.aclose()
        while self._idle:
            self._idle.pop()[1].close()

    def _forget(self) -> None:
        self._resolved = None
        self.server.forget()

    async def _resolve(self, deadline: BatchDeadline) -> _Resolved:
        server = await self.server.find(deadline.remaining())
        if self._resolved is None or self._resolved.server != server:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(deadline.remaining()):
                found = await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
            if server.encrypted and self._tls is None:
                self._tls = ssl.create_default_context()
            self._resolved = _Resolved(server, [(family, address) for family, _, _, _, address in found])
        return self._resolved

    def _job(
        self, use: _Use, work: Callable[[RespConnection], None], resolved: _Resolved, deadline: BatchDeadline
    ) -> list[RespRefusal]:
        connection = self._fresh_one(resolved.server) or self._connect(use, resolved, deadline)
        use.take(connection)
        connection.deadline, connection.refusals = deadline, {}
        try:
            work(connection)
        except BaseException:
            connection.close()
            raise
        finally:
            use.leave()
        if connection.owed or use.stopped:
            connection.close()
        else:
            self._idle.append((resolved.server, connection))
        return list(connection.refusals.values())

    def _fresh_one(self, server: RespServer) -> RespConnection | None:
        while True:
            try:
                leads_to, connection = self._idle.pop()
            except IndexError:  # another thread took the last
                return None
            if connection.quiet and leads_to == server:
                return connection
            connection.close()

    def _connect(self, use: _Use, resolved: _Resolved, deadline: BatchDeadline) -> RespConnection:
        problem: Exception | None = None
        server = resolved.server
        for family, address in resolved.addresses:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                use.take(RespConnection(sock, deadline))
                if use.stopped:  # stopping a socket that is not connected yet stops nothing
                    raise RespError("it was given up")
                sock.settimeout(deadline.remaining())
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if server.encrypted:
                    assert self._tls is not None
                    sock = self._tls.wrap_socket(sock, server_hostname=server.host, do_handshake_on_connect=False)
                connection = RespConnection(sock, deadline, encrypted=server.encrypted)
                use.take(connection)
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                greet(connection, server)
            except BaseException as error:
                sock.close()
                if not isinstance(error, OSError) or isinstance(error, TimeoutError):
                    raise
                problem = error
            else:
                return connection
        assert problem is not None, "a name resolves to one address at least"
        raise problem


def greet(connection: RespConnection, server: RespServer) -> None:
    """Log in, choose the database and see whether the server is ready. Raises RespError with what it refuses."""
    words: list[tuple[bytes, ...]] = [(b"PING",)]
    if server.database:
        words.insert(0, (b"SELECT", b"%d" % server.database))
    if server.password:
        who = (server.user.encode(),) if server.user else ()
        words.insert(0, (b"AUTH", *who, server.password.encode()))
    connection.send([command(*line) for line in words], replies=len(words))
    replies = [connection.reply() for _ in words]
    for line, reply in zip(words, replies, strict=True):
        if isinstance(reply, RespRefusal) and not (line == (b"PING",) and reply.code == "NOPERM"):
            raise RespError(told(reply))


def told(refusal: RespRefusal) -> str:
    """What the server refuses, and what to do where that is known."""
    remedy = {
        "NOAUTH": f"; give user and password in tiers.redis.url, or the password in {PASSWORDS[0]}",
        "MOVED": "; it is a node of a Redis Cluster: write redis-cluster:// in tiers.redis.url",
        "READONLY": "; tiers.redis.url names a replica: name its primary",
    }.get(refusal.code, "")
    return f"it answers {refusal.text}{remedy}"


def _text_of(error: Exception) -> str:
    if isinstance(error, TimeoutError | TransferTimeoutError):
        return "it did not answer in time"
    if isinstance(error, TransferError):
        return error.message
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)
