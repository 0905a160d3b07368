"""The greeting of transports: who gets through, and that no message fits another connection."""

import secrets as random
from pathlib import Path

import pytest

from kvcore.errors import TransferForgedError, TransferProofError
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.secrets import Secrets
from transfer.greeting import (
    CHALLENGE_BYTES,
    GreetingKey,
    InitiatorGreeting,
    TargetGreeting,
    greeting_keys,
    parse_hello,
)
from transfer.tcp import wire
from transfer.tcp.frame_macs import FrameMacs

ROOT = Path(__file__).resolve().parents[3]
OLD, NEW = random.token_bytes(32), random.token_bytes(32)


def keys(*secrets: bytes, cluster: str = "here") -> tuple[GreetingKey, ...]:
    return greeting_keys(ClusterTrust(cluster, Secrets(secrets)))


def greet(initiator: InitiatorGreeting, target: TargetGreeting) -> str:
    segment, challenge = target.challenge(initiator.hello())
    assert len(challenge) == CHALLENGE_BYTES
    target.check(initiator.answer(challenge))
    return segment


@pytest.mark.parametrize(
    ("ours", "theirs"), [((OLD,), (OLD,)), ((NEW, OLD), (OLD,)), ((OLD,), (NEW, OLD)), ((NEW, OLD), (NEW,))]
)
def test_two_of_a_cluster_greet_each_other_also_while_the_secret_is_changed(ours, theirs):
    assert greet(InitiatorGreeting(keys(*ours), "tcp", "a.1"), TargetGreeting(keys(*theirs), "tcp")) == "a.1"


def test_another_secret_is_told_by_its_name_before_anything_else():
    ours, theirs = keys(OLD), keys(NEW)
    with pytest.raises(TransferProofError, match=ours[0].id.hex()):
        greet(InitiatorGreeting(ours, "tcp", "a.1"), TargetGreeting(theirs, "tcp"))


@pytest.mark.parametrize(("cluster", "transport"), [("there", "tcp"), ("here", "ucx")])
def test_the_cluster_and_the_transport_are_part_of_a_proof(cluster, transport):
    target = TargetGreeting(keys(OLD, cluster=cluster), transport)
    with pytest.raises(TransferProofError, match="does not know"):
        greet(InitiatorGreeting(keys(OLD), "tcp", "a.1"), target)


def test_a_target_that_knows_no_secret_is_found_out_before_the_initiator_proves_anything():
    initiator = InitiatorGreeting(keys(OLD), "tcp", "a.1")
    _, challenge = TargetGreeting(keys(OLD), "tcp").challenge(InitiatorGreeting(keys(OLD), "tcp", "a.1").hello())
    for wrong in (challenge, bytes(CHALLENGE_BYTES), challenge[:-1], b""):
        with pytest.raises(TransferProofError):
            initiator.answer(wrong)


def test_a_proof_fits_one_connection_one_segment_and_one_side():
    first, second = TargetGreeting(keys(OLD), "tcp"), TargetGreeting(keys(OLD), "tcp")
    initiator = InitiatorGreeting(keys(OLD), "tcp", "a.1")
    _, challenge = first.challenge(initiator.hello())
    proof = initiator.answer(challenge)
    second.challenge(initiator.hello())
    for wrong in (proof[:-1], b"", challenge[-32:], bytes(32)):
        with pytest.raises(TransferProofError):
            first.check(wrong)
    with pytest.raises(TransferProofError):
        second.check(proof)
    other = TargetGreeting(keys(OLD), "tcp", nonce=lambda _: challenge[:16])
    other.challenge(InitiatorGreeting(keys(OLD), "tcp", "b.1", nonce=lambda _: initiator.hello()[:16]).hello())
    with pytest.raises(TransferProofError):
        other.check(proof)
    first.check(proof)


def test_a_proof_before_the_challenge_is_none():
    with pytest.raises(TransferProofError):
        TargetGreeting(keys(OLD), "tcp").check(b"")


@pytest.mark.parametrize("raw", [b"", bytes(16), bytes(16) + b"\x09" + bytes(100), bytes(16) + b"\x02" + bytes(15)])
def test_a_greeting_of_another_form_is_refused(raw):
    with pytest.raises(TransferProofError, match="cut short"):
        parse_hello(raw)


def test_the_keys_of_a_connection_are_both_ends_and_no_others():
    def agreed(transport: str = "tcp+frames") -> tuple[bytes, ...]:
        initiator, target = InitiatorGreeting(keys(NEW), transport, "n.1"), TargetGreeting(keys(NEW), transport)
        target.check(initiator.answer(target.challenge(initiator.hello())[1]))
        assert initiator.direction_keys == target.direction_keys
        return initiator.direction_keys

    found = [*agreed(), *agreed(), *agreed("tcp")]
    assert len(set(found)) == 6 and {len(key) for key in found} == {32}


def test_the_vector_of_the_docs():
    """docs/wire-formats.md, "Frames with MACs"."""
    known = keys(bytes(range(32)))
    initiator = InitiatorGreeting(known, "tcp+frames", "n0.1", lambda size: b"a" * size)
    target = TargetGreeting(known, "tcp+frames", lambda size: b"b" * size)
    initiator.answer(target.challenge(initiator.hello())[1])
    request = wire.pack_request(wire.FrameKind.READ, [(0, 4096)], 1)
    tag = FrameMacs(*initiator.direction_keys).seal([request])
    assert tag.hex() in (ROOT / "docs/wire-formats.md").read_text()
    mirrored = FrameMacs(*reversed(target.direction_keys))
    mirrored.check([request], tag)
    with pytest.raises(TransferForgedError):
        mirrored.check([request], tag)
