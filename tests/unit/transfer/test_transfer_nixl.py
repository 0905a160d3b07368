"""What is decided about NIXL before any byte moves: descriptors, greetings, registrations, options. No NIXL here."""

import base64
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.transfer_rigs import renamed

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, SegmentUnknownError, TransferProofError, TransferProtocolError
from kvcore.types import Segment
from transfer.nixl.binding import has_nvidia_gpu, nixl_options
from transfer.nixl.descriptor import (
    MAX_HELLO,
    MAX_TEXT,
    HelloAnswer,
    NixlDescriptor,
    NixlHello,
    NixlWelcome,
    Versions,
    descriptor_of,
    pack_descriptor,
    pack_hello,
    pack_welcome,
    parse_descriptor,
    parse_hello,
    parse_welcome,
)
from transfer.nixl.registrations import RegisteredRange, Registrations
from transfer.select import build_transfer

VERSIONS = Versions((1, 5, 1), (1, 23))
DESCRIPTOR = NixlDescriptor(VERSIONS, "node-a.18f", 1 << 33, 0x7F0123456000, bytes(range(200)))
HELLO = NixlHello(1 << 60, "node-a.18f", bytes(range(100)))
WELCOME = NixlWelcome(1 << 60, HelloAnswer.WELCOME)

Parser = Callable[[bytes], object]
MESSAGES: dict[str, tuple[bytes, Parser]] = {
    "descriptor": (
        base64.b64decode(pack_descriptor(DESCRIPTOR)),
        lambda raw: parse_descriptor(base64.b64encode(raw).decode()),
    ),
    "hello": (pack_hello(HELLO), parse_hello),
    "welcome": (pack_welcome(WELCOME), parse_welcome),
}


def segment_of(descriptor: NixlDescriptor) -> Segment:
    return Segment(
        id=descriptor.segment_id,
        node_id="node-a",
        size_bytes=descriptor.size_bytes,
        host_id="h",
        addresses={"nixl": pack_descriptor(descriptor)},
    )


def test_what_was_packed_is_parsed() -> None:
    assert parse_descriptor(pack_descriptor(DESCRIPTOR)) == DESCRIPTOR
    assert parse_hello(pack_hello(HELLO)) == HELLO
    assert parse_welcome(pack_welcome(WELCOME)) == WELCOME


@pytest.mark.parametrize("name", MESSAGES)
@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(name: str, position: int, bit: int) -> None:
    packed, parse = MESSAGES[name]
    raw = bytearray(packed)
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(TransferProtocolError):
        parse(bytes(raw))


@pytest.mark.parametrize("name", MESSAGES)
def test_any_truncation_or_appendix_is_refused(name: str) -> None:
    packed, parse = MESSAGES[name]
    for raw in [*(packed[:length] for length in range(len(packed))), packed + b"\0", packed * 2]:
        with pytest.raises(TransferProtocolError):
            parse(raw)


@pytest.mark.parametrize("name", MESSAGES)
@given(raw=st.binary(max_size=300))
def test_garbage_is_refused(name: str, raw: bytes) -> None:
    with pytest.raises(TransferProtocolError):
        MESSAGES[name][1](raw)


def test_endless_ones_are_not_even_looked_at() -> None:
    for text in ("A" * (MAX_TEXT + 4), "not base64", ""):
        with pytest.raises(TransferProtocolError):
            parse_descriptor(text)
    with pytest.raises(TransferProtocolError, match="at most"):
        parse_hello(pack_hello(NixlHello(1, "n.1", bytes(MAX_HELLO))))


def test_a_descriptor_for_another_segment_size_or_version_is_refused() -> None:
    segment = segment_of(DESCRIPTOR)
    assert descriptor_of(segment, VERSIONS) == DESCRIPTOR
    assert descriptor_of(segment, Versions((1, 5, 9), (1, 23))) == DESCRIPTOR
    for other in (renamed(segment, "node-a.190", 1 << 33), renamed(segment, "node-a.18f", 1 << 34)):
        with pytest.raises(SegmentUnknownError):
            descriptor_of(other, VERSIONS)
    for versions in (Versions((1, 6, 0), (1, 23)), Versions((1, 5, 1), (1, 22))):
        with pytest.raises(TransferProtocolError, match=r"1\.5\.1 with UCX 1\.23, this one NIXL .*the same"):
            descriptor_of(segment, versions)


