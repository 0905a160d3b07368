"""Peers that die, stall, lie or are not who they should be; thousands of connections: with seeds, for each transport.

What only one transport can meet (TCP's frames, UCX's and NIXL's descriptors) has its own tests beside it.
"""

import asyncio
import contextlib
import gc
import os
import random
import socket
from pathlib import Path

import pytest
from support.slow import slow_but
from support.transfer_child import segment_process
from support.transfer_pump import pump_process
from support.transfer_rigs import KINDS, NIXL, REMOTE, SIZE_BYTES, UCX, Rig, renamed, resources
from support.transports import transport_config

from kvcore.errors import PeerUnreachableError, SegmentUnknownError, TransferError, TransferTimeoutError
from transfer.base import TransferEngine, TransferOp
from transfer.inproc import InprocTransfer
from transfer.memory.segment import host_identity
from transfer.select import build_transfer

NETWORK = ["tcp", UCX, NIXL]
"""Those whose bytes go through the peer's program: over RDMA the NIC moves them, whatever the program does."""

_CONNECTS = 2000
_LIBRARY_CONNECTS = {"ucx": 100, "nixl": 100}
"""A library's connection here is a context, a worker and an agent of its own: some 10 ms each."""

_GIVEN_UP_BYTES = 4 << 20
"""Of each batch that chaos cancels or gives too little time."""


def engine_for(rig: Rig) -> TransferEngine:
    """Another initiator."""
    if rig.kind == "inproc":
        return InprocTransfer(rig.registry)
    return build_transfer(transport_config(rig.kind), host_identity())


class Chaos:
    """Random moves on one rig, held against what its memory must hold.

    A write that was given up may still be landing, over a network: what lies below `quiet_from` is then left alone
    until the segment has begun anew, as the metadata server lets such room rest.
    """

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.former: list[TransferOp] = []
        self.quiet_from = 0

    def ranges(self) -> list[tuple[int, int]]:
        """Disjoint (offset, size), some of them tiny, some of a megabyte."""
        cuts = sorted(self.random.sample(range(self.quiet_from, SIZE_BYTES), 2 * self.random.randint(1, 12)))
        pairs = zip(cuts[::2], cuts[1::2], strict=True)
        most = self.random.choice([64, 4096, 1 << 20])
        return [(start, min(end - start, most)) for start, end in pairs]

    async def write(self) -> None:
        ranges = self.ranges()
        data = [self.random.randbytes(size) for _, size in ranges]
        ops = [self.rig.op(at, one) for (at, _), one in zip(ranges, data, strict=True)]
        assert await self.rig.engine.write(ops, 20) == [None] * len(ops)
        for (at, size), one in zip(ranges, data, strict=True):
            assert self.rig.memory.view[at : at + size] == one, f"{size} bytes at {at}"

    async def read(self) -> None:
        ranges = self.ranges()
        back = [bytearray(size) for _, size in ranges]
        ops = [self.rig.op(at, one) for (at, _), one in zip(ranges, back, strict=True)]
        assert await self.rig.engine.read(ops, 20) == [None] * len(ops)
        for (at, size), one in zip(ranges, back, strict=True):
            assert self.rig.memory.view[at : at + size] == one, f"{size} bytes at {at}"

    async def cancelled(self) -> None:
        """What it says has landed has; a buffer that was read into is not touched any more."""
        data = bytearray(self.random.randbytes(_GIVEN_UP_BYTES))
        move = self.random.choice([self.rig.engine.write, self.rig.engine.read])
        task = asyncio.create_task(move([self.rig.op(0, data)], 20))
        await asyncio.sleep(self.random.choice([0, 0.0003, 0.002]))
        task.cancel()
        try:
            assert await task == [None]
        except asyncio.CancelledError:
            if move == self.rig.engine.write:
                self.quiet_from = _GIVEN_UP_BYTES
        data[:] = bytes(len(data))
        assert await self.rig.engine.write([self.rig.op(SIZE_BYTES - 1, b"x")], 20) == [None]
        assert data.count(0) == len(data)

    async def too_late(self) -> None:
        data = bytes(_GIVEN_UP_BYTES)
        (error,) = await self.rig.engine.write([self.rig.op(0, data)], self.random.choice([1e-6, 0.0005, 0.002]))
        if error is not None:
            assert isinstance(error, TransferTimeoutError)
            self.quiet_from = _GIVEN_UP_BYTES

    async def restarted(self) -> None:
        """The segment comes back elsewhere; its former life is an error, and never touches the new one."""
        self.former.append(self.rig.op(0, b"former"))
        await self.rig.close_host()
        await self.rig.host()
        self.quiet_from = 0
        before = bytes(self.rig.memory.view[:6])
        (error,) = await self.rig.engine.write([self.random.choice(self.former)], 20)
        assert isinstance(error, PeerUnreachableError | SegmentUnknownError)
        assert self.rig.memory.view[:6] == before

    async def wrong(self) -> None:
        """Another segment at the address, another size, a range outside."""
        segment = self.rig.segment
        for other in (renamed(segment, "rig.dead", SIZE_BYTES), renamed(segment, segment.id, 2 * SIZE_BYTES)):
            (error,) = await self.rig.engine.write([TransferOp(other, SIZE_BYTES - 4, [memoryview(b"wildwild")])], 20)
            assert isinstance(error, SegmentUnknownError)

    async def run(self, steps: int) -> None:
        moves = [self.write, self.read, self.cancelled, self.too_late, self.restarted, self.wrong]
        for move in self.random.choices(moves, weights=[6, 6, 3, 2, 2, 1], k=steps):
            await move()
        await self.write()
        await self.read()


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize("kind", KINDS)
async def test_nothing_is_lost_mixed_up_or_left_by_a_hundred_random_moves(kind: str, seed: int) -> None:
    before = resources()
    async with asyncio.timeout(60), Rig(kind) as rig:
        await Chaos(rig, seed).run(100)
    assert resources() == before


