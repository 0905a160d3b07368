"""A server on a Redis' port that greets as one, and answers whatever else with nonsense."""

import asyncio
from contextlib import suppress
from types import TracebackType
from typing import Self

_HEADS = {
    "a part 0 of no chunk": b"x" * 144,
    "a part 0 of a chunk of another length": b"KVFPART0" + (1 << 40).to_bytes(8, "little") + b"x" * 128,
}
GARBAGE = {
    "another protocol": b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n",
    "half a reply": b"$1000000\r\nabc",
    "a length that cannot be": b"$999999999999\r\n" + b"x" * 100_000,
    "a negative length": b"$-17\r\n$-17\r\n",
    "an array without end": b"*999999999\r\n" + b":1\r\n" * 1000,
    "numbers where there are none": b":one\r\n",
    "more replies than were asked for": b"$-1\r\n" * 100,
    "errors": b"-ERR unknown command\r\n" * 8,
    "silence": b"",
    **{name: b"$%d\r\n%b\r\n" % (len(head), head) for name, head in _HEADS.items()},
}
"""What it says, and then, unless it is silence, nothing more."""
_CLOSES = frozenset({"another protocol", "half a reply"})


class GarbageServer:
    """Entered, it listens on `port`, and gives each connection the next of `kinds` as its answer, in turn.

    Of questions whether keys are there it answers two of three properly, so that it is asked for their values, and for
    taking them.
    """

    def __init__(self, port: int, kinds: list[str]) -> None:
        self.answered = 0
        """Commands other than a greeting that got nonsense."""
        self._port, self._kinds = port, kinds
        self._connections = self._asked = 0
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kind = self._kinds[self._connections % len(self._kinds)]
        self._connections += 1
        self._writers.add(writer)
        with suppress(ConnectionError):
            while data := await reader.read(1 << 16):
                if b"PING" in data:
                    writer.write(b"+PONG\r\n")
                    data = data.partition(b"PING\r\n")[2]
                self._asked += 1
                if data.startswith(b"*") and b"EXISTS" in data and self._asked % 3:
                    writer.write(b":%d\r\n" % (self._asked % 2) * data.count(b"EXISTS"))
                elif data.startswith(b"*"):
                    self.answered += 1
                    writer.write(GARBAGE[kind])
                    await writer.drain()
                    if kind in _CLOSES:
                        break
        self._writers.discard(writer)
        writer.close()