def test_the_descriptor_in_the_documentation() -> None:
    small = NixlDescriptor(VERSIONS, "n.1", 4096, 0x7F0000000000, b"metadata")
    assert pack_descriptor(small) == "S1ZGTgEAAQUBARcAABAAAAAAAAAAAAAAAH8AAAMACABuLjFtZXRhZGF0YRt6YPw="
    withheld = replace(small, base=0, withheld=True)
    assert pack_descriptor(withheld) == "S1ZGTgIAAQUBARcAABAAAAAAAAAAAAAAAAAAAAMACABuLjFtZXRhZGF0YcBW7BA="
    assert descriptor_of(segment_of(withheld), VERSIONS, proven=True) == withheld
    for told, proven in ((small, True), (withheld, False)):
        with pytest.raises(TransferProofError):
            descriptor_of(segment_of(told), VERSIONS, proven=proven)


class Recorder:
    """A registrar that knows what is registered."""

    def __init__(self) -> None:
        self.ranges: list[tuple[int, int]] = []

    def register(self, ranges: list[tuple[int, int]]) -> tuple[int, int]:
        (one,) = ranges
        assert not any(at < one[0] + one[1] and one[0] < at + size for at, size in self.ranges), "they overlap"
        self.ranges.append(one)
        return one

    def deregister(self, registered: tuple[int, int]) -> None:
        self.ranges.remove(registered)


@pytest.mark.parametrize("seed", range(20))
def test_registrations_never_overlap_cover_their_users_and_go_with_the_last(seed: int) -> None:
    dice = random.Random(seed)
    recorder = Recorder()
    registrations = Registrations(recorder)
    registrations.add(1000, 200)
    taken: list[RegisteredRange] = []
    for _ in range(400):
        if taken and dice.random() < 0.5:
            registrations.release(taken.pop(dice.randrange(len(taken))))
            continue
        at, size = dice.randrange(2000), dice.choice([1, 8, 64, 300])
        claim = registrations.acquire(at, size)
        if claim is not None:
            assert any(start <= at and at + size <= start + length for start, length in recorder.ranges)
            taken.append(claim)
        else:
            touching = [one for one in recorder.ranges if one[0] < at + size and at < sum(one)]
            assert touching and not any(start <= at and at + size <= start + length for start, length in touching)
    for claim in taken:
        registrations.release(claim)
    assert recorder.ranges == [(1000, 200)] and len(registrations) == 1


def test_a_region_over_memory_in_use_is_refused_and_one_inside_of_another_needs_nothing() -> None:
    registrations = Registrations(Recorder())
    claim = registrations.acquire(100, 50)
    assert claim is not None
    with pytest.raises(ConfigError, match="overlaps"):
        registrations.add(120, 100)
    registrations.release(claim)
    registrations.add(120, 100)
    registrations.add(150, 10)
    assert len(registrations) == 1


def test_cuda_is_allowed_where_nixl_insists_on_it_and_shared_memory_never(tmp_path: Path) -> None:
    options = {"TLS": "ib,self", "NET_DEVICES": "mlx5_0:1"}
    for name, vendor, kind in (("0000:00:01.0", "0x8086", "0x030000"), ("0000:00:02.0", "0x10de", "0x040300")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "vendor").write_text(vendor + "\n")
        (tmp_path / name / "class").write_text(kind + "\n")
    assert not has_nvidia_gpu(tmp_path)
    assert nixl_options(options, gpu=False) == options
    (tmp_path / "0000:00:02.0" / "class").write_text("0x030200\n")
    assert has_nvidia_gpu(tmp_path)
    assert nixl_options(options, gpu=True) == {"TLS": "ib,self,cuda_copy", "NET_DEVICES": "mlx5_0:1"}


async def test_a_device_that_is_not_here_stops_it_unless_a_fallback_is_written(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(ConfigError, match="mlx5_77"):
        build_transfer(TransportConfig(kind="nixl", devices=["mlx5_77"]), "here")
    engine = build_transfer(TransportConfig(kind="nixl", devices=["mlx5_77"], fallback="tcp"), "here")
    assert engine.kind == "tcp"
    assert "asked=nixl" in caplog.text and "mlx5_77 is not on this machine" in caplog.text
    await engine.aclose()
