"""A worker half's end of the bus (`engines.vllm.bus`): sends reports, receives orders.

Owns the connection. Nothing depends on it: while there is none, reports are dropped and connecting is tried again.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

import msgspec

from engines.process.channel import FrameChannel
from engines.vllm.connector.bus_messages import FromWorker, ToWorker, WorkerHello
from engines.vllm.connector.limits import ConnectorLimits

_logger = logging.getLogger(__name__)


class WorkerBus:
    """Run `run` as a task on the loop that `send` is called on. `handle` is called with each frame of the front's."""

    def __init__(
        self, path: str, hello: WorkerHello, handle: Callable[[ToWorker], None], limits: ConnectorLimits
    ) -> None:
        self._path = path
        self._hello = hello
        self._handle = handle
        self._limits = limits
        self._channel: FrameChannel | None = None

    def __repr__(self) -> str:
        state = "connected" if self._channel is not None else "not connected"
        return f"<WorkerBus rank {self._hello.spec.tp_rank}, {state} to {self._path}>"

    def send(self, frame: FromWorker) -> None:
        """To the front if it is there."""
        if self._channel is not None:
            self._channel.send(msgspec.msgpack.encode(frame))

    async def run(self) -> None:
        """Connect, and again whenever the connection has ended, until cancelled."""
        limits = self._limits
        pause_s = limits.bus_first_pause_s
        while True:
            try:
                async with asyncio.timeout(limits.bus_connect_s):
                    channel = await _connect(self._path)
            except OSError:  # TimeoutError too
                pass
            else:
                pause_s = limits.bus_first_pause_s
                await self._serve(channel)
            await asyncio.sleep(pause_s)
            pause_s = min(limits.bus_longest_pause_s, 2 * pause_s)

    async def _serve(self, channel: FrameChannel) -> None:
        channel.send(msgspec.msgpack.encode(self._hello))
        self._channel = channel
        try:
            while payloads := await channel.receive():
                for payload in payloads:
                    self._handle(msgspec.msgpack.decode(payload, type=ToWorker))
        except Exception:  # the connection's boundary
            _logger.exception("bus_broken path=%s", self._path)
        finally:
            self._channel = None
            await channel.aclose()


async def _connect(path: str) -> FrameChannel:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, path)
        return await FrameChannel.over(sock)
    except BaseException:
        sock.close()
        raise
