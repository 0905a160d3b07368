"""A server's connection without a socket: what is received is given to it, what it writes is kept."""

import asyncio
from typing import Any

import uvicorn
from uvicorn.server import ServerState

from kvcore.process.http_protocol import BoundedHttp


class Wire(asyncio.Transport):
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.closed = False

    @property
    def sent(self) -> bytes:
        return b"".join(self.writes)

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.writes.append(bytes(data))

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


def connected(app: Any) -> tuple[BoundedHttp, Wire, ServerState]:
    """A connection to a server of `app`; the state counts the requests that it has answered."""
    config = uvicorn.Config(app, log_config=None, ws="none", date_header=False, server_header=False)
    protocol, wire, state = BoundedHttp(config, ServerState(), {}), Wire(), ServerState()
    protocol.server_state = state
    protocol.connection_made(wire)
    return protocol, wire, state
