"""What is decided about UCX before any byte moves: descriptors, devices, libraries, fallbacks."""

import base64
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.transfer_rigs import renamed
from support.transports import transport_config
from support.ucx import needs_ucx

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, SegmentUnknownError, TransferProofError, TransferProtocolError
from kvcore.types import Segment
from transfer.memory.segment import SegmentMemory
from transfer.select import build_transfer, start_segment_hosts
from transfer.ucx.binding import load_library
from transfer.ucx.descriptor import (
    MAX_TEXT,
    UcxDescriptor,
    descriptor_of,
    pack_descriptor,
    pack_place,
    parse_descriptor,
    parse_place,
)
from transfer.ucx.devices import check_opened, plan_devices, read_components, read_resources

DESCRIPTOR = UcxDescriptor((1, 13), "node-a.18f", 1 << 33, 0x7F0123456000, bytes(range(79)), b"rkey bytes")
ABSENT = TransportConfig(kind="ucx", devices=["mlx5_77"])


def segment_of(descriptor: UcxDescriptor) -> Segment:
    return Segment(
        id=descriptor.segment_id,
        node_id="node-a",
        size_bytes=descriptor.size_bytes,
        host_id="h",
        addresses={"ucx": pack_descriptor(descriptor)},
    )


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_of_a_descriptor_is_refused(position: int, bit: int) -> None:
    raw = bytearray(base64.b64decode(pack_descriptor(DESCRIPTOR)))
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(TransferProtocolError):
        parse_descriptor(base64.b64encode(raw).decode())


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda raw: base64.b64encode(raw).decode())))
def test_garbage_is_no_descriptor(text: str) -> None:
    with pytest.raises(TransferProtocolError):
        parse_descriptor(text)


def test_truncated_or_endless_descriptors_are_refused() -> None:
    text = pack_descriptor(DESCRIPTOR)
    for wrong in (text[:-4], text[4:], "A" * (MAX_TEXT + 4), ""):
        with pytest.raises(TransferProtocolError):
            parse_descriptor(wrong)


def test_a_descriptor_for_another_segment_size_or_ucx_is_refused() -> None:
    segment = segment_of(DESCRIPTOR)
    assert descriptor_of(segment, (1, 13)) == DESCRIPTOR
    for other in (renamed(segment, "node-a.190", 1 << 33), renamed(segment, "node-a.18f", 1 << 34)):
        with pytest.raises(SegmentUnknownError):
            descriptor_of(other, (1, 13))
    with pytest.raises(TransferProtocolError, match=r"1\.13, this one 1\.22; give all nodes the same"):
        descriptor_of(segment, (1, 22))


def test_the_descriptor_in_the_documentation() -> None:
    small = UcxDescriptor((1, 13), "n.1", 4096, 0x7F0000000000, b"address", b"rkey")
    assert pack_descriptor(small) == "S1ZGVQEAAQ0AEAAAAAAAAAAAAAAAfwAAAwAHAAQAbi4xYWRkcmVzc3JrZXmIm/A/"
    withheld = replace(small, base=0, rkey=b"", withheld=True)
    assert pack_descriptor(withheld) == "S1ZGVQIAAQ0AEAAAAAAAAAAAAAAAAAAAAwAHAAAAbi4xYWRkcmVzcyM8DQg="
    assert parse_descriptor(pack_descriptor(withheld)) == withheld


def test_what_a_descriptor_tells_is_what_a_process_with_a_secret_or_without_one_expects() -> None:
    withheld = replace(DESCRIPTOR, base=0, rkey=b"", withheld=True)
    assert descriptor_of(segment_of(withheld), (1, 13), proven=True) == withheld
    for told, proven in ((DESCRIPTOR, True), (withheld, False)):
        with pytest.raises(TransferProofError):
            descriptor_of(segment_of(told), (1, 13), proven=proven)
    for wrong in (replace(withheld, rkey=b"r"), replace(withheld, base=1), replace(DESCRIPTOR, rkey=b"")):
        with pytest.raises(TransferProtocolError, match="remote key"):
            parse_descriptor(pack_descriptor(wrong))


def test_a_place_that_is_cut_short_is_refused() -> None:
    assert parse_place(pack_place(5, b"rkey")) == (5, b"rkey")
    for place in (b"", bytes(8)):
        with pytest.raises(TransferProtocolError):
            parse_place(place)


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    files = {
        "infiniband/mlx5_0/ports/1/state": "4: ACTIVE",
        "infiniband/mlx5_1/ports/1/state": "1: DOWN",
        "infiniband/mlx5_2/ports/1/state": "4: ACTIVE",
        "infiniband/mlx5_2/ports/2/state": "2: INIT",
        "net/eth0/flags": "0x1003",
        "net/ib0/flags": "0x1002",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text + "\n")
    return tmp_path


