"""Who watches the records of this process, and what each has not been told yet."""

import asyncio
from collections.abc import AsyncIterator, Callable

from metadata_server.records.base import Listing, Record, RecordsUpdate
from metadata_server.records.table import Batch


class Watchers:
    """`tell` them of each batch that was flushed. One that is more than `backlog` changes behind is given all again."""

    def __init__(self, listing: Callable[[str], Listing], backlog: int) -> None:
        self._listing = listing
        self._backlog = backlog
        self._watchers: set[_Watcher] = set()
        self._closed = False

    async def watch(self, prefix: str) -> AsyncIterator[RecordsUpdate]:
        """First all, then what changes; ends when they are closed."""
        watcher = _Watcher(prefix)
        self._watchers.add(watcher)
        try:
            while not self._closed:
                if watcher.behind:
                    listing = self._listing(prefix)
                    watcher.behind, watcher.changes = False, {}
                    yield RecordsUpdate(reset=True, records=listing.records, gone=(), revision=listing.revision)
                elif watcher.changes:
                    changes, watcher.changes = watcher.changes, {}
                    written = tuple(record for record in changes.values() if record is not None)
                    gone = tuple(key for key, record in changes.items() if record is None)
                    yield RecordsUpdate(reset=False, records=written, gone=gone, revision=watcher.revision)
                else:
                    watcher.news.clear()
                    await watcher.news.wait()
        finally:
            self._watchers.discard(watcher)

    def tell(self, batch: Batch) -> None:
        """It is flushed, and the listing has it."""
        for watcher in self._watchers:
            found = {key: record for key, record in batch.records.items() if key.startswith(watcher.prefix)}
            if not found or watcher.behind:
                continue
            for key in found:
                watcher.changes.pop(key, None)  # in the order of the last change of each
            watcher.changes.update(found)
            watcher.revision = batch.revision
            if len(watcher.changes) > self._backlog:
                watcher.behind, watcher.changes = True, {}
            watcher.news.set()

    def close(self) -> None:
        """End every watch."""
        self._closed = True
        for watcher in self._watchers:
            watcher.news.set()


class _Watcher:
    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.behind = True
        self.changes: dict[str, Record | None] = {}
        self.revision = 0
        self.news = asyncio.Event()
