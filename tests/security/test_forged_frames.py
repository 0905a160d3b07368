"""Who sits on the network between two nodes changes what passes over tcp: unseen with `integrity: greeting` (where only
a chunk's own MAC finds it), and never with `frames`."""

import asyncio
import logging
import secrets as random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import pytest
from support.man_in_the_middle import Frame, Kind, Tamper, Way, Wire, in_the_middle
from support.store_fakes import CHUNK_BYTES, KEYS, SPEC, World, payload

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, TransferError, TransferForgedError, TransferProofError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome
from transfer.base import TransferEngine, TransferOp
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import SegmentHosts, build_transfer, start_segment_hosts
from transfer.tcp import wire
from transfer.tcp.host import TcpSegmentHost

SIZE, TIMEOUT_S = 4 << 20, 20.0
ID = "guarded.1"
TRUST = ClusterTrust("here", Secrets((random.token_bytes(32),)))
SMALL, LARGE = 1000, 1 << 20
"""Moved on the event loop, and in threads, part by part."""
INTEGRITIES = ["greeting", "frames"]
modes = pytest.mark.parametrize("integrity", INTEGRITIES)
sizes = pytest.mark.parametrize("num_bytes", [SMALL, LARGE])


def config(integrity: str) -> TransportConfig:
    return TransportConfig(kind="tcp", streams=1, integrity=integrity)  # type: ignore[arg-type]  # one of two


class Between:
    """A segment, its host, and an initiator whose way there leads through the middle."""

    def __init__(self, segment: Segment, memory: SegmentMemory, engine: TransferEngine, hosts: SegmentHosts) -> None:
        self.segment, self.memory, self.engine, self.hosts = segment, memory, engine, hosts

    async def write(self, *pieces: tuple[int, bytes]) -> TransferError | None:
        """One frame."""
        ops = [TransferOp(self.segment, offset, [memoryview(data)], lambda _: None) for offset, data in pieces]
        return (await self.engine.write(ops, TIMEOUT_S))[0]

    async def read(self, offset: int, num_bytes: int) -> tuple[TransferError | None, bytes]:
        into = bytearray(num_bytes)
        (error,) = await self.engine.read([TransferOp(self.segment, offset, [memoryview(into)])], TIMEOUT_S)
        return error, bytes(into)

    async def until_refused(self) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while ("tcp", "forged") not in self.hosts.refused:  # noqa: ASYNC110 - it is another thread's
                await asyncio.sleep(0.01)

    def holds(self, offset: int, data: bytes) -> bool:
        return bool(self.memory.view[offset : offset + len(data)] == data)


@asynccontextmanager
async def between(integrity: str, tamper: Tamper) -> AsyncIterator[Between]:
    with SegmentMemory.create(ID, SIZE) as memory:
        hosts = await start_segment_hosts(config(integrity), memory, host="127.0.0.1", trust=TRUST)
        here = host_identity()
        segment = Segment(id=ID, node_id="guarded", size_bytes=SIZE, host_id=here, addresses=hosts.addresses)
        engine = build_transfer(config(integrity), here, trust=TRUST)
        try:
            async with in_the_middle(segment, tamper) as seen:
                yield Between(seen, memory, engine, hosts)
                await engine.aclose()
        finally:
            await engine.aclose()
            await hosts.aclose()


def nothing(_wire: Wire, _way: Way, frame: Frame) -> Frame:
    return frame


