"""A metadata server in the test's own loop, behind HTTP or called directly: what conformance suites run over."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

from support.metadata_words import new_state

from kvcore.clock import Clock, SystemClock
from kvcore.errors import MetadataUnavailableError, OverloadedError
from kvcore.process.asgi import AsgiServer
from kvcore.telemetry import Metrics
from metadata_server.client import MetadataClient, MetadataTransport
from metadata_server.core import MetadataCore
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.shell.app import create_app
from metadata_server.subscription import EventSource

MAX_BODY = 1 << 20


class DirectTransport:
    """`MetadataTransport` that calls a core in the same loop."""

    def __init__(self, core: MetadataCore) -> None:
        self.core: MetadataCore | None = core

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        if self.core is None:
            raise MetadataUnavailableError("closed")
        try:
            async with asyncio.timeout(timeout_s):
                return await self.core.dispatch(path, body)
        except (TimeoutError, OverloadedError) as error:
            raise MetadataUnavailableError(str(error)) from error

    async def aclose(self) -> None:
        self.core = None


class DirectEventSource:
    """`EventSource` that follows a core in the same loop; `core` None: unreachable."""

    def __init__(self, core: MetadataCore | None) -> None:
        self.core = core

    async def batches(self, epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
        if self.core is None:
            raise MetadataUnavailableError("down")
        async for batch in self.core.events(epoch, from_seq):
            yield batch

    async def aclose(self) -> None:
        self.core = None


class Rig:
    """`core`, a `client` of it, and `source` for an IndexSubscription."""

    def __init__(
        self, core: MetadataCore, client: MetadataClient, source: EventSource, url: str | None, clock: Clock
    ) -> None:
        self.core, self.client, self.source, self.url, self.clock = core, client, source, url, clock


@asynccontextmanager
async def metadata_rig(over: str, **state_settings: Any) -> AsyncIterator[Rig]:
    """`over`: `http` or `direct`."""
    clock = SystemClock()
    core = MetadataCore(new_state(**state_settings), clock)
    transport: MetadataTransport
    source: EventSource
    url: str | None = None
    async with AsyncExitStack() as stack:
        ticking = asyncio.create_task(core.run())
        stack.push_async_callback(end, ticking)
        if over == "http":
            server = AsgiServer(create_app(core, clock, Metrics(), MAX_BODY), "127.0.0.1", 0)
            await server.start()
            stack.push_async_callback(server.aclose)
            transport, source, url = HttpMetadataTransport(server.url), HttpEventSource(server.url), server.url
        else:
            transport, source = DirectTransport(core), DirectEventSource(core)
        stack.callback(core.stop)
        stack.push_async_callback(source.aclose)
        stack.push_async_callback(transport.aclose)
        yield Rig(core, MetadataClient(transport, clock, 5.0), source, url, clock)


async def end(task: "asyncio.Task[None]") -> None:
    """Cancel and await."""
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task


async def until(condition: Callable[[], object], timeout_s: float = 60.0) -> None:
    """Let the loop run until `condition()` holds; it is looked at after each turn of the loop."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - any expression: nobody could set an event for it
            await asyncio.sleep(0.001)
