"""The bus between the engine's front and the connector's worker halves."""

import asyncio
import socket
from pathlib import Path

import msgspec
import pytest
from support.store_fakes import SPEC

from engines.process.channel import FrameChannel
from engines.vllm.bus import Bus
from engines.vllm.connector import bus_messages as m
from kvcore.errors import EngineError


async def _connect(bus: Bus) -> FrameChannel:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(bus.path)
    sock.setblocking(False)
    return await FrameChannel.over(sock)


def _say(channel: FrameChannel, frame: m.FromWorker) -> None:
    channel.send(msgspec.msgpack.encode(frame))


async def _hello(bus: Bus, rank: int = 0, size: int = 1, dtype: str = "float32") -> FrameChannel:
    channel = await _connect(bus)
    spec = msgspec.structs.replace(SPEC, tp_rank=rank, tp_size=size, dtype=dtype)
    _say(channel, m.WorkerHello(spec=spec))
    return channel


def _saved(leg: str, rank: int, num_chunks: int = 3) -> m.SaveEnded:
    return m.SaveEnded(leg=leg, rank=rank, num_chunks=num_chunks, save_s=0.5)


async def test_a_rank_that_never_reports_is_named() -> None:
    async with Bus() as bus:
        channel = await _hello(bus, 0, 2)
        with pytest.raises(EngineError, match=r"rank \[1\]"):
            await bus.wait_workers(2, 0.5)
        await channel.aclose()


async def test_ranks_that_hold_different_kv_are_refused() -> None:
    async with Bus() as bus:
        channels = [await _hello(bus, 0, 2), await _hello(bus, 1, 2, dtype="bfloat16")]
        with pytest.raises(EngineError, match="different kinds of KV"):
            await bus.wait_workers(2, 5.0)
        for channel in channels:
            await channel.aclose()


async def test_a_worker_half_of_another_protocol_is_refused_by_name() -> None:
    async with Bus() as bus:
        channel = await _connect(bus)
        _say(channel, m.WorkerHello(protocol=m.BUS_PROTOCOL + 1, spec=msgspec.structs.replace(SPEC, tp_rank=3)))
        with pytest.raises(EngineError, match=r"rank 3 speaks protocol 2 of the bus, this engine protocol 1"):
            await bus.wait_workers(1, 5.0)
        assert await asyncio.wait_for(channel.receive(), 60) == []
        await channel.aclose()


async def test_a_report_may_have_fields_that_the_front_does_not_know() -> None:
    async with Bus() as bus:
        channel = await _hello(bus)
        await bus.wait_workers(1, 5.0)
        assert repr(bus) == "<Bus ranks [0], 0 legs>"
        assert repr(bus._workers[0]) == "<_WorkerSession rank 0 of 1, no sample>"
        with bus.leg("r") as reports:
            channel.send(msgspec.msgpack.encode({**msgspec.to_builtins(_saved("r", 0)), "weather": "fine"}))
            await asyncio.wait_for(reports.wait_saved(1), 60)
        await channel.aclose()


async def test_a_connection_without_a_hello_is_closed_and_harms_nobody() -> None:
    async with Bus() as bus:
        liar = await _connect(bus)
        _say(liar, _saved("r", 0))
        assert await asyncio.wait_for(liar.receive(), 60) == []
        await liar.aclose()
        channel = await _hello(bus)
        assert (await bus.wait_workers(1, 5.0)).tp_rank == 0
        await channel.aclose()


async def test_a_leg_is_saved_once_every_rank_has_said_so() -> None:
    async with Bus() as bus:
        first, second = await _hello(bus, 0, 2), await _hello(bus, 1, 2)
        await bus.wait_workers(2, 5.0)
        with bus.leg("r") as reports:
            _say(first, _saved("r", 0))
            _say(first, _saved("r", 0))
            _say(first, _saved("another", 0))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(reports.wait_saved(2), 0.05)
            _say(second, _saved("r", 1, num_chunks=2))
            await asyncio.wait_for(reports.wait_saved(2), 60)
            assert min(save.num_chunks for save in reports.saves.values()) == 2
        for channel in (first, second):
            await channel.aclose()


async def test_workers_are_told_that_a_handoff_ended_and_are_asked_for_samples() -> None:
    async with Bus() as bus:
        channel = await _hello(bus)
        await bus.wait_workers(1, 5.0)
        bus.end_handoff("r")
        (told,) = await asyncio.wait_for(channel.receive(), 60)
        assert msgspec.msgpack.decode(told, type=m.ToWorker) == m.BusEndHandoff(leg="r")
        asking = asyncio.create_task(bus.samples(5.0))
        (asked,) = await asyncio.wait_for(channel.receive(), 60)
        assert msgspec.msgpack.decode(asked, type=m.ToWorker) == m.AskSample()
        sample = m.WorkerSample(rank=0, loading=1, pending_saves=2)
        _say(channel, sample)
        assert await asking == [sample]
        await channel.aclose()


async def test_a_silent_worker_costs_the_bound_and_a_gone_one_nothing() -> None:
    async with Bus() as bus:
        channel = await _hello(bus)
        await bus.wait_workers(1, 5.0)
        assert await bus.samples(0.02) == []
        await channel.aclose()


async def test_leaving_removes_the_socket() -> None:
    async with Bus() as bus:
        path = Path(bus.path)
        assert path.is_socket()  # noqa: ASYNC240 - a test
    assert not path.parent.exists()
