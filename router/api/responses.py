"""Answers as ASGI responses: a body or a stream of server-sent events, cancelled at once when the client leaves.

Owns the race between the work and the client's disconnect, and the form of an error at each stage. Invariant: no work
of a request outlives its response.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvcore.clock import SystemClock
from kvcore.errors import EngineError, KVFerryError
from kvcore.process.http_exchange import HttpExchange, exchange_of, told_when_gone
from kvcore.step_timeout import StepTimeout
from router.admission.no_node import Tell
from router.api.formats.formatter import Formatter
from router.api.http_errors import headers_for, reply_of
from router.client_answer import ClientAnswer, TextPiece

APPROXIMATE = b"x-kvferry-approximate"
_log = logging.getLogger("router")
_now = SystemClock().now
_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_SLICE_BYTES = 1 << 20
_WAITING = b": no node is up, waiting for one\n\n"


class Turns:
    """Cuts one piece of work on the event loop, which calls `give_way` between any two of its steps."""

    def __init__(self, longest_s: float = 0.005) -> None:
        """`longest_s`: as long as others may wait for their turn."""
        self._longest_s = longest_s
        self._until = _now() + longest_s

    @property
    def over(self) -> bool:
        """Whether this work has gone on for long enough."""
        return _now() >= self._until

    async def give_way(self) -> None:
        """Let others run, if it has."""
        if self.over:
            await asyncio.sleep(0)
            self._until = _now() + self._longest_s


class _Gathering:
    """Takes every piece of an answer that is sent in one body."""

    takes = True

    def __init__(self, formatter: Formatter) -> None:
        self.put = formatter.take


class _Writing:
    """Takes pieces of a stream as long as its client takes what is sent. `exchange`: whose body has begun."""

    def __init__(self, formatter: Formatter, exchange: HttpExchange) -> None:
        self._formatter = formatter
        self._exchange = exchange
        self.begun = False
        """The first piece is out."""

    @property
    def takes(self) -> bool:
        """See PieceSink."""
        return self.begun and self._exchange.takes

    def put(self, piece: TextPiece) -> None:
        """See PieceSink."""
        self._exchange.write(self._formatter.chunk(piece))


class _ClientGoneError(Exception):
    """The client took no more."""


class JsonReply(Response):
    """A msgspec value as JSON."""

    media_type = "application/json"

    def __init__(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(body), status_code=status, headers=headers)


def error_response(error: KVFerryError) -> JsonReply:
    """OpenAI's body for one of our errors."""
    return JsonReply(reply_of(error), error.http_status, headers_for(error))


