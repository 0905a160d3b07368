"""Greetings over UCX, one by one, between two ends that stand on no library: what strangers get, and replays."""

import logging
import secrets as random
from typing import Any

import pytest

from kvcore.errors import SegmentUnknownError, TransferError, TransferProofError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from transfer.greeting import greeting_keys
from transfer.ucx.binding import ffi
from transfer.ucx.greetings import Greetings, HostedSegment
from transfer.ucx.limits import UcxLimits

OLD, NEW = random.token_bytes(32), random.token_bytes(32)
PLACE = b"where it lies, and its remote key"
HELLO, WELCOME, PROVEN_HELLO, CHALLENGE, PROOF, PLACED = range(1, 7)
HERE, UNKNOWN, REFUSED = b"\1", b"\0", b"\2"
Message = tuple[int, bytes]


def trust(*secrets: bytes, cluster: str = "here") -> ClusterTrust:
    return ClusterTrust(cluster, Secrets(secrets))


class End:
    """One worker's greetings. `sent`: what it said since it was asked last, as (message, header)."""

    def __init__(self, known: ClusterTrust, hosted: HostedSegment | None = None, **limits: int) -> None:
        self.sent: list[Message] = []
        self.callbacks: dict[int, Any] = {}
        self.lib = self.library = self
        self.build = "no UCX"
        self.known = known
        self.greetings = Greetings(self, hosted, lambda: greeting_keys(self.known), UcxLimits(**limits))  # type: ignore[arg-type]

    def on_message(self, message: int, callback: Any) -> None:
        self.callbacks[message] = callback

    def ucp_am_send_nbx(self, _handle: Any, message: int, header: Any, size: int, *_: Any) -> Any:
        self.sent.append((message, bytes(ffi.buffer(header, size))))
        return ffi.NULL

    def status_of(self, _request: Any) -> int:
        return 0

    def free(self, _request: Any) -> None:
        pass

    def hears(self, said: Message, connection: int = 1) -> list[Message]:
        """What it answers on that connection."""
        message, header = said
        kept = ffi.new("char[]", header)
        param = ffi.new("ucp_am_recv_param_t *", {"recv_attr": 1, "reply_ep": ffi.cast("void *", connection)})
        self.callbacks[message](ffi.NULL, kept, len(header), ffi.NULL, 0, param)
        answers, self.sent = self.sent, []
        self.greetings.clean_up()
        return answers


class Endpoint:
    segment_id = "n.1"
    handle = ffi.NULL
    lanes = ""

    def __init__(self) -> None:
        self.error: TransferError | None = None
        self.confirmed = False
        self.place = b""

    def fail(self, error: TransferError) -> None:
        self.error = self.error or error

    def take_place(self, place: bytes) -> None:
        self.place = place

    def read_lanes(self) -> None:
        pass


def asks(known: ClusterTrust) -> tuple[End, Endpoint, Message]:
    """An initiator, and the first that it says."""
    end, endpoint = End(known), Endpoint()
    end.greetings.begin(endpoint)  # type: ignore[arg-type]
    (hello,), end.sent = end.sent, []
    return end, endpoint, hello


def host(known: ClusterTrust, segment_id: str = "n.1", **limits: int) -> End:
    return End(known, HostedSegment(segment_id, PLACE), **limits)


def talk(initiator: End, target: End, hello: Message) -> list[Message]:
    """All that is said after `hello`, in order."""
    said: list[Message] = []
    asked = [hello]
    while asked:
        answers = [answer for message in asked for answer in target.hears(message)]
        asked = [more for answer in answers for more in initiator.hears(answer)]
        said += [*answers, *asked]
    return said


@pytest.mark.parametrize("theirs", [(OLD,), (NEW, OLD), (OLD, NEW)])
def test_who_proves_itself_is_told_where_the_segment_lies_and_nobody_else_can_read_it(theirs):
    initiator, endpoint, hello = asks(trust(OLD))
    target = host(trust(*theirs))
    said = talk(initiator, target, hello)
    assert [message for message, _ in said] == [CHALLENGE, PROOF, PLACED]
    assert (endpoint.confirmed, endpoint.place, endpoint.error) == (True, PLACE, None)
    assert not any(PLACE in header for _, header in said)
    assert not target.greetings.refused


