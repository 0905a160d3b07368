"""Frames over a connected Unix socket on an event loop, both ends of the link between a node and its engine's process.

Owns the socket. Knows nothing of what the frames mean.
Invariant: frames sent in one turn of the loop leave in one write.
"""

import asyncio
import socket
from typing import Self

from nodeapi.frames import FrameDecoder, pack_frame

_READ_BYTES = 256 << 10


class FrameChannel:
    """Use from one loop. `receive` has one caller at a time; `send` may be called from anywhere on the loop."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._decoder = FrameDecoder()
        self._outgoing = bytearray()

    @classmethod
    async def over(cls, sock: socket.socket) -> Self:
        """Takes `sock` over: it is closed with the channel."""
        reader, writer = await asyncio.open_unix_connection(sock=sock)
        return cls(reader, writer)

    def send(self, payload: bytes) -> None:
        """Queue one frame. Raises FrameError if it is too large. After the peer has gone, frames vanish."""
        frame = pack_frame(payload)
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing += frame

    def _flush(self) -> None:
        data, self._outgoing = self._outgoing, bytearray()
        if data and not self._writer.is_closing():
            self._writer.write(data)

    async def drain(self) -> None:
        """Wait until the peer keeps up. A peer that has gone is no error here: `receive` tells it."""
        self._flush()
        try:
            await self._writer.drain()
        except (ConnectionError, RuntimeError):
            return

    async def receive(self) -> list[bytes]:
        """The payloads of at least one frame, or an empty list when the peer has gone. Raises FrameError.

        Waits without a bound: the peer is a process of ours, and whoever waits watches over it (pings)."""
        while True:
            try:
                data = await self._reader.read(_READ_BYTES)
            except ConnectionError:
                return []
            if not data:
                return []
            if payloads := self._decoder.feed(data):
                return payloads

    async def aclose(self) -> None:
        """Send what is queued if the peer takes it at once, and close. Idempotent."""
        self._flush()
        self._writer.close()
        try:
            async with asyncio.timeout(1.0):
                await self._writer.wait_closed()
        except (ConnectionError, TimeoutError):
            self._writer.transport.abort()