@pytest.mark.parametrize("seed", slow_but([0], range(3)))
@pytest.mark.parametrize("kind", REMOTE)
async def test_a_peer_killed_at_a_random_moment_ends_every_batch_with_a_result(kind: str, seed: int) -> None:
    """Many batches at once, of all sizes: each ends soon, and none after the death says that it landed."""
    dice = random.Random(seed)
    engine = build_transfer(transport_config(kind), host_identity())
    data = memoryview(bytearray(16 << 20))
    killed = asyncio.Event()
    with segment_process("child.1", len(data), kind) as child:

        async def pump(size: int) -> TransferError:
            at = dice.randrange(len(data) - size)
            move = dice.choice([engine.write, engine.read])
            while True:
                too_late = killed.is_set()
                (error,) = await move([TransferOp(child.segment, at, [data[at : at + size]])], 20)
                if error is not None:
                    return error
                assert not too_late, "landed at a dead peer"
                await asyncio.sleep(0)

        async with asyncio.timeout(60):
            assert await engine.write([TransferOp(child.segment, 0, [data[:1]])], 10) == [None]
            tasks = [asyncio.create_task(pump(dice.choice([64, 4096, 1 << 20, 8 << 20]))) for _ in range(6)]
            await asyncio.sleep(dice.random() * 0.1)
            child.kill()
            killed.set()
            for error in await asyncio.gather(*tasks):
                assert isinstance(error, PeerUnreachableError)
    await engine.aclose()


@pytest.mark.parametrize("kind", REMOTE)
async def test_a_host_outlives_initiators_that_are_killed_in_the_middle(kind: str) -> None:
    dice = random.Random(1)
    async with Rig(kind) as rig:
        for _ in range(3):
            async with pump_process(rig.segment, kind) as process:
                await asyncio.sleep(dice.random() * 0.02)  # not to wait for something: to hit another moment
                process.kill()
        assert await rig.engine.write([rig.op(0, b"still here")], 5) == [None]
        assert rig.memory.view[:10] == b"still here"