def flip(frame: Frame) -> Frame:
    payload = bytearray(frame.payload)
    payload[len(payload) // 2] ^= 1
    return Frame(frame.header, frame.table, frame.head_tag, bytes(payload), frame.payload_tag)


def flips(kind: Kind) -> Tamper:
    return lambda _wire, _way, frame: flip(frame) if frame.header.kind is kind else frame


def made_anew(num_bytes: int) -> bytes:
    return random.token_bytes(num_bytes)


@modes
@sizes
async def test_what_nobody_changes_arrives(integrity, num_bytes):
    async with between(integrity, nothing) as run:
        for offset in (0, LARGE, 17):
            data = made_anew(num_bytes)
            assert await run.write((offset, data)) is None
            assert run.holds(offset, data)
            assert await run.read(offset, num_bytes) == (None, data)
        assert not run.hosts.refused


@modes
@sizes
async def test_a_byte_is_flipped_on_its_way_into_the_segment(integrity, num_bytes, caplog):
    data = made_anew(num_bytes)
    async with between(integrity, flips(Kind.WRITE)) as run:
        assert await run.write((0, b"first")) is None or integrity == "frames"  # the greeting is over
        with caplog.at_level(logging.WARNING):
            errors = [await run.write((0, data)) for _ in range(3)]
        if integrity == "greeting":
            assert errors == [None] * 3
            assert not run.holds(0, data)
        else:
            assert all(isinstance(error, TransferForgedError) for error in errors)
            assert run.hosts.refused == {("tcp", "forged"): 4}
            assert sum("peer_broke_protocol reason=forged" in line for line in caplog.messages) <= 1


@modes
@sizes
async def test_a_byte_is_flipped_on_its_way_to_the_reader(integrity, num_bytes):
    data = made_anew(num_bytes)
    async with between(integrity, flips(Kind.DATA)) as run:
        run.memory.view[:num_bytes] = data
        for _ in range(2):
            error, got = await run.read(0, num_bytes)
            if integrity == "greeting":
                assert error is None and got != data
            else:
                assert isinstance(error, TransferForgedError)


@modes
async def test_a_write_is_sent_to_another_place(integrity):
    def elsewhere(_wire: Wire, _way: Way, frame: Frame) -> Frame:
        return frame.with_ranges((LARGE, SMALL)) if frame.header.kind is Kind.WRITE else frame

    data = made_anew(SMALL)
    async with between(integrity, elsewhere) as run:
        error = await run.write((0, data))
        assert run.holds(LARGE, data) == (error is None) == (integrity == "greeting")
        assert integrity == "greeting" or not any(run.memory.view)


@modes
async def test_two_chunks_change_places_in_one_frame(integrity):
    def swap(_wire: Wire, _way: Way, frame: Frame) -> Frame:
        if frame.header.kind is Kind.WRITE:
            half = len(frame.payload) // 2
            swapped = frame.payload[half:] + frame.payload[:half]
            return Frame(frame.header, frame.table, frame.head_tag, swapped, frame.payload_tag)
        return frame

    one, other = made_anew(SMALL), made_anew(SMALL)
    async with between(integrity, swap) as run:
        error = await run.write((0, one), (LARGE, other))
        if integrity == "greeting":
            assert error is None and run.holds(0, other) and run.holds(LARGE, one)
        else:
            assert isinstance(error, TransferForgedError)


@modes
@sizes
async def test_an_earlier_write_is_sent_again(integrity, num_bytes):
    """Old bytes over new ones, with the host's answer kept from the initiator."""
    old, new = made_anew(num_bytes), made_anew(num_bytes)

    def again(seen: Wire, way: Way, frame: Frame) -> Frame:
        writes = [one for one in seen.seen if one.header.kind is Kind.WRITE]
        if frame.header.kind is Kind.WRITTEN and len(writes) == 2:
            seen.swallow = 1
            seen.to_host.write(writes[0].raw())
        return frame

    async with between(integrity, again) as run:
        assert await run.write((0, old)) is None
        assert await run.write((0, new)) is None
        if integrity == "greeting":
            assert (await run.read(LARGE, 1))[0] is None, "it comes behind what was sent again"
            assert run.holds(0, old)
        else:
            await run.until_refused()
            assert run.holds(0, new)


@modes
@sizes
async def test_a_read_is_answered_with_what_an_earlier_one_got(integrity, num_bytes):
    """Also two readers' chunks changed for each other: what was read for one is given to the other."""
    mine, theirs = made_anew(num_bytes), made_anew(num_bytes)

    def earlier(seen: Wire, _way: Way, frame: Frame) -> Frame:
        answers = [one for one in seen.seen if one.header.kind is Kind.DATA]
        if frame.header.kind is Kind.DATA and len(answers) == 2:
            return Frame(frame.header, b"", answers[0].head_tag, answers[0].payload, answers[0].payload_tag)
        return frame

    async with between(integrity, earlier) as run:
        run.memory.view[:num_bytes] = theirs
        run.memory.view[LARGE : LARGE + num_bytes] = mine
        assert await run.read(0, num_bytes) == (None, theirs)
        error, got = await run.read(LARGE, num_bytes)
        if integrity == "greeting":
            assert error is None and got == theirs
        else:
            assert isinstance(error, TransferForgedError)


@modes
async def test_two_writes_change_their_order(integrity):
    """The middle answers the first in the host's name, and passes it on behind the second."""
    first, second = made_anew(SMALL), made_anew(SMALL)

    def reorder(seen: Wire, _way: Way, frame: Frame) -> Frame | None:
        writes = [one for one in seen.seen if one.header.kind is Kind.WRITE]
        if frame.header.kind is not Kind.WRITE:
            return frame
        if len(writes) == 1:
            seen.to_initiator.write(answered(frame, seen))
            return None
        seen.swallow = 1
        seen.to_host.write(frame.raw())
        return writes[0]

    async with between(integrity, reorder) as run:
        errors = [await run.write((0, first)), await run.write((0, second))]
        if integrity == "greeting":
            await run.read(0, 1)
            assert run.holds(0, first)
        else:
            assert isinstance(errors[0], TransferForgedError)
            assert not run.holds(0, first)


def answered(frame: Frame, seen: Wire) -> bytes:
    """A WRITTEN for it, as whoever knows no secret makes one."""
    header = wire.Header(Kind.WRITTEN, frame.header.count, request_id=frame.header.request_id)
    return Frame(header, head_tag=bytes(16) if seen.sealed else b"").raw()


@modes
async def test_a_write_is_kept_back_and_answered_in_the_hosts_name(integrity):
    def keep(seen: Wire, _way: Way, frame: Frame) -> Frame | None:
        if frame.header.kind is Kind.WRITE:
            seen.to_initiator.write(answered(frame, seen))
            return None
        return frame

    async with between(integrity, keep) as run:
        error = await run.write((0, made_anew(SMALL)))
        assert not any(run.memory.view)
        assert (error is None) == (integrity == "greeting")
        assert integrity == "greeting" or isinstance(error, TransferForgedError)


@modes
@pytest.mark.parametrize("borrowed", [False, True], ids=["made up", "the MAC of the frame before"])
async def test_a_frame_is_put_in(integrity, borrowed):
    evil = made_anew(SMALL)

    def inject(seen: Wire, way: Way, frame: Frame) -> Frame:
        if frame.header.kind is Kind.WELCOME:
            seen.swallow = 1
            request = wire.pack_request(Kind.WRITE, [(LARGE, SMALL)], 7)
            tag = (frame.payload_tag if borrowed else bytes(16)) if seen.sealed else b""
            seen.to_host.write(request + tag + evil + tag)
        return frame

    async with between(integrity, inject) as run:
        await run.write((0, b"x"))
        if integrity == "greeting":
            assert run.holds(LARGE, evil)
        else:
            await run.until_refused()
            assert not any(run.memory.view[LARGE:])


@modes
async def test_what_the_initiator_sent_is_sent_back_to_it(integrity):
    """A READ's answer made of the initiator's own WRITE: same bytes, same number, other direction."""
    data = made_anew(SMALL)

    def reflect(seen: Wire, way: Way, frame: Frame) -> Frame:
        if frame.header.kind is Kind.DATA:
            (sent,) = (one for one in seen.seen if one.header.kind is Kind.WRITE)
            return Frame(frame.header, b"", frame.head_tag, sent.payload, sent.payload_tag)
        return frame

    async with between(integrity, reflect) as run:
        assert await run.write((LARGE, data)) is None
        error, got = await run.read(0, SMALL)
        assert (error is None and got == data) == (integrity == "greeting")
        assert integrity == "greeting" or isinstance(error, TransferForgedError)


@modes
@sizes
async def test_what_is_cut_short_is_an_error_with_either(integrity, num_bytes):
    def cut(seen: Wire, _way: Way, frame: Frame) -> Frame:
        if frame.header.kind is Kind.DATA:
            seen.to_initiator.write(frame.raw()[:-1])
            seen.to_initiator.close()
        return frame

    async with between(integrity, cut) as run:
        error, _ = await run.read(0, num_bytes)
        assert isinstance(error, TransferError)


@pytest.mark.parametrize("hosts_mode", INTEGRITIES)
async def test_nobody_in_the_middle_talks_two_ends_out_of_their_macs(hosts_mode):
    def weaken(raw: bytes) -> bytes:
        header = wire.parse_header(raw[: wire.HEADER_BYTES])
        if header.kind is Kind.SEALED_HELLO:
            header = msgspec.structs.replace(header, kind=Kind.PROVEN_HELLO)
        return wire.pack_header(header) + raw[wire.HEADER_BYTES :]

    with SegmentMemory.create(ID, SIZE) as memory:
        hosts = await start_segment_hosts(config(hosts_mode), memory, host="127.0.0.1", trust=TRUST)
        here = host_identity()
        segment = Segment(id=ID, node_id="guarded", size_bytes=SIZE, host_id=here, addresses=hosts.addresses)
        engine = build_transfer(config("frames"), here, trust=TRUST)
        async with in_the_middle(segment, nothing, weaken) as seen:
            (error,) = await engine.write([TransferOp(seen, 0, [memoryview(b"evil")])], TIMEOUT_S)
            assert isinstance(error, TransferProofError)
            assert not any(memory.view[:4])
            await engine.aclose()
        await hosts.aclose()


@pytest.mark.parametrize(("ours", "served"), [("frames", True), ("greeting", False)])
async def test_a_node_that_wants_more_is_served_and_one_that_wants_less_is_told(ours, served):
    """While a cluster's files are changed: the others' setting."""
    theirs = "greeting" if ours == "frames" else "frames"
    with SegmentMemory.create(ID, SIZE) as memory:
        hosts = await start_segment_hosts(config(theirs), memory, host="127.0.0.1", trust=TRUST)
        here = host_identity()
        segment = Segment(id=ID, node_id="guarded", size_bytes=SIZE, host_id=here, addresses=hosts.addresses)
        engine = build_transfer(config(ours), here, trust=TRUST)
        (error,) = await engine.write([TransferOp(segment, 0, [memoryview(b"ferry")])], TIMEOUT_S)
        await engine.aclose()
        await hosts.aclose()
        if served:
            assert error is None and memory.view[:5] == b"ferry"
        else:
            assert isinstance(error, TransferProofError) and "transport.integrity" in error.message


@modes
async def test_a_chunk_that_was_changed_on_its_way_is_a_miss_with_either(integrity, caplog):
    """The chunk's own MAC finds it where frames have none; then it is taken for a forger's in the segment."""
    key, world, on_the_way = KEYS[0], World(), list[Tamper]([nothing])

    def tamper(seen: Wire, way: Way, frame: Frame) -> Frame | None:
        return on_the_way[0](seen, way, frame)

    segment = world.add_node("a", kind="tcp")
    host = TcpSegmentHost(segment.id, world.memory[segment.id], "127.0.0.1", trust=TRUST, sealed=integrity == "frames")
    await host.start()
    try:
        target = msgspec.structs.replace(segment, addresses={"tcp": host.address})
        async with in_the_middle(target, tamper) as told:
            world.register(told)
            engine = build_transfer(config(integrity), "elsewhere", trust=TRUST)
            store, _ = world.store("a", engine, integrity=Integrity("mac", TRUST.secrets))
            async with await store.begin_put([key], prefer_segment=None, timeout_s=TIMEOUT_S) as session:
                chunk = [memoryview(payload(key[0]))]
                await session.write(key, SPEC.chunk_tokens, chunk, timeout_s=TIMEOUT_S)
                assert await session.commit(timeout_s=TIMEOUT_S) == [key]
            on_the_way[0] = flips(Kind.DATA)
            match = await store.match([key], timeout_s=TIMEOUT_S)
            into = [[memoryview(bytearray(CHUNK_BYTES))]]
            with caplog.at_level(logging.WARNING):
                (outcome,) = (await store.get_into(match, 0, into, timeout_s=TIMEOUT_S)).outcomes
            await store.release(match)
            found = outcome, store.counters()["frames_forged"], "frame_forged" in caplog.text
            if integrity == "greeting":
                assert found == (GetOutcome.CHECKSUM, 0, False)
            else:
                assert found == (GetOutcome.UNREACHABLE, 1, True)
            await engine.aclose()
            await world.aclose()
    finally:
        await host.aclose()


def test_there_are_no_macs_without_a_secret():
    with pytest.raises(ConfigError, match="needs the cluster's secret"):
        build_transfer(config("frames"), "here", trust=OPEN)
