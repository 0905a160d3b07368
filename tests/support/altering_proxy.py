"""Somebody on the network between a client and a server, who puts other bytes into what the server says."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


@asynccontextmanager
async def altering(target: int, old: bytes, new: bytes, heard: bytearray | None = None) -> AsyncIterator[str]:
    """A URL that leads to the port `target` on loopback. `old` is as long as `new`, and passes in one piece. `heard`:
    where what the client says is noted."""
    assert len(old) == len(new)
    tasks: set[asyncio.Task[None]] = set()

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: bool) -> None:
        while data := await reader.read(1 << 16):
            if heard is not None and not change:
                heard.extend(data)
            writer.write(data.replace(old, new) if change else data)
            await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection("127.0.0.1", target)
        ways = [pass_on(reader, to_server, change=False), pass_on(from_server, writer, change=True)]
        tasks.update(asyncio.ensure_future(way) for way in ways)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
