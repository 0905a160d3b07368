"""What only NIXL can meet, over real NIXL on loopback TCP: see the conformance tests for the rest."""

import asyncio
import os
import random
import re
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest
from support.nixl import needs_nixl
from support.transfer_child import segment_process
from support.transfer_rigs import SIZE_BYTES, Rig, resources
from support.transports import transport_config

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError, TransferError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory
from transfer.nixl import peer as nixl_peer
from transfer.nixl import port as nixl_port
from transfer.nixl.binding import NixlAgent, load_nixl
from transfer.nixl.descriptor import NixlDescriptor, NixlHello, pack_descriptor, pack_hello, parse_descriptor
from transfer.nixl.host import NixlSegmentHost
from transfer.nixl.limits import NixlLimits
from transfer.nixl.transport import NixlTransfer
from transfer.ucx.devices import plan_devices

pytestmark = list(needs_nixl)
CONFIG = transport_config("nixl")


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig("nixl") as made:
        yield made


@pytest.fixture
def as_rdma(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests on their way, straight between the callers' buffers: as over RDMA, but over TCP."""
    monkeypatch.setattr("transfer.nixl.worker.NixlWorker._over_tcp", staticmethod(lambda plan: False))


def described(rig: Rig, **changes: object) -> Segment:
    """The rig's segment with a descriptor that is whole, and wrong."""
    changed = replace(parse_descriptor(rig.segment.addresses["nixl"]), **changes)  # type: ignore[arg-type]
    return Segment(
        id=changed.segment_id,
        node_id="rig",
        size_bytes=changed.size_bytes,
        host_id="h",
        addresses={"nixl": pack_descriptor(changed)},
    )


async def attempt(rig: Rig, segment: Segment) -> TransferError | None:
    (error,) = await rig.engine.write([TransferOp(segment, 0, [memoryview(b"wild")])], 5)
    return error


async def test_a_foreign_segment_at_the_address_is_never_written(rig: Rig) -> None:
    """The address of a former life, taken over by another: its descriptor is whole, but the peer is not the one."""
    assert isinstance(await attempt(rig, described(rig, segment_id="rig.dead")), SegmentUnknownError)
    assert rig.memory.view[:4] == bytes(4)
    assert await attempt(rig, rig.segment) is None


async def test_memory_that_was_not_registered_is_out_of_reach_whatever_the_descriptor_says(rig: Rig) -> None:
    base = parse_descriptor(rig.segment.addresses["nixl"]).base
    for wrong in (base + SIZE_BYTES - 2, base - 4096, 8):
        assert isinstance(await attempt(rig, described(rig, base=wrong)), SegmentUnknownError)
    assert rig.memory.view[-4:] == bytes(4)
    assert await attempt(rig, rig.segment) is None


@pytest.mark.parametrize("seed", range(10))
async def test_metadata_cut_off_is_an_error_and_hurts_no_other(rig: Rig, seed: int) -> None:
    whole = parse_descriptor(rig.segment.addresses["nixl"]).metadata
    cut = whole[: random.Random(seed).randrange(len(whole))]
    assert isinstance(await attempt(rig, described(rig, metadata=cut)), TransferError)
    async with Rig("nixl") as other:
        assert await rig.engine.write([other.op(0, b"fine")], 5) == [None]


def stranger(descriptor: NixlDescriptor) -> tuple[NixlAgent, str]:
    """An agent of nobody, connected to a host."""
    agent = NixlAgent(load_nixl(), f"stranger.{os.urandom(4).hex()}", plan_devices(["lo"]).options(), progress=False)
    return agent, agent.load(descriptor.metadata)


async def test_greetings_that_lie_are_answered_by_nobody_and_hinder_nobody(rig: Rig) -> None:
    descriptor = parse_descriptor(rig.segment.addresses["nixl"])
    agent, host = stranger(descriptor)
    good = pack_hello(NixlHello(7, rig.segment.id, agent.metadata()))
    lies = [b"x", b"GET / HTTP/1.1\r\n\r\n", good[:-1], good + b"x", bytes(100_000)]
    lies += [bytes([*good[:at], good[at] ^ 1, *good[at + 1 :]]) for at in range(0, len(good), 17)]
    lies += [pack_hello(NixlHello(7, rig.segment.id, garbage)) for garbage in (b"", b"garbage", agent.metadata()[:50])]
    for lie in lies:
        agent.send(host, lie)
    agent.send(host, good)
    heard: list[bytes] = []
    async with asyncio.timeout(60):
        while not heard:
            heard += [message for messages in agent.messages().values() for message in messages]
            await asyncio.sleep(0.001)
    assert len(heard) == 1 and heard[0][:4] == b"KVFW"
    agent.close()
    assert await attempt(rig, rig.segment) is None


async def test_connections_over_the_bound_are_refused_and_the_places_of_the_dead_are_given_again() -> None:
    with SegmentMemory.create("n.1", 4096) as memory:
        host = NixlSegmentHost("n.1", memory.view, CONFIG, NixlLimits(max_connections=2))
        await host.start()
        segment = Segment(id="n.1", node_id="n", size_bytes=4096, host_id="h", addresses={"nixl": host.address})
        engines = [NixlTransfer(CONFIG) for _ in range(3)]

        async def put(engine: NixlTransfer) -> TransferError | None:
            return (await engine.write([TransferOp(segment, 0, [memoryview(b"here")])], 5))[0]

        assert [await put(engine) for engine in engines[:2]] == [None, None]
        refused = await put(engines[2])
        assert isinstance(refused, PeerUnreachableError) and "takes no more" in refused.message
        assert [await put(engine) for engine in engines[:2]] == [None, None]
        await engines[0].aclose()
        async with asyncio.timeout(60):
            while await put(engines[2]) is not None:  # noqa: ASYNC110  (nobody is told when a place is free)
                await asyncio.sleep(0.01)
        assert host.num_connections == 2
        for engine in engines:
            await engine.aclose()
        async with asyncio.timeout(60):
            while host.num_connections:  # noqa: ASYNC110  (nobody is told when a peer goes)
                await asyncio.sleep(0.01)
        await host.aclose()


async def test_an_initiator_lets_go_of_the_connection_that_was_idle_longest() -> None:
    limits = TransferLimits(nixl=NixlLimits(max_peers=2))
    async with Rig("nixl", limits=limits) as rig, Rig("nixl") as second, Rig("nixl") as third:
        for one in (rig, second, third, rig, second, third):
            assert await rig.engine.write([one.op(0, b"turn")], 5) == [None]
            assert one.memory.view[:4] == b"turn"


async def test_regions_are_registered_once_and_a_closed_transport_registers_none() -> None:
    async with Rig("nixl") as rig:
        region = memoryview(bytearray(os.urandom(1 << 20)))
        rig.engine.register(region)
        rig.engine.register(region[4096:8192])
        assert await rig.engine.write([rig.op(0, region)], 5) == [None]
        assert rig.memory.view[: len(region)] == region
    with pytest.raises(ConfigError, match="closed"):
        rig.engine.register(region)


async def test_what_moves_the_bytes_is_shown_with_its_build(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        async with Rig("nixl") as other:
            assert await other.engine.write([rig.op(0, b"x")], 5) == [None]
            assert list(other.engine.choices().values()) == ["nixl:lo@1.5.1"]  # type: ignore[attr-defined]
    assert "transfer.nixl_connected" in caplog.text
    assert "resources=self/memory,tcp/lo" in caplog.text and "NIXL 1.5.1 with UCX 1.23.0" in caplog.text


@pytest.mark.usefixtures("as_rdma")
async def test_many_requests_on_their_way_move_every_byte_to_its_place(rig: Rig) -> None:
    dice = random.Random(1)
    data = memoryview(dice.randbytes(SIZE_BYTES))
    cuts = sorted(dice.sample(range(SIZE_BYTES), 2000))
    pieces = list(zip([0, *cuts], [*cuts, SIZE_BYTES], strict=True))
    dice.shuffle(pieces)
    for start in range(0, len(pieces), 500):
        part = pieces[start : start + 500]
        results = await asyncio.gather(*(rig.engine.write([rig.op(a, data[a:b])], 20) for a, b in part[:50]))
        results += [await rig.engine.write([rig.op(a, data[a:b]) for a, b in part[50:]], 20)]
        assert all(error is None for one in results for error in one)
    assert rig.memory.view == data
    back = [bytearray(b - a) for a, b in pieces]
    ops = [rig.op(a, one) for (a, _), one in zip(pieces, back, strict=True)]
    assert await rig.engine.read(ops, 20) == [None] * len(ops)
    assert all(one == data[a:b] for (a, b), one in zip(pieces, back, strict=True))


@pytest.mark.usefixtures("as_rdma")
async def test_batches_on_overlapping_buffers_do_not_meet_in_their_registrations(rig: Rig) -> None:
    data = memoryview(random.Random(1).randbytes(1 << 20))
    parts = [(at, min(at + 300_000, len(data))) for at in range(0, len(data), 50_000)]
    results = await asyncio.gather(*(rig.engine.write([rig.op(a, data[a:b])], 20) for a, b in parts))
    assert results == [[None]] * len(parts)
    assert rig.memory.view[: len(data)] == data
    back = memoryview(bytearray(len(data)))
    assert await asyncio.gather(*(rig.engine.read([rig.op(a, back[a:b])], 20) for a, b in parts)) == results
    assert back == data


@pytest.mark.usefixtures("as_rdma")
async def test_a_silent_peer_costs_the_agent_and_the_others_only_a_new_connection(rig: Rig) -> None:
    before = resources()
    engine = NixlTransfer(CONFIG)
    region = memoryview(bytearray(8 << 20))
    engine.register(region)
    loop = asyncio.get_running_loop()
    with segment_process("child.1", len(region), "nixl") as child:
        assert await engine.write([TransferOp(child.segment, 0, [region])], 10) == [None]
        child.stop()
        start = loop.time()
        silent = asyncio.create_task(engine.read([TransferOp(child.segment, 0, [region])], 0.2))
        while not silent.done():
            assert await engine.write([rig.op(0, b"meanwhile")], 5) == [None]
        assert isinstance((await silent)[0], TransferTimeoutError) and loop.time() - start < 4
        region[:] = b"\x05" * len(region)
        child.kill()
        assert await engine.read([rig.op(0, region[:9])], 5) == [None]
        assert region[:9] == b"meanwhile" and region[9:] == b"\x05" * (len(region) - 9)
    await engine.aclose()
    assert resources() == before


@pytest.mark.usefixtures("as_rdma")
async def test_what_is_in_the_hands_of_nixl_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    most = {"bytes": 0, "requests": 0}
    post = nixl_port.Port.post

    def watched(port: nixl_port.Port, *args: object) -> nixl_peer.Request:
        request = post(port, *args)  # type: ignore[arg-type]
        most["bytes"] = max(most["bytes"], port.num_bytes)
        most["requests"] = max(most["requests"], port.num_requests)
        return request

    monkeypatch.setattr(nixl_port.Port, "post", watched)
    data = bytes(SIZE_BYTES)
    limits = TransferLimits(nixl=NixlLimits(window_bytes=4 << 20, window_requests=3))
    async with Rig("nixl", limits=limits) as rig:
        results = await asyncio.gather(*(rig.engine.write([rig.op(0, data)], 30) for _ in range(6)))
    assert results == [[None]] * 6
    assert most["requests"] <= 3 and most["bytes"] <= (4 << 20) + SIZE_BYTES


async def test_workers_ports_and_peers_show_what_they_hold(rig: Rig) -> None:
    (engine,) = rig.engine._engines  # type: ignore[attr-defined]
    assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
    port = engine._worker._port
    (peer,) = port._peers.values()
    shown = f"<Peer {rig.segment.id} agent={peer.name} batches=[01] requests=0 confirmed>"  # as over UCX
    assert re.fullmatch(shown, repr(peer))
    state = "open peers=1 requests=0 abandoned=0 bytes=0"
    assert repr(port) == f"<Port {port._agent.name} {state}>"
    assert repr(engine._worker) == f"<NixlWorker kvferry-nixl open batches=0 ports=[{port!r}]>"
    assert repr(engine).startswith("<NixlTransfer nixl:lo@1.5.1 <Handover nixl open batches=0/64> <NixlWorker ")
