"""Servers and disks of tiers that die, stand still, are full, or speak nonsense, under real clusters.

Held in each case: every answer is right meanwhile, `kvferry status` says what is wrong, and within five seconds of
its return the tier is in use again.
"""

import asyncio
import io
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import pytest_asyncio
from rich.console import Console
from support.garbage_server import GARBAGE, GarbageServer
from support.redis_server import RedisServer, redis_server, with_redis
from support.serve_process import CHUNK_TOKENS, Served, served

from engines.sim.reference import expected_tokens
from kvcore.config.file import load_config
from kvcore.config.schema import SimEngineConfig
from kvferry.status import run_status
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180), pytest.mark.asyncio(loop_scope="module")]

CHUNKS = 6
WHOLE = CHUNKS * CHUNK_TOKENS
CALL_S = 0.5
"""The tiers' own deadline, one call."""
PAUSE_S = 20.0
RETURN_S = 50.0
"""It takes about five on a machine that has nothing else to do."""
dice = random.Random(1)


def fresh() -> list[int]:
    """A prompt that nobody has seen."""
    return dice.choices(range(3, 250), k=WHOLE + 1)


async def cached_of(one: Served, prompt: list[int]) -> int:
    """How many of the prompt's tokens were cached for an answer that was right."""
    tokens, cached = await one.ask(prompt)
    engine = load_config(one.file).engine
    assert isinstance(engine, SimEngineConfig)
    sampling = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    assert tokens == expected_tokens(engine, prompt, sampling)[0]
    return cached


async def status_text(one: Served) -> str:
    """What `kvferry status` prints."""
    console = Console(file=io.StringIO(), width=200)
    assert await run_status(one.url, one.metadata_url, as_json=False, console=console) == 0
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


async def until_said(one: Served, *words: str) -> None:
    """While it is asked fresh prompts, until its status says a tier's problem with one of these words."""
    async with asyncio.timeout(60):
        while True:
            said = [line for line in (await status_text(one)).splitlines() if line.startswith("problem: tier")]
            if any(word in line for word in words for line in said):
                return
            await cached_of(one, fresh())


async def until_well(one: Served) -> None:
    """Until its status says nothing of the kind any longer."""
    async with asyncio.timeout(RETURN_S):
        while "problem: tier" in await status_text(one):  # noqa: ASYNC110  (it tells nobody)
            await asyncio.sleep(0.1)


async def until_shared(one: Served, other: Served) -> None:
    """Until what `one` computes now is found by `other`, to the chunk."""
    async with asyncio.timeout(RETURN_S):
        while True:
            prompt = fresh()
            assert await cached_of(one, prompt) == 0
            await asyncio.sleep(0.1)
            if await cached_of(other, prompt) == WHOLE:
                return


# --- Redis: two clusters, which have nothing but it in common ---


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with redis_server() as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def pair(server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Served, Served]]:
    folder = tmp_path_factory.mktemp("pair")
    overrides = (f"tiers.redis.timeout_s={CALL_S}", f"kv.chunk_tokens={CHUNK_TOKENS}")
    tier = ("--tier", server.url)
    async with (
        served(folder / "one", *tier, overrides=overrides) as one,
        served(folder / "other", *tier, overrides=overrides) as other,
    ):
        await until_shared(one, other)
        yield one, other


@with_redis
async def test_a_redis_that_is_killed_and_comes_back_empty(server: RedisServer, pair: tuple[Served, Served]) -> None:
    server.stop()
    for one in pair:
        await until_said(one, "Connection refused")
    server.start()
    await until_shared(*pair)


@with_redis
async def test_a_redis_that_stands_still_for_many_times_the_deadline(
    server: RedisServer, pair: tuple[Served, Served]
) -> None:
    server.freeze()
    try:
        loop = asyncio.get_running_loop()
        end, asked = loop.time() + PAUSE_S, 0
        for one in pair:
            await until_said(one, "did not answer in time", "left alone")
        while loop.time() < end:
            for one in pair:
                assert await cached_of(one, fresh()) == 0
                asked += 1
            await asyncio.sleep(0.2)
        assert asked > PAUSE_S, "it is not waited for each time"
    finally:
        server.thaw()
    await until_shared(*pair)


@with_redis
async def test_a_redis_that_is_full_and_may_not_evict_still_gives_what_it_has(
    server: RedisServer, pair: tuple[Served, Served]
) -> None:
    one, other = pair
    prompt = fresh()
    await cached_of(one, prompt)
    await until_shared(one, other)
    server.ask(b"CONFIG", b"SET", b"maxmemory-policy", b"noeviction")
    server.ask(b"CONFIG", b"SET", b"maxmemory", b"1mb")
    await until_said(one, "OOM")
    assert await cached_of(other, prompt) == WHOLE
    await until_said(other, "OOM")
    assert "OOM" in await status_text(one), "as long as it lasts, whatever else was asked of it since"
    server.ask(b"CONFIG", b"SET", b"maxmemory", b"64mb")
    await until_shared(one, other)
    await until_well(one)


