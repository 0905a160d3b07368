"""Sealed addresses: who opens them, and that nothing which was changed or moved elsewhere opens."""

import base64
import secrets as random
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import TransferProofError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from transfer.sealed_address import PREFIX, AddressSeal, open_address
from transfer.ucx.descriptor import parse_descriptor

OLD, NEW = random.token_bytes(32), random.token_bytes(32)
ADDRESS = base64.b64encode(b"worker address and remote key").decode()
OURS = ClusterTrust("here", Secrets((OLD,)))


def trust(*secrets: bytes, cluster: str = "here") -> ClusterTrust:
    return ClusterTrust(cluster, Secrets(secrets))


def segment(told: str, segment_id: str = "a.1", kind: str = "ucx") -> Segment:
    return Segment(id=segment_id, node_id="a", size_bytes=4096, host_id="h", addresses={kind: told})


SEALED = AddressSeal(OURS, "ucx", "a.1").told(ADDRESS)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [((OLD,), (OLD,)), ((NEW, OLD), (OLD,)), ((OLD,), (NEW, OLD)), ((NEW, OLD), (NEW,)), ((NEW,), (NEW, OLD))],
)
def test_a_cluster_opens_its_own_also_while_the_secret_is_changed(ours, theirs):
    told = AddressSeal(trust(*ours), "ucx", "a.1").told(ADDRESS)
    assert open_address(trust(*theirs), "ucx", segment(told)) == ADDRESS


def test_the_sealed_address_in_the_documentation():
    text = (Path(__file__).parents[3] / "docs/wire-formats.md").read_text()
    told = "".join(text[text.index(PREFIX + "AQ") :].partition("\n```")[0].split())
    opened = open_address(trust(bytes(range(32))), "ucx", segment(told, "n.1"))
    assert parse_descriptor(opened).segment_id == "n.1" and f"\n{opened}\n" in text


def test_nothing_of_the_address_is_left_readable():
    raw = base64.b64decode(SEALED.removeprefix(PREFIX))
    assert b"worker" not in raw and b"remote" not in raw and len(SEALED) < len(ADDRESS) + 300


@pytest.mark.parametrize(
    ("who", "says"),
    [
        (OPEN, "this process has none"),
        (trust(NEW), OURS.secrets.newest.id.hex()),  # type: ignore[union-attr]
        (trust(OLD, cluster="there"), "does not open"),
    ],
    ids=["none", "other", "cluster"],
)
def test_strangers_do_not_open_it_and_are_told_why(who, says):
    with pytest.raises(TransferProofError, match=says):
        open_address(who, "ucx", segment(SEALED))


def test_it_is_of_one_segment_and_one_transport():
    for other in (segment(SEALED, "a.2"), segment(SEALED, "b.1"), segment(SEALED, kind="nixl")):
        with pytest.raises(TransferProofError, match="does not open"):
            open_address(OURS, next(iter(other.addresses)), other)


def test_what_is_not_sealed_is_taken_in_an_open_cluster_alone():
    assert open_address(OPEN, "ucx", segment(ADDRESS)) == ADDRESS == AddressSeal(OPEN, "ucx", "a.1").told(ADDRESS)
    for told in (ADDRESS, "", "127.0.0.1:1"):
        with pytest.raises(TransferProofError, match="is not sealed"):
            open_address(OURS, "ucx", segment(told))


@given(position=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_any_flipped_bit_is_refused(position, bit):
    raw = bytearray(base64.b64decode(SEALED.removeprefix(PREFIX)))
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(TransferProofError):
        open_address(OURS, "ucx", segment(PREFIX + base64.b64encode(raw).decode()))


@given(st.one_of(st.text(max_size=300), st.binary(max_size=300).map(lambda raw: base64.b64encode(raw).decode())))
def test_garbage_is_refused(text):
    with pytest.raises(TransferProofError):
        open_address(OURS, "ucx", segment(PREFIX + text))


def test_truncated_or_endless_ones_are_refused():
    for told in (*(SEALED[:end] for end in range(len(PREFIX), len(SEALED))), SEALED + "A" * 40_000):
        with pytest.raises(TransferProofError):
            open_address(OURS, "ucx", segment(told))


def test_parts_of_two_seals_make_none():
    other = AddressSeal(OURS, "ucx", "a.1").told(base64.b64encode(b"another address of the segment").decode())
    first, second = (base64.b64decode(told.removeprefix(PREFIX)) for told in (SEALED, other))
    with pytest.raises(TransferProofError, match="does not open"):
        open_address(OURS, "ucx", segment(PREFIX + base64.b64encode(first[:70] + second[70:]).decode()))


def test_the_text_is_the_same_until_the_address_or_the_secrets_are_others():
    secrets: Iterator[tuple[bytes, ...]] = iter([(OLD,), (NEW, OLD), (NEW,)])
    held = Secrets((OLD,), reread=lambda: next(secrets))
    seal = AddressSeal(ClusterTrust("here", held), "ucx", "a.1")
    told = [seal.told(ADDRESS)]
    assert seal.told("") == ""
    held.refresh()
    assert seal.told(ADDRESS) == told[0]
    for _ in range(2):
        held.refresh()
        told.append(seal.told(ADDRESS))
        assert seal.told(ADDRESS) == told[-1]
    other = base64.b64encode(b"of the process that was started again").decode()
    assert len({*told, seal.told(other)}) == 4
    assert open_address(trust(OLD), "ucx", segment(told[1])) == ADDRESS
    with pytest.raises(TransferProofError, match="is sealed for secret"):
        open_address(trust(OLD), "ucx", segment(told[2]))


def test_neither_a_seal_nor_an_error_shows_secrets_or_what_is_sealed():
    seal = AddressSeal(OURS, "ucx", "a.1")
    seal.told(ADDRESS)
    with pytest.raises(TransferProofError) as refused:
        open_address(trust(NEW), "ucx", msgspec.structs.replace(segment(SEALED), size_bytes=1))
    for shown in (repr(seal), refused.value.message):
        assert ADDRESS not in shown and OLD.hex() not in shown and SEALED not in shown
