"""What a long prompt costs the metadata server and its own process grows with its chunks, not with their square."""

import asyncio
from collections import Counter
from contextlib import asynccontextmanager

import msgspec
import pytest
from support.sim_loop import LoopClock, run_sim
from support.store_fakes import CHUNK_BYTES, World, key

from engines.jobs.context import JobContext, JobLimits
from engines.jobs.load import LoadJob
from engines.jobs.save import SavableChunk, SaveJob
from kvstore.store import KVStore
from metadata_server.client import MetadataClient
from transfer.inproc import InprocTransfer

ROOM = 64 << 20
PAYLOAD = memoryview(bytes(CHUNK_BYTES))
ONE_BY_ONE, BY_FOURS = 18, 6
"""Keys in all questions of one reader, a chunk, at most: it asks for 16 each time that some came, once for all."""


class Counting:
    """A way to the metadata server that counts keys and calls by path."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.keys: Counter[str] = Counter()
        self.calls: Counter[str] = Counter()

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        raw = msgspec.msgpack.decode(body) if body else {}
        name = path.rpartition("/")[2]
        self.calls[name] += 1
        self.keys[name] += sum(len(raw.get(field, ())) for field in ("keys", "items", "replica_ids"))
        async with asyncio.timeout(timeout_s):
            return await self._world.dispatch(path, body)

    async def aclose(self) -> None:
        pass


def node(world: World, name: str) -> tuple[JobContext, Counting]:
    way = Counting(world)
    store, _ = world.store(name, InprocTransfer(world.memory))
    store._placement._metadata = store._placement._leases._metadata = MetadataClient(way, world.clock, 5.0)
    return JobContext(store, world.clock, Counter(), 5.0, JobLimits()), way


async def a_world() -> World:
    world = World()
    world.use(LoopClock(asyncio.get_running_loop()))
    for name in ("a", "b"):
        world.add_node(name, ROOM)
    return world


def save_job(context: JobContext, keys) -> SaveJob:
    return SaveJob(context, "b.1", keys)


def chunk(wanted) -> SavableChunk:
    @asynccontextmanager
    async def reading():
        yield [PAYLOAD]

    return SavableChunk(wanted, 4, reading)


@asynccontextmanager
async def nowhere(first: int, count: int):
    yield [[memoryview(bytearray(CHUNK_BYTES))] for _ in range(count)]


async def no_claim(_):
    raise AssertionError("somebody else computes it")


async def handed_over(num_chunks: int, *, store_only: bool = False, at_a_time: int = 1) -> tuple[Counter, ...]:
    """Keys sent by the reader of a prompt that another node computes, and by that node; and its calls."""
    world = await a_world()
    writer, written = node(world, "a")
    reader, read = node(world, "b")
    keys = [key(number) for number in range(num_chunks)]
    saving = save_job(writer, keys)
    task = asyncio.create_task(saving.run())
    await saving.begun.wait()
    how = {"claim": no_claim, "store_only": True} if store_only else {"wait_chunks": num_chunks, "deadline": 1e6}
    loading = LoadJob(reader, keys, nowhere, **how)
    waiting = asyncio.create_task(loading.run())
    for number, wanted in enumerate(keys):
        if number % at_a_time == 0:
            await asyncio.sleep(0.001)
        saving.add(chunk(wanted))
    saving.close()
    await task
    await waiting
    assert loading.all_stored if store_only else loading.num_loaded == num_chunks
    await world.aclose()
    assert world.stats().read_leases == 0
    return read.keys, written.keys, written.calls


@pytest.mark.parametrize("store_only", [False, True], ids=["reads", "watches"])
def test_a_prompts_chunks_are_asked_for_a_few_times_each_however_long_it_is(store_only):
    for num_chunks in (32, 256):
        read, written, calls = run_sim(lambda n=num_chunks: handed_over(n, store_only=store_only))
        assert read.total() <= ONE_BY_ONE * num_chunks, (num_chunks, read)
        assert written["reserve"] == written["commit"] == num_chunks and calls["reserve"] == 1


@pytest.mark.slow
def test_a_prompt_of_128k_tokens_in_chunks_of_16():
    read, written, _ = run_sim(lambda: handed_over(8192, at_a_time=4))
    assert read.total() <= BY_FOURS * 8192
    assert written["reserve"] == written["commit"] == 8192


def test_a_save_that_lags_behind_looks_at_each_chunk_a_few_times():
    """All chunks are there at once, and are written four by four: neither the queue nor the grants are gone through
    for each four."""

    async def looks(num_chunks: int) -> int:
        world = await a_world()
        context, _ = node(world, "a")
        keys = [key(number) for number in range(num_chunks)]
        saving = save_job(context, keys)
        asked = 0
        wants = KVStore.begin_put

        async def begin_put(store, *args, **kwargs):
            session = await wants(store, *args, **kwargs)
            grants = session._grants

            class Watched(dict):
                def items(self):
                    nonlocal asked
                    asked += len(self)
                    return super().items()

            session._grants = Watched(grants)
            return session

        context.store.begin_put = begin_put.__get__(context.store)
        for wanted in keys:
            saving.add(chunk(wanted))
        saving.close()
        await saving.run()
        assert saving.stored == set(keys)
        await world.aclose()
        return asked

    assert run_sim(lambda: looks(256)) <= 256
