"""What one HTTP listener holds at a time: connections, in all and of one client, and bodies that are not whole.

Owns the counts; whoever speaks the protocol asks before it takes more. A connection over a bound is a *spare* one: it
may ask for /health or /metrics and nothing else, so that operators see what is the matter; of spare ones that say
nothing the oldest goes for a new one. Invariant: what a place holds is given back when it is left.
"""

import asyncio
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from ipaddress import IPv6Network
from typing import Any

from kvcore import metric_names as names
from kvcore.peer_log import PeerLog
from kvcore.process.descriptors import RESERVED, soft_limit
from kvcore.process.limits import HttpLimits
from kvcore.process.proven_app import OPEN_PATHS
from kvcore.telemetry import Metrics, log_fields

_logger = logging.getLogger("kvcore.http")


class GatePlace:
    """One connection at the gate. `why_spare`: over which bound it is; None: it is served as any other."""

    __slots__ = ("_drop", "_gate", "_held", "_left", "client", "why_spare")

    def __init__(self, gate: "HttpGate", client: str, why_spare: str | None, drop: Callable[[], None]) -> None:
        self._gate = gate
        self.client = client
        self.why_spare = why_spare
        self._drop = drop
        self._held = 0
        self._left = False

    def serves(self, method: str, path: str) -> bool:
        """Whether this request may be answered. It has sent its head, and is no longer among those that go first."""
        if self.why_spare is None:
            return True
        self._gate.heard(self)
        return method in ("GET", "HEAD") and path in OPEN_PATHS

    def hold(self, num_bytes: int) -> str | None:
        """So many more bytes of a body have come; None, or why they are too many."""
        self._held += num_bytes
        return self._gate.hold(self.client, num_bytes)

    def let_go(self) -> None:
        """The body is whole, or given up."""
        held, self._held = self._held, 0
        if held:
            self._gate.let_go(self.client, held)

    def leave(self) -> None:
        """The connection has ended. Idempotent."""
        self.let_go()
        if not self._left:
            self._left = True
            self._gate.leave(self)

    def drop(self) -> None:
        """Have whoever owns the connection cut it."""
        self._drop()

    def passes_to(self, drop: Callable[[], None]) -> None:
        """Another owns the connection from now on."""
        self._drop = drop


