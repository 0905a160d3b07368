"""What only UCX can meet, over real UCX on loopback TCP: see the conformance tests for the rest."""

import asyncio
import os
import re
import threading
from collections.abc import AsyncIterator
from dataclasses import replace

import msgspec
import pytest
from support.transfer_rigs import SIZE_BYTES, Rig
from support.transports import transport_config
from support.ucx import needs_ucx

from kvcore.errors import ConfigError, SegmentUnknownError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.limits import TransferLimits
from transfer.ucx import endpoint as ucx_endpoint
from transfer.ucx.batch import UcxBatch
from transfer.ucx.binding import Pointer, UcxLibrary
from transfer.ucx.descriptor import UcxDescriptor, pack_descriptor, parse_descriptor
from transfer.ucx.limits import UcxLimits
from transfer.ucx.transport import UcxSegmentHost
from transfer.ucx.worker import UcxWorker

pytestmark = list(needs_ucx)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig("ucx") as made:
        yield made


def limited(**changed: float) -> TransferLimits:
    return TransferLimits(ucx=UcxLimits(**changed))  # type: ignore[arg-type]


async def test_a_foreign_segment_at_the_address_is_never_written(rig: Rig) -> None:
    """The address of a former life, taken over by another: its descriptor is whole, but the peer is not the one."""
    found = parse_descriptor(rig.segment.addresses["ucx"])
    former = UcxDescriptor(found.ucx, "rig.dead", found.size_bytes, found.base, found.worker_address, found.rkey)
    segment = Segment(
        id="rig.dead",
        node_id="rig",
        size_bytes=found.size_bytes,
        host_id="h",
        addresses={"ucx": pack_descriptor(former)},
    )
    (error,) = await rig.engine.write([TransferOp(segment, 0, [memoryview(b"wild")])], 5)
    assert isinstance(error, SegmentUnknownError)
    assert rig.memory.view[:4] == bytes(4)


async def test_over_tcp_the_place_in_memory_is_all_that_keeps_a_segment_from_others(rig: Rig) -> None:
    """As SECURITY.md says: another segment's remote key does as well."""
    found = parse_descriptor(rig.segment.addresses["ucx"])
    async with Rig("ucx", 4096) as other:
        rkey = parse_descriptor(other.segment.addresses["ucx"]).rkey
    address = pack_descriptor(replace(found, rkey=rkey))
    segment = msgspec.structs.replace(rig.segment, addresses={"ucx": address})
    assert await rig.engine.write([TransferOp(segment, 0, [memoryview(b"came")])], 5) == [None]
    assert rig.memory.view[:4] == b"came"


async def test_registered_memory_is_used_and_a_closed_transport_registers_none() -> None:
    async with Rig("ucx") as rig:
        region = memoryview(bytearray(1 << 20))
        region[:] = os.urandom(len(region))
        rig.engine.register(region)
        assert await rig.engine.write([rig.op(0, region)], 5) == [None]
        assert rig.memory.view[: len(region)] == region
    with pytest.raises(ConfigError, match="closed"):
        rig.engine.register(region)


