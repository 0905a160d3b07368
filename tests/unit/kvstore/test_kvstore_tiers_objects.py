"""The object tier: where it is, what its errors say, what ends, and calls that nobody can stop."""

import asyncio
import os
import threading
from functools import partial

import pytest
from support.tier_rigs import chunk_of, content, name_of, room_for

from kvcore.clock import ManualClock, SystemClock
from kvcore.config.tiers import ObjectTierConfig
from kvcore.errors import ConfigError
from kvstore.tiers.base import Cleared, TierOutcome
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.limits import ObjectLimits
from kvstore.tiers.objects.bucket import Bucket, StoredObject, said
from kvstore.tiers.objects.calls import CallPool, Grip
from kvstore.tiers.objects.generations import BucketGenerations
from kvstore.tiers.objects.place import object_place
from kvstore.tiers.objects.tier import ObjectTier, open_bucket

OK, MISSING, AWAY = TierOutcome.OK, TierOutcome.MISSING, TierOutcome.UNAVAILABLE
CALL_S = 20.0


@pytest.fixture
def clock():
    return ManualClock()


@pytest.fixture
async def tier(tmp_path, clock):
    made = ObjectTier(open_bucket(ObjectTierConfig(url=f"file://{tmp_path}/kv")), clock, connections=2)
    yield made
    await made.aclose()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (ObjectTierConfig(url="bucket/prefix"), "tiers.object.url: 'bucket/prefix' is no place for objects; expected"),
        (ObjectTierConfig(url="s3://b", endpoint="minio:9000"), "tiers.object.endpoint: it is no address of a server"),
        (ObjectTierConfig(url="s3://b", endpoint="http://me:secret@minio"), "tiers.object.endpoint: it is no address"),
        (ObjectTierConfig(url="s3://b", endpoint="http://h:99999"), "tiers.object.endpoint: it is no address"),
        (ObjectTierConfig(url="file:///a", region="x"), "a folder has no endpoint and no region"),
        (ObjectTierConfig(url="s3://me:secret@b"), "credentials are taken from the environment"),
        (ObjectTierConfig(url="s3://[::1"), "it cannot be read"),
    ],
)
def test_a_place_that_cannot_be_is_refused_and_shows_no_secret(config, message):
    with pytest.raises(ConfigError, match=message) as refused:
        object_place(config)
    assert "secret" not in str(refused.value)


def test_a_place_is_shown_as_it_is_written():
    for url in ("s3://b/some/prefix", "gs://b", "az://c/p", "file:///kv"):
        assert object_place(ObjectTierConfig(url=url)).shown == url


def test_what_the_environment_lacks_is_said_without_its_secrets(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("AZURE_")]:
        monkeypatch.delenv(name)
    azure = ObjectTierConfig(url="az://container")
    with pytest.raises(ConfigError, match=r"tiers.object: az://container: .*Account must be specified"):
        open_bucket(azure)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "someone")
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "!not-a-key!")
    with pytest.raises(ConfigError) as refused:
        open_bucket(azure)
    assert "!not-a-key!" not in str(refused.value)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="Not a directory"):
        open_bucket(ObjectTierConfig(url=f"file://{tmp_path}/file/kv"))


