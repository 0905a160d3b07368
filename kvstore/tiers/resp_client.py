"""Connections to one Redis or Valkey, used from threads: made when they are needed, dropped when anything went wrong.

Owns where the server is, its connections and the threads that wait in them. Invariant: a connection that any exception
passed through, or that still owes a reply, is never used again.
"""

import asyncio
import os
import socket
import ssl
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote, urlsplit

from kvcore.errors import ConfigError, TransferError, TransferTimeoutError
from kvstore.tiers.resp import RespConnection, RespError, RespRefusal, command
from transfer.blocking import BatchDeadline, BlockingPool

_FORM = "redis://[USER:PASSWORD@]HOST[:PORT][/DB], or rediss:// for TLS"
_SCHEMES = {"redis": False, "valkey": False, "rediss": True, "valkeys": True}
_PASSWORDS = ("KVFERRY_REDIS_PASSWORD", "REDIS_PASSWORD")
_Resolved = list[tuple[socket.AddressFamily, tuple[Any, ...]]]


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
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'rediss' if self.encrypted else 'redis'}://{host}:{self.port}/{self.database}"


def parse_server(url: str, environ: Mapping[str, str] = os.environ) -> RespServer:
    """The server that `tiers.redis.url` names; the password may be in the environment. Raises ConfigError."""
    wrong = ConfigError(f"tiers.redis.url names no server; write {_FORM}")  # without the url: a password may be in it
    try:
        split = urlsplit(url)
        scheme = split.scheme.lower()
        if "sentinel" in scheme or "cluster" in scheme or "," in split.netloc:
            raise ConfigError("tiers.redis.url: Redis Sentinel and Redis Cluster are not supported; name one server")
        port = split.port or 6379
        (split.hostname or "").encode("idna")  # as it will be looked up
    except ValueError:
        raise wrong from None
    path = split.path.strip("/")
    if scheme not in _SCHEMES or not split.hostname or split.query or split.fragment or (path and not path.isdecimal()):
        raise wrong
    in_environment = next((environ[name] for name in _PASSWORDS if environ.get(name)), "")
    return RespServer(
        split.hostname,
        port,
        int(path or 0),
        unquote(split.username or ""),
        unquote(split.password or "") or in_environment,
        _SCHEMES[scheme],
    )


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

    def __init__(self, server: RespServer, connections: int) -> None:
        self.server = server
        self._pool = BlockingPool("redis-tier", connections)
        self._idle: list[RespConnection] = []
        self._resolved: _Resolved | None = None
        self._tls = ssl.create_default_context() if server.encrypted else None

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
            refusal = await self._pool.run(lambda: self._job(use, work, resolved, deadline), use.stop, deadline)
        except (OSError, TransferError, RespError) as error:
            self._resolved = None
            return f"{self.server.shown}: {_text_of(error)}"
        return None if refusal is None else f"{self.server.shown}: {told(refusal)}"

    async def aclose(self) -> None:
        """Idempotent. Work under way ends with an error."""
        await self._pool.aclose()
        while self._idle:
            self._idle.pop().close()

    async def _resolve(self, deadline: BatchDeadline) -> _Resolved:
        if self._resolved is None:
            server, loop = self.server, asyncio.get_running_loop()
            async with asyncio.timeout(deadline.remaining()):
                found = await loop.getaddrinfo(server.host, server.port, type=socket.SOCK_STREAM)
            self._resolved = [(family, address) for family, _, _, _, address in found]
        return self._resolved

    def _job(
        self, use: _Use, work: Callable[[RespConnection], None], resolved: _Resolved, deadline: BatchDeadline
    ) -> RespRefusal | None:
        connection = self._fresh_one() or self._connect(use, resolved, deadline)
        use.take(connection)
        connection.deadline, connection.refusal = deadline, None
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
            self._idle.append(connection)
        return connection.refusal

    def _fresh_one(self) -> RespConnection | None:
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:  # another thread took the last
                return None
            if connection.quiet:
                return connection
            connection.close()

    def _connect(self, use: _Use, resolved: _Resolved, deadline: BatchDeadline) -> RespConnection:
        problem: Exception | None = None
        for family, address in resolved:
            sock = socket.socket(family, socket.SOCK_STREAM)
            try:
                use.take(RespConnection(sock, deadline))
                if use.stopped:  # stopping a socket that is not connected yet stops nothing
                    raise RespError("it was given up")
                sock.settimeout(deadline.remaining())
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._tls is not None:
                    sock = self._tls.wrap_socket(sock, server_hostname=self.server.host, do_handshake_on_connect=False)
                connection = RespConnection(sock, deadline, encrypted=self._tls is not None)
                use.take(connection)
                if isinstance(sock, ssl.SSLSocket):
                    sock.do_handshake()
                greet(connection, self.server)
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
        "NOAUTH": f"; give user and password in tiers.redis.url, or the password in {_PASSWORDS[0]}",
        "MOVED": "; Redis Cluster is not supported: name one server",
        "READONLY": "; tiers.redis.url names a replica: name its primary",
    }.get(refusal.code, "")
    return f"it answers {refusal.text}{remedy}"


def _text_of(error: Exception) -> str:
    if isinstance(error, TimeoutError | TransferTimeoutError):
        return "it did not answer in time"
    if isinstance(error, TransferError):
        return error.message
    return str(error.strerror or error) if isinstance(error, OSError) else str(error)