class AnswerResponse(Response):
    """Runs the work when it is sent. The status is decided by the first piece: an error before it is an HTTP error,
    one after it an SSE event that ends the stream without `[DONE]`.

    `start(tell)`: makes the answer and its formatter, and calls `tell` now and then while it waits for a node: a client
    of a stream gets its head and a comment then. `send_timeout_s`: a client that takes nothing for so long is gone.
    `failed`: the event of an error in a stream that has not got to its formatter.
    """

    def __init__(
        self,
        start: Callable[[Tell], Awaitable[tuple[ClientAnswer, Formatter]]],
        *,
        stream: bool,
        send_timeout_s: float,
        failed: Callable[[KVFerryError], bytes],
    ) -> None:
        super().__init__()
        self._start = start
        self._stream = stream
        self._send_timeout_s = send_timeout_s
        self._failed = failed
        self._made: ClientAnswer | None = None
        self._begun = False
        """The head of a stream is out."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry: ends when the answer has been sent, or the client has left and every leg is cancelled."""

        # The answer is made and sent by this task. It ends in one of four ways:
        #   1. The answer is out, or its error has been answered.
        #   2. The client has left: `told_when_gone` ends the block, which cancels every leg, by a TimeoutError.
        #   3. It took nothing for too long, or its connection broke in a send: so too, or by _ClientGoneError.
        #   4. This call is cancelled (the server stops).
        # In each case the legs have ended before this returns, as `_answer` closes what runs them.
        try:
            async with StepTimeout() as sending:

                async def send_in_time(message: Message) -> None:
                    sending.start(self._send_timeout_s)
                    try:
                        await send(message)
                    except OSError as error:
                        raise _ClientGoneError from error
                    sending.stop()

                with told_when_gone(scope, receive, sending.expire):
                    await self._answer(send_in_time, exchange_of(scope))
        except (TimeoutError, _ClientGoneError):
            return

    async def _answer(self, send: Send, exchange: HttpExchange | None) -> None:
        """`exchange`: by which pieces of a stream can be written without waking this task; None: there is none."""
        turns = Turns()
        try:
            answer, formatter = await self._start(partial(self._tell, send))
            self._made = answer
            if self._stream:
                writing = None if exchange is None else _Writing(formatter, exchange)
                async with aclosing(answer.pieces(writing)) as pieces:
                    await self._send_stream(pieces, formatter, send, turns, writing)
                return
            async with aclosing(answer.pieces(_Gathering(formatter))) as pieces:
                async for piece in pieces:
                    formatter.take(piece)
                    if turns.over:
                        await turns.give_way()
            body = formatter.body()
        except KVFerryError as error:
            await self._refuse(error, send)
            return
        except _ClientGoneError:
            raise
        except Exception:  # request boundary
            _log.exception("request_failed")
            await self._refuse(EngineError("internal error"), send)
            return
        await _send_whole(send, 200, [*_JSON, *_approximate(answer)], body)

    async def _refuse(self, error: KVFerryError, send: Send) -> None:
        if self._begun:  # it had waited
            await send({"type": "http.response.body", "body": self._failed(error), "more_body": False})
            return
        reply = error_response(error)
        headers = [(name, value) for name, value in reply.raw_headers if name != b"content-length"]
        await _send_whole(send, reply.status_code, headers, bytes(reply.body))

    async def _send_stream(
        self,
        pieces: AsyncGenerator[TextPiece],
        formatter: Formatter,
        send: Send,
        turns: Turns,
        writing: _Writing | None,
    ) -> None:
        # Where a stream can be cut:
        #   1. before its first piece: the error goes on to `_answer`, which answers it with a status of its own, or
        #      where the client was told that it waits as in the next case;
        #   2. after it: the status is out, so the error is the last event, and `[DONE]` does not follow;
        #   3. by the client, at any send: nothing can be said to it any more.
        opening = b"".join(formatter.opening())
        first = await anext(pieces, None)
        await self._begin(send)
        if body := opening + (formatter.chunk(first) if first else b""):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        if writing is not None:
            writing.begun = True
        try:
            async for piece in pieces:
                if body := formatter.chunk(piece):
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                if turns.over:
                    await turns.give_way()
            last = formatter.closing()
        except KVFerryError as error:
            last = formatter.failure(error)
        except _ClientGoneError:
            raise
        except Exception:  # request boundary; the status is out already
            _log.exception("stream_failed")
            last = formatter.failure(EngineError("internal error"))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    async def _tell(self, send: Send) -> None:
        """The request waits for a node. Only in a stream can that be said."""
        if self._stream:
            await self._begin(send)
            await send({"type": "http.response.body", "body": _WAITING, "more_body": True})

    async def _begin(self, send: Send) -> None:
        if not self._begun:
            self._begun = True
            await send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *_approximate(self._made)]})


def _approximate(answer: ClientAnswer | None) -> list[tuple[bytes, bytes]]:
    """The header that says whether an answer to a prompt that names documents is approximate. A stream's goes out with
    the first token: it says so of prompts that have none yet, unless nothing of theirs is reused."""
    if answer is None or answer.approximate_tokens is None:
        return []
    return [(APPROXIMATE, b"true" if answer.may_be_approximate else b"false")]


def failed_event(error: KVFerryError) -> bytes:
    """By its name the libraries of OpenAI's clients know it."""
    return b"event: error\ndata: " + msgspec.json.encode(reply_of(error)) + b"\n\n"


async def _send_whole(send: Send, status: int, headers: Sequence[tuple[bytes, bytes]], body: bytes) -> None:
    length = (b"content-length", b"%d" % len(body))
    await send({"type": "http.response.start", "status": status, "headers": [length, *headers]})
    for start in range(0, max(1, len(body)), _SLICE_BYTES):
        more = start + _SLICE_BYTES < len(body)
        await send({"type": "http.response.body", "body": body[start : start + _SLICE_BYTES], "more_body": more})
        if more:  # tens of MB are copied where the connection does not take them: others have their turn between
            await asyncio.sleep(0)
