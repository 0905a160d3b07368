"""How callers find the leader among several metadata servers: asked first, and followed to, in one round trip.

Owns which server is asked. A server that fails makes the next one the first to be asked; what it was asked is not asked
again, as it may have been done. One that does not lead has done nothing.
"""

from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Generic, Protocol, TypeVar

from kvcore.errors import MetadataUnavailableError, NotLeaderError
from metadata_server.client import MetadataTransport
from metadata_server.subscription import EventSource


class _Closed(Protocol):
    async def aclose(self) -> None: ...


_W = TypeVar("_W", bound=_Closed)


class _Ways(Generic[_W]):
    """A way to each server, opened when it is first wanted."""

    def __init__(self, urls: Sequence[str], connect: Callable[[str], _W]) -> None:
        self._urls = list(urls)
        self._connect = connect
        self._open: dict[str, _W] = {}
        self.url = self._urls[0]
        """Who is asked."""

    def way(self) -> _W:
        """To who is asked."""
        if self.url not in self._open:
            self._open[self.url] = self._connect(self.url)
        return self._open[self.url]

    def failed(self, url: str) -> None:
        """`url` did not answer, or knows no leader: the next is asked, unless that was changed meanwhile."""
        if url == self.url:
            self.url = self._urls[(self._urls.index(url) + 1) % len(self._urls)]

    def follow(self, url: str, leader: str) -> bool:
        """Whether `url` named one of the others, who is asked from now on."""
        if leader == url or leader not in self._urls:
            self.failed(url)
            return False
        self.url = leader
        return True

    async def aclose(self) -> None:
        """Close them all. Idempotent."""
        ways, self._open = self._open, {}
        for way in ways.values():
            await way.aclose()


class FollowingTransport:
    """`MetadataTransport` to whichever of `urls` leads; `connect` makes one to a single server."""

    def __init__(self, urls: Sequence[str], connect: Callable[[str], MetadataTransport]) -> None:
        self._ways = _Ways(urls, connect)

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """See `MetadataTransport.call`."""
        url = self._ways.url
        try:
            return await self._ways.way().call(path, body, timeout_s)
        except NotLeaderError as error:
            if not self._ways.follow(url, error.leader):
                raise
            url = self._ways.url
        except MetadataUnavailableError:
            self._ways.failed(url)
            raise
        try:
            return await self._ways.way().call(path, body, timeout_s)
        except MetadataUnavailableError:
            self._ways.failed(url)
            raise

    async def aclose(self) -> None:
        """See `MetadataTransport.aclose`."""
        await self._ways.aclose()


class FollowingSource:
    """`EventSource` of whichever of `urls` leads."""

    def __init__(self, urls: Sequence[str], connect: Callable[[str], EventSource]) -> None:
        self._ways = _Ways(urls, connect)

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        """See `EventSource.batches`."""
        for again in (True, False):
            url = self._ways.url
            try:
                async with aclosing(self._ways.way().batches(epoch, from_seq)) as batches:
                    async for batch in batches:
                        yield batch
                return
            except NotLeaderError as error:
                if not (self._ways.follow(url, error.leader) and again):
                    raise
            except MetadataUnavailableError:
                self._ways.failed(url)
                raise

    async def aclose(self) -> None:
        """See `EventSource.aclose`."""
        await self._ways.aclose()
