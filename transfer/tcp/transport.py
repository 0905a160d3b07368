"""The initiator's side of the TCP transport: pooled connections, batches striped over them, large ones in threads.

Owns the connections: one that saw any error, timeout or cancellation is closed, never reused. Bytes go straight between
the caller's buffers and the socket.
"""

import asyncio
import socket
from collections.abc import Sequence

from kvcore.errors import ConfigError, PeerUnreachableError, TransferError, TransferTimeoutError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import BatchDeadline, BlockingPool
from transfer.memory.pages import usable_cpus
from transfer.ranges import check_batch
from transfer.stripes import OpSlice, stripe
from transfer.tcp.connection import Connection
from transfer.tcp.exchange import Exchange
from transfer.tcp.limits import TcpLimits
from transfer.tcp.sockets import shut_down, split_address, tune

_STRIPE_BYTES = 8 << 20
"""A batch uses one connection for each so many bytes: less is not worth another thread."""
_CORES_A_STREAM = 2
"""On 2 cores, two streams over loopback were 15 to 25 % slower than one: each keeps a core busy on either side."""
_LOOP_BYTES = 256 << 10
"""Up to here a batch moves on the loop: it keeps the loop busy for less time than handing it to a thread and back
takes."""
_THREADS = 16


class _Peer:
    """Connections to one segment at one address."""

    def __init__(self, streams: int) -> None:
        self.free = asyncio.Semaphore(streams)
        self.idle: list[Connection] = []
        self.users = 0

    def __repr__(self) -> str:
        return f"<_Peer idle={len(self.idle)} users={self.users}>"

    def take_idle(self) -> Connection | None:
        """An idle connection whose peer has not closed it meanwhile."""
        while self.idle:
            connection = self.idle.pop()
            if connection.usable:
                return connection
            connection.close()
        return None


class TcpTransfer:
    """TransferEngine over TCP: at most `streams` connections a segment; a batch uses one for each `_STRIPE_BYTES`."""

    kind = "tcp"

    def __init__(
        self,
        streams: int = 2,
        limits: TcpLimits = TcpLimits(),
        trust: ClusterTrust = OPEN,
        *,
        sealed: bool = False,
    ) -> None:
        """`sealed`: frames have MACs, in a cluster with a secret."""
        self._sealed = sealed
        self._limits = limits
        self._trust = trust
        self._streams = streams
        self._stripes = max(1, min(streams, usable_cpus() // _CORES_A_STREAM))
        self._pool = BlockingPool("kvferry-tcp", _THREADS)
        self._peers: dict[tuple[str, str], _Peer] = {}
        self._on_loop: set[Connection] = set()
        self._loop_free = asyncio.Event()

    def __repr__(self) -> str:
        idle = sum(len(peer.idle) for peer in self._peers.values())
        users = sum(peer.users for peer in self._peers.values())
        state = "closed" if self._pool.closed else "open"
        return f"<TcpTransfer {state} peers={len(self._peers)} idle={idle} users={users}>"

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `tcp` address."""
        return self.kind in segment.addresses

    def register(self, region: memoryview) -> None:
        """Nothing to do: sockets take any memory."""

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose."""
        await self._pool.aclose()
        for connection in self._on_loop:
            shut_down(connection.sock)
        while self._on_loop:
            self._loop_free.clear()
            await self._loop_free.wait()
        for peer in self._peers.values():
            while peer.idle:
                peer.idle.pop().close()

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results = check_batch(direction, ops)
        deadline = BatchDeadline(timeout_s)
        groups: dict[tuple[str, str], list[tuple[int, TransferOp]]] = {}
        for index, op in enumerate(ops):
            if results[index] is None and op.num_bytes:
                groups.setdefault((op.segment.addresses.get(self.kind, ""), op.segment.id), []).append((index, op))
        jobs = [
            (group[0][1].segment, parts)
            for group in groups.values()
            for parts in stripe(group, self._stripes, _STRIPE_BYTES)
        ]

        async def run(segment: Segment, parts: list[OpSlice]) -> None:
            error = await self._run_stripe(direction, segment, parts, deadline)
            for part in parts:
                results[part.op_index] = results[part.op_index] or error

        if len(jobs) == 1:  # no task: a small batch is all latency
            await run(*jobs[0])
        else:
            async with asyncio.TaskGroup() as tasks:
                for segment, parts in jobs:
                    tasks.create_task(run(segment, parts))
        return results

    async def _run_stripe(
        self, direction: Direction, segment: Segment, parts: list[OpSlice], deadline: BatchDeadline
    ) -> TransferError | None:
        key = (segment.addresses.get(self.kind, ""), segment.id)
        peer = self._peers.get(key) or self._peers.setdefault(key, _Peer(self._streams))
        peer.users += 1
        try:
            await _acquire(peer.free, deadline)
            try:
                connection = peer.take_idle() or await self._connect(key[0], deadline)
                exchange = Exchange(direction, segment, parts, self._trust, sealed=self._sealed)
                await self._use(peer, connection, exchange, deadline)
            finally:
                peer.free.release()
        except TransferError as error:
            return error
        finally:
            peer.users -= 1
        return None

    async def _use(self, peer: _Peer, connection: Connection, exchange: Exchange, deadline: BatchDeadline) -> None:
        whole = False
        try:
            if connection.greeted and exchange.fits_the_loop(_LOOP_BYTES):
                await self._use_on_loop(connection, exchange, deadline)
            else:
                connection.unwatch()
                sock = connection.sock
                await self._pool.run(lambda: exchange.run(connection, deadline), lambda: shut_down(sock), deadline)
            whole = not self._pool.closed
        finally:
            if whole:
                peer.idle.append(connection)
            else:
                connection.abort()

    async def _use_on_loop(self, connection: Connection, exchange: Exchange, deadline: BatchDeadline) -> None:
        deadline.remaining()
        if self._pool.closed:
            raise PeerUnreachableError("the transport is closed")
        self._on_loop.add(connection)
        try:
            await exchange.run_on_loop(connection, deadline)
        finally:
            self._on_loop.discard(connection)
            self._loop_free.set()

    async def _connect(self, address: str, deadline: BatchDeadline) -> Connection:
        self._drop_unused()
        if self._pool.closed:
            raise PeerUnreachableError("the transport is closed")
        try:
            host, port = split_address(address)
        except ConfigError as error:
            raise PeerUnreachableError(error.message) from error
        sock = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
        try:
            sock.setblocking(False)
            async with asyncio.timeout(deadline.remaining()):
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
            tune(sock, self._limits)
        except TimeoutError as error:
            sock.close()
            raise TransferTimeoutError(f"connecting to {address} took too long") from error
        except OSError as error:
            sock.close()
            raise PeerUnreachableError(f"cannot connect to {address}: {error.strerror or error}") from error
        except BaseException:
            sock.close()
            raise
        return Connection(sock)

    def _drop_unused(self) -> None:
        """Forget peers with no live connection, so that dead ones do not pile up. Called before each new connection."""
        for key, peer in list(self._peers.items()):
            dead = [one for one in peer.idle if not one.usable]
            peer.idle = [one for one in peer.idle if one not in dead]
            for one in dead:
                one.close()
            if not peer.users and not peer.idle:
                del self._peers[key]


async def _acquire(free: asyncio.Semaphore, deadline: BatchDeadline) -> None:
    if not free.locked():  # at once: a timer would be a tenth of a small batch's time
        await free.acquire()
        return
    try:
        async with asyncio.timeout(deadline.remaining()):
            await free.acquire()
    except TimeoutError as error:
        raise deadline.error() from error
