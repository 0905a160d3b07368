"""What the Mooncake tier does beyond what every tier does: late calls, clients that hang, memory that it lends."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from support.mooncake_server import HOST, MooncakeServer, mooncake_server, with_mooncake
from support.tier_rigs import CAPACITY_BYTES, FINGERPRINT, chunk_of, content, name_of, room_for

from kvcore.config.tiers import MooncakeTierConfig
from kvcore.errors import ConfigError
from kvcore.process import child
from kvstore.tiers.base import TierChunk, TierOutcome
from kvstore.tiers.mooncake import tier as mooncake
from kvstore.tiers.mooncake.buffer import MooncakeBuffer
from kvstore.tiers.mooncake.limits import MooncakeLimits
from kvstore.tiers.mooncake.tier import MooncakeTier, place_of

OK, AWAY = TierOutcome.OK, TierOutcome.UNAVAILABLE
CALL_S = 20.0
BIG = 5 << 20
"""More than half of the buffer."""


@pytest.fixture(scope="module")
def server() -> Iterator[MooncakeServer]:
    with mooncake_server() as server:
        yield server


@pytest.fixture
def bare(server: MooncakeServer) -> Iterator[MooncakeServer]:
    """The same, with nothing running."""
    server.end()
    yield server
    server.end()
    server.start()
    server.lend()


@asynccontextmanager
async def opened(
    server: MooncakeServer, limits: MooncakeLimits = MooncakeLimits(), **section: object
) -> AsyncIterator[MooncakeTier]:
    """A tier whose client is set up."""
    config = MooncakeTierConfig(master=server.master, **section)
    with server.machines.entered():
        tier = MooncakeTier(place_of(config, "127.0.0.1"), CAPACITY_BYTES, limits)
        try:
            yield tier
        finally:
            await tier.aclose()


async def until(check: Callable[[], Awaitable[bool]], timeout_s: float = CALL_S) -> None:
    async with asyncio.timeout(timeout_s):
        while not await check():  # noqa: ASYNC110  (Mooncake tells nobody)
            await asyncio.sleep(0.02)


async def test_a_room_is_given_out_again_when_the_last_has_let_go():
    buffer = MooncakeBuffer(3 * 4096)
    try:
        with await buffer.room([4096, 10]) as room:
            room.hold()
            assert [len(view) for view in room.views] == [4096, 10]
        waiting = asyncio.create_task(buffer.room([8192]))
        await asyncio.sleep(0)
        assert not waiting.done(), "the client has it still"
        room.let_go()
        with await waiting as again:
            assert again.starts == [again.starts[0]]
        assert buffer.groups([4096, 4096, 8192, 1]) == [slice(0, 2), slice(2, 4)]
        assert buffer.groups([]) == [] and buffer.groups([12288, 1]) == [slice(0, 1), slice(1, 2)]
    finally:
        buffer.close()


@pytest.mark.parametrize(
    ("section", "ports", "message"),
    [
        ({"protocol": "rdma"}, {}, "protocol: rdma needs an RDMA device; active RDMA devices of this machine: none"),
        ({"protocol": "rdma"}, {"mlx5_0:1": "DOWN"}, "active RDMA devices of this machine: none"),
        (
            {"protocol": "rdma", "rdma_devices": ["mlx5_0", "mlx5_7"]},
            {"mlx5_0:1": "ACTIVE"},
            "rdma_devices: mlx5_7 cannot be used; active RDMA devices of this machine: mlx5_0",
        ),
        ({}, {}, "pip install mooncake-transfer-engine-non-cuda"),
    ],
)
def test_what_this_machine_lacks_is_refused_by_name(monkeypatch, section, ports, message):
    monkeypatch.setattr(mooncake, "hca_ports", lambda: ports)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        place_of(MooncakeTierConfig(master="m:1", **section), HOST)


@pytest.mark.parametrize(("late", "outcome"), [(2, OK), (9, AWAY)])
async def test_what_was_read_too_slowly_is_read_again_and_is_never_missing(monkeypatch, late, outcome):
    """A client that stands still for longer than its lease has read what may be anything. The chunk is there still."""
    tier, asked = MooncakeTier(place_of(MooncakeTierConfig(master="127.0.0.1:1"), HOST), CAPACITY_BYTES), list[int]()

    async def call(operation, keys, room, timeout_s):
        asked.append(len(keys))
        return [1000 if len(asked) > late or key == mooncake.key_of(name_of(2)) else -707 for key in keys]

    monkeypatch.setattr(tier._client, "call", call)
    chunks = [TierChunk(name_of(number), [memoryview(bytearray(1000))]) for number in (1, 2)]
    assert await tier.load(chunks, timeout_s=CALL_S) == [outcome, OK]
    assert asked == [2, 1, 1] and tier.stats().problem in (None, tier._client.problem)
    await tier.aclose()


@with_mooncake
async def test_a_late_call_keeps_its_room_and_never_touches_the_callers_memory(server):
    async with opened(server) as tier:
        chunk, other = chunk_of(name_of(1), BIG), chunk_of(name_of(2), BIG)
        await until(saved(tier, chunk))
        server.freeze()
        try:
            late = room_for(chunk)
            before = content(late)
            assert await tier.load([late], timeout_s=0.3) == [AWAY]
            assert "did not answer in time" in (tier.stats().problem or "")
            assert await tier.load([room_for(chunk)], timeout_s=0.3) == [AWAY]
            assert "late hold all of its buffer" in (tier.stats().problem or "")
        finally:
            server.thaw()
        await until(saved(tier, other))
        assert content(late) == before
        back = room_for(chunk)
        assert await tier.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(chunk)


@with_mooncake
async def test_a_client_that_hangs_is_replaced_and_its_rooms_are_free(server):
    limits = MooncakeLimits(hung_s=0.3, look_s=0.05, setup_s=2.5, retry_s=0.2)
    async with opened(server, limits) as tier:
        chunk = chunk_of(name_of(3), BIG)
        await until(saved(tier, chunk))
        server.freeze()
        try:
            assert await tier.load([room_for(chunk)], timeout_s=0.3) == [AWAY]

            async def seen() -> bool:
                return "not set up after" in (tier.stats().problem or "")

            await until(seen)
            async with asyncio.timeout(5.0):
                assert await tier.find([chunk.name], timeout_s=CALL_S) == [False], "without waiting for it"
        finally:
            server.thaw()
        await until(saved(tier, chunk))
        assert await tier.load([room_for(chunk)], timeout_s=CALL_S) == [OK]
        assert tier.stats().problem is None


@with_mooncake
async def test_a_client_that_is_killed_is_started_again(server):
    async with opened(server, MooncakeLimits(retry_s=0.1)) as tier:
        chunk = chunk_of(name_of(4), 1000)
        await until(saved(tier, chunk))
        (pid,) = children()
        assert f'"local_hostname":"{HOST}"' in command_of(pid), "not loopback, but as the others see us"
        os.kill(pid, signal.SIGKILL)

        async def away() -> bool:
            return "its client ended" in (tier.stats().problem or "")

        await until(away)
        await until(saved(tier, chunk))
        assert tier.stats().problem is None


@with_mooncake
async def test_closing_ends_the_client_within_its_bound_whatever_hangs(server):
    async with opened(server, MooncakeLimits(close_s=0.5), global_segment_size=16 << 20) as tier:
        await until(saved(tier, chunk_of(name_of(5), 1000)))
        (pid,) = children()
        server.freeze()
        try:
            load = asyncio.create_task(tier.load([room_for(chunk_of(name_of(5), 1000))], timeout_s=CALL_S))
            await asyncio.sleep(0.1)
            async with asyncio.timeout(3.0):
                await tier.aclose()
                assert await load == [AWAY]
        finally:
            server.thaw()
        assert pid not in children()


@with_mooncake
async def test_a_setup_that_fails_is_said_and_harms_nobody(server):
    async with opened(server, metadata_server="http://127.0.0.1:1/metadata") as tier:
        chunk = chunk_of(name_of(6), 1000)
        assert await tier.save([chunk], timeout_s=CALL_S) == [AWAY]
        assert "mooncake://10.98.72.1:50051: Mooncake's setup returned -" in (tier.stats().problem or "")
        assert await tier.find([chunk.name], timeout_s=0.2) == [False]


@with_mooncake
async def test_a_generation_is_cleared_by_its_name_and_never_as_stale(server):
    async with opened(server) as tier:
        ours, theirs = chunk_of(name_of(7), 1000), chunk_of(name_of(7, b"\xee" * 16), 1000)
        await until(saved(tier, ours))
        await until(saved(tier, theirs))
        stale = await tier.clear([FINGERPRINT], own=["ours/d0"], timeout_s=CALL_S)
        assert stale.num_chunks == 0 and "does not tell who uses" in stale.incomplete
        cleared = await tier.clear([b"\xee" * 16], timeout_s=CALL_S)
        assert (cleared.num_chunks, cleared.incomplete) == (1, "")
        assert await tier.find([ours.name, theirs.name], timeout_s=CALL_S) == [True, False]
        assert await tier.generations(timeout_s=CALL_S) is None
        assert await tier.expire([ours.name], 1.0, timeout_s=CALL_S) == 0


@with_mooncake
async def test_memory_that_a_node_lends_is_taken_back_with_what_lies_in_it(bare):
    """Nobody else lends, so what was saved went into this node's memory."""
    bare.start()
    async with opened(bare) as reader:
        chunk = chunk_of(name_of(8), 1 << 20)
        assert await reader.save([chunk], timeout_s=CALL_S) == [TierOutcome.FULL]
        assert "no client lends it memory" in (reader.stats().problem or "")
        async with opened(bare, global_segment_size=32 << 20) as lender:
            await until(saved(reader, chunk))
            back = room_for(chunk)
            assert await reader.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(chunk)
            many = [chunk_of(name_of(number), 4 << 20) for number in range(100, 112)]
            outcomes = [(await lender.save([one], timeout_s=CALL_S))[0] for one in many]
            assert OK in outcomes and set(outcomes) <= {OK, TierOutcome.FULL}, "48 MiB into 32: it evicts, or refuses"
        assert await reader.load([room_for(chunk)], timeout_s=CALL_S) == [TierOutcome.MISSING]


@with_mooncake
async def test_mooncakes_own_metadata_server_will_do_too(bare):
    bare.start("--enable_http_metadata_server=true", f"--http_metadata_server_host={HOST}")
    section = {"metadata_server": f"http://{HOST}:8080/metadata", "local_hostname": f"{HOST}:17001"}
    for _ in range(2):  # the first takes its names back, or the second could not be set up
        async with opened(bare, global_segment_size=16 << 20, **section) as tier:
            chunk = chunk_of(name_of(9), 100_000)
            await until(saved(tier, chunk))
            back = room_for(chunk)
            assert await tier.load([back], timeout_s=CALL_S) == [OK] and content(back) == content(chunk)


def saved(tier: MooncakeTier, chunk: TierChunk) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return await tier.save([chunk], timeout_s=CALL_S) == [OK]

    return check


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def children() -> list[int]:
    """The processes of Mooncake's clients that this process has."""
    return list(child._running)
