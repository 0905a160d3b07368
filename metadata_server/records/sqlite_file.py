"""The file of the embedded records: SQLite in WAL mode, every commit flushed, and proof that what it says is whole.

Blocking; for one thread. SQLite tells a torn page of its main file, but ends its WAL at the first frame that is damaged
and says nothing: records that were answered would be gone. Three things find that, and every other way to lose a row:
each row has a CRC over its key and value; one row of state has the number of commits, and the exclusive or of the CRCs
of all rows; and beside the file, FILE.mark has the number of commits that were answered. The mark is written after each
flush without one of its own: it may be behind after a power cut, never ahead.
"""

import os
import sqlite3
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kvcore.errors import ConfigError, RecordsDamagedError, RecordsUnavailableError
from metadata_server.records.base import Record
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import Batch

APPLICATION_ID = 0x6B76_6672
FORMAT = 1
_MAGIC = b"kvfmark1"
_SCHEMA = (
    "CREATE TABLE records (key TEXT PRIMARY KEY, value BLOB, revision INTEGER, lease INTEGER, crc INTEGER)"
    " WITHOUT ROWID",
    "CREATE TABLE leases (id INTEGER PRIMARY KEY, ttl_s REAL, crc INTEGER)",
    "CREATE TABLE state (id INTEGER PRIMARY KEY, commits INTEGER, revision INTEGER, digest INTEGER, crc INTEGER)",
)


class SqliteFile:
    """Open, and held against other processes, until it is closed. What it has is in `records`, `leases`, `revision`."""

    def __init__(self, path: Path, limits: RecordsLimits = RecordsLimits()) -> None:
        """Open or make it. Raises RecordsDamagedError, and ConfigError for what cannot be opened or is not ours."""
        self._path = path
        self.records: dict[str, Record] = {}
        self.leases: dict[int, float] = {}
        self.revision = 0
        """All three as they were when it was opened."""
        self._commits = 0
        self._crcs: dict[str | int, int] = {}
        """Of each row, by key or lease."""
        self._digest = 0
        answered = _read_mark(self._mark_path)
        if answered and not (path.exists() and path.stat().st_size):  # SQLite would remove its WAL
            raise self._damaged("it is empty or missing, and commits were answered")
        with self._refusing():
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, timeout=limits.busy_s, isolation_level=None, check_same_thread=False)
        try:
            with self._refusing():
                self._begin(answered)
                self._mark: int = _open_mark(self._mark_path, self._commits)
        except BaseException:
            self._db.close()
            raise

    def __repr__(self) -> str:
        return f"<SqliteFile {self._path}: {len(self._crcs)} rows, {self._commits} commits>"

    def write(self, batch: Batch) -> None:
        """Flushed when it returns. Raises RecordsUnavailableError: it may be there after a crash or not, else not."""
        records = [
            (record.key, record.value, record.revision, record.lease, _record_crc(record))
            for record in batch.records.values()
            if record is not None
        ]
        leases = [(lease, ttl, _lease_crc(lease, ttl)) for lease, ttl in batch.leases.items() if ttl is not None]
        new: dict[str | int, int | None] = {**dict.fromkeys(batch.records), **dict.fromkeys(batch.leases)}
        new |= {key: crc for key, *_, crc in records} | {lease: crc for lease, _, crc in leases}
        digest = self._digest
        for name, crc in new.items():
            digest ^= self._crcs.get(name, 0) ^ (crc or 0)
        state = (self._commits + 1, batch.revision, digest)
        try:
            self._db.execute("BEGIN IMMEDIATE")
            self._db.executemany("DELETE FROM records WHERE key = ?", _gone(batch.records))
            self._db.executemany("DELETE FROM leases WHERE id = ?", _gone(batch.leases))
            self._db.executemany("INSERT OR REPLACE INTO records VALUES (?, ?, ?, ?, ?)", records)
            self._db.executemany("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", leases)
            self._put_state(*state)
            self._db.execute("COMMIT")
        except sqlite3.Error as error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise RecordsUnavailableError(f"{self._path}: nothing can be written: {error}; look at its disk") from error
        self._commits, _, self._digest = state
        for name, crc in new.items():
            if crc is None:
                self._crcs.pop(name, None)
            else:
                self._crcs[name] = crc
        _write_mark(self._mark, self._commits)

    def close(self) -> None:
        """Everything into the main file. Whatever fails stays in the WAL, which the next start reads."""
        try:
            with suppress(sqlite3.Error, OSError):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                os.fdatasync(self._mark)
        finally:
            self._db.close()
            os.close(self._mark)

    # --- at start -----------------------------------------------------------------------------------------------

    @property
    def _mark_path(self) -> Path:
        return self._path.with_name(self._path.name + ".mark")

    def _begin(self, answered: int | None) -> None:
        db = self._db
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # before the WAL is touched: needs no shared memory then
        db.execute("PRAGMA synchronous = FULL")
        (tables,) = db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables == 0 and not answered:
            self._create()
            return
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != APPLICATION_ID:
            raise self._damaged("it is not a file of kvferry's records")
        if version != FORMAT:
            raise ConfigError(f"{self._path}: records of format {version}; this kvferry reads format {FORMAT}")
        if [sql for (sql,) in db.execute("SELECT sql FROM sqlite_master ORDER BY rowid")] != list(_SCHEMA):
            raise self._damaged("its tables are not those that we made")
        checked = [line for (line,) in db.execute("PRAGMA quick_check(3)")]
        if checked != ["ok"]:
            raise self._damaged("; ".join(str(line) for line in checked))
        self._load()
        if answered is not None and self._commits < answered:
            raise self._damaged(f"{answered - self._commits} commits that were answered are missing at its end")
        self._take_over()

    def _create(self) -> None:
        self._take_over()
        self._db.execute("BEGIN IMMEDIATE")
        for statement in (*_SCHEMA, f"PRAGMA application_id = {APPLICATION_ID}", f"PRAGMA user_version = {FORMAT}"):
            self._db.execute(statement)
        self._put_state(0, 0, 0)
        self._db.execute("COMMIT")
        _sync_folder(self._path.parent)

    def _take_over(self) -> None:
        """Only once all was found whole: it changes the file."""
        (mode,) = self._db.execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":
            raise ConfigError(f"{self._path}: its file system cannot hold records (no WAL): choose a local disk")
        self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.execute("BEGIN IMMEDIATE")
        if self._commits:
            self._db.execute("UPDATE state SET commits = commits")  # fails at once where nothing can be written
        self._db.execute("ROLLBACK")

    def _load(self) -> None:
        for key, value, revision, lease, crc in self._db.execute("SELECT * FROM records"):
            record = Record(key=key, value=value, revision=revision, lease=lease)
            if crc != _record_crc(record):
                raise self._damaged(f"the record {key!r} is damaged")
            self.records[key] = record
            self._crcs[key] = crc
        for lease, ttl_s, crc in self._db.execute("SELECT * FROM leases"):
            if crc != _lease_crc(lease, ttl_s):
                raise self._damaged("a lease is damaged")
            self.leases[lease] = ttl_s
            self._crcs[lease] = crc
        for crc in self._crcs.values():
            self._digest ^= crc
        found = self._db.execute("SELECT commits, revision, digest, crc FROM state").fetchall()
        if len(found) != 1 or found[0][3] != _state_crc(*found[0][:3]):
            raise self._damaged("its row of state is damaged")
        self._commits, self.revision, digest = found[0][:3]
        if digest != self._digest:
            raise self._damaged("its rows are not those of its last commit")

    def _put_state(self, commits: int, revision: int, digest: int) -> None:
        row = (commits, revision, digest, _state_crc(commits, revision, digest))
        self._db.execute("INSERT OR REPLACE INTO state VALUES (1, ?, ?, ?, ?)", row)

    def _damaged(self, what: str) -> RecordsDamagedError:
        return RecordsDamagedError(
            f"{self._path}: damaged: {what}. Nothing is served from it. Put back a copy of {self._path}* that was made "
            f"while no server ran, or move {self._path}* away to begin without records"
        )

    @contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            if "locked" in str(error):
                raise ConfigError(f"{self._path}: another metadata server has these records open") from error
            raise ConfigError(f"{self._path}: cannot be opened: {error}; {_REMEDY}") from error
        except (sqlite3.Error, ValueError, TypeError, struct.error, OverflowError) as error:  # rows of nonsense
            raise self._damaged(str(error)) from error
        except OSError as error:
            raise ConfigError(f"{self._path}: cannot be opened: {error.strerror}; {_REMEDY}") from error