@pytest.mark.parametrize("kind", NETWORK)
async def test_a_stopped_owner_is_a_timeout_soon_after_the_deadline_and_all_is_well_once_it_goes_on(kind: str) -> None:
    """Half-open, as far as we can see: the connection is there, and nobody reads or writes at its other end."""
    before = resources()
    engine = build_transfer(transport_config(kind), host_identity())
    data = bytearray(8 << 20)
    loop = asyncio.get_running_loop()
    with segment_process("child.1", len(data), kind) as child:
        op = TransferOp(child.segment, 0, [memoryview(data)])
        assert await engine.write([op], 10) == [None]
        for move in (engine.write, engine.read):
            child.stop()
            start = loop.time()
            (error,) = await move([op], 0.1)
            assert isinstance(error, TransferTimeoutError) and loop.time() - start < 10
            data[:] = b"\x05" * len(data)
            child.go_on()
            assert await engine.write([op], 10) == [None]
            assert data.count(5) == len(data), "a read that was given up has touched its buffer"
        child.stop()
        task = asyncio.create_task(engine.write([op], 30))
        await asyncio.sleep(0.02)
        start = loop.time()
        await engine.aclose()
        (error,) = await task
        assert isinstance(error, PeerUnreachableError) and loop.time() - start < 15
    assert resources() == before


@pytest.mark.parametrize("kind", NETWORK)
async def test_a_slow_owner_gets_every_byte_in_its_own_time_and_others_do_not_wait(kind: str) -> None:
    """One that stands still for a moment again and again; meanwhile another segment is served as ever."""
    dice = random.Random(1)
    engine = build_transfer(transport_config(kind), host_identity())
    async with Rig(kind) as other, asyncio.timeout(100):
        with segment_process("child.1", 16 << 20, kind) as child:
            data = dice.randbytes(16 << 20)
            back = bytearray(len(data))
            slow = TransferOp(child.segment, 0, [memoryview(data)])
            task = asyncio.create_task(engine.write([slow], 90))
            served = 0
            while not task.done():
                child.stop()
                for _ in range(3):
                    assert await engine.write([other.op(0, data[:4096])], 20) == [None]
                    served += 1
                child.go_on()
                await asyncio.sleep(dice.random() * 0.005)
            assert await task == [None] and served
            assert await engine.read([TransferOp(child.segment, 0, [memoryview(back)])], 10) == [None]
            assert back == data
        await engine.aclose()


def listening_ports(pid: int) -> list[int]:
    """TCP ports on which a process of ours listens, on any address."""
    sockets = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            sockets.add(str(entry.readlink()))
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    return [int(row[1].rpartition(":")[2], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", NETWORK)
async def test_strangers_who_say_nothing_or_nonsense_or_close_at_once_hinder_nobody(kind: str, seed: int) -> None:
    """Half-open connections of a port scanner, a load balancer's check: the owner goes on serving."""
    dice = random.Random(seed)
    engine = build_transfer(transport_config(kind), host_identity())
    with segment_process("child.1", 1 << 20, kind) as child, contextlib.ExitStack() as strangers:
        pids = child.pids
        ports = [port for pid in pids for port in listening_ports(pid)]
        assert ports
        op = TransferOp(child.segment, 0, [memoryview(b"served")])
        for port in ports * 30:
            stranger = strangers.enter_context(socket.create_connection(("127.0.0.1", port), timeout=5))
            with contextlib.suppress(OSError):
                stranger.sendall(dice.randbytes(dice.choice([0, 1, 8, 64, 4096])))
            if dice.random() < 0.5:
                stranger.close()
            assert await engine.write([op], 10) == [None]
        assert child.process.poll() is None and child.pids == pids
    await engine.aclose()


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
async def test_thousands_of_connects_leave_no_descriptor_thread_mapping_or_memory(kind: str) -> None:
    """Both ends are in this process, so that both are counted."""
    async with Rig(kind, 64 << 10) as rig:

        async def connect() -> None:
            engine = engine_for(rig)
            engine.register(memoryview(bytearray(4096)))
            back = bytearray(5)
            assert await engine.write([rig.op(0, b"again")], 20) == [None]
            assert await engine.read([rig.op(0, back)], 20) == [None]
            assert back == b"again"
            await engine.aclose()

        count = _LIBRARY_CONNECTS.get(kind, _CONNECTS)
        assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
        before = resources()
        for _ in range(count // 10):
            await connect()
        warm = resident_bytes()
        for _ in range(count):
            await connect()
        async with asyncio.timeout(30):
            while resources() != before:  # noqa: ASYNC110  (the host sees the last ones go, and tells nobody)
                await asyncio.sleep(0.01)
        assert resident_bytes() - warm < 8 << 20
