"""Somebody on the network between an initiator of the TCP transport and a host: sees each frame, and passes on what it
likes. Knows no secret."""

import asyncio
import contextlib
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal
from zlib import crc32

import msgspec

from kvcore.types import Segment
from transfer.tcp import wire
from transfer.tcp.sockets import join_address, split_address

Kind = wire.FrameKind
_UNSEALED = (Kind.HELLO, Kind.PROVEN_HELLO, Kind.SEALED_HELLO, Kind.CHALLENGE, Kind.PROOF)
_TAG_BYTES = 16


@dataclass
class Frame:
    """As it passed. Tags are empty on connections without MACs."""

    header: wire.Header
    table: bytes = b""
    head_tag: bytes = b""
    payload: bytes = b""
    payload_tag: bytes = b""

    def raw(self) -> bytes:
        return wire.pack_header(self.header) + self.table + self.head_tag + self.payload + self.payload_tag

    def with_ranges(self, *ranges: tuple[int, int]) -> "Frame":
        """The same bytes for other places; all but the MAC is right."""
        table = struct.pack(f"<{2 * len(ranges)}Q", *(number for one in ranges for number in one))
        header = msgspec.structs.replace(self.header, table_crc=crc32(table))
        return Frame(header, table, self.head_tag, self.payload, self.payload_tag)


@dataclass
class Wire:
    """One connection through the middle. What a tamperer sends goes to either end as it is."""

    to_host: asyncio.StreamWriter
    to_initiator: asyncio.StreamWriter
    hello: Kind | None = None
    sealed: bool = False
    seen: list[Frame] = field(default_factory=list)
    """Behind the greeting, in the order in which they passed, both ways."""
    swallow: int = 0
    """So many of the host's next frames are not passed on."""


Way = Literal["to_host", "to_initiator"]
Tamper = Callable[[Wire, Way, Frame], "Frame | None"]
"""Called for each frame behind the greeting; what it returns is passed on, None: nothing."""


class Middle:
    def __init__(self, target: Segment, tamper: Tamper, rehello: Callable[[bytes], bytes] = lambda raw: raw) -> None:
        self._address = split_address(target.addresses["tcp"])
        self._tamper = tamper
        self._rehello = rehello
        self._tasks: set[asyncio.Task[None]] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host_reader, host_writer = await asyncio.open_connection(*self._address)
        between = Wire(host_writer, writer)
        pumps = [
            asyncio.create_task(self._pump(between, "to_host", reader, host_writer)),
            asyncio.create_task(self._pump(between, "to_initiator", host_reader, writer)),
        ]
        self._tasks.update(pumps)
        await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        for one in (writer, host_writer):
            one.close()
        await asyncio.wait(pumps)

    async def _pump(self, between: Wire, way: Way, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, OSError):
            while True:
                frame = await _read(between, reader)
                if frame.header.kind in _UNSEALED:
                    writer.write(self._rehello(frame.raw()))
                    continue
                between.seen.append(frame)
                if way == "to_initiator" and between.swallow:
                    between.swallow -= 1
                    continue
                passed = self._tamper(between, way, frame)
                if passed is not None:
                    writer.write(passed.raw())
                await writer.drain()


async def _read(between: Wire, reader: asyncio.StreamReader) -> Frame:
    header = wire.parse_header(await reader.readexactly(wire.HEADER_BYTES))
    kind = header.kind
    if kind in (Kind.HELLO, Kind.PROVEN_HELLO, Kind.SEALED_HELLO):
        between.hello = kind
    elif kind is Kind.PROOF:
        between.sealed = between.hello is Kind.SEALED_HELLO
    tag_bytes = _TAG_BYTES if between.sealed and kind not in _UNSEALED else 0
    table = await reader.readexactly(header.count * wire.ENTRY_BYTES) if kind in (Kind.WRITE, Kind.READ) else b""
    head_tag = await reader.readexactly(tag_bytes)
    payload_bytes = 0 if kind is Kind.READ else header.payload_bytes
    payload = await reader.readexactly(payload_bytes)
    return Frame(header, table, head_tag, payload, await reader.readexactly(tag_bytes if payload_bytes else 0))


@asynccontextmanager
async def in_the_middle(
    target: Segment, tamper: Tamper, rehello: Callable[[bytes], bytes] = lambda raw: raw
) -> AsyncIterator[Segment]:
    """The segment as an initiator sees it whose way to it leads through the middle."""
    server = await asyncio.start_server(Middle(target, tamper, rehello).serve, "127.0.0.1", 0, limit=1 << 22)
    host, port = server.sockets[0].getsockname()
    try:
        yield msgspec.structs.replace(target, addresses={"tcp": join_address(host, port)})
    finally:
        server.close()
