"""Answers as ASGI responses: a body or a stream of server-sent events, cancelled at once when the client leaves.

Owns the race between the work and the client's disconnect, and the form of an error at each stage. Invariant: no work
of a request outlives its response.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvcore.clock import SystemClock
from kvcore.errors import EngineError, KVFerryError
from kvcore.process.http_exchange import HttpExchange, exchange_of, told_when_gone
from router.admission.no_node import Tell
from router.api.formats.formatter import Formatter
from router.api.http_errors import headers_for, reply_of
from router.api.out import ClientGoneError, Out, out_of
from router.api.silences import Silences
from router.client_answer import ClientAnswer, TextPiece

APPROXIMATE = b"x-kvferry-approximate"
_log = logging.getLogger("router")
_now = SystemClock().now
_JSON = [(b"content-type", b"application/json")]
_SSE = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
_WAITING = b": no node is up, waiting for one\n\n"


class Turns:
    """Cuts one piece of work on the event loop, which calls `give_way` between any two of its steps."""

    def __init__(self, longest_s: float = 0.005) -> None:
        """`longest_s`: as long as others may wait for their turn."""
        self._longest_s = longest_s
        self._until: float | None = None
        """None: it has not begun."""

    @property
    def over(self) -> bool:
        """Whether this work has gone on for long enough, since it was first asked this."""
        now = _now()
        if self._until is None:
            self._until = now + self._longest_s
        return now >= self._until

    async def give_way(self) -> None:
        """Let others run, if it has."""
        if self.over:
            await asyncio.sleep(0)
            self._until = _now() + self._longest_s


class _GatheringSink:
    """Takes every piece of an answer that is sent in one body."""

    takes = True

    def __init__(self, formatter: Formatter, turns: Turns) -> None:
        self.put = formatter.take
        self._turns = turns

    async def give(self, piece: TextPiece) -> None:
        """See PieceSink."""
        self.put(piece)
        if self._turns.over:
            await self._turns.give_way()


class _StreamSink:
    """Takes the pieces of a stream. `exchange`: by which those are written that its client takes at once."""

    def __init__(
        self,
        formatter: Formatter,
        turns: Turns,
        out: Out,
        begin: Callable[[], Awaitable[None]],
        exchange: HttpExchange | None,
    ) -> None:
        self._formatter, self._turns, self._out, self._begin = formatter, turns, out, begin
        self._exchange = exchange
        self._opening = b"".join(formatter.opening())  # now: it says how many tokens there have been
        self.begun = self.silent = False
        """`begun`: the head and the first piece, if there is any, are out. `silent`: see Silences."""

    @property
    def takes(self) -> bool:
        """See PieceSink."""
        return self.begun and self._exchange is not None and self._exchange.takes

    def put(self, piece: TextPiece) -> None:
        """See PieceSink."""
        assert self._exchange is not None, "it takes none"
        self.silent = False
        self._exchange.write(self._formatter.chunk(piece))

    def comment(self, text: bytes) -> None:
        """See Silences."""
        if self._exchange is not None and self._exchange.takes:
            self._exchange.write(text)

    async def give(self, piece: TextPiece) -> None:
        """See PieceSink."""
        self.silent = False
        if not self.begun:
            await self.begin(piece)
        elif body := self._formatter.chunk(piece):
            await self._out.part(body)
        if self._turns.over:
            await self._turns.give_way()

    async def begin(self, first: TextPiece | None = None) -> None:
        """The head, and all that comes before and with the first piece; None: there is none. Once."""
        if self.begun:
            return
        body = self._opening + (self._formatter.chunk(first) if first else b"")
        await self._begin()
        if body:
            await self._out.part(body)
        self.begun = True


class JsonReply(Response):
    """A msgspec value as JSON."""

    media_type = "application/json"

    def __init__(self, body: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        super().__init__(msgspec.json.encode(body), status_code=status, headers=headers)


def error_response(error: KVFerryError) -> JsonReply:
    """OpenAI's body for one of our errors."""
    return JsonReply(reply_of(error), error.http_status, headers_for(error))


