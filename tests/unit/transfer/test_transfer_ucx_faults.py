"""Peers that die, stall or are not who they should be, over real UCX on loopback TCP."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support.transfer_child import segment_process
from support.transfer_rigs import Rig, resources, transport_config
from support.ucx import needs_ucx

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError, TransferTimeoutError
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.memory import host_identity
from transfer.select import build_transfer
from transfer.ucx import UcxTransfer
from transfer.ucx_descriptor import UcxDescriptor, pack_descriptor, parse_descriptor

pytestmark = list(needs_ucx)


@pytest.fixture
async def rig() -> AsyncIterator[Rig]:
    async with Rig("ucx") as made:
        yield made


async def pump(segment: Segment) -> "asyncio.subprocess.Process":
    """A process in the middle of writing to and reading from `segment`."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "support.ucx_child",
        msgspec.json.encode(segment).decode(),
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(20):
        assert await process.stdout.readline() == b"moving\n"
    return process


async def test_a_host_outlives_initiators_that_are_killed_in_the_middle(rig: Rig) -> None:
    for pause_s in (0.0, 0.003, 0.011):
        process = await pump(rig.segment)
        await asyncio.sleep(pause_s)  # not to wait for something: to hit another moment
        process.kill()
        await process.communicate()
    assert await rig.engine.write([rig.op(0, b"still here")], 5) == [None]
    assert rig.memory.view[:10] == b"still here"


async def test_a_stopped_owner_is_a_timeout_soon_after_the_deadline_and_all_is_well_once_it_goes_on() -> None:
    before = resources()
    engine = build_transfer(transport_config("ucx"), host_identity())
    data = bytes(8 << 20)
    loop = asyncio.get_running_loop()
    with segment_process("child.1", len(data), "ucx") as child:
        op = TransferOp(child.segment, 0, [memoryview(data)])
        assert await engine.write([op], 10) == [None]
        os.kill(child.process.pid, signal.SIGSTOP)
        start = loop.time()
        (error,) = await engine.write([op], 0.1)
        assert isinstance(error, TransferTimeoutError) and loop.time() - start < 2
        os.kill(child.process.pid, signal.SIGCONT)
        assert await engine.write([op], 10) == [None]
        os.kill(child.process.pid, signal.SIGSTOP)
        task = asyncio.create_task(engine.write([op], 30))
        await asyncio.sleep(0.02)
        start = loop.time()
        await engine.aclose()
        (error,) = await task
        assert isinstance(error, PeerUnreachableError) and loop.time() - start < 4
    assert resources() == before


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


async def test_hundreds_of_connects_leave_nothing_open(rig: Rig) -> None:
    assert await rig.engine.write([rig.op(0, b"x")], 5) == [None]
    before = resources()
    for _ in range(100):
        engine = UcxTransfer(transport_config("ucx"))
        assert await engine.write([rig.op(0, b"again")], 5) == [None]
        await engine.aclose()
    async with asyncio.timeout(5):
        while resources() != before:  # noqa: ASYNC110  (the host sees the last ones go, and tells nobody)
            await asyncio.sleep(0.01)


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