async def test_what_moves_the_bytes_is_shown_with_its_build(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
    (shown,) = rig.engine.choices().values()  # type: ignore[attr-defined]
    assert shown.startswith("ucx:tcp/lo@1.")
    assert any("transfer.ucx_connected" in record.message for record in caplog.records)


async def test_tcp_takes_segments_of_a_megabyte(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """UCX ignores an option's name that it does not know, and then moves a quarter as much in segments of 8 KiB."""
    printed = UcxLibrary.printed
    said: list[str] = []

    def listen(library: UcxLibrary, function: str, handle: Pointer) -> str:
        said.append(printed(library, function, handle))
        return said[-1]

    monkeypatch.setattr(UcxLibrary, "printed", listen)
    assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
    (endpoint,) = (text for text in said if "UCP endpoint" in text)
    eager = re.search(r"am_send: 0\.\.<egr/short>\.\.(\d+)|0\.\.(\d+) \| short", endpoint)  # UCX 1.13; 1.23
    assert eager is not None
    assert int(eager[1] or eager[2]) > 200_000


@pytest.mark.parametrize("now_s", [5.0, 0.0])
async def test_small_batches_need_no_other_thread(monkeypatch: pytest.MonkeyPatch, now_s: float) -> None:
    """With no time at all in the caller's thread, the worker's ends what was begun there."""
    move_now, threads, begun = UcxWorker.move_now, set[int](), 0
    done = UcxBatch.finish

    def finish(batch: UcxBatch) -> None:
        threads.add(threading.get_ident())
        done(batch)

    def counted(worker: UcxWorker, batch: UcxBatch, key: str) -> bool:
        nonlocal begun
        threads.clear()
        moved = move_now(worker, batch, key)
        begun += moved
        return moved

    monkeypatch.setattr(UcxWorker, "move_now", counted)
    monkeypatch.setattr(UcxBatch, "finish", finish)
    at = 0
    async with Rig("ucx", limits=limited(move_now_s=now_s)) as rig:
        while not begun:  # the worker's thread has to have gone to sleep
            at += 1
            assert at < 1000
            assert await rig.engine.write([rig.op(64 * at, at.to_bytes(64, "big"))], 5) == [None]
            assert rig.memory.view[64 * at : 64 * at + 64] == at.to_bytes(64, "big")
    assert threads == {threading.get_ident()} or not now_s


async def test_an_initiator_lets_go_of_the_connection_that_was_idle_longest() -> None:
    async with Rig("ucx", limits=limited(max_endpoints=2)) as rig, Rig("ucx") as second, Rig("ucx") as third:
        for one in (rig, second, third, rig, second, third):
            assert await rig.engine.write([one.op(0, b"turn")], 5) == [None]
            assert one.memory.view[:4] == b"turn"


async def test_more_greetings_than_can_be_answered_are_not(rig: Rig) -> None:
    assert await rig.engine.write([rig.op(0, b"one")], 5) == [None]
    host = UcxSegmentHost("rig.deaf", rig.memory.view, transport_config("ucx"), UcxLimits(max_answers=0))
    await host.start()
    deaf = Segment(id="rig.deaf", node_id="rig", size_bytes=SIZE_BYTES, host_id="h", addresses={"ucx": host.address})
    (error,) = await rig.engine.write([TransferOp(deaf, 0, [memoryview(b"none")])], 0.2)
    assert isinstance(error, TransferTimeoutError)
    assert await rig.engine.write([rig.op(0, b"one")], 5) == [None]
    await host.aclose()


async def test_what_is_in_the_hands_of_ucx_is_bounded_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """As over RDMA, where many pieces of many batches are on their way at once."""
    most = {"bytes": 0, "requests": 0}
    add = ucx_endpoint.Window.add

    def watched(window: ucx_endpoint.Window, num_bytes: int, num_requests: int) -> None:
        add(window, num_bytes, num_requests)
        most["bytes"] = max(most["bytes"], window.num_bytes)
        most["requests"] = max(most["requests"], window.num_requests)
        assert window.num_bytes >= 0 and window.num_requests >= 0

    monkeypatch.setattr(ucx_endpoint.Window, "add", watched)
    monkeypatch.setattr(
        ucx_endpoint.UcxEndpoint, "read_lanes", lambda endpoint: setattr(endpoint, "one_at_a_time", False)
    )
    data = bytes(SIZE_BYTES)
    async with Rig("ucx", limits=limited(all_bytes=8 << 20, all_requests=20)) as rig:
        small = [rig.op(at, data[:64]) for at in range(0, SIZE_BYTES, 1 << 16)]
        batches = [rig.engine.write([rig.op(0, data)], 30) for _ in range(6)]
        batches += [rig.engine.write(small, 30) for _ in range(3)]
        assert all(error is None for results in await asyncio.gather(*batches) for error in results)
    assert 0 < most["requests"] <= 20 and most["bytes"] <= (8 << 20) + (4 << 20)


async def test_workers_connections_and_endpoints_show_what_they_hold(rig: Rig) -> None:
    (engine,) = rig.engine._engines  # type: ignore[attr-defined]
    opened = "<UcxTransfer <Handover ucx open batches=0/64> <UcxWorker kvferry-ucx open batches=0 <Connections "
    assert repr(engine) == opened + "endpoints=0 closing=0 <Greetings asked=0 challenged=0 sent=0>>>>"
    assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
    (endpoint,) = engine._worker._connections._endpoints.values()
    shown = f"<UcxEndpoint {rig.segment.id} lanes=tcp/lo batches=[01] confirmed>"  # told of its end a little later
    assert re.fullmatch(shown, repr(endpoint))
    assert "resources=" in repr(engine._worker.context) and "tcp/lo" in repr(engine._worker.context)
    hosts = repr(rig._hosts)
    assert hosts.startswith(f"<SegmentHosts {rig.segment.id} [<ProcessSegmentHost ucx {rig.segment.id} pid=")
