"""Records of each kind, running in the test's own loop: what their conformance suite runs over."""

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.etcd_server import EtcdServer, needs_etcd
from support.metadata_rigs import end

from kvcore.clock import SystemClock
from kvcore.config.records import EtcdRecordsConfig
from metadata_server.records.base import Records
from metadata_server.records.etcd.access import etcd_access
from metadata_server.records.memory import memory_records
from metadata_server.records.sqlite import sqlite_records

Open = Callable[[], Awaitable[Records]]


@dataclass(frozen=True)
class RecordsKind:
    """What one kind can do, and how long its shortest lease is."""

    survives: bool
    """What was written is there when they are opened again."""
    lease_s: float


KINDS = {"memory": RecordsKind(False, 0.1), "sqlite": RecordsKind(True, 0.1), "etcd": RecordsKind(True, 1.0)}
ALL_KINDS = ["memory", "sqlite", pytest.param("etcd", marks=needs_etcd)]
"""For a test's parameter."""


@asynccontextmanager
async def running(records: Records) -> AsyncIterator[Records]:
    """Closed afterwards, in the order in which a process closes them."""
    async with AsyncExitStack() as stack:
        task = asyncio.ensure_future(records.run())
        stack.push_async_callback(end, task)
        stack.push_async_callback(records.aclose)
        yield records


def opener(kind: str, folder: Path, etcd: Callable[[], EtcdServer]) -> Open:
    """Each call opens the same records. `etcd` starts one, or gives the one that runs."""
    name = secrets.token_hex(8)

    async def memory() -> Records:
        return memory_records(SystemClock())

    async def sqlite() -> Records:
        return await sqlite_records(folder / "records.sqlite", SystemClock())

    async def of_etcd() -> Records:
        from metadata_server.records.etcd.records import open_etcd

        config = EtcdRecordsConfig(endpoints=etcd().urls, timeout_s=10.0)
        return await open_etcd(etcd_access(config, name), SystemClock())

    return {"memory": memory, "sqlite": sqlite, "etcd": of_etcd}[kind]
