"""Ten `kvferry serve`, which know nothing of one another, on one Redis: what one computed, the others reuse."""

import asyncio
import random
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.redis_server import RedisServer, redis_server, with_redis
from support.serve_process import CHUNK_TOKENS, Served, served

pytestmark = [pytest.mark.slow]

INSTANCES = 10
CHUNKS = 6
FIRST, LAST, PRIVATE = (random.Random(seed).choices(range(3, 250), k=CHUNK_TOKENS * CHUNKS + 1) for seed in range(3))


def keys_of(server: RedisServer) -> list[bytes]:
    keys = server.ask(b"KEYS", b"*")
    assert isinstance(keys, list)
    return [key for key in keys if isinstance(key, bytes)]


def is_chunk(key: bytes) -> bool:
    return key.startswith(b"kvf1:{")


async def until_kept(server: RedisServer, chunks: int) -> None:
    """Until so many chunks are in the server."""
    async with asyncio.timeout(60):
        while sum(map(is_chunk, keys_of(server))) < chunks:  # noqa: ASYNC110  (a server tells nobody)
            await asyncio.sleep(0.02)


async def nodes_known(one: Served) -> set[str]:
    """Segments that its metadata server knows of, and what its router routes to."""
    stats = await one.get(f"{one.metadata_url}/v1/stats")
    cluster = await one.get(f"{one.url}/v1/cluster")
    return {node["id"] for node in stats["nodes"]} | {node["url"] for node in cluster["nodes"]}


@with_redis
@pytest.mark.timeout(180)
async def test_ten_serves_reuse_what_one_of_them_computed_and_share_nothing_else(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        server = stack.enter_context(redis_server())
        tier = ("--tier", server.url, "--set", f"kv.chunk_tokens={CHUNK_TOKENS}")
        first = await stack.enter_async_context(served(tmp_path / "one", *tier))
        answer, cached = await first.ask(FIRST)
        assert cached == 0
        await until_kept(server, CHUNKS)
        starting = [served(tmp_path / f"other-{number}", *tier) for number in range(1, INSTANCES)]
        others = await asyncio.gather(*(stack.enter_async_context(one) for one in starting))

        for other in others:
            assert await other.ask(FIRST) == (answer, CHUNKS * CHUNK_TOKENS), "every chunk that the first computed"
        answer, cached = await others[-1].ask(LAST)
        assert cached == 0, "nobody computed this one"
        await until_kept(server, 2 * CHUNKS)
        again = await asyncio.gather(*(one.ask(LAST) for one in [first, *others[:-1]]))
        assert again == [(answer, CHUNKS * CHUNK_TOKENS)] * (INSTANCES - 1), "they started before it was computed"

        everybody = [first, *others]
        known = await asyncio.gather(*map(nodes_known, everybody))
        assert known == [{"decode-0", one.node_url} for one in everybody]
        tally = Counter(key.partition(b"{")[0] if is_chunk(key) else key[:10] for key in keys_of(server))
        expected = {b"kvf1:": 2 * CHUNKS, b"kvf1:live:": INSTANCES, b"kvf1:note:": 1}
        assert tally == expected, "one copy of each, who uses them, and nothing besides"

        server.stop()
        answer, cached = await first.ask(PRIVATE)
        assert cached == 0
        assert await others[0].ask(PRIVATE) == (answer, 0), "there is no other way from one to the other"
        assert await first.ask(PRIVATE) == (answer, CHUNKS * CHUNK_TOKENS), "and its own memory still serves it"


@with_redis
@pytest.mark.timeout(120)
async def test_what_is_prefetched_lies_in_memory_before_it_is_asked_for(tmp_path: Path) -> None:
    with redis_server() as server:
        tier = ("--tier", server.url, "--set", f"kv.chunk_tokens={CHUNK_TOKENS}")
        async with served(tmp_path / "one", *tier) as first:
            answer, _ = await first.ask(FIRST)
            await until_kept(server, CHUNKS)
        async with served(tmp_path / "two", *tier) as second:
            url, body = f"{second.url}/v1/cache/prefetch", {"model": "sim", "prompt": FIRST}
            async with second.session.post(url, json=body) as reply:
                brought = await reply.json()
            assert brought["chunks"] == CHUNKS and brought["problems"] == []
            assert brought["places"] == [{"place": "redis", "node": "", "chunks": CHUNKS, "problem": ""}]
            server.stop()
            assert await second.ask(FIRST) == (answer, CHUNKS * CHUNK_TOKENS), "nothing is left to be brought"
