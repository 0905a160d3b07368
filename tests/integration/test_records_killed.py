"""Records of a process that is killed in mid-write, again and again; and on a disk that is full or read-only."""

import os
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support import records_writer
from support.metadata_words import keys
from support.processes import cluster

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, RecordsUnavailableError
from kvcore.process.service import EXIT_CONFIG
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.records.base import Record
from metadata_server.records.sqlite_file import SqliteFile
from metadata_server.records.table import Batch

pytestmark = pytest.mark.slow
LIVES = 100


def live(path: Path, life: str, lines: int) -> list[str]:
    """What one process was answered until it was killed, after so many lines."""
    command = [sys.executable, records_writer.__file__, str(path), life]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "ready\n"
            found = [process.stdout.readline() for _ in range(lines)]
        finally:
            process.kill()
        found += process.stdout.readlines()
    return [line.removesuffix("\n") for line in found if line.endswith("\n")]


def writer_of(key: str) -> str:
    return key.rpartition("/")[0]


def later(key: str) -> str:
    """The record whose writing comes before `key` is removed."""
    writer, _, step = key.rpartition("/")
    return f"{writer}/{int(step) + 5}"


def test_killed_a_hundred_times_every_answered_write_is_there_once(tmp_path):
    path, chance = tmp_path / "records.sqlite", random.Random(7)
    there: set[str] = set()
    gone: set[str] = set()
    again: dict[str, tuple[int, int]] = {}
    count = answered = 0
    for life in range(LIVES):
        for line in live(path, str(life), chance.randrange(1, 120)):
            kind, *words = line.split(" ")
            answered += 1
            if kind == "put":
                there.add(words[0])
            elif kind == "gone":
                gone.add(words[0])
            elif kind == "again":
                again[words[0]] = tuple(map(int, words[1].split(".")))
            else:
                assert int(words[0]) > count, "two writers were told the same count"
                count = int(words[0])
        file = SqliteFile(path)
        file.close()
        found = file.records
        assert not gone & found.keys()
        lost = there - gone - found.keys()  # of each writer one removal may have happened, unanswered, ...
        assert all(later(key) in there for key in lost) and len({writer_of(key) for key in lost}) == len(lost)
        more = {key for key in found if key.startswith("new/")} - there  # ... or one more write
        assert len({writer_of(key) for key in more}) == len(more)
        assert {writer_of(key) for key in lost | more} <= {f"new/{life}/{writer}" for writer in range(6)}
        there |= more
        gone |= lost
        assert count <= int(found["count"].value) <= count + 1
        for writer, seen in again.items():
            assert tuple(map(int, found[f"again/{writer}"].value.split(b"."))) >= seen
        revisions = [record.revision for record in found.values()]
        assert len(set(revisions)) == len(revisions) and max(revisions) <= file.revision
        count = int(found["count"].value)
    assert answered > 40 * LIVES


@contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "records-test", folder], capture_output=True)
    if done.returncode and not os.environ.get("CI"):
        pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode()}")
    assert done.returncode == 0, done.stderr
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def batch(revision: int, key: str, size: int) -> Batch:
    return Batch(revision=revision, records={key: Record(key=key, value=bytes(size), revision=revision)})


def test_on_a_disk_that_is_full_nothing_answered_is_lost_and_writes_go_on_when_there_is_room(tmp_path):
    with small_disk(tmp_path / "disk", "512k") as disk:
        file = SqliteFile(disk / "records.sqlite")
        answered, refused = [], 0
        for at in range(60):
            try:
                file.write(batch(at + 1, f"k{at}", 12_000))
            except RecordsUnavailableError as error:
                assert str(disk / "records.sqlite") in str(error)
                refused += 1
            else:
                answered.append(f"k{at}")
        assert refused and answered
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        file.write(batch(100, "later", 12_000))
        file.close()
        file = SqliteFile(disk / "records.sqlite")
        assert set(file.records) == {*answered, "later"}
        file.close()


def test_on_a_full_disk_a_killed_process_leaves_what_it_answered(tmp_path):
    with small_disk(tmp_path / "disk", "512k") as disk:
        code = (
            "import sys, os; from pathlib import Path; sys.path[:0] = sys.argv[2:]\n"
            "from test_records_killed import batch\n"
            "from kvcore.errors import RecordsUnavailableError\n"
            "from metadata_server.records.sqlite_file import SqliteFile\n"
            "file, answered = SqliteFile(Path(sys.argv[1])), []\n"
            "for at in range(60):\n"
            "    try: file.write(batch(at + 1, f'k{at}', 12_000))\n"
            "    except RecordsUnavailableError: continue\n"
            "    print(f'k{at}', flush=True)\n"
            "os.kill(os.getpid(), 9)"
        )
        command = [sys.executable, "-c", code, disk / "records.sqlite", Path(__file__).parent, *sys.path]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == -9, done.stderr
        subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
        file = SqliteFile(disk / "records.sqlite")
        file.close()
        assert done.stdout.split() == list(file.records) or set(done.stdout.split()) == set(file.records)


def test_on_a_disk_that_is_read_only_it_is_refused_at_start_with_what_to_set(tmp_path):
    with small_disk(tmp_path / "disk", "1m") as disk:
        file = SqliteFile(disk / "records.sqlite")
        file.write(batch(1, "a", 10))
        file.close()
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for path in (disk / "records.sqlite", disk / "new" / "records.sqlite"):
            with pytest.raises(ConfigError, match=r"metadata_server\.records\.path"):
                SqliteFile(path)


async def test_a_killed_metadata_server_knows_its_pins_and_one_with_damaged_records_does_not_start(tmp_path):
    async with cluster(tmp_path) as subject:
        await subject.start("metadata")
        client = connect_client(MetadataEndpoints(urls=(subject.url("metadata"),), timeout_s=5.0), SystemClock())
        assert (await client.pin(keys(1, 2))).done == 2
        assert (await client.pin(keys(3), ttl_s=600.0)).done == 1
        await kill(subject, "metadata")
        await subject.start("metadata")
        found = {pin.key: pin.left_s for pin in (await client.pins()).pins}
        (one, two, three) = keys(1, 2, 3)
        assert found[one] is None and found[two] is None and 0 < found[three] <= 600.0
        assert (await client.unpin([one])).done == 1
        await kill(subject, "metadata")
        wal = tmp_path / "records.sqlite-wal"
        os.truncate(wal, wal.stat().st_size - 100)
        with pytest.raises(AssertionError, match="did not become ready"):
            await subject.start("metadata")
        assert await subject.children["metadata"].wait() == EXIT_CONFIG
        (told,) = (line for line in subject.lines["metadata"] if "error" in line)
        assert f"{tmp_path / 'records.sqlite'}: damaged" in told and "Put back a copy" in told
        await client.aclose()


async def kill(subject, name: str) -> None:
    subject.children[name].kill()
    await subject.children[name].wait()
