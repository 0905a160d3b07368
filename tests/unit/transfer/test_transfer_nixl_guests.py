"""A NIXL host's answers to those who greet it, over an agent that is none: who is let in, told, and dropped."""

import secrets as random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcore.errors import TransferProofError, TransferProtocolError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from transfer.greeting import InitiatorGreeting, greeting_keys, open_place
from transfer.nixl.descriptor import HelloAnswer, NixlHello, pack_hello, parse_welcome
from transfer.nixl.guests import ConnectedAgents, GuestBook
from transfer.nixl.limits import NixlLimits
from transfer.nixl.proving import (
    MAGIC,
    GreetingStep,
    NixlStep,
    check_voucher,
    pack_place,
    pack_step,
    parse_place,
    parse_step,
    vouched,
)

OLD, NEW = random.token_bytes(32), random.token_bytes(32)
PLACE = pack_place(1 << 40, b"metadata with remote keys")
SEGMENT = "n.1"


def trust(*secrets: bytes) -> ClusterTrust:
    return ClusterTrust("here", Secrets(secrets))


class Clock:
    def __init__(self) -> None:
        self.at = 0.0

    def now(self) -> float:
        return self.at


class Host:
    """`sent`: (to whom, what) since it was asked last. `loaded`: agents whose metadata the library was given."""

    def __init__(self, known: ClusterTrust, max_connections: int = 8) -> None:
        self.inbox: dict[str, list[bytes]] = {}
        self.sent: list[tuple[str, bytes]] = []
        self.loaded: set[str] = set()
        self.clock = Clock()
        keys = lambda: greeting_keys(known)  # noqa: E731
        limits = NixlLimits(max_connections=max_connections)
        self.agents = ConnectedAgents(self, GuestBook(SEGMENT, keys, PLACE), limits, self.clock)  # type: ignore[arg-type]

    def messages(self) -> dict[str, list[bytes]]:
        found, self.inbox = self.inbox, {}
        return found

    def load(self, metadata: bytes) -> str:
        self.loaded.add(metadata.decode())
        return metadata.decode()

    def drop(self, name: str) -> None:
        self.loaded.discard(name)

    def send(self, name: str, message: bytes) -> None:
        if message:
            self.sent.append((name, message))

    def hears(self, sender: str, message: bytes) -> list[bytes]:
        self.inbox = {sender: [message]}
        self.agents.answer_greetings()
        answers, self.sent = [said for to, said in self.sent if to == sender], []
        return answers


class Guest:
    """An agent that asks for the segment; its metadata is its name."""

    def __init__(self, known: ClusterTrust, name: str = "asking", segment_id: str = SEGMENT) -> None:
        self.name = name
        self.greeting = InitiatorGreeting(greeting_keys(known), "nixl", segment_id)
        self.nonce = random.randbits(63)

    def hello(self, metadata: bytes | None = None) -> bytes:
        body = vouched(self.greeting.keys, self.greeting.hello(), self.name.encode())
        return pack_step(NixlStep(GreetingStep.HELLO, self.nonce, body, metadata or self.name.encode()))

    def proof(self, challenge: bytes) -> bytes:
        step = parse_step(challenge)
        assert (step.step, step.nonce) == (GreetingStep.CHALLENGE, self.nonce)
        return pack_step(NixlStep(GreetingStep.PROOF, self.nonce, self.greeting.answer(step.body)))

    def place(self, told: bytes) -> tuple[int, bytes]:
        step = parse_step(told)
        assert (step.step, step.nonce) == (GreetingStep.PLACE, self.nonce)
        return parse_place(open_place(self.greeting.direction_keys, step.body))


@pytest.mark.parametrize("theirs", [(OLD,), (NEW, OLD), (OLD, NEW)])
def test_who_proves_itself_is_told_where_the_segment_lies_however_often_it_asks(theirs):
    host, guest = Host(trust(*theirs)), Guest(trust(OLD))
    (challenge,), (again,) = host.hears(guest.name, guest.hello()), host.hears(guest.name, guest.hello())
    assert challenge == again
    told = [*host.hears(guest.name, guest.proof(challenge)), *host.hears(guest.name, guest.proof(challenge))]
    assert told[0] == told[1] and b"remote keys" not in told[0]
    assert guest.place(told[0]) == (1 << 40, b"metadata with remote keys")
    assert host.loaded == {guest.name} and not host.agents.refused


@pytest.mark.parametrize("known", [trust(NEW), ClusterTrust("there", Secrets((OLD,)))], ids=["secret", "cluster"])
def test_a_strangers_metadata_does_not_reach_the_library(known):
    host, guest = Host(trust(OLD)), Guest(known)
    assert host.hears(guest.name, guest.hello()) == [] and not host.loaded
    plain = pack_hello(NixlHello(guest.nonce, SEGMENT, guest.name.encode()))
    assert host.hears(guest.name, plain) == [] and not host.loaded
    assert host.agents.refused == {"proof": 2}


def test_metadata_that_was_put_into_anothers_greeting_does_not_either():
    host, guest = Host(trust(OLD)), Guest(trust(OLD))
    assert host.hears("other", guest.hello(b"other")) == [] and not host.loaded
    assert host.agents.refused == {"proof": 1}


