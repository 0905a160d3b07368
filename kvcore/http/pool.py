"""Calls to HTTP/1.1 servers over kept connections, by origin (scheme, host, port).

Owns the connections, their number and their age, redirects (none is followed) and proofs. One a client, on one loop.
"""

import asyncio
import ssl
from collections import deque
from collections.abc import Mapping
from functools import partial
from urllib.parse import quote

import aiohappyeyeballs
import msgspec

from kvcore.clock import SystemClock
from kvcore.http.connection import HttpConnection
from kvcore.http.errors import BrokenCallError, ConnectTimeoutError, ProofNotTakenError
from kvcore.http.limits import CallLimits
from kvcore.http.origin import Origin, addresses, origin_of, peer_socket
from kvcore.trust.http_proof import DIGEST, INPUT, MAX_SAID_BYTES, SIGNATURE, WANTED, Proof, RequestProver, why_unproven
from kvcore.trust.opening import OPEN, ClusterTrust

_IDEMPOTENT = frozenset({"GET", "PUT", "DELETE"})


class _Request(msgspec.Struct, frozen=True):
    """`target`: path and query. `lines`: headers that it has whatever happens."""

    method: str
    target: str
    body: bytes
    lines: str


class HttpPool:
    """Connects when it is first used. Cancelling a call drops its connection."""

    def __init__(
        self,
        *,
        connect_timeout_s: float,
        max_connections: int,
        keepalive_s: float,
        headers: Mapping[str, str],
        trust: ClusterTrust = OPEN,
        tls: ssl.SSLContext | None = None,
        limits: CallLimits = CallLimits(),
    ) -> None:
        """`max_connections`: calls under way; more wait, within their deadlines. `headers`: of every request. `tls`:
        for servers at https; None: the cluster's own, where its processes have certificates; else those that this
        machine's certificate authorities vouch for."""
        self._connect_timeout_s = connect_timeout_s
        self._max_connections = max_connections
        self._keepalive_s = keepalive_s
        self._headers = _header_lines(headers)
        self._prover = RequestProver(trust, SystemClock()) if trust.proves_http else None
        self._tls = trust.certificate.client if tls is None and trust.certificate is not None else tls
        self._limits = limits
        self._origins: dict[str, Origin] = {}
        self._num_busy = 0
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._closed = False

    def __repr__(self) -> str:
        idle = sum(len(origin.idle) for origin in self._origins.values())
        return f"<HttpPool {self._num_busy} calls, at most {self._max_connections}, {idle} idle connections>"

    async def call(
        self,
        method: str,
        url: str,
        body: bytes,
        timeout_s: float,
        *,
        num_bytes: int = 1,
        headers: Mapping[str, str] | None = None,
    ) -> HttpConnection:
        """Ask, and wait for the head of the answer and so many bytes of its body, or all of it (see
        `HttpConnection.wait`). The caller hands the answer back by its `end`.

        Raises TimeoutError, which covers all of this, BrokenCallError and OSError: of these nothing is left.
        """
        cut = url.find("/", url.find("//") + 2)
        base, target = (url, "/") if cut < 0 else (url[:cut], url[cut:])
        if not target.isascii() or not target.isprintable() or " " in target:
            target = quote(target, safe="/?&=%:@!$'()*+,;~-._")
        lines = self._headers if headers is None else self._headers + _header_lines(headers)
        request = _Request(method, target, body, lines)
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        learnt = repeated = False
        while True:
            origin = self._origins.get(base) or self._add_origin(base)
            connection = self._at_hand(origin) or await self._connection(origin, until - loop.time())
            proof = self._send(connection, origin, request)
            handed_out = False
            try:
                await connection.wait(num_bytes, until)
                if learnt or not self._learns(connection, origin, proof):
                    self._check(connection, url, origin, proof)
                    handed_out = True
                    return connection
                learnt = True
            except BrokenCallError:
                # A server may close a connection while a request is on its way to it. What it may not have read is
                # asked again, once, if it changes nothing to ask twice.
                if repeated or connection.status or not connection.is_reused or method not in _IDEMPOTENT:
                    raise
                repeated = True
            finally:
                if not handed_out:
                    connection.end()

    def close(self) -> None:
        """Drop all connections, those of calls under way too. Idempotent."""
        self._closed = True
        for origin in list(self._origins.values()):
            for connection in [*origin.idle, *origin.busy]:
                connection.abort()

    # --- one request ---

    def _send(self, connection: HttpConnection, origin: Origin, request: _Request) -> Proof | None:
        method, target, body, proof = request.method, request.target, request.body, None
        head = f"{method} {target} HTTP/1.1\r\nHost: {origin.authority}\r\n{request.lines}"
        if self._prover is not None:
            proof = self._prover.prove(method, origin.authority, target, body)
            head += proof.lines
        head += f"Content-Length: {len(body)}\r\n\r\n" if body or method != "GET" else "\r\n"
        connection.begin(head.encode("latin-1"), body)
        return proof

    def _learns(self, answer: HttpConnection, origin: Origin, proof: Proof | None) -> bool:
        """Whether it is a refusal that asks for another secret of ours: it had no effect, and the call is made anew."""
        if self._prover is None or proof is None or answer.status != 401:
            return False
        return self._prover.learn(origin.authority, proof, answer.header(WANTED))

    def _check(self, answer: HttpConnection, url: str, origin: Origin, proof: Proof | None) -> None:
        """Raises BrokenCallError: it is no answer of whom we asked."""
        status = answer.status
        if 300 <= status < 400:
            raise BrokenCallError(
                f"{url} answered {status}, a redirect to {answer.header('Location') or 'nowhere'}, which is not "
                "followed: name the server itself"
            )
        if self._prover is None or proof is None:
            return
        found = {name: answer.header(name) for name in (DIGEST, INPUT, SIGNATURE)}
        said = {name: value for name, value in found.items() if value is not None}
        answer.proven = self._prover.proven_reply(proof, status, said)
        if answer.proven is None:
            beginning = answer.take()[:MAX_SAID_BYTES] if status >= 400 else b""
            kind = ProofNotTakenError if status == 401 else BrokenCallError
            raise kind(why_unproven(origin.url, status, said, beginning))

    # --- connections ---

    def _at_hand(self, origin: Origin) -> HttpConnection | None:
        """One that stands, for a call that need not wait."""
        if self._num_busy >= self._max_connections:
            return None
        while origin.idle:
            connection = origin.idle.pop()
            if connection.is_open:
                origin.busy.add(connection)
                self._num_busy += 1
                return connection
        return None

    async def _connection(self, origin: Origin, timeout_s: float) -> HttpConnection:
        origin.coming += 1  # else it is forgotten meanwhile, and another one of the same URL made beside it
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if (connection := self._at_hand(origin)) is not None:
                        return connection
                    if self._num_busy < self._max_connections:
                        return await self._connect(origin)
                    await self._one_free()
        finally:
            origin.coming -= 1
            self._forget_if_unused(origin)

    async def _one_free(self) -> None:
        """Returns when there may be one; whoever does not use it tells the next."""
        waiter = asyncio.get_running_loop().create_future()
        self._waiting.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._tell_next()
            raise
        finally:
            if waiter in self._waiting:
                self._waiting.remove(waiter)

    def _tell_next(self) -> None:
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return

    async def _connect(self, origin: Origin) -> HttpConnection:
        self._num_busy += 1
        connection = None
        try:
            connection = await self._connected(origin)
            if self._closed:
                connection.abort()
                raise BrokenCallError("the client was closed")
            origin.busy.add(connection)
            return connection
        finally:
            if connection is None or connection not in origin.busy:
                self._num_busy -= 1
                self._tell_next()

    async def _connected(self, origin: Origin) -> HttpConnection:
        """Raises OSError, ConnectTimeoutError among them."""
        loop = asyncio.get_running_loop()
        connection = HttpConnection(partial(self._freed, origin), partial(self._lost, origin), self._limits)
        tls = await self._tls_context() if origin.encrypted else None
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                connected = await aiohappyeyeballs.start_connection(
                    await addresses(origin.host, origin.port),
                    happy_eyeballs_delay=self._limits.fallback_s,
                    socket_factory=peer_socket,
                )
                try:
                    await loop.create_connection(
                        lambda: connection, sock=connected, ssl=tls, server_hostname=origin.host if tls else None
                    )
                except BaseException:
                    connected.close()
                    raise
        except TimeoutError as error:
            raise ConnectTimeoutError("a connection took too long") from error
        return connection

    async def _tls_context(self) -> ssl.SSLContext:
        if self._tls is None:
            self._tls = await asyncio.to_thread(ssl.create_default_context)
        return self._tls

    def _freed(self, origin: Origin, connection: HttpConnection, reusable: bool) -> None:
        origin.busy.discard(connection)
        self._num_busy -= 1
        if reusable and not self._closed:
            origin.idle.append(connection)
            connection.keep(self._keepalive_s)
        else:
            connection.abort()
            self._forget_if_unused(origin)
        self._tell_next()

    def _lost(self, origin: Origin, connection: HttpConnection) -> None:
        if connection in origin.idle:
            origin.idle.remove(connection)
        self._forget_if_unused(origin)

    def _add_origin(self, base: str) -> Origin:
        self._origins[base] = origin = origin_of(base)
        return origin

    def _forget_if_unused(self, origin: Origin) -> None:
        if not (origin.busy or origin.idle or origin.coming):
            self._origins.pop(origin.url, None)


def _header_lines(headers: Mapping[str, str]) -> str:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    if lines.count("\r") != len(headers) or lines.count("\n") != len(headers):
        raise ValueError("a header's value must be of one line")
    return lines
