"""The file of the records: whole, or refused by name; never shorter than what was answered."""

import os
import shutil
import sqlite3
from pathlib import Path

import pytest

from kvcore.errors import ConfigError, RecordsDamagedError, RecordsUnavailableError
from metadata_server.records.base import Record
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.sqlite_file import SqliteFile
from metadata_server.records.table import Batch


def batch(revision: int, *keys: str, value: bytes = b"v" * 40) -> Batch:
    return Batch(revision=revision, records={key: Record(key=key, value=value, revision=revision) for key in keys})


def names(folder: Path) -> list[str]:
    return sorted(found.name for found in folder.iterdir())


def content(path: Path) -> dict[str, bytes]:
    file = SqliteFile(path)
    file.close()
    return {key: record.value for key, record in file.records.items()}


def killed(path: Path, target: Path) -> Path:
    """What lies on the disk once the process that has `path` open is killed now."""
    target.mkdir()
    for name in names(path.parent):
        shutil.copy(path.parent / name, target)
    return target / path.name


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "there" / "not" / "yet" / "records.sqlite"


@pytest.fixture
def crashed(path, tmp_path) -> Path:
    """Forty rows, some in the main file and some in the WAL; four removed, one lease."""
    file = SqliteFile(path)
    for at in range(20):
        file.write(batch(at + 1, f"main/{at}"))
    file.close()
    file = SqliteFile(path)
    for at in range(20):
        file.write(batch(at + 21, f"wal/{at}"))
    file.write(Batch(revision=44, records=dict.fromkeys([f"main/{at}" for at in range(4)]), leases={77: 2.5}))
    try:
        return killed(path, tmp_path / "crashed")
    finally:
        file.close()


WHOLE = {f"main/{at}" for at in range(4, 20)} | {f"wal/{at}" for at in range(20)}


def test_a_new_file_is_empty_and_its_folder_is_made(path):
    assert content(path) == {}
    assert names(path.parent) == ["records.sqlite", "records.sqlite.mark"]


def test_after_a_kill_everything_is_there(crashed):
    file = SqliteFile(crashed)
    assert set(file.records) == WHOLE and file.leases == {77: 2.5} and file.revision == 44
    file.write(batch(45, "more"))
    file.close()
    assert set(content(crashed)) == {*WHOLE, "more"}