_REMEDY = "metadata_server.records.path says where it is, and with `kind: memory` there is none"


def _gone(changes: dict[str, Record | None] | dict[int, float | None]) -> list[tuple[str | int]]:
    return [(name,) for name, value in changes.items() if value is None]


def _record_crc(record: Record) -> int:
    key = record.key.encode()
    return zlib.crc32(struct.pack("<Iqq", len(key), record.revision, record.lease) + key + record.value)


def _lease_crc(lease: int, ttl_s: float) -> int:
    return zlib.crc32(struct.pack("<qd", lease, ttl_s))


def _state_crc(commits: int, revision: int, digest: int) -> int:
    return zlib.crc32(struct.pack("<qqq", commits, revision, digest))


# --- the mark -----------------------------------------------------------------------------------------------------


def _pack_mark(commits: int) -> bytes:
    head = _MAGIC + commits.to_bytes(8, "little")
    return head + zlib.crc32(head).to_bytes(4, "little")


def _read_mark(path: Path) -> int | None:
    """How many commits were answered; None: there is no mark."""
    try:
        found = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}; {_REMEDY}") from error
    commits = int.from_bytes(found[8:16], "little")
    if found != _pack_mark(commits):
        raise RecordsDamagedError(
            f"{path}: damaged: without it nobody can say whether records are missing. Remove it to trust the rest, "
            "which is checked by itself"
        )
    return commits


def _open_mark(path: Path, commits: int) -> int:
    """A descriptor of the mark, which says `commits`. It is replaced whole: a crash leaves the old one or the new."""
    fresh = path.with_name(path.name + ".new")
    mark = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(mark, _pack_mark(commits), 0)
        os.fsync(mark)
        fresh.replace(path)
        _sync_folder(path.parent)
    except BaseException:
        os.close(mark)
        raise
    return mark


def _write_mark(mark: int, commits: int) -> None:
    with suppress(OSError):  # the commit is flushed: the mark stays behind, and says less at the next start
        os.pwrite(mark, _pack_mark(commits), 0)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