class HttpGate:
    """Of one listener, on its event loop."""

    def __init__(self, limits: HttpLimits = HttpLimits()) -> None:
        self.limits = limits
        free = soft_limit() - RESERVED - limits.listeners * limits.max_spare
        self.max_connections = limits.max_connections or max(1, free // limits.listeners)
        self.max_per_client = limits.max_per_client or max(
            min(self.max_connections, limits.max_spare), int(limits.client_share * self.max_connections)
        )
        self.refused: Counter[str] = Counter()
        """By reason: what the metrics show."""
        self.held_bytes = 0
        self._connections: Counter[str] = Counter()
        self._held: Counter[str] = Counter()
        self._num = 0
        self._spare: dict[GatePlace, None] = {}
        """Those that have said nothing yet, the oldest first."""
        self._num_spare = 0

    def __repr__(self) -> str:
        return (
            f"<HttpGate {self._num} of {self.max_connections} connections, {self._num_spare} spare, "
            f"{self.held_bytes} bytes of bodies>"
        )

    @property
    def num_connections(self) -> int:
        """Those that are served, without spare ones."""
        return self._num

    def admit(self, peer: str | None, drop: Callable[[], None], place: GatePlace | None = None) -> GatePlace | None:
        """The place of a new connection; None: not even a spare one is left, cut it. `drop` cuts it later. `place`: it
        has one already."""
        if place is not None:
            place.passes_to(drop)
            return place
        client = client_of(peer)
        reason = None
        if self._num >= self.max_connections:
            reason = "connections"
        elif self._connections[client] >= self.max_per_client:
            reason = "client_connections"
        if reason is None:
            self._num += 1
            self._connections[client] += 1
            return GatePlace(self, client, None, drop)
        self.refused[reason] += 1
        if self._num_spare >= self.limits.max_spare:
            if not self._spare:
                return None
            oldest = next(iter(self._spare))
            del self._spare[oldest]
            oldest.drop()
        place = GatePlace(self, client, self._says(reason), drop)
        self._spare[place] = None
        self._num_spare += 1
        return place

    def heard(self, place: GatePlace) -> None:
        """The head of a spare connection's request has come."""
        self._spare.pop(place, None)

    def leave(self, place: GatePlace) -> None:
        """See GatePlace.leave."""
        if place.why_spare is not None:
            self._spare.pop(place, None)
            self._num_spare -= 1
            return
        self._num -= 1
        _take(self._connections, place.client, 1)

    def hold(self, client: str, num_bytes: int) -> str | None:
        """See GatePlace.hold."""
        self.held_bytes += num_bytes
        self._held[client] += num_bytes
        most = self.limits.max_held_bytes
        if self.held_bytes > most:
            return f"bodies that are not whole yet hold {most >> 20} MiB of this process, its bound"
        most = int(self.limits.client_share * most)
        if self._held[client] > most:
            return f"bodies of this client that are not whole yet hold {most >> 20} MiB, the bound of one client"
        return None

    def let_go(self, client: str, num_bytes: int) -> None:
        """See GatePlace.let_go."""
        self.held_bytes -= num_bytes
        _take(self._held, client, num_bytes)

    def _says(self, reason: str) -> str:
        if reason == "connections":
            return f"this process takes {self.max_connections} connections at a time"
        return f"this process takes {self.max_per_client} connections of one client at a time"


class TlsListener:
    """Accepts connections that begin with TLS. Each has its place from the moment it is accepted: one that never ends
    its handshake counts as any other, and for `handshake_s` at most."""

    def __init__(self, gate: HttpGate, bound: socket.socket, tls: ssl.SSLContext, make: Callable[[], Any]) -> None:
        """Accepts from now on until `close`. `bound`: listens, and is closed at the end. `make`: a connection's
        protocol, which takes its `place` with it."""
        self._gate, self._bound, self._tls, self._make = gate, bound, tls, make
        self._shaking: dict[asyncio.Task[None], socket.socket] = {}
        self._said = PeerLog(_logger)
        self._leaving = False
        self._accepting = asyncio.create_task(self._accept(), name="TLS listener")

    @property
    def num_shaking(self) -> int:
        """Connections whose TLS does not stand yet."""
        return len(self._shaking)

    def leave(self) -> None:
        """Accept what the kernel has accepted already, and then no more."""
        self._leaving = True
        self._accepting.cancel()

    def close(self) -> None:
        """Accept no more, and cut what is not encrypted yet. Idempotent."""
        self._accepting.cancel()
        for connection in self._shaking.values():
            _cut(connection)

    async def wait_closed(self) -> None:
        """Until that is done."""
        await asyncio.wait({self._accepting, *self._shaking})

    async def _accept(self) -> None:
        with self._bound:
            try:
                await self._accept_all()
            finally:
                for connection, address in queued(self._bound) if self._leaving else ():
                    self._begin(connection, address)

    async def _accept_all(self) -> None:
        while True:
            try:
                self._begin(*await asyncio.get_running_loop().sock_accept(self._bound))
            except ConnectionError:
                continue  # it has left already
            except Exception as error:  # no descriptor is left, or a fault of ours: either way others still come
                shown = str(error) if isinstance(error, OSError) else repr(error)
                log_fields(_logger, logging.ERROR, "accept_failed", error=shown)
                await asyncio.sleep(self._gate.limits.accept_again_s)

    def _begin(self, connection: socket.socket, address: Any) -> None:
        try:
            place = self._gate.admit(address[0], partial(_cut, connection))
        except BaseException:
            connection.close()
            raise
        if place is None:
            connection.close()
            return
        task = asyncio.create_task(self._shake(connection, place))
        self._shaking[task] = connection
        task.add_done_callback(self._shaking.pop)

    async def _shake(self, connection: socket.socket, place: GatePlace) -> None:
        limits = self._gate.limits
        seconds = limits.handshake_s if place.why_spare is None else min(limits.spare_head_s, limits.handshake_s)

        def make() -> Any:
            made = self._make()
            made.place = place
            return made

        loop = asyncio.get_running_loop()
        try:
            await loop.connect_accepted_socket(make, connection, ssl=self._tls, ssl_handshake_timeout=seconds)
        except (OSError, ValueError) as error:  # ssl's errors are; and an address that is gone is a ValueError
            log_fields(_logger, logging.DEBUG, "handshake_failed", error=str(error))
            place.leave()
        except BaseException as error:
            place.leave()
            connection.close()
            if not isinstance(error, Exception):
                raise
            self._said.say(logging.ERROR, "connection_failed", type(error).__name__, None, error=repr(error))


def queued(bound: socket.socket) -> Iterator[tuple[socket.socket, Any]]:
    """The connections that the kernel has accepted for a listening socket and nobody has taken yet."""
    with suppress(BlockingIOError):
        while True:
            connection, address = bound.accept()
            connection.setblocking(False)
            yield connection, address


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def client_of(peer: str | None) -> str:
    """By what a peer's connections are counted together: its address; of IPv6 the /64 that a host has to itself."""
    if peer is None or ":" not in peer:
        return peer or ""
    try:
        return str(IPv6Network((peer.partition("%")[0], 64), strict=False))
    except ValueError:
        return peer


def show_gates(metrics: Metrics, gates: dict[str, HttpGate]) -> None:
    """Metrics of a process's listeners, by name; `gates` may grow."""
    metrics.sampled(names.HTTP_CONNECTIONS, lambda: [((name,), gate.num_connections) for name, gate in gates.items()])
    metrics.sampled(names.HTTP_HELD_BYTES, lambda: [((name,), gate.held_bytes) for name, gate in gates.items()])
    metrics.sampled(
        names.HTTP_REFUSED,
        lambda: [((name, why), num) for name, gate in gates.items() for why, num in gate.refused.items()],
    )


def _take(counts: Counter[str], key: str, num: int) -> None:
    counts[key] -= num
    if counts[key] <= 0:
        del counts[key]
