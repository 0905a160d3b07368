"""A segment served from a process of its own: what its end costs, and what is said when there is none."""

import asyncio
import os
import random
import secrets
import signal
import subprocess
import sys
from dataclasses import replace

import msgspec
import pytest
from support.process_tree import children
from support.transfer_rigs import NIXL, UCX
from support.transports import transport_config
from support.ucx import needs_ucx

from kvcore.clock import SystemClock
from kvcore.errors import ConfigError, TransferProofError
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.host_process import ProcessSegmentHost
from transfer.limits import HostProcessLimits, TransferLimits
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.nixl import descriptor as nixl_descriptor
from transfer.sealed_address import open_address
from transfer.select import SegmentHosts, build_transfer, start_segment_hosts
from transfer.ucx import descriptor as ucx_descriptor
from transfer.ucx.binding import load_library
from transfer.ucx.devices import plan_devices
from transfer.ucx.worker import UcxWorker

pytestmark = list(needs_ucx)

SIZE = 1 << 20


def segment_of(memory: SegmentMemory, hosts: SegmentHosts, kind: str = "ucx") -> Segment:
    addresses = {kind: hosts.addresses[kind]}
    return Segment(id="n.1", node_id="n", size_bytes=SIZE, host_id=host_identity(), addresses=addresses)


async def test_a_process_that_ends_without_a_word_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transfer.host_process.sys.executable", "/bin/false")
    with SegmentMemory.create("n.1", SIZE) as memory:
        host = ProcessSegmentHost("ucx", memory, transport_config("ucx"), lambda: None)
        with pytest.raises(ConfigError, match=r"serves segment n\.1 ended with 1"):
            await host.start()
        await host.aclose()
    assert children(os.getpid()) == []


async def test_a_killed_process_is_started_again_and_the_segment_keeps_what_lies_in_it() -> None:
    changed = asyncio.Event()
    with SegmentMemory.create("n.1", SIZE) as memory:
        hosts = await start_segment_hosts(transport_config("ucx"), memory, host="127.0.0.1", on_change=changed.set)
        engine = build_transfer(transport_config("ucx"), host_identity())
        first = segment_of(memory, hosts)
        assert await engine.write([TransferOp(first, 5, [memoryview(b"kept")])], 10) == [None]
        for _ in range(2):
            before, (serving,) = segment_of(memory, hosts), children(os.getpid())
            os.kill(serving, signal.SIGKILL)
            (error,) = await engine.write([TransferOp(before, 0, [memoryview(b"lost?")])], 10)
            assert error is not None
            async with asyncio.timeout(60):
                await changed.wait()
            changed.clear()
            back = bytearray(4)
            after = segment_of(memory, hosts)
            assert after.addresses["ucx"] != before.addresses["ucx"]
            assert await engine.read([TransferOp(after, 5, [memoryview(back)])], 10) == [None]
            assert back == b"kept"
        await engine.aclose()
        await hosts.aclose()
    assert children(os.getpid()) == []


@pytest.mark.parametrize("kind", [UCX, NIXL])
async def test_a_secret_is_changed_and_no_transfer_fails(kind: str) -> None:
    """A secret more: the same process, told of it, and connections stand. One less: another process, at another place,
    while the one before serves those on for a while who came by the old address."""
    old, new = secrets.token_bytes(32), secrets.token_bytes(32)
    now = [(old,)]
    holder = ClusterTrust("here", Secrets((old,), reread=lambda: now[-1], clock=SystemClock(), look_s=0))
    ours = ClusterTrust("here", Secrets((new, old)))
    resealed, restarted, failed = asyncio.Event(), asyncio.Event(), list[object]()
    limits = TransferLimits(host_process=HostProcessLimits(reseal_s=0.01, retire_s=3.0))
    with SegmentMemory.create("n.1", SIZE) as memory:
        hosts = await start_segment_hosts(
            transport_config(kind),
            memory,
            host="127.0.0.1",
            on_change=restarted.set,
            on_reseal=resealed.set,
            limits=limits,
            trust=holder,
        )
        engine = build_transfer(transport_config(kind), host_identity(), trust=ours)
        memory.view[:4] = b"kept"

        async def reads(segment: Segment) -> object:
            back = bytearray(4)
            (error,) = await engine.read([TransferOp(segment, 0, [memoryview(back)])], 10)
            return error or (None if back == b"kept" else back)

        async def read_on() -> None:
            while True:
                if (error := await reads(segment_of(memory, hosts, kind))) is not None:
                    failed.append(error)
                await asyncio.sleep(0.001)

        reading = asyncio.create_task(read_on())
        first, serving = segment_of(memory, hosts, kind), children(os.getpid())
        now.append((new, old))
        async with asyncio.timeout(60):
            await resealed.wait()
        both = segment_of(memory, hosts, kind)
        assert both.addresses[kind] != first.addresses[kind] and children(os.getpid()) == serving
        now.append((new,))
        beside = 0
        async with asyncio.timeout(60):
            while serving[0] in children(os.getpid()):
                beside += len(children(os.getpid())) == 2 and await reads(both) is None
                await asyncio.sleep(0.01)
        assert beside, "the old address served on beside the new one"
        assert await reads(both) is not None, "whoever learned that place by the old secret has lost it"
        assert await reads(segment_of(memory, hosts, kind)) is None
        reading.cancel()
        assert failed == [] and not restarted.is_set()
        late = build_transfer(transport_config(kind), host_identity(), trust=ClusterTrust("here", Secrets((old,))))
        op = TransferOp(segment_of(memory, hosts, kind), 0, [memoryview(bytearray(4))])
        assert isinstance((await late.read([op], 10))[0], TransferProofError)
        await late.aclose()
        await engine.aclose()
        await hosts.aclose()
    assert children(os.getpid()) == []