def test_without_a_secret_it_is_one_question_and_its_answer():
    for segment_id, answer in (("n.1", HERE), ("n.2", UNKNOWN)):
        initiator, endpoint, hello = asks(OPEN)
        (welcome,) = talk(initiator, host(OPEN, segment_id), hello)
        assert welcome[0] == WELCOME and welcome[1].endswith(answer)
        assert endpoint.confirmed == (answer == HERE)
        assert isinstance(endpoint.error, SegmentUnknownError) == (answer == UNKNOWN)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (OPEN, trust(OLD)),
        (trust(OLD), OPEN),
        (trust(NEW), trust(OLD)),
        (trust(OLD, cluster="there"), trust(OLD)),
    ],
    ids=["the host alone has a secret", "the initiator alone", "another secret", "another cluster"],
)
def test_strangers_are_told_nothing_and_counted(ours, theirs, caplog):
    target = host(theirs)
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            initiator, endpoint, hello = asks(ours)
            said = talk(initiator, target, hello)
            assert PLACED not in [message for message, _ in said]
            assert isinstance(endpoint.error, TransferProofError) and not endpoint.confirmed
    refused = target.greetings.refused["proof"] + initiator.greetings.refused["proof"]
    assert refused and caplog.text.count("peer_broke_protocol") <= 6
    if ours.cluster == "here":
        assert target.greetings.refused == {"proof": 5} and caplog.text.count("peer_broke_protocol") == 1


def test_what_was_heard_opens_no_other_connection():
    """Neither the same messages again, nor the first connection's proof on a second, nor twice on its own."""
    initiator, endpoint, hello = asks(trust(OLD))
    target = host(trust(OLD))
    _, proof, _ = talk(initiator, target, hello)
    assert endpoint.confirmed
    (again,) = target.hears(hello, connection=2)
    assert again[0] == CHALLENGE
    for connection in (2, 3, 1):
        (answer,) = target.hears(proof, connection)
        assert answer[0] == WELCOME and answer[1].endswith(REFUSED)
    assert target.greetings.refused == {"proof": 3}


def test_a_place_that_another_target_or_an_earlier_connection_told_is_not_believed():
    first, _, hello = asks(trust(OLD))
    *_, told = talk(first, host(trust(OLD)), hello)
    second, endpoint, hello = asks(trust(OLD))
    forged = (PLACED, hello[1][:8] + told[1][8:])
    assert second.hears(forged) == [] and not endpoint.confirmed and endpoint.error is None, "before any challenge"
    (challenge,) = host(trust(OLD)).hears(hello)
    assert [message for message, _ in second.hears(challenge)] == [PROOF]
    second.hears(forged)
    assert isinstance(endpoint.error, TransferProofError) and not endpoint.confirmed


def test_a_welcome_in_the_hosts_name_opens_nothing_where_there_is_a_secret():
    initiator, endpoint, hello = asks(trust(OLD))
    initiator.hears((WELCOME, hello[1][:8] + HERE))
    assert isinstance(endpoint.error, TransferProofError) and not endpoint.confirmed


def test_a_host_proves_nothing_for_another_segment():
    initiator, endpoint, hello = asks(trust(OLD))
    (answer,) = host(trust(OLD), "n.2").hears(hello)
    assert answer[0] == WELCOME and answer[1].endswith(UNKNOWN)
    initiator.hears(answer)
    assert isinstance(endpoint.error, SegmentUnknownError)


def test_a_flood_of_greetings_is_bounded_and_later_ones_are_served():
    target = host(trust(OLD), max_answers=4)
    for connection in range(50):
        target.hears(asks(trust(OLD))[2], connection)
    assert "challenged=4" in repr(target.greetings)
    initiator, endpoint, hello = asks(trust(OLD))
    talk(initiator, target, hello)
    assert endpoint.confirmed


def test_a_secret_that_is_changed_holds_for_the_next_connection():
    target = host(trust(OLD))
    for known, served in ((trust(OLD), True), (trust(NEW, OLD), True), (trust(NEW), False), (trust(OLD), True)):
        initiator, endpoint, hello = asks(known)
        talk(initiator, target, hello)
        assert endpoint.confirmed == served
    target.known = trust(NEW)
    initiator, endpoint, hello = asks(trust(NEW, OLD))
    talk(initiator, target, hello)
    assert endpoint.confirmed


def test_noise_is_answered_with_nothing():
    target = host(trust(OLD))
    for message in range(1, 7):
        for header in (b"", b"1234567", b"12345678", b"12345678" + bytes(100)):
            for answered, said in target.hears((message, header)):
                assert answered == WELCOME and said.endswith(REFUSED)
