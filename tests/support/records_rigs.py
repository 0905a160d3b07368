"""Records of each kind, running in the test's own loop: what their conformance suite runs over."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from support.metadata_rigs import end

from kvcore.clock import SystemClock
from metadata_server.records.base import Records
from metadata_server.records.memory import memory_records
from metadata_server.records.sqlite import sqlite_records

Open = Callable[[], Awaitable[Records]]


@dataclass(frozen=True)
class RecordsKind:
    """What one kind can do, and how long its shortest lease is."""

    survives: bool
    """What was written is there when they are opened again."""
    lease_s: float


KINDS = {"memory": RecordsKind(False, 0.1), "sqlite": RecordsKind(True, 0.1)}


@asynccontextmanager
async def running(records: Records) -> AsyncIterator[Records]:
    """Closed afterwards, in the order in which a process closes them."""
    async with AsyncExitStack() as stack:
        task = asyncio.ensure_future(records.run())
        stack.push_async_callback(end, task)
        stack.push_async_callback(records.aclose)
        yield records


def opener(kind: str, folder: Path) -> Open:
    """Each call opens the same records."""

    async def memory() -> Records:
        return memory_records(SystemClock())

    async def sqlite() -> Records:
        return await sqlite_records(folder / "records.sqlite", SystemClock())

    return {"memory": memory, "sqlite": sqlite}[kind]
