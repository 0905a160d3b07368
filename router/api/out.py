"""Where an answer goes: straight to its connection, or, where something is done to it behind the application or another
server has the connection, as ASGI's messages.

Owns the time that a client may take nothing.
"""

import asyncio
from collections.abc import Awaitable
from typing import Protocol

from starlette.types import Scope, Send

from kvcore.process.http_exchange import Headers, HttpExchange, straight

_SLICE_BYTES = 1 << 20


class ClientGoneError(Exception):
    """The client took no more."""


class Out(Protocol):
    """Of one answer. Each call waits while the client takes nothing. Raises ClientGoneError where that was too long, or
    the connection broke."""

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """All of it. `headers`: but its length."""
        ...

    async def begin(self, status: int, headers: Headers) -> None:
        """The head of one that comes in parts."""
        ...

    async def part(self, body: bytes, *, more: bool = True) -> None:
        """A part of its body."""
        ...


def out_of(scope: Scope, send: Send, timeout_s: float) -> Out:
    """Of an answer to this request. `timeout_s`: a client that takes nothing for so long is gone."""
    exchange = straight(scope, send)
    return SendOut(send, timeout_s) if exchange is None else StraightOut(exchange, timeout_s)


class StraightOut:
    """Writes into the connection. Without a limit of time where it takes what is written: then nothing waits."""

    def __init__(self, exchange: HttpExchange, timeout_s: float) -> None:
        self._exchange, self._timeout_s = exchange, timeout_s

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """See Out."""
        if len(body) > _SLICE_BYTES:
            await _in_slices(self, status, headers, body)
            return
        if not self._exchange.flows:
            await self._ready()
        self._exchange.answer(status, headers, body)

    async def begin(self, status: int, headers: Headers) -> None:
        """See Out."""
        if not self._exchange.flows:
            await self._ready()
        self._exchange.start(status, headers)

    async def part(self, body: bytes, *, more: bool = True) -> None:
        """See Out."""
        if not self._exchange.flows:
            await self._ready()
        if more:
            self._exchange.write(body)
        else:
            self._exchange.end(body)

    async def _ready(self) -> None:
        await _in_time(self._exchange.ready(), self._timeout_s)


class SendOut:
    """Sends messages."""

    def __init__(self, send: Send, timeout_s: float) -> None:
        self._send, self._timeout_s = send, timeout_s

    async def whole(self, status: int, headers: Headers, body: bytes) -> None:
        """See Out."""
        await _in_slices(self, status, headers, body)

    async def begin(self, status: int, headers: Headers) -> None:
        """See Out."""
        message = {"type": "http.response.start", "status": status, "headers": [*headers]}
        await _in_time(self._send(message), self._timeout_s)

    async def part(self, body: bytes, *, more: bool = True) -> None:
        """See Out."""
        message = {"type": "http.response.body", "body": body, "more_body": more}
        await _in_time(self._send(message), self._timeout_s)


async def _in_time(step: Awaitable[None], timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await step
    except OSError as error:  # of which a TimeoutError is one
        raise ClientGoneError from error


async def _in_slices(out: Out, status: int, headers: Headers, body: bytes) -> None:
    """Tens of MB are copied where the connection does not take them: others have their turn between."""
    await out.begin(status, [(b"content-length", b"%d" % len(body)), *headers])
    for start in range(0, max(1, len(body)), _SLICE_BYTES):
        more = start + _SLICE_BYTES < len(body)
        await out.part(body[start : start + _SLICE_BYTES], more=more)
        if more:
            await asyncio.sleep(0)