class AnswerResponse:
    """An ASGI application that runs the work when it is called. The status is decided by the first piece: an error
    before it is an HTTP error, one after it an SSE event that ends the stream without `[DONE]`.

    `start(tell)`: makes the answer and its formatter, and calls `tell` now and then while it waits for a node: a client
    of a stream gets its head and a comment then. `send_timeout_s`: a client that takes nothing for so long is gone.
    `failed`: the event of an error in a stream that has not got to its formatter. `silences`: by which streams are
    kept open.
    """

    def __init__(
        self,
        start: Callable[[Tell], Awaitable[tuple[ClientAnswer, Formatter]]],
        *,
        stream: bool,
        send_timeout_s: float,
        failed: Callable[[KVFerryError], bytes],
        silences: Silences,
    ) -> None:
        self._start = start
        self._stream = stream
        self._send_timeout_s = send_timeout_s
        self._failed = failed
        self._silences = silences
        self._made: ClientAnswer | None = None
        self._begun = False
        """The head of a stream is out."""
        self._left = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI entry: ends when the answer has been sent, or the client has left and every leg is cancelled."""

        # The answer is made and sent by this task. It ends in one of four ways:
        #   1. The answer is out, or its error has been answered.
        #   2. The client has left: `told_when_gone` cancels this task, and so every leg, and nobody else hears of it.
        #   3. It took nothing for too long, or its connection broke in a send: so too, by ClientGoneError.
        #   4. This call is cancelled (the server stops).
        # In each case the legs have ended before this returns, as what runs them is left on the way here.
        task, out = asyncio.current_task(), out_of(scope, send, self._send_timeout_s)
        assert task is not None

        def leave() -> None:
            self._left = True
            task.cancel()

        try:
            with told_when_gone(scope, receive, leave):
                await self._answer(out, exchange_of(scope))
        except ClientGoneError:
            return
        except asyncio.CancelledError:
            if not self._left or task.uncancel():
                raise

    async def _answer(self, out: Out, exchange: HttpExchange | None) -> None:
        """`exchange`: by which pieces of a stream can be written without waking this task; None: there is none."""
        turns = Turns()
        try:
            answer, formatter = await self._start(partial(self._tell, out))
            self._made = answer
            if self._stream:
                await self._send_stream(answer, formatter, turns, out, exchange)
                return
            await answer.give_to(_GatheringSink(formatter, turns))
            body = formatter.body()
        except KVFerryError as error:
            await self._refuse(error, out)
            return
        except ClientGoneError:
            raise
        except Exception:  # request boundary
            _log.exception("request_failed")
            await self._refuse(EngineError("internal error"), out)
            return
        await out.whole(200, [*_JSON, *_approximate(answer)], body)

    async def _refuse(self, error: KVFerryError, out: Out) -> None:
        if self._begun:  # it had waited
            await out.part(self._failed(error), more=False)
            return
        reply = error_response(error)
        headers = [(name, value) for name, value in reply.raw_headers if name != b"content-length"]
        await out.whole(reply.status_code, headers, bytes(reply.body))

    async def _send_stream(
        self, answer: ClientAnswer, formatter: Formatter, turns: Turns, out: Out, exchange: HttpExchange | None
    ) -> None:
        # Where a stream can be cut:
        #   1. before its first piece: the error goes on to `_answer`, which answers it with a status of its own, or
        #      where the client was told that it waits as in the next case;
        #   2. after it: the status is out, so the error is the last event, and `[DONE]` does not follow;
        #   3. by the client, at any send: nothing can be said to it any more.
        stream = _StreamSink(formatter, turns, out, partial(self._begin, out), exchange)
        self._silences.watch(stream)
        try:
            await answer.give_to(stream)
            await stream.begin()
            last = formatter.closing()
        except KVFerryError as error:
            if not stream.begun:
                raise
            last = formatter.failure(error)
        except ClientGoneError:
            raise
        except Exception:  # request boundary; the status is out already
            if not stream.begun:
                raise
            _log.exception("stream_failed")
            last = formatter.failure(EngineError("internal error"))
        finally:
            self._silences.leave(stream)
        await out.part(last, more=False)

    async def _tell(self, out: Out) -> None:
        """The request waits for a node. Only in a stream can that be said."""
        if self._stream:
            await self._begin(out)
            await out.part(_WAITING)

    async def _begin(self, out: Out) -> None:
        if not self._begun:
            self._begun = True
            await out.begin(200, [*_SSE, *_approximate(self._made)])


def _approximate(answer: ClientAnswer | None) -> list[tuple[bytes, bytes]]:
    """The header that says whether an answer to a prompt that names documents is approximate. A stream's goes out with
    the first token: it says so of prompts that have none yet, unless nothing of theirs is reused."""
    if answer is None or answer.approximate_tokens is None:
        return []
    return [(APPROXIMATE, b"true" if answer.may_be_approximate else b"false")]


def failed_event(error: KVFerryError) -> bytes:
    """By its name the libraries of OpenAI's clients know it."""
    return b"event: error\ndata: " + msgspec.json.encode(reply_of(error)) + b"\n\n"
