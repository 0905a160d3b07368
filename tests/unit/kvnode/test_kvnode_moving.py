"""A drained node copies its chunks into others' segments: whole, paced, and never what was overwritten meanwhile."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from support.chunk_attacks import CLUSTER, sealed_chunk
from support.metadata_rigs import DirectTransport, end, until
from support.metadata_words import new_state

from kvcore.chunk_keys import owner_of
from kvcore.clock import SystemClock
from kvcore.config.schema import StoreConfig
from kvcore.errors import MetadataUnavailableError, PeerUnreachableError, TransferError
from kvcore.types import ChunkKey, NodeInfo, Role, Segment
from kvnode.limits import NodeLimits
from kvnode.moving import ChunkMover
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, parse, verify
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome
from metadata_server.cache_messages import NodeOrderRequest, RebalanceRequest
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.messages import ManifestEntry, RegisterRequest, SegmentManifest
from transfer.base import TransferOp

CHUNK = 8192
PRINT = b"f" * 16
OWNER = owner_of(b"tenant")
MACS = Integrity("mac", CLUSTER)
ENCRYPTED = Integrity("mac", CLUSTER, encrypt=True)
LIMITS = NodeLimits(move_poll_s=0.005, move_bytes=3 * CHUNK, move_share=0.9)


def chunk_key(number: int) -> ChunkKey:
    return ChunkKey(hashlib.sha256(bytes([number])).digest()[:16])


@dataclass
class Memories:
    """The segments' bytes, as a transport reaches them. `fail`: what becomes of an op; `before`: called ahead."""

    views: dict[str, memoryview] = field(default_factory=dict)
    fail: Callable[[TransferOp], TransferError | None] = lambda _: None
    before: Callable[[TransferOp], None] = lambda _: None
    calls: list[int] = field(default_factory=list)
    open: int = 0
    kind: str = "memory"

    def __call__(self) -> "Memories":
        self.open += 1
        return self

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        self.calls.append(len(ops))
        errors: list[TransferError | None] = []
        for op in ops:
            self.before(op)
            at = op.offset
            for part in op.buffers:
                self.views[op.segment.id][at : at + part.nbytes] = part
                at += part.nbytes
            errors.append(self.fail(op))
        return errors

    async def aclose(self) -> None:
        self.open -= 1


@dataclass
class World:
    client: MetadataClient
    memories: Memories
    mover: ChunkMover
    ordered: list[bool]
    core: MetadataCore

    def place(self, number: int) -> dict[str, memoryview]:
        """Segment -> the bytes of this chunk there, as the index has it."""
        replicas = self.core.state.match([chunk_key(number)], SystemClock().now()).replicas
        return {
            one.segment_id: self.memories.views[one.segment_id][one.offset : one.offset + one.length]
            for found in replicas
            for one in found
            if self.is_whole(one.segment_id, one.offset, one.length, number, one.generation)
        }

    def is_whole(self, segment: str, offset: int, length: int, number: int, generation: int) -> bool:
        memory = self.memories.views[segment][offset : offset + length]
        wanted = Expected(chunk_key(number), PRINT, generation, CHUNK - HEADER_BYTES)
        return verify(memory[:HEADER_BYTES], wanted, [memory[HEADER_BYTES:]]) is GetOutcome.OK


def payload(number: int) -> bytes:
    return bytes([number]) * (CHUNK - HEADER_BYTES)