@pytest.mark.parametrize(
    ("devices", "tls", "net_devices"),
    [
        ([], "ib,self", "mlx5_0:1,mlx5_2:1"),
        (["mlx5_0"], "ib,self", "mlx5_0:1"),
        (["mlx5_2:1", "mlx5_0"], "ib,self", "mlx5_2:1,mlx5_0:1"),
        (["eth0"], "tcp,self", "eth0"),
        (["mlx5_0", "eth0"], "ib,tcp,self", "mlx5_0:1,eth0"),
    ],
)
def test_devices_say_which_transports_are_used(machine: Path, devices: list[str], tls: str, net_devices: str) -> None:
    plan = plan_devices(devices, machine)
    assert (plan.tls, plan.net_devices, plan.rdma) == (tls, net_devices, "ib" in tls)
    assert not {"cma", "posix", "sysv", "sm", "shm", "all"} & set(plan.tls.split(","))


@pytest.mark.parametrize(
    ("devices", "why"),
    [
        (["mlx5_9"], "mlx5_9 is not on this machine"),
        (["mlx5_1"], "mlx5_1 has no active port .mlx5_1:1 is DOWN"),
        (["mlx5_2:2"], "mlx5_2:2 is INIT"),
        (["ib0"], "ib0 is down"),
        (["mlx5_0", "eth7"], "eth7 is not on this machine"),
    ],
)
def test_a_device_that_cannot_be_used_is_named(machine: Path, devices: list[str], why: str) -> None:
    with pytest.raises(ConfigError, match=why) as caught:
        plan_devices(devices, machine)
    assert caught.value.param == "transport.devices"


def test_without_hca_and_devices_tcp_is_not_taken_silently(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no HCA with an active port.*; name a network interface"):
        plan_devices([], tmp_path)


def test_a_ucx_that_did_not_open_the_device_is_refused(machine: Path) -> None:
    plan = plan_devices(["mlx5_0"], machine)
    check_opened(plan, ["self/memory0", "rc_mlx5/mlx5_0:1"], "UCX 1")
    with pytest.raises(ConfigError, match=r"UCX 1 opened self/memory0 but not mlx5_0:1; .*verbs"):
        check_opened(plan, ["self/memory0"], "UCX 1")
    with pytest.raises(ConfigError, match="opened self/memory0 but not a network"):
        check_opened(plan_devices([], machine), ["self/memory0"], "UCX 1")


def test_what_ucx_prints_of_a_context_is_understood() -> None:
    text = (
        "# UCP context\n#     component 1  :  tcp\n#     component 4  :  ib\n#            md 1  :  component 1  tcp \n"
    )
    text += (
        "#      resource 0  :  md 0  dev 0  flags -- self/memory0\n#      resource 1  :  md 1  dev 1  flags -- tcp/lo\n"
    )
    assert read_components(text) == ("tcp", "ib")
    assert read_resources(text) == ("self/memory0", "tcp/lo")


@pytest.mark.parametrize("path", ["/nowhere/libucp.so.0", "libc.so.6"])
def test_a_library_that_is_not_libucp_says_what_to_install(path: str) -> None:
    with pytest.raises(ConfigError, match="install libucx0"):
        load_library(path)


async def test_a_device_that_is_not_here_stops_both_sides_unless_a_fallback_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with SegmentMemory.create("n.1", 4096) as memory:
        with pytest.raises(ConfigError, match="mlx5_77"):
            build_transfer(ABSENT, "here")
        with pytest.raises(ConfigError, match="mlx5_77"):
            await start_segment_hosts(ABSENT, memory, host="127.0.0.1")
        fallback = TransportConfig(kind="ucx", devices=["mlx5_77"], fallback="tcp")
        with caplog.at_level(logging.WARNING):
            engine = build_transfer(fallback, "here")
            hosts = await start_segment_hosts(fallback, memory, host="127.0.0.1")
        assert set(hosts.addresses) == {"shm", "tcp"} and engine.kind == "tcp"
        assert [record.message.count("mlx5_77 is not on this machine") for record in caplog.records] == [1, 1]
        await engine.aclose()
        await hosts.aclose()


@pytest.mark.ucx
@needs_ucx[1]
async def test_with_a_fallback_peers_that_fell_back_are_reached_too() -> None:
    config = transport_config("ucx")
    both = TransportConfig(kind="ucx", devices=config.devices, ucx_library=config.ucx_library, fallback="tcp")
    with SegmentMemory.create("n.1", 4096) as memory:
        engine = build_transfer(both, "here")
        hosts = await start_segment_hosts(both, memory, host="127.0.0.1")
        assert set(hosts.addresses) == {"shm", "tcp", "ucx"}
        ours = Segment(id="n.1", node_id="n", size_bytes=4096, host_id="x", addresses=hosts.addresses)
        theirs = Segment(id="n.2", node_id="n", size_bytes=4096, host_id="x", addresses={"tcp": "127.0.0.1:1"})
        assert (engine.transport_for(ours), engine.transport_for(theirs)) == ("ucx", "tcp")
        await engine.aclose()
        await hosts.aclose()
