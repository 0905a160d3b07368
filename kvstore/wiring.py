"""The one place where a KVStore is made with its metadata client and its transports, and where they are closed."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from kvcore.clock import Clock, SystemClock
from kvcore.trust.opening import open_trust
from kvcore.types import KVSpec
from kvstore.integrity.checks import Integrity
from kvstore.placement import Placement
from kvstore.settings import KVStoreSettings
from kvstore.store import KVStore
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client
from transfer.select import TransferSelector, build_transfer


@dataclass(frozen=True, slots=True)
class OpenedStore:
    """A store in use; `transports`: segment id -> the transport that reaches it, as far as segments were met."""

    store: KVStore
    transports: Callable[[], dict[str, str]] = dict

    def totals(self) -> dict[str, int]:
        """The store's counters, and `moved.<transport>.<direction>.bytes` and `.us`."""
        moved = {
            f"moved.{move.transport}.{move.direction}.{unit}": value
            for move in self.store.moved()
            for unit, value in (("bytes", move.num_bytes), ("us", int(move.seconds * 1e6)))
        }
        return self.store.counters() | moved


StoreOpener = Callable[[KVStoreSettings, KVSpec], AbstractAsyncContextManager[OpenedStore]]
"""Entered on the loop that will use the store; `open_store` is one."""


class StoreWiring:
    """Metadata client and transports of one process, made by `open_wiring`, which also closes what is made of them."""

    def __init__(
        self,
        settings: KVStoreSettings,
        clock: Clock,
        *,
        metadata: MetadataClient,
        transfer: TransferSelector,
        integrity: Integrity,
        stack: AsyncExitStack,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._metadata = metadata
        self._transfer = transfer
        self._integrity = integrity
        self._stack = stack

    def open_store(self, spec: KVSpec) -> OpenedStore:
        """A store for KV of this kind: to be called when the engine knows its `spec`."""
        settings = self._settings
        store = KVStore(
            spec=spec,
            node_id=settings.node_id,
            incarnation=settings.incarnation,
            metadata=self._metadata,
            transfer=self._transfer,
            clock=self._clock,
            host_id=settings.host_id,
            config=settings.store,
            integrity=self._integrity,
        )
        self._stack.push_async_callback(store.aclose)
        return OpenedStore(store, lambda: dict(self._transfer.choices()))


@asynccontextmanager
async def open_wiring(settings: KVStoreSettings, clock: Clock) -> AsyncIterator[StoreWiring]:
    """Over HTTP and the configured transports. Raises ConfigError where a transport or the secret cannot be had.

    Closes stores, transports and metadata client, in this order.
    """
    trust = await asyncio.to_thread(open_trust, settings.trust)
    integrity = Integrity(settings.verify, trust.secrets, encrypt=settings.encrypt)
    async with AsyncExitStack() as stack:
        metadata = connect_client(settings.metadata, clock, trust)
        stack.push_async_callback(metadata.aclose)
        transfer = build_transfer(settings.transport, settings.host_id, trust=trust)
        stack.push_async_callback(transfer.aclose)
        yield StoreWiring(settings, clock, metadata=metadata, transfer=transfer, integrity=integrity, stack=stack)


@asynccontextmanager
async def open_store(settings: KVStoreSettings, spec: KVSpec) -> AsyncIterator[OpenedStore]:
    """A store with a wiring of its own, on the clock of this machine. Raises ConfigError as `open_wiring` does."""
    async with open_wiring(settings, SystemClock()) as wiring:
        yield wiring.open_store(spec)


@asynccontextmanager
async def open_placement(settings: KVStoreSettings) -> AsyncIterator[Placement]:
    """Where chunks lie, for a process that moves no bytes. Give-backs under way have a second to end."""
    clock = SystemClock()
    metadata = connect_client(settings.metadata, clock, open_trust(settings.trust))
    placement = Placement(
        metadata, node_id=settings.node_id, incarnation=settings.incarnation, clock=clock, config=settings.store
    )
    try:
        yield placement
    finally:
        await placement.aclose(1.0)
        await metadata.aclose()
