"""Calls to nodes over HTTP with kept-alive connections: deadlines, bounds, and every failure as one of kvcore.errors.

Owns what a failure means. The caller says what a refusal means. Decides nothing and retries nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

from kvcore.errors import DeadlineExceededError, KVFerryError, NoDescriptorsError, NodeUnavailableError, ProofError
from kvcore.http.connection import Feed, HttpConnection
from kvcore.http.errors import ConnectTimeoutError
from kvcore.http.pool import HttpPool
from kvcore.ports import why_unreachable
from kvcore.process.descriptors import are_exhausted, soft_limit
from kvcore.trust.http_proof import FrameSeal
from kvcore.trust.opening import OPEN, ClusterTrust

MAX_REPLY_BYTES = 16 << 20
MAX_ERROR_BYTES = 64 << 10
Refusal = Callable[[int, bytes, str], KVFerryError]
"""(status of 400 or more, the beginning of the body, URL) -> what it means."""


class HttpCalls:
    """Entered and left on one event loop; connects when first used. Cancelling a call drops its connection."""

    def __init__(
        self,
        refusal: Refusal,
        *,
        connect_timeout_s: float,
        max_connections: int,
        headers: Mapping[str, str],
        keepalive_s: float = 15.0,
        trust: ClusterTrust = OPEN,
    ) -> None:
        self._refusal = refusal
        self._pool = HttpPool(
            connect_timeout_s=connect_timeout_s,
            max_connections=max_connections,
            keepalive_s=keepalive_s,
            headers=headers,
            trust=trust,
        )

    def __repr__(self) -> str:
        return repr(self._pool)

    async def fetch(
        self,
        method: str,
        url: str,
        body: bytes,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        *,
        most: int = MAX_REPLY_BYTES,
    ) -> bytes:
        """The body of an answer, of at most so many bytes, all of it within `timeout_s`."""
        try:
            answer = await self._pool.call(method, url, body, timeout_s, num_bytes=most + 1, headers=headers)
        except OSError as error:
            raise _meaning(error, url, timeout_s) from error
        try:
            if answer.num_unread > most:
                raise NodeUnavailableError(f"{url} answered more than {most} bytes")
            reply = _proved(answer, url, answer.take())
            if answer.status >= 400:
                raise self._refusal(answer.status, reply[:MAX_ERROR_BYTES], url)
            return reply
        finally:
            answer.end()

    async def open(
        self, method: str, url: str, body: bytes, timeout_s: float, headers: Mapping[str, str] | None = None
    ) -> "OpenAnswer":
        """An answer with status 200, whose head and first bytes came within `timeout_s`, to be used by `with`. Every
        other outcome raises an error of kvcore.errors."""
        try:
            answer = await self._pool.call(method, url, body, timeout_s, headers=headers)
        except OSError as error:
            raise _meaning(error, url, timeout_s) from error
        opened = OpenAnswer(answer, url)
        if answer.status < 400:
            return opened
        with opened:
            said = await opened.beginning(MAX_ERROR_BYTES, timeout_s)
            raise self._refusal(answer.status, _proved(answer, url, said), url)

    async def aclose(self) -> None:
        """Close all connections. Idempotent."""
        self._pool.close()


class OpenAnswer:
    """An answer that is read part by part. Leaving its `with` ends it, and keeps its connection where that may be."""

    def __init__(self, answer: HttpConnection, url: str) -> None:
        self._answer = answer
        self._url = url
        self.finished = False
        """Set by a reader that has all that it wants, and expects nothing but the answer's end: the connection is kept
        for another call."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._answer.end(rests=self.finished)

    @property
    def seal(self) -> FrameSeal | None:
        """What opens its frames; None: they are not sealed."""
        return None if self._answer.proven is None else self._answer.proven.seal

    async def read(self, until: float) -> bytes:
        """What comes next, until then in the loop's time; empty: all has come. Raises errors of kvcore.errors."""
        if not self._answer.num_unread:
            try:
                await self._answer.wait(1, until)
            except OSError as error:
                raise _broken(error, self._url) from error
        return self._answer.take()

    async def pass_on(self, feed: Feed, until: float) -> bool:
        """See HttpConnection. Raises errors of kvcore.errors, and what `feed` raises."""
        try:
            return await self._answer.pass_on(feed, until)
        except OSError as error:
            raise _broken(error, self._url) from error

    async def beginning(self, most: int, timeout_s: float) -> bytes:
        """At most so many bytes of it, within `timeout_s`."""
        try:
            await self._answer.wait(most, asyncio.get_running_loop().time() + timeout_s)
        except OSError as error:
            raise _meaning(error, self._url, timeout_s) from error
        return self._answer.take()[:most]


def _proved(answer: HttpConnection, url: str, body: bytes) -> bytes:
    """The whole body, if it is the one that was proved, or none was."""
    if answer.proven is not None:
        try:
            answer.proven.check(body)
        except ProofError as error:
            raise NodeUnavailableError(f"{url}: {error.message}") from error
    return body


def _meaning(error: OSError, url: str, timeout_s: float) -> KVFerryError:
    if isinstance(error, TimeoutError):
        return _late(url, timeout_s)
    if isinstance(error, ConnectTimeoutError):
        return NodeUnavailableError(f"{url} could not be connected to in time")
    if are_exhausted(error):
        return NoDescriptorsError(
            f"no file descriptor is left for a connection to {url}: this process may have {soft_limit()}; "
            "raise its limit (ulimit -Hn, LimitNOFILE=) or lower router.max_requests"
        )
    return NodeUnavailableError(f"{url} cannot be reached or broke off: {why_unreachable(error)}")


def _broken(error: OSError, url: str) -> KVFerryError:
    """What it means in the midst of an answer."""
    if isinstance(error, TimeoutError):
        return DeadlineExceededError(f"{url} began an answer and says nothing more")
    return _meaning(error, url, 0.0)


def _late(url: str, timeout_s: float) -> DeadlineExceededError:
    return DeadlineExceededError(f"{url} did not answer within {timeout_s:.1f} s")


@asynccontextmanager
async def deadline(url: str, timeout_s: float) -> AsyncIterator[None]:
    """The block takes at most `timeout_s`: DeadlineExceededError."""
    try:
        async with asyncio.timeout(timeout_s):
            yield
    except TimeoutError as error:
        raise _late(url, timeout_s) from error