def test_without_obstore_the_way_to_install_it_is_said(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "kvstore.tiers.objects.bucket", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvferry\[object\]'"):
        open_bucket(ObjectTierConfig(url="s3://b"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("status code: 403 Forbidden: <Code>SignatureDoesNotMatch</Code> sig=abc", "403 Forbidden, Signature"),
        ("status code: 301 Moved Permanently: <Code>PermanentRedirect</Code>", "set tiers.object.region"),
        ("status code: 503 Service Unavailable: <Code>SlowDown</Code>", "it answers 503 Service Unavailable, SlowDown"),
        ("Error performing PUT http://169.254.169.254/latest/api/token", "no credentials are set in the environment"),
        ("inner: Http( HttpError { kind: Timeout, source: TimedOut", "it did not answer in time"),
        ('Os {\n code: 111,\n kind: ConnectionRefused,\n message: "Connection refused"', "Connection refused"),
        ("Unable to create dir /x: Read-only file system (os error 30)", "Read-only file system"),
        ("hyper: dns error: failed to lookup", "its name is not known here"),
        ("<Code>NoSuchBucket</Code>", "there is no such bucket"),
        ("token=abc https://host/?sig=abc", "it cannot be reached"),
    ],
)
def test_errors_are_said_in_words_without_addresses_and_tokens(text, words):
    told = said(RuntimeError(text))
    assert words in told and "abc" not in told


def test_one_that_refuses_a_condition_is_asked_without(tmp_path, monkeypatch):
    bucket = open_bucket(ObjectTierConfig(url=f"file://{tmp_path}"))
    assert bucket.put("a/b", memoryview(b"one"), end=None)
    assert not bucket.put("a/b", memoryview(b"two"), end=None), "it is there"
    real, modes = bucket._store, []

    class Old:
        def put(self, path, value, *, mode, **options):
            modes.append(mode)
            if mode == "create":
                raise NotImplementedError
            return real.put(path, value, mode=mode, **options)

    monkeypatch.setattr(bucket, "_store", Old())
    assert bucket.put("a/b", memoryview(b"two"), end=None) and bucket.put("a/b", memoryview(b"3"), end=None)
    assert modes == ["create", "overwrite", "overwrite"]


async def test_what_has_ended_or_is_not_whole_is_written_again(tier, clock, tmp_path):
    chunk = chunk_of(name_of(1), 5000)
    path = tmp_path / "kv" / chunk.name.text
    assert await tier.save([chunk], ttl_s=5.0, timeout_s=CALL_S) == [OK]
    assert path.stat().st_mtime == clock.wall() + 5
    clock.advance(6)
    assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [MISSING]
    assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
    assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [OK]
    os.truncate(path, 100)
    os.utime(path, (4e9, 4e9))
    back = room_for(chunk)
    assert await tier.load([back], timeout_s=CALL_S) == [TierOutcome.DAMAGED]
    assert await tier.save([chunk], timeout_s=CALL_S) == [OK]
    assert await tier.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(chunk)


async def test_a_prompt_that_is_new_is_asked_for_once(tier, monkeypatch):
    asked = []
    head = Bucket.head
    monkeypatch.setattr(Bucket, "head", lambda self, path: (asked.append(path), head(self, path))[1])
    names = [name_of(number) for number in range(100)]
    assert await tier.find(names, timeout_s=CALL_S) == [False] * 100
    assert len(asked) == ObjectLimits().questions
    await tier.save([chunk_of(name, 10) for name in names[:20]], timeout_s=CALL_S)
    asked.clear()
    assert await tier.find(names, timeout_s=CALL_S) == [True] * 20 + [False] * 80
    assert len(asked) == 2 * ObjectLimits().questions


async def test_a_long_prompt_that_is_found_in_part_by_then_is_no_fault_of_the_tier(tier, monkeypatch):
    names = [name_of(number) for number in range(100)]
    there, go_on = {name.text for name in names[: ObjectLimits().questions]}, threading.Event()
    known, real, given_s = StoredObject(10, None), tier._questions.run, []

    async def run(jobs, timeout_s):  # the time for the second batch is soon over, that for the first never
        given_s.append(timeout_s)
        return await real(jobs, timeout_s if len(given_s) == 1 else 0.01)

    monkeypatch.setattr(tier._questions, "run", run)
    monkeypatch.setattr(Bucket, "head", lambda _, path: known if path in there else (go_on.wait(30), known)[1])
    guarded = GuardedTier(tier, SystemClock(), in_flight_bytes=1)
    try:
        assert await guarded.find(names, timeout_s=CALL_S) == [True] * len(there) + [False] * (100 - len(there))
        assert guarded.stats().problem is None
        assert len(given_s) == 2 and given_s[0] <= 0.9 * CALL_S, "who asks is not gone by the time of the answer"
    finally:
        go_on.set()


async def test_a_full_or_read_only_folder_says_so(tier, monkeypatch):
    chunk = chunk_of(name_of(1), 10)

    def full(_: object, *given: object, **options: object) -> None:
        raise OSError("Unable to copy data to file: No space left on device (os error 28)")

    monkeypatch.setattr(tier._bucket, "_store", type("Full", (), {"put": full})())
    assert await tier.save([chunk], timeout_s=CALL_S) == [TierOutcome.FULL]
    assert "No space left on device" in tier.stats().problem and "file://" in repr(tier)


async def test_a_bucket_that_is_not_there_is_no_miss(tier, monkeypatch):
    def away(_: object, *given: object, **options: object) -> None:
        raise FileNotFoundError("status code: 404 Not Found: <Code>NoSuchBucket</Code>")

    monkeypatch.setattr(tier._bucket, "_store", type("Away", (), {"get": away, "put": away})())
    chunk = chunk_of(name_of(1), 10)
    assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [AWAY]
    assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
    assert tier.stats().problem.endswith("there is no such bucket")


class Stuck:
    """A call that ends when it is let go, and then copies."""

    def __init__(self) -> None:
        self.begun, self.go_on, self.ended = threading.Event(), threading.Event(), threading.Event()

    def __call__(self, grip: Grip, target: memoryview, source: bytes) -> bool:
        self.begun.set()
        assert self.go_on.wait(30)
        copied = grip.scatter(memoryview(source), [target])
        self.ended.set()
        return copied


@pytest.mark.parametrize("how", ["late", "cancelled", "closed"])
async def test_memory_is_let_go_of_before_a_call_that_is_late_ends(how):
    pool, stuck, memory = CallPool("test", 1), Stuck(), memoryview(bytearray(8))
    call = partial(stuck, target=memory, source=b"new-data")
    try:
        task = asyncio.create_task(pool.run([call, call], 0.05 if how == "late" else 30.0))
        assert await asyncio.to_thread(stuck.begun.wait, 30)
        if how == "cancelled":
            task.cancel()
        if how == "closed":
            await pool.aclose(0.0)
        results = await asyncio.gather(task, return_exceptions=True)
        if how == "cancelled":
            assert isinstance(results[0], asyncio.CancelledError)
        else:
            assert results == [[None, None]]
    finally:
        stuck.go_on.set()
    assert await asyncio.to_thread(stuck.ended.wait, 30)
    assert bytes(memory) == bytes(8)
    await pool.aclose(30.0)
    assert pool.closed and await pool.run([call], 1.0) == [None]


async def test_calls_wait_in_line_for_threads():
    pool, most, now, lock = CallPool("test", 3), 0, 0, threading.Lock()
    gate = threading.Barrier(3)

    def call(_: Grip) -> int:
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        gate.wait(30)
        with lock:
            now -= 1
        return 7

    assert await pool.run([call] * 9, 30.0) == [7] * 9
    assert most == 3
    await pool.aclose(30.0)


async def test_what_may_be_in_use_is_not_cleared_when_the_time_for_looking_is_up(tier, monkeypatch):
    chunk = chunk_of(name_of(1), 100)
    fingerprint = chunk.name.fingerprint
    await tier.save([chunk], timeout_s=CALL_S)
    await tier.mark(fingerprint, "theirs/d0", "of theirs", ttl_s=900, timeout_s=CALL_S)
    monkeypatch.setattr(BucketGenerations, "_is_late", lambda seen: setattr(seen, "incomplete", "late") or True)
    assert await tier.clear([fingerprint], own=[], timeout_s=CALL_S) == Cleared(0, "late")
    assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [OK]
