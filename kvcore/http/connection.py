"""One connection to an HTTP/1.1 server, one call at a time.

Two timers an answer, futures and tasks are what a call costs beside its bytes: here one timer serves a connection for
all its life, and a reader is woken once for what it waits for. Invariants: nobody waits without a deadline; an answer
that was not read to its end takes its connection with it, but for a short rest that is known to come (`end`).
"""

import asyncio
import math
from collections.abc import Callable
from typing import cast

import httptools

from kvcore.http.errors import BrokenCallError
from kvcore.http.limits import CallLimits
from kvcore.ports import why_unreachable
from kvcore.trust.http_proof import ProvenReply

Feed = Callable[[bytes], float]
"""Gets parts of a body as they come. Until when it waits for the next one, in the loop's time; 0: it does not go on."""


class HttpConnection(asyncio.Protocol):
    """`on_free(connection, reusable)`: called once after each `begin`, when its call is over for good; `on_lost`: when
    a connection that is between calls is closed, by the server or for its age."""

    def __init__(
        self,
        on_free: Callable[["HttpConnection", bool], None],
        on_lost: Callable[["HttpConnection"], None],
        limits: CallLimits,
    ) -> None:
        self._on_free = on_free
        self._on_lost = on_lost
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = math.inf
        """When the timer does; inf: there is none."""
        self._deadline = math.inf
        self._waiter: asyncio.Future[None] | None = None
        self._feed: Feed | None = None
        """Gets what comes while a reader waits."""
        self._busy = self._rests = False
        self._paused = False
        self._want: float = 1
        self.is_reused = False
        """Whether the call under way is not its first."""
        self.status = 0
        """Of the answer; 0: its head has not come."""
        self.proven: ProvenReply | None = None
        """What the answer's head has proved to its owner, who sets it; None: nothing was asked for."""
        self._headers: dict[bytes, bytes] = {}
        self._parts: list[bytes] = []
        self._size = self._head_bytes = 0
        self._whole = self._interim = self._to_the_end = False
        self._keeps = True
        self._error: OSError | None = None

    def __repr__(self) -> str:
        state = "closed" if not self.is_open else "busy" if self._busy else "rests" if self._rests else "idle"
        return f"<HttpConnection {state}, status {self.status or '-'}, {self._size} bytes unread>"

    # --- its owner ---

    @property
    def is_open(self) -> bool:
        """Whether a call may be begun."""
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, head: bytes, body: bytes) -> None:
        """Send a request."""
        assert self._transport is not None and not self._busy, "one call at a time"
        self.status = self._size = self._head_bytes = 0
        self._headers, self._parts, self._error = {}, [], None
        self.proven = None
        self._whole = self._interim = self._to_the_end = False
        self._keeps = self._busy = True
        self._transport.writelines((head, body) if body else (head,))

    def keep(self, seconds: float) -> None:
        """It is between calls, for so long at most."""
        self.is_reused = True
        self._limit(self._loop.time() + seconds)

    def abort(self) -> None:
        """Drop it at once."""
        if self._transport is not None:
            self._transport.abort()

    # --- its reader ---

    @property
    def is_whole(self) -> bool:
        """Whether the answer has come to its end, read or not."""
        return self._whole

    @property
    def num_unread(self) -> int:
        """Bytes of the body that are there to be taken."""
        return self._size

    async def wait(self, num_bytes: int, until: float) -> None:
        """Until the head has come and so many bytes (at least one) of the body are there to be taken, or all of it.
        Raises TimeoutError after `until`, in the loop's time, and BrokenCallError; bytes that came before can still be
        taken."""
        if not (self._whole or self._size >= num_bytes):
            await self._woken(num_bytes, until)

    async def pass_on(self, feed: Feed, until: float) -> bool:
        """Give `feed` what comes of the body, straight from the socket, as long as it goes on: no task is woken for it.
        Whether there may be more; False: all has come and was given. Raises as `wait` does, the first part being waited
        for until then, and what `feed` raises."""
        while not self._size or (until := feed(self.take())):
            if self._whole:
                return False
            self._feed = feed
            try:
                await self._woken(math.inf, until)
            finally:
                self._feed = None
            if not (self._size or self._whole):  # woken by one that does not go on
                return True
        return True

    async def _woken(self, num_bytes: float, until: float) -> None:
        if self._error is not None:
            raise self._error
        self._want = num_bytes
        if self._paused:
            self._resume()
        self._limit(until)
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter, self._deadline, self._want = None, math.inf, 1

    def take(self) -> bytes:
        """What has come of the body and was not taken; empty: nothing, or it is at its end."""
        parts, self._parts, self._size = self._parts, [], 0
        if self._paused:
            self._resume()
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def header(self, name: str) -> str | None:
        """Of the answer; the first of this name."""
        found = self._headers.get(name.lower().encode("latin-1"))
        return None if found is None else found.decode("utf-8", "surrogateescape")

    def end(self, *, rests: bool = False) -> None:
        """The reader is done. The connection is kept if the answer is whole, or (`rests`: nothing but its end is to
        come) becomes so soon; else the server hears that nobody listens. Once a call; later ones do nothing."""
        if not self._busy:
            return
        self._busy = False
        self._parts, self._size = [], 0
        if rests and not self._whole and self._keeps and self._error is None:
            self._rests = True
            self._resume()
            self._limit(self._loop.time() + self._limits.rest_s)
            return
        self._free()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio.Protocol."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class

    def data_received(self, data: bytes) -> None:
        """See asyncio.Protocol."""
        if not (self._busy or self._rests):
            self.abort()  # nobody has asked
            return
        if not self.status:
            self._head_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broke(BrokenCallError(f"what it sent is no answer in HTTP/1.1: {error}"))
        except httptools.HttpParserUpgrade:
            self._broke(BrokenCallError("it wants to speak another protocol"))
        if not self.status and self._head_bytes > self._limits.max_head_bytes:
            self._broke(BrokenCallError(f"the head of its answer is over {self._limits.max_head_bytes} bytes"))
        if self._feed is not None and self._size:
            self._pass_on(self._feed)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio.Protocol."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._fires_at = None, math.inf
        if self._to_the_end and exc is None and self.status:
            self._whole = True
        if self._error is None:
            self._error = BrokenCallError("it closed the connection" if exc is None else why_unreachable(exc))
        if self._rests:
            self._free()
        elif self._busy:
            self._wake()
        else:
            self._on_lost(self)

    # --- httptools ---

    def on_message_begin(self) -> None:
        """An answer begins; behind one that is whole there must be none."""
        if self._whole:
            self._keeps = False
            if not self._busy:
                self.abort()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Of a head; those behind a body are nothing to us."""
        if not self.status:
            self._headers.setdefault(name.lower(), value)

    def on_headers_complete(self) -> None:
        """The head has come."""
        status = self._parser.get_status_code()
        if self._whole:
            return
        if status < 200:  # the answer is still to come
            self._interim = True
            self._headers = {}
            return
        self.status = status
        self._keeps = self._parser.should_keep_alive()
        if not self._keeps:
            self._to_the_end = not self._headers.keys() & {b"content-length", b"transfer-encoding"}

    def on_body(self, data: bytes) -> None:
        """A part of the body."""
        if self._whole:
            return
        self._size += len(data)
        if self._rests:
            if self._size > self._limits.max_rest_bytes:
                self._keeps = False
                self.abort()
            return
        self._parts.append(data)
        if self._size >= self._want:
            self._wake()
            if self._size >= self._limits.max_unread_bytes and not self._paused and self._transport is not None:
                self._paused = True
                self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """The answer is at its end."""
        if self._interim:
            self._interim = False
            return
        if self._whole:
            return
        self._whole = True
        if self._rests:
            self._free()
        else:
            self._wake()

    # --- inside ---

    def _resume(self) -> None:
        if self._paused and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def _wake(self) -> None:
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        if self._error is not None and not self._whole:
            waiter.set_exception(self._error)
        else:
            waiter.set_result(None)

    def _pass_on(self, feed: Feed) -> None:
        """Unless its reader has been woken, who then takes what has come himself."""
        waiter = self._waiter
        if waiter is None or waiter.done():
            return
        try:
            if until := feed(self.take()):
                self._limit(until)
            elif not waiter.done():
                waiter.set_result(None)
        except Exception as error:  # raised where it is waited for
            if not waiter.done():
                waiter.set_exception(error)

    def _broke(self, error: OSError) -> None:
        self._error = self._error or error
        self._wake()
        self.abort()

    def _free(self) -> None:
        self._rests = False
        self._deadline = math.inf
        sent = self._transport is not None and not self._transport.get_write_buffer_size()
        reusable = self._whole and self._keeps and self._error is None and sent and self.is_open
        if not reusable:
            self.abort()
        self._on_free(self, reusable)

    def _limit(self, until: float) -> None:
        """There is time until then. A timer that fires before is set again when it does."""
        self._deadline = until
        if self._fires_at > until:
            if self._timer is not None:
                self._timer.cancel()
            self._set_timer(until)

    def _set_timer(self, at: float) -> None:
        self._timer, self._fires_at = self._loop.call_at(at, self._fired), at

    def _fired(self) -> None:
        # 1. Nobody has a deadline now: the next one sets the timer.
        # 2. Whose deadline it was has another one by now: the timer is set for that.
        # 3. A reader waits: its call is late. 4. A rest has not come, or a connection is old: it is dropped.
        self._timer, self._fires_at = None, math.inf
        if self._deadline == math.inf:
            return
        if self._loop.time() < self._deadline:
            self._set_timer(self._deadline)
        elif self._waiter is not None:
            if not self._waiter.done():
                self._waiter.set_exception(TimeoutError())
        else:
            self.abort()
