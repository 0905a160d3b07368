"""Records in a file: a RecordsTable whose batches one thread writes into an SqliteFile."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from kvcore.clock import Clock
from metadata_server.records.embedded import EmbeddedRecords
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.sqlite_file import SqliteFile
from metadata_server.records.table import Batch, RecordsTable


async def sqlite_records(path: Path, clock: Clock, limits: RecordsLimits = RecordsLimits()) -> EmbeddedRecords:
    """Those of the file, which is made if there is none. Raises as SqliteFile does."""
    thread = ThreadPoolExecutor(1, "records")
    try:
        file = await asyncio.get_running_loop().run_in_executor(thread, SqliteFile, path, limits)
    except BaseException:
        thread.shutdown(wait=False)
        raise
    table = RecordsTable(file.records.values(), file.leases, file.revision, limits)
    file.records.clear()
    return EmbeddedRecords(table, clock, SqliteJournal(file, thread), limits)


class SqliteJournal:
    """Writes batches into a file, in a thread of its own."""

    def __init__(self, file: SqliteFile, thread: ThreadPoolExecutor) -> None:
        self._file = file
        self._thread = thread

    async def write(self, batch: Batch) -> None:
        """See Journal. When it is cancelled the batch is written all the same."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._file.write, batch)

    async def aclose(self) -> None:
        """After what is being written. Idempotent it is not."""
        try:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._file.close)
        finally:
            self._thread.shutdown(wait=False)