def test_what_was_heard_opens_nothing_again():
    """The greeting that is sent again by another gets a challenge, and its proof is that of another nonce."""
    host, guest = Host(trust(OLD)), Guest(trust(OLD))
    (challenge,) = host.hears(guest.name, guest.hello())
    proof = guest.proof(challenge)
    host.hears(guest.name, proof)
    host.clock.at = 60.0
    assert host.hears("thief", guest.hello()) == [], "it greets as somebody else"
    fresh = Host(trust(OLD))
    assert fresh.hears(guest.name, proof) == [], "nobody asked for it"
    (other,) = fresh.hears(guest.name, guest.hello())
    assert other != challenge and fresh.hears(guest.name, proof) == []
    fresh.clock.at = 6.0
    fresh.agents.drop_broken()
    assert fresh.agents.refused == {"proof": 2} and not fresh.loaded


@pytest.mark.parametrize("proved", [True, False], ids=["proved", "still to prove"])
def test_nobody_ends_a_guest_by_speaking_in_its_name(proved):
    """With what it made up, and with all that was heard of others and of the guest itself."""
    host, guest = Host(trust(OLD)), Guest(trust(OLD))
    (challenge,) = host.hears(guest.name, guest.hello())
    proof = guest.proof(challenge)
    if proved:
        host.hears(guest.name, proof)
    elsewhere, earlier = Guest(trust(OLD), "other", "n.2"), [Guest(trust(OLD), guest.name) for _ in range(2)]
    heard = [*(one.hello() for one in earlier), elsewhere.hello(b"other")]
    made_up = [
        pack_step(NixlStep(GreetingStep.PROOF, guest.nonce, bytes(32))),
        pack_step(NixlStep(GreetingStep.HELLO, guest.nonce, b"\0hello", b"asking")),
        pack_hello(NixlHello(guest.nonce, "n.2", b"asking")),
    ]
    for message in [*heard, *made_up]:
        host.hears(guest.name, message)
    host.hears("thief", guest.hello())
    assert guest.name in host.loaded and "thief" not in host.loaded
    (told,) = host.hears(guest.name, proof)
    assert guest.place(told)[0] == 1 << 40
    host.clock.at = 60.0
    host.agents.drop_broken()
    assert guest.name in host.loaded, "a greeting in its name that nobody ends is not its own"


def test_a_name_has_a_bounded_number_of_greetings():
    host, guest = Host(trust(OLD)), Guest(trust(OLD))
    for _ in range(50):
        host.hears(guest.name, Guest(trust(OLD)).hello())
    (asked,) = [guest.asked for guest in host.agents._guests.values()]
    assert len(asked) == NixlLimits().max_greetings
    (challenge,) = host.hears(guest.name, guest.hello())
    (told,) = host.hears(guest.name, guest.proof(challenge))
    assert guest.place(told)[0] == 1 << 40, "the latest is among them"


def test_a_host_proves_nothing_for_another_segment():
    host, guest = Host(trust(OLD)), Guest(trust(OLD), segment_id="n.2")
    (answer,) = host.hears(guest.name, guest.hello())
    assert parse_welcome(answer).answer is HelloAnswer.UNKNOWN and not host.loaded


def test_who_does_not_prove_itself_in_time_makes_room_for_others():
    host = Host(trust(OLD), max_connections=2)
    silent = [Guest(trust(OLD), f"silent{n}") for n in range(2)]
    for guest in silent:
        host.hears(guest.name, guest.hello())
    late = Guest(trust(OLD), "late")
    (full,) = host.hears(late.name, late.hello())
    assert parse_welcome(full).answer is HelloAnswer.FULL
    host.clock.at = 6.0
    (challenge,) = host.hears(late.name, late.hello())
    (told,) = host.hears(late.name, late.proof(challenge))
    assert late.place(told)[0] == 1 << 40 and host.loaded == {"late"}
    host.clock.at = 60.0
    host.agents.drop_broken()
    assert host.loaded == {"late"}, "who has proved itself stays"


def test_without_a_secret_it_is_one_question_and_its_answer():
    host = Host(OPEN)
    for wanted, answer in ((SEGMENT, HelloAnswer.WELCOME), ("n.2", HelloAnswer.UNKNOWN)):
        (said,) = host.hears("asking", pack_hello(NixlHello(7, wanted, b"asking")))
        assert parse_welcome(said).answer is answer
    assert host.hears("asking", Guest(trust(OLD)).hello()) == []


def test_what_only_a_host_says_is_refused():
    host = Host(trust(OLD))
    for step in (GreetingStep.CHALLENGE, GreetingStep.PLACE):
        assert host.hears("asking", pack_step(NixlStep(step, 7, b"x"))) == []
    assert host.agents.refused == {"protocol": 2}


@given(st.integers(0, 10_000), st.integers(0, 7))
def test_any_flipped_bit_of_a_message_is_refused(position: int, bit: int):
    raw = bytearray(pack_step(NixlStep(GreetingStep.HELLO, 1 << 60, bytes(range(90)), bytes(range(100)))))
    raw[position % len(raw)] ^= 1 << bit
    with pytest.raises(TransferProtocolError):
        parse_step(bytes(raw))


@given(st.binary(max_size=300))
def test_garbage_is_no_message_and_no_voucher(raw: bytes):
    for text in (raw, MAGIC + raw):
        with pytest.raises(TransferProtocolError):
            parse_step(text)
    with pytest.raises(TransferProofError):
        check_voucher(greeting_keys(trust(OLD)), raw, b"metadata")


def test_a_place_that_is_cut_short_is_refused():
    for place in (b"", bytes(8)):
        with pytest.raises(TransferProtocolError):
            parse_place(place)