@asynccontextmanager
async def world(
    chunks: int = 7, room: int = 16, limits: NodeLimits = LIMITS, *, order: str = "drain", sealed: Integrity = MACS
) -> AsyncIterator[World]:
    """Node a with so many chunks, drained to be emptied or to `shed`, and b with room for so many."""
    clock, state = SystemClock(), new_state(reserve_ttl_s=5.0)
    core = MetadataCore(state, clock)
    client = MetadataClient(DirectTransport(core), clock, 5.0)
    memories = Memories()
    info = {}
    for name, size in (("a", 16), ("b", room)):
        node = NodeInfo(id=name, role=Role.STORE, control_url=f"http://{name}", incarnation=1)
        segment = Segment(id=f"{name}.1", node_id=name, size_bytes=size * CHUNK, host_id="h", addresses={})
        memory = memories.views[segment.id] = memoryview(bytearray(size * CHUNK))
        entries = []
        for n in range(chunks if name == "a" else 0):
            body = payload(n)
            header = ChunkHeader(chunk_key(n), PRINT, 16, len(body), 0, n + 1, OWNER)
            memory[n * CHUNK : (n + 1) * CHUNK] = sealed_chunk(sealed, header, body)
            entries.append(ManifestEntry(key=chunk_key(n), offset=n * CHUNK, length=CHUNK, generation=n + 1))
        manifest = SegmentManifest(segment=segment, entries=entries)
        await client.register(RegisterRequest(node=node, segments=[manifest], ttl_s=900))
        info[name] = node
    if order == "shed":
        await client.rebalance(RebalanceRequest(action="start"))
    else:
        await client.order_node(NodeOrderRequest(node_id="a", action="drain", move=True))
    ordered = [True]

    async def run(work: Callable[[], object]) -> object:
        return work()

    mover = ChunkMover(
        memories.views["a.1"],
        node=info["a"],
        metadata=client,
        open_transfer=memories,  # type: ignore[arg-type]
        wanted=lambda: ordered[0],
        store=StoreConfig(reserve_ttl_s=5.0),
        clock=clock,
        run_blocking=run,  # type: ignore[arg-type]
        limits=limits,
    )
    task = asyncio.ensure_future(mover.run())
    try:
        yield World(client, memories, mover, ordered, core)
    finally:
        await end(task)
        await mover.aclose()
        state.check_invariants(clock.now())
        assert memories.open == 0 and state.num_reservations == 0


async def test_every_chunk_is_copied_whole_and_then_lies_there_alone():
    async with world() as it:
        await until(lambda: it.mover.left == 0)
        assert it.mover.moved == 7
        await until(lambda: all(set(it.place(n)) == {"b.1"} for n in range(7)))
        assert all(bytes(it.place(n)["b.1"][HEADER_BYTES:]) == payload(n) for n in range(7))


async def test_a_copy_says_whose_chunk_it_is():
    async with world() as it:
        await until(lambda: it.mover.left == 0)
        copies = [parse(it.place(n)["b.1"][:HEADER_BYTES]) for n in range(7)]
        assert [one.owner for one in copies] == [OWNER] * 7


@pytest.mark.parametrize("sealed", [MACS, ENCRYPTED], ids=["mac", "encrypted"])
async def test_a_copy_is_proved_to_its_reader_by_the_seal_of_who_wrote_it_first(sealed):
    async with world(sealed=sealed) as it:
        await until(lambda: it.mover.left == 0)
        for number in range(7):
            copy = it.place(number)["b.1"]
            header = parse(copy[:HEADER_BYTES])
            expected = Expected(chunk_key(number), PRINT, header.generation, CHUNK - HEADER_BYTES, OWNER)
            assert header.generation != number + 1
            assert sealed.check(copy[:HEADER_BYTES], expected, [copy[HEADER_BYTES:]]) is GetOutcome.OK


async def test_a_batch_has_no_more_bytes_than_agreed_and_headers_come_last():
    async with world() as it:
        await until(lambda: it.mover.left == 0)
        assert it.memories.calls == [3, 3, 3, 3, 1, 1]


async def test_what_is_overwritten_while_it_is_read_never_becomes_a_chunk():
    async with world() as it:

        def overwrite(op: TransferOp) -> None:
            source = it.memories.views["a.1"]
            if sum(part.nbytes for part in op.buffers) > HEADER_BYTES:
                source[3 * CHUNK + 500 : 3 * CHUNK + 600] = bytes(100)

        it.memories.before = overwrite
        await until(lambda: it.mover.moved == 6)
        await until(lambda: it.mover.left == 1)
        assert "b.1" not in it.place(3) and all("b.1" in it.place(n) for n in range(7) if n != 3)


