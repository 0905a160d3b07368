"""Answers as ASGI responses: a body or a stream of server-sent events, cancelled at once when the client leaves.

Owns the race between the work and the client's disconnect, and the form of an error at each stage. Invariant: no work
of a request outlives its response.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing

import msgspec
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from kvcore.clock import SystemClock
from kvcore.errors import EngineError, KVFerryError
from kvcore.step_timeout import StepTimeout
from router.answering import ClientAnswer, TextPiece
from router.api.formatter import Formatter, sse
from router.api.http_errors import headers_for, reply_of

_log = logging.getLogger("router")
_now = SystemClock().now
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Turns:
    """Cuts one piece of work on the event loop, which calls `give_way` between any two of its steps."""

    def __init__(self, longest_s: float = 0.01) -> None:
        """`longest_s`: as long as others may wait for their turn."""
        self._longest_s = longest_s
        self._until = _now() + longest_s

    async def give_way(self) -> None:
        """Let others run, if this work has gone on for long enough."""
        if _now() >= self._until:
            await asyncio.sleep(0)
            self._until = _now() + self._longest_s


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

    `start`: makes the answer and its formatter. `send_timeout_s`: a client that takes nothing for so long is gone.
    """

    def __init__(
        self,
        start: Callable[[], Awaitable[tuple[ClientAnswer, Formatter]]],
        *,
        stream: bool,
        send_timeout_s: float,
    ) -> None:
        super().__init__()
        self._start = start
        self._stream = stream
        self._send_timeout_s = send_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry: ends when the answer has been sent, or the client has left and every leg is cancelled."""

        # Two tasks race: `work` makes and sends the answer, `gone` waits for the client's disconnect.
        #   1. `work` ends first: the answer is out, or its error has been answered, or the client took no more
        #      (_ClientGoneError). What else it raises came of ASGI's send: a bug of ours, raised below.
        #   2. `gone` ends first: the client has left. `work` is cancelled, and with it every leg.
        #   3. This call is cancelled (the server stops): both are.
        # In each case both tasks have ended before this returns, so no work outlives its response.
        work = asyncio.create_task(self._answer_in_time(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
            await asyncio.gather(work, gone, return_exceptions=True)
        error = None if work.cancelled() else work.exception()
        if error is not None and not isinstance(error, _ClientGoneError):
            raise error  # of ASGI's send: a bug of ours; what the work itself raised has been answered

    async def _answer_in_time(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, with a limit for each send."""
        try:
            async with StepTimeout() as sending:

                async def send_in_time(message: Message) -> None:
                    sending.start(self._send_timeout_s)
                    try:
                        await send(message)
                    except OSError as error:
                        raise _ClientGoneError from error
                    sending.stop()

                await self._answer(scope, receive, send_in_time)
        except TimeoutError as error:  # of a send
            raise _ClientGoneError from error

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        turns = Turns()
        try:
            answer, formatter = await self._start()
            async with aclosing(answer.pieces()) as pieces:
                if self._stream:
                    await self._send_stream(pieces, formatter, send, turns)
                    return
                async for piece in pieces:
                    formatter.take(piece)
                    await turns.give_way()
            reply: Response = Response(formatter.body(), media_type="application/json")
        except KVFerryError as error:
            reply = error_response(error)
        except _ClientGoneError:
            raise
        except Exception:  # request boundary
            _log.exception("request_failed")
            reply = error_response(EngineError("internal error"))
        await reply(scope, receive, send)

    async def _send_stream(
        self, pieces: AsyncGenerator[TextPiece], formatter: Formatter, send: Send, turns: Turns
    ) -> None:
        # Where a stream can be cut:
        #   1. before its first piece: the error goes on to `_answer`, which answers it with a status of its own;
        #   2. after it: the status is out, so the error is the last event, and `[DONE]` does not follow;
        #   3. by the client, at any send: nothing can be said to it any more.
        opening = b"".join(formatter.opening())
        first = await anext(pieces, None)
        await send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *self._extra_headers()]})
        body = opening + (formatter.chunk(first) if first else b"")
        await _write(send, body)
        try:
            async for piece in pieces:
                await _write(send, formatter.chunk(piece))
                await turns.give_way()
            last = formatter.closing()
        except KVFerryError as error:
            last = sse(reply_of(error))
        except _ClientGoneError:
            raise
        except Exception:  # request boundary; the status is out already
            _log.exception("stream_failed")
            last = sse(reply_of(EngineError("internal error")))
        await send({"type": "http.response.body", "body": last, "more_body": False})

    def _extra_headers(self) -> list[tuple[bytes, bytes]]:
        return [(name, value) for name, value in self.raw_headers if name not in (b"content-length", b"content-type")]


async def _write(send: Send, body: bytes) -> None:
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