@pytest.mark.parametrize("kind", [UCX, NIXL])
async def test_the_node_counts_whom_its_process_refuses_also_once_another_one_serves(kind: str) -> None:
    secret, changed = secrets.token_bytes(32), asyncio.Event()
    trust = ClusterTrust("here", Secrets((secret,)))
    limits = TransferLimits(host_process=HostProcessLimits(report_s=0.01))
    with SegmentMemory.create("n.1", SIZE) as memory:
        hosts = await start_segment_hosts(
            transport_config(kind), memory, host="127.0.0.1", limits=limits, trust=trust, on_change=changed.set
        )
        expected = 0
        for _ in range(2):
            told = segment_of(memory, hosts, kind)
            claim = {kind: as_if_told(kind, open_address(trust, kind, told))}
            stranger = build_transfer(transport_config(kind), host_identity())
            op = TransferOp(msgspec.structs.replace(told, addresses=claim), 0, [memoryview(bytearray(4))])
            assert (await stranger.read([op], 1.0))[0] is not None
            async with asyncio.timeout(60):
                while hosts.refused.get((kind, "proof"), 0) <= expected:  # noqa: ASYNC110 - another process tells
                    await asyncio.sleep(0.01)
            expected = hosts.refused[kind, "proof"]
            await stranger.aclose()
            os.kill(children(os.getpid())[0], signal.SIGKILL)
            async with asyncio.timeout(60):
                await changed.wait()
            changed.clear()
        await hosts.aclose()


def as_if_told(kind: str, withheld: str) -> str:
    """The address of an open cluster's segment, made of one that withholds where it lies."""
    if kind == "ucx":
        found = ucx_descriptor.parse_descriptor(withheld)
        worker = UcxWorker(load_library(transport_config(kind).ucx_library), plan_devices(["lo"]), "stranger")
        handle, base = worker.context.map_memory(memoryview(bytearray(4096)))
        own = replace(found, base=base, rkey=worker.context.pack_rkey(handle), withheld=False)
        worker.close_unstarted()
        return ucx_descriptor.pack_descriptor(own)
    return nixl_descriptor.pack_descriptor(replace(nixl_descriptor.parse_descriptor(withheld), withheld=False))


CONNECT = """
import asyncio, sys, msgspec
from kvcore.config.schema import TransportConfig
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.select import build_transfer
async def main():
    segment = msgspec.json.decode(sys.argv[1], type=Segment)
    engine = build_transfer(msgspec.json.decode(sys.argv[2], type=TransportConfig), "elsewhere")
    data = memoryview(bytes(1 << 19))
    print("go", flush=True)
    while True:
        await engine.write([TransferOp(segment, 1 << 19, [data])], 10)
asyncio.run(main())
"""


@pytest.mark.parametrize("seed", range(2))
async def test_initiators_that_die_as_they_connect_cost_a_segment_at_most_its_process(seed: int) -> None:
    """UCX 1.13 ends the target's process over some of these deaths."""
    dice = random.Random(seed)
    with SegmentMemory.create("n.1", SIZE) as memory:
        hosts = await start_segment_hosts(transport_config("ucx"), memory, host="127.0.0.1")
        memory.view[:4] = b"kept"
        for _ in range(4):
            asked = [msgspec.json.encode(one).decode() for one in (segment_of(memory, hosts), transport_config("ucx"))]
            process = subprocess.Popen(  # noqa: ASYNC220
                [sys.executable, "-c", CONNECT, *asked], stdout=subprocess.PIPE, text=True
            )
            assert process.stdout is not None and process.stdout.readline() == "go\n"
            await asyncio.sleep(dice.random() * 0.01)
            process.kill()
            process.wait()
            process.stdout.close()
        engine, back = build_transfer(transport_config("ucx"), host_identity()), bytearray(4)
        async with asyncio.timeout(30):
            while True:  # until the process is there again, if it had gone
                op = TransferOp(segment_of(memory, hosts), 0, [memoryview(back)])
                if await engine.read([op], 2) == [None]:
                    break
        assert back == b"kept"
        await engine.aclose()
        await hosts.aclose()