async def test_a_write_that_fails_leaves_no_chunk_and_is_tried_again():
    failures = [3]

    def fail(_: TransferOp) -> TransferError | None:
        failures[0] -= 1
        return PeerUnreachableError("no route") if failures[0] >= 0 else None

    async with world(limits=NodeLimits(move_poll_s=0.005, move_bytes=3 * CHUNK, move_share=0.9)) as it:
        it.memories.fail = fail
        await until(lambda: it.mover.left == 0 and it.mover.moved == 7)
        assert all(set(it.place(n)) <= {"a.1", "b.1"} and it.place(n) for n in range(7))


async def test_without_room_for_all_the_rest_stays_and_is_told_of():
    async with world(room=4) as it:
        await until(lambda: it.mover.left == 3)
        assert it.mover.moved == 4 and all(it.place(n) for n in range(7))


async def test_it_stops_when_the_node_is_no_longer_drained_and_nothing_was_lost():
    async with world() as it:
        it.memories.before = lambda _: it.ordered.__setitem__(0, False)
        await until(lambda: it.memories.calls and it.mover.left is None)
        assert 0 < it.mover.moved <= 3 and all(it.place(n) for n in range(7))
        await until(lambda: all(len(it.place(n)) == 1 for n in range(7)))


async def test_a_segment_that_sheds_gives_up_what_is_too_much_and_no_more():
    """Of 7 chunks in two segments of 16 each."""
    async with world(order="shed") as it:
        await until(lambda: not it.core.state.moves.look(None, 0.0).running)
        await until(lambda: all(len(it.place(n)) == 1 for n in range(7)))
        assert [set(it.place(n)) for n in range(7)].count({"b.1"}) == it.mover.moved == 3


async def test_a_copy_of_which_no_answer_told_does_not_lie_twice_for_good():
    async with world() as it:
        original, lost = it.client._transport.call, []

        async def call(path: str, body: bytes, timeout_s: float) -> bytes:
            reply = await original(path, body, timeout_s)
            if path.endswith("/commit") and len(lost) < 2:
                lost.append(path)
                raise MetadataUnavailableError("the answer was lost")
            return reply

        it.client._transport.call = call  # type: ignore[method-assign]
        await until(lambda: it.mover.left == 0 and len(lost) == 2)
        await until(lambda: all(set(it.place(n)) == {"b.1"} for n in range(7)))
        assert it.mover.moved < 7, "as far as it knows"


async def test_a_metadata_server_that_was_started_anew_is_told_what_was_copied():
    """Between copying and telling of it, and the run or the drain is unknown to the new one."""
    async with world() as it:
        stopped = asyncio.Event()

        async def call(path: str, body: bytes, timeout_s: float) -> bytes:
            if path.endswith("/move_chunks") and it.mover.moved and not stopped.is_set():
                it.ordered[0] = False
                raise MetadataUnavailableError("it is started again")
            return await original(path, body, timeout_s)

        original = it.client._transport.call
        it.client._transport.call = call  # type: ignore[method-assign]
        await until(lambda: it.mover.moved and it.mover.left is None)
        assert sum(len(it.place(n)) == 2 for n in range(7)) == it.mover.moved
        it.core.state.orders.give(NodeOrderRequest(node_id="a", action="undrain"), None, 0.0)
        stopped.set()
        await until(lambda: all(len(it.place(n)) == 1 for n in range(7)))


async def test_while_it_is_paused_nothing_is_written_and_then_it_goes_on():
    async with world() as it:
        async with it.mover.work.paused():
            calls = len(it.memories.calls)
            await asyncio.sleep(0)
            assert len(it.memories.calls) == calls
        await until(lambda: it.mover.left == 0)


async def test_a_target_that_is_not_reached_gets_no_chunk_and_all_of_them_stay_here():
    async with world() as it:
        it.memories.fail = lambda _: PeerUnreachableError("dead")
        await until(lambda: len(it.memories.calls) > 1)
        assert it.mover.moved == 0 and all(set(it.place(n)) == {"a.1"} for n in range(7))
