"""A worker half's end of the bus (`engines.vllm.bus`): says what it has done, hears when a handoff has ended.

Owns the connection. Nothing depends on it: without one, reports are dropped and it is tried again.
"""

import asyncio
import logging
import socket
from collections.abc import Callable

import msgspec

from engines.process.channel import FrameChannel
from engines.vllm.connector.bus_messages import FromHalf, ToHalf, WorkerHello

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 2.0
_CONNECT_S = 5.0
_logger = logging.getLogger(__name__)


class WorkerBus:
    """Run `run` as a task on the loop that `send` is called on. `take` gets each frame of the front's."""

    def __init__(self, path: str, hello: WorkerHello, take: Callable[[ToHalf], None]) -> None:
        self._path = path
        self._hello = hello
        self._take = take
        self._channel: FrameChannel | None = None

    def send(self, frame: FromHalf) -> None:
        """To the front if it is there."""
        if self._channel is not None:
            self._channel.send(msgspec.msgpack.encode(frame))

    async def run(self) -> None:
        """Connect, and again whenever the connection has ended, until cancelled."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                async with asyncio.timeout(_CONNECT_S):
                    channel = await _connect(self._path)
            except OSError:  # TimeoutError too
                pass
            else:
                pause_s = _FIRST_PAUSE_S
                await self._serve(channel)
            await asyncio.sleep(pause_s)
            pause_s = min(_LONGEST_PAUSE_S, 2 * pause_s)

    async def _serve(self, channel: FrameChannel) -> None:
        channel.send(msgspec.msgpack.encode(self._hello))
        self._channel = channel
        try:
            while payloads := await channel.receive():
                for payload in payloads:
                    self._take(msgspec.msgpack.decode(payload, type=ToHalf))
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
