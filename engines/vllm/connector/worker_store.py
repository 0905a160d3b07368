"""A worker half's own way to the store: metadata client, transports, store, wired from the connector's settings."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from engines.vllm.connector.settings import ConnectorSettings
from kvcore.clock import SystemClock
from kvcore.types import KVSpec
from kvstore.store import KVStore
from metadata_server.client import HttpMetadataTransport, MetadataClient
from transfer.select import build_transfer


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store; `transports` as WorkerSample.transports."""

    store: KVStore
    transports: Callable[[], dict[str, str]] = dict

    def totals(self) -> dict[str, int]:
        """As process_messages.Sample.store."""
        moved = {
            f"moved.{move.transport}.{move.direction}.{unit}": value
            for move in self.store.moved()
            for unit, value in (("bytes", move.num_bytes), ("us", int(move.seconds * 1e6)))
        }
        return self.store.counters() | moved


StoreOpener = Callable[[ConnectorSettings, KVSpec], AbstractAsyncContextManager[OpenedStore]]
"""Entered on the loop that will use the store."""


@asynccontextmanager
async def open_store(settings: ConnectorSettings, spec: KVSpec) -> AsyncIterator[OpenedStore]:
    """Over HTTP and the configured transports. Raises ConfigError where a transport cannot be had."""
    clock = SystemClock()
    async with AsyncExitStack() as stack:
        metadata = MetadataClient(HttpMetadataTransport(settings.metadata_url), clock, settings.metadata_timeout_s)
        stack.push_async_callback(metadata.aclose)
        transfer = build_transfer(settings.transport, settings.host_id)
        stack.push_async_callback(transfer.aclose)
        store = KVStore(
            spec=spec,
            node_id=settings.node_id,
            incarnation=settings.incarnation,
            metadata=metadata,
            transfer=transfer,
            clock=clock,
            host_id=settings.host_id,
            config=settings.store,
            verify=settings.verify,
        )
        stack.push_async_callback(store.aclose)
        yield OpenedStore(store, lambda: dict(transfer.choices()))
