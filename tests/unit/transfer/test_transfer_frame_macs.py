"""MACs of a connection's frames: each fits its place alone, however it is computed."""

import secrets as random

import pytest

from kvcore.errors import TransferForgedError
from transfer.tcp.frame_macs import PLAIN, FrameMacs

KEYS = random.token_bytes(32), random.token_bytes(32)


def ends() -> tuple[FrameMacs, FrameMacs]:
    return FrameMacs(*KEYS), FrameMacs(*reversed(KEYS))


@pytest.mark.parametrize("num_bytes", [0, 1, (64 << 10) - 1, 64 << 10, (64 << 10) + 1, 3 << 20])
def test_at_once_and_part_by_part_are_the_same(num_bytes):
    data = random.token_bytes(num_bytes)
    parts = [data[: num_bytes // 3], memoryview(data)[num_bytes // 3 :]]
    ours, theirs = ends()
    running = theirs.checking()
    for part in parts:
        running.show(part)
    theirs.check_tag(running, ours.seal(parts))
    sealing = ours.sealing()
    sealing.show(data)
    theirs.check(parts, sealing.tag())


def test_a_tag_fits_its_number_its_direction_and_its_bytes():
    ours, theirs = ends()
    first, second = ours.seal([b"a"]), ours.seal([b"a"])
    assert first != second
    for wrong in (second, bytes(16), first[:-1], b""):
        with pytest.raises(TransferForgedError):
            ends()[1].check([b"a"], wrong)
    with pytest.raises(TransferForgedError):
        ends()[0].check([b"a"], first)
    theirs.check([b"a"], first)
    theirs.check([b"a"], second)
    assert repr(theirs) == "<FrameMacs sent=0 received=2>"


def test_without_keys_a_tag_is_empty_and_nothing_else_fits():
    assert (PLAIN.seal([b"a"]), PLAIN.sealing().tag(), PLAIN.tag_bytes, bool(PLAIN)) == (b"", b"", 0, False)
    PLAIN.check([b"a"], b"")
    with pytest.raises(TransferForgedError):
        PLAIN.check([b"a"], b"x")
