"""Who is connected to a segment over NIXL, and what they have still to prove. Owns the host's answers to greetings."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from kvcore.clock import Clock
from kvcore.errors import PeerUnreachableError, TransferProofError, TransferProtocolError
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from transfer.base import refusal
from transfer.greeting import Keys, TargetGreeting, seal_place
from transfer.nixl.binding import NixlAgent
from transfer.nixl.descriptor import HelloAnswer, NixlHello, NixlWelcome, pack_welcome, parse_hello
from transfer.nixl.limits import NixlLimits
from transfer.nixl.proving import MAGIC, GreetingStep, NixlStep, check_voucher, pack_step, parse_step

_LOG = logging.getLogger("transfer")


@dataclass(frozen=True, slots=True)
class GuestBook:
    """What a host tells to whom. `place`: with a secret, where the segment lies, for those who have proved
    themselves; empty where the address tells it."""

    segment_id: str
    keys: Keys = lambda: ()
    place: bytes = b""


@dataclass(slots=True)
class _GuestGreeting:
    """One greeting of a guest, by its hello. `told`: what it was sent once it had proved itself, to be sent again."""

    greeting: TargetGreeting
    challenge: bytes
    told: bytes = b""


@dataclass(slots=True)
class _Guest:
    """`asked`: by their hellos, the latest last. Whoever can send over NIXL sends in whichever name it likes, also a
    hello of somebody else that it has heard: so a name's greetings stand beside each other, and one that goes wrong
    ends neither the others nor the guest."""

    came_at: float
    asked: dict[bytes, _GuestGreeting] = field(default_factory=dict)
    proved: bool = False


class ConnectedAgents:
    """Agents by name. Not thread-safe.

    `refused`: as SegmentHost.refused.
    """

    def __init__(self, agent: NixlAgent, book: GuestBook, limits: NixlLimits, clock: Clock) -> None:
        self._agent = agent
        self._book = book
        self._limits = limits
        self._clock = clock
        self._guests: dict[str, _Guest] = {}
        self.refused: Counter[str] = Counter()
        self._log = PeerLog(_LOG)

    def __len__(self) -> int:
        return len(self._guests)

    def __repr__(self) -> str:
        return f"<ConnectedAgents {self._book.segment_id} {len(self)}/{self._limits.max_connections}>"

    def answer_greetings(self) -> None:
        """Answer every greeting that has come."""
        for sender, messages in self._agent.messages().items():
            for message in messages:
                try:
                    self._received(sender, message)
                except TransferProtocolError as error:
                    reason = refusal(error)
                    self.refused[reason] += 1
                    fields = {"transport": "nixl", "reason": reason, "error": error.message}
                    self._log.say(logging.WARNING, "transfer.peer_broke_protocol", reason, None, **fields)
                except PeerUnreachableError as error:
                    self._log.say(
                        logging.WARNING, "transfer.greeting_failed", "gone", None, agent=sender, error=error.message
                    )

    def drop_broken(self) -> None:
        """Drop those whose connection is broken, which an empty message finds out, and who take too long to prove
        themselves."""
        now = self._clock.now()
        for name, guest in list(self._guests.items()):
            if guest.asked and not guest.proved and now - guest.came_at > self._limits.prove_s:
                self._forget(name)
                continue
            try:
                self._agent.send(name, b"")
            except PeerUnreachableError:
                self._forget(name)

    def _received(self, sender: str, message: bytes) -> None:
        if not message.startswith(MAGIC):
            hello = parse_hello(message)
            if self._book.keys():
                raise TransferProofError("this cluster has a secret, and the initiator gives no proof of it")
            self._greeted(sender, hello)
            return
        step = parse_step(message)
        if step.step is GreetingStep.HELLO:
            self._challenge(sender, step)
        elif step.step is GreetingStep.PROOF:
            self._tell(sender, step)
        else:
            raise TransferProtocolError(f"an initiator sent a {step.step.name}")

    def _greeted(self, sender: str, hello: NixlHello) -> None:
        known = sender in self._guests
        answer = HelloAnswer.WELCOME if hello.segment_id == self._book.segment_id else HelloAnswer.UNKNOWN
        self._let_in(sender, hello.metadata, hello.nonce, answer)
        if answer is HelloAnswer.WELCOME and sender in self._guests:
            self._send(sender, pack_welcome(NixlWelcome(hello.nonce, answer)))
            if not known:
                self._note_guest()

    def _challenge(self, sender: str, step: NixlStep) -> None:
        """A greeting that is said again gets the same challenge. Proves nothing for another segment, as over TCP."""
        guest = self._guests.get(sender)
        asked = None if guest is None else guest.asked.get(step.body)
        if asked is None:
            keys = self._book.keys()
            hello = check_voucher(keys, step.body, step.metadata)
            greeting = TargetGreeting(keys, "nixl")
            wanted, challenge = greeting.challenge(hello)
            answer = HelloAnswer.WELCOME if wanted == self._book.segment_id else HelloAnswer.UNKNOWN
            self._let_in(sender, step.metadata, step.nonce, answer)
            guest = self._guests.get(sender)
            if guest is None or answer is not HelloAnswer.WELCOME:
                return
            guest.asked[step.body] = asked = _GuestGreeting(greeting, challenge)
            if len(guest.asked) > self._limits.max_greetings:
                del guest.asked[next(iter(guest.asked))]
        self._send(sender, pack_step(NixlStep(GreetingStep.CHALLENGE, step.nonce, asked.challenge)))

    def _tell(self, sender: str, step: NixlStep) -> None:
        guest = self._guests.get(sender)
        if guest is None or not guest.asked:
            raise TransferProofError("a proof that nobody was asked for")
        asked = next((one for one in guest.asked.values() if one.greeting.proves(step.body)), None)
        if asked is None:
            raise TransferProofError("the initiator's proof is wrong: it does not know this cluster's secret")
        if not asked.told:
            asked.told = seal_place(asked.greeting.direction_keys, self._book.place)
            guest.proved = True
            self._note_guest()
        self._send(sender, pack_step(NixlStep(GreetingStep.PLACE, step.nonce, asked.told)))

    def _let_in(self, sender: str, metadata: bytes, nonce: int, answer: HelloAnswer) -> None:
        """Connect to an agent, or tell it why not, which takes a connection for a moment. Raises
        TransferProtocolError, PeerUnreachableError."""
        known = sender in self._guests
        if not known and len(self._guests) >= self._limits.max_connections:
            self.drop_broken()
            answer = HelloAnswer.FULL if len(self._guests) >= self._limits.max_connections else answer
        if not known:
            name = self._agent.load(metadata)
            if name != sender:
                if name not in self._guests:  # else it is a guest's own, sent again by somebody who heard it
                    self._forget(name)
                raise TransferProtocolError(f"{sender} greets as {name}")
            self._guests[name] = _Guest(self._clock.now())
        if answer is not HelloAnswer.WELCOME:
            self._send(sender, pack_welcome(NixlWelcome(nonce, answer)))
            if not known:
                self._forget(sender)

    def _send(self, sender: str, message: bytes) -> None:
        try:
            self._agent.send(sender, message)
        except PeerUnreachableError:
            self._forget(sender)
            raise

    def _note_guest(self) -> None:
        log_fields(_LOG, logging.INFO, "transfer.nixl_guest", segment=self._book.segment_id, connections=len(self))

    def _forget(self, name: str) -> None:
        self._guests.pop(name, None)
        self._agent.drop(name)