@with_redis
async def test_a_server_that_speaks_nonsense_where_redis_was(server: RedisServer, pair: tuple[Served, Served]) -> None:
    server.stop()
    async with GarbageServer(server.port, list(GARBAGE)) as garbage:
        async with asyncio.timeout(30):
            while garbage.answered < 2 * len(GARBAGE):
                for one in pair:
                    assert await cached_of(one, fresh()) == 0
        for one in pair:
            await until_said(one, server.url)
    server.start()
    await until_shared(*pair)


# --- a disk whose system calls fail ---

INJECTED = """
import errno, os

def failing(call, place):
    def tried(*args):
        try:
            name = open(place).read()
        except FileNotFoundError:
            return call(*args)
        number = getattr(errno, name)
        raise OSError(number, os.strerror(number))
    return tried

os.preadv = failing(os.preadv, os.environ["FAILING_READS"])
os.pwritev = failing(os.pwritev, os.environ["FAILING_WRITES"])
"""


class BadDisk:
    """A disk tier's folder. A process that runs with `environment` has the faults that are set here."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "disk"
        self._faults = {name: folder / name for name in ("FAILING_READS", "FAILING_WRITES")}
        (folder / "sitecustomize.py").write_text(INJECTED)
        python_path = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])
        self.environment = {"PYTHONPATH": python_path, **{name: str(path) for name, path in self._faults.items()}}

    @contextmanager
    def fails(self, error: str, *, reads: bool) -> Iterator[None]:
        """Writes fail with this error, and reads too if asked for."""
        faults = list(self._faults.values())[0 if reads else 1 :]
        for path in faults:
            path.write_text(error)
        try:
            yield
        finally:
            for path in faults:
                path.unlink()

    def flip(self) -> None:
        """One bit in each block of the one file in it, its table left as it is."""
        (slab,) = self.path.iterdir()
        with slab.open("r+b", buffering=0) as file:
            content = bytearray(file.read())
            start = 4096 + len(content) // 64
            for at in range(start, len(content), 4096):
                content[at + 2000] ^= 1
            file.seek(start)
            file.write(content[start:])
            os.fsync(file.fileno())


async def tier_count(one: Served, what: str) -> int:
    """Of the node's disk tier, since start."""
    (tier,) = (await one.get(f"{one.node_url}/v1/info"))["tiers"]
    return int(tier["counts"].get(what, 0))


MANY = [fresh() for _ in range(30)]
"""More than the segment and the engine's own cache hold."""


async def until_promoted(one: Served) -> None:
    """Until most of the many come from the disk when they are asked for in turn."""
    async with asyncio.timeout(RETURN_S):
        while True:
            before = await tier_count(one, "promoted")
            for prompt in MANY[:10]:
                await cached_of(one, prompt)
            if await tier_count(one, "promoted") >= before + 5 * CHUNKS:
                return
            for prompt in MANY[10:]:
                await cached_of(one, prompt)


async def until_saved(one: Served) -> None:
    async with asyncio.timeout(RETURN_S):
        before = await tier_count(one, "saved")
        while await tier_count(one, "saved") < before + CHUNKS:
            await cached_of(one, fresh())


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def on_disk(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Served, BadDisk]]:
    folder = tmp_path_factory.mktemp("on-disk")
    disk = BadDisk(folder)
    options = ("--segment", "1MiB", "--tier", f"disk:{disk.path}:16MiB")
    overrides = (f"kv.chunk_tokens={CHUNK_TOKENS}", f"tiers.disk.timeout_s={CALL_S}")
    async with served(folder / "one", *options, overrides=overrides, environment=disk.environment) as one:
        for prompt in MANY:
            assert await cached_of(one, prompt) == 0
        await until_promoted(one)
        yield one, disk


async def test_a_disk_that_fails_fills_up_or_is_read_only_and_recovers(on_disk: tuple[Served, BadDisk]) -> None:
    one, disk = on_disk
    with disk.fails("EIO", reads=True):
        await until_said(one, "Input/output error")
        for prompt in MANY:
            await cached_of(one, prompt)
    await until_promoted(one)
    await until_saved(one)
    for error, words in (("ENOSPC", "No space left on device"), ("EROFS", "Read-only file system")):
        with disk.fails(error, reads=False):
            await until_said(one, words)
            await until_promoted(one)
            assert words in await status_text(one), "reading is fine, and yet it is to be seen"
        await until_saved(one)
        await until_well(one)


async def test_a_disk_whose_bits_flip_gives_no_wrong_byte_and_is_written_anew(on_disk: tuple[Served, BadDisk]) -> None:
    one, disk = on_disk
    disk.flip()
    for prompt in MANY:
        await cached_of(one, prompt)
    assert await tier_count(one, "damaged") >= len(MANY) // 2
    await until_promoted(one)