@pytest.mark.parametrize("which", [*(pytest.param(name, marks=pytest.mark.slow) for name in ("", "-wal")), ".mark"])
def test_damage_at_every_512th_byte_is_refused_or_did_no_harm(crashed, tmp_path, which):
    """SQLite alone opens most of these, with fewer rows than there were."""
    damaged = Path(f"{crashed}{which}")
    whole = {name: (crashed.parent / name).read_bytes() for name in names(crashed.parent)}
    size, refused = len(whole[damaged.name]), 0
    for offset in [*range(0, size, 512), *range(24, 100, 4), size - 1]:
        if offset >= size:
            continue
        folder = tmp_path / f"at-{offset}"
        folder.mkdir()
        for name, held in whole.items():
            (folder / name).write_bytes(held)
        with (folder / damaged.name).open("r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ 0xFF]))
        try:
            found = SqliteFile(folder / crashed.name)
        except ConfigError as error:
            refused += 1
            assert str(folder / crashed.name) in str(error)
        else:
            found.close()
            assert set(found.records) == WHOLE and found.leases == {77: 2.5}, offset
        shutil.rmtree(folder)
    assert refused, "of so much damage some must matter"


@pytest.mark.parametrize("left", [0, 32, 4000, 20_000])
def test_a_wal_that_was_cut_is_refused_and_stays_refused(crashed, left):
    os.truncate(f"{crashed}-wal", left)
    for _ in range(2):
        with pytest.raises(RecordsDamagedError, match=r"commits that were answered are missing.*Put back a copy"):
            SqliteFile(crashed)


def test_sqlite_itself_says_nothing_of_a_damaged_wal(crashed):
    """Why there is a mark: should this ever fail, SQLite has learnt it."""
    wal = Path(f"{crashed}-wal")
    wal.write_bytes(wal.read_bytes()[:20_000] + bytes(64) + wal.read_bytes()[20_064:])
    shutil.copy(crashed, alone := crashed.with_name("alone.sqlite"))
    shutil.copy(wal, f"{alone}-wal")
    database = sqlite3.connect(alone)
    assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert database.execute("SELECT count(*) FROM records").fetchone()[0] < len(WHOLE)
    database.close()
    with pytest.raises(RecordsDamagedError):
        SqliteFile(crashed)


@pytest.mark.parametrize("gone", ["records.sqlite", "records.sqlite-wal"])
def test_a_part_that_is_missing_is_refused(crashed, gone):
    (crashed.parent / gone).unlink()
    with pytest.raises(RecordsDamagedError):
        SqliteFile(crashed)
    assert "records.sqlite.mark" in names(crashed.parent)


def test_an_older_copy_beside_a_newer_mark_is_refused(path, tmp_path):
    file = SqliteFile(path)
    file.write(batch(1, "a"))
    file.close()
    old = path.read_bytes()
    file = SqliteFile(path)
    file.write(batch(2, "b"))
    file.close()
    path.write_bytes(old)
    with pytest.raises(RecordsDamagedError, match="1 commits"):
        SqliteFile(path)


def test_without_its_mark_a_file_that_was_closed_in_order_is_taken(path):
    file = SqliteFile(path)
    file.write(batch(1, "a"))
    file.close()
    Path(f"{path}.mark").unlink()
    assert set(content(path)) == {"a"}


def test_a_damaged_mark_says_what_to_do(path):
    SqliteFile(path).close()
    Path(f"{path}.mark").write_bytes(b"nonsense")
    with pytest.raises(RecordsDamagedError, match=r"\.mark: damaged.*Remove it"):
        SqliteFile(path)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE records SET value = x'00' WHERE key = 'b'",
        "DELETE FROM records WHERE key = 'b'",
        "INSERT INTO records SELECT 'c', value, revision, lease, crc FROM records WHERE key = 'b'",
        "UPDATE records SET key = 'c' WHERE key = 'b'",
        "UPDATE state SET revision = 9",
        "DELETE FROM state",
        "UPDATE leases SET ttl_s = 1e9",
        "DELETE FROM leases",
        "UPDATE records SET value = 'text' WHERE key = 'b'",
        "UPDATE records SET revision = NULL WHERE key = 'b'",
    ],
)
def test_rows_that_another_hand_changed_are_refused(path, change):
    file = SqliteFile(path)
    file.write(batch(1, "a", "b"))
    file.write(Batch(revision=1, leases={5: 10.0}))
    file.close()
    database = sqlite3.connect(path)
    with database:
        database.execute(change)
    database.close()
    with pytest.raises(RecordsDamagedError):
        SqliteFile(path)


def test_another_programs_file_is_refused_and_left_alone(path):
    path.parent.mkdir(parents=True)
    database = sqlite3.connect(path)
    with database:
        database.execute("CREATE TABLE notes (text)")
    database.close()
    before = path.read_bytes()
    with pytest.raises(RecordsDamagedError, match="not a file of kvferry's records"):
        SqliteFile(path)
    assert path.read_bytes() == before


def test_a_text_file_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text("these are no records\n" * 100)
    with pytest.raises(RecordsDamagedError):
        SqliteFile(path)


def test_a_later_format_is_refused_by_its_number(path):
    SqliteFile(path).close()
    database = sqlite3.connect(path)
    database.execute("PRAGMA user_version = 9")
    database.close()
    with pytest.raises(ConfigError, match="format 9; this kvferry reads format 1"):
        SqliteFile(path)


def test_a_second_server_is_refused_and_the_first_goes_on(path):
    file = SqliteFile(path)
    with pytest.raises(ConfigError, match="another metadata server has these records open"):
        SqliteFile(path, RecordsLimits(busy_s=0.05))
    file.write(batch(1, "a"))
    file.close()
    assert set(content(path)) == {"a"}


def test_a_path_that_cannot_be_is_refused_with_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "records.sqlite", tmp_path):
        with pytest.raises(ConfigError, match=r"metadata_server\.records\.path"):
            SqliteFile(path)


def test_a_write_without_room_is_refused_whole_and_works_again_with_room(path):
    file = SqliteFile(path, RecordsLimits())
    file.write(batch(1, "a"))
    (pages,) = file._db.execute("PRAGMA page_count").fetchone()
    file._db.execute(f"PRAGMA max_page_count = {pages + 4}")
    with pytest.raises(RecordsUnavailableError, match="full"):
        file.write(batch(2, "b", "c", value=b"x" * 40_000))
    file.write(batch(3, "d"))
    file._db.execute("PRAGMA max_page_count = 100000")
    file.write(batch(4, "b", value=b"x" * 40_000))
    file.close()
    assert set(content(path)) == {"a", "b", "d"}
