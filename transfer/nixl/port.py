"""One NIXL agent of an initiator, the peers that it is connected to and the requests that it has under way.

A peer carries no batch before it has said that it holds the segment: over TCP UCX writes wherever it is told to, in
whatever process listens at the address by then. NIXL cannot take a request back: one that a silent peer holds may
write into its buffer, whatever NIXL says, until the whole agent is closed. Over TCP bytes therefore go through bounce
buffers of the port, which outlive a caller that gave up waiting; over RDMA the agent is closed.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence

from kvcore.errors import (
    ConfigError,
    PeerUnreachableError,
    SegmentUnknownError,
    TransferError,
    TransferProofError,
    TransferProtocolError,
)
from kvcore.peer_log import PeerLog
from kvcore.telemetry import log_fields
from transfer.base import Direction
from transfer.fragments import FRAGMENT_BYTES, Fragment
from transfer.greeting import InitiatorGreeting, Keys, open_place
from transfer.nixl.binding import NixlAgent, NixlLibrary, address_of
from transfer.nixl.descriptor import HelloAnswer, NixlDescriptor, NixlHello, NixlWelcome, pack_hello, parse_welcome
from transfer.nixl.limits import NixlLimits
from transfer.nixl.peer import Peer, Request
from transfer.nixl.proving import MAGIC, GreetingStep, NixlStep, pack_step, parse_place, parse_step, vouched
from transfer.nixl.registrations import RegisteredRange, Registrations

_LOG = logging.getLogger("transfer")
REQUEST_BYTES = 32 << 20
REQUEST_FRAGMENTS = 256
"""Of one request at most."""


class Port:
    """All of it runs in the worker's thread, or before it starts. Opening raises ConfigError.

    `one_at_a_time`: a peer has one request at a time on its way, of one fragment. Over TCP, UCX (1.13 to 1.23) aborts
    the *target's* process when an initiator dies with several reads on their way: in 8 of 105 such deaths; with one at
    a time in none of 210.
    """

    def __init__(
        self,
        library: NixlLibrary,
        options: Mapping[str, str],
        regions: Sequence[memoryview],
        *,
        one_at_a_time: bool,
        limits: NixlLimits,
        keys: Keys = lambda: (),
    ) -> None:
        self._limits = limits
        self._keys = keys
        self.one_at_a_time = one_at_a_time
        self.close_by: float | None = None
        """Set when it takes no new batches any more."""
        self._agent = NixlAgent(library, f"kvferry.{secrets.token_hex(8)}", options, progress=False)
        self._hello = self._agent.metadata()
        self._log = PeerLog(_LOG)
        self._registrations = Registrations(self._agent)
        self._peers: dict[str, Peer] = {}
        self._requests: set[Request] = set()
        self._abandoned: list[Request] = []
        self._bounces: list[bytearray] = []
        self.num_bytes = 0
        """Of the requests under way."""
        try:
            for region in regions:
                self.register(region)
        except ConfigError:
            self.close()
            raise

    def __repr__(self) -> str:
        state = "open" if self.close_by is None else "retiring"
        return (
            f"<Port {self._agent.name} {state} peers={len(self._peers)} requests={self.num_requests} "
            f"abandoned={len(self._abandoned)} bytes={self.num_bytes}>"
        )

    @property
    def num_requests(self) -> int:
        """Under way, those included that were abandoned."""
        return len(self._requests)

    @property
    def waiting(self) -> bool:
        """Whether a peer has still to answer."""
        return any(not peer.confirmed and peer.error is None for peer in self._peers.values())

    def register(self, region: memoryview) -> None:
        """Register memory for good. Raises ConfigError."""
        self._registrations.add(address_of(region), region.nbytes)

    def peer(self, key: str, descriptor: NixlDescriptor, now: float) -> Peer:
        """The connection to a segment, made if need be. Raises PeerUnreachableError.

        Four cases:
        1. there is one, and nothing is wrong with it: it is used;
        2. it failed, and batches or requests are still on it: NIXL would free those a second time if it were dropped,
           so the new batch fails as they do;
        3. it failed, and nothing is on it: it is dropped, and another is made;
        4. there is none: one is made, for which the one that was idle longest may have to go.
        """
        found = self._peers.get(key)
        if found is not None and found.error is None:  # case 1
            found.used_at = now
            return found
        if found is not None and (found.num_batches or found.num_requests):  # case 2
            raise found.error or PeerUnreachableError(f"segment {descriptor.segment_id}: the connection broke")
        if found is not None:  # case 3
            self._drop(found)
        if len(self._peers) >= self._limits.max_peers:
            self._make_room()
        name = self._agent.load(descriptor.metadata)
        peer = Peer(key, descriptor, name, secrets.randbits(63), made_at=now, used_at=now, base=descriptor.base)
        if keys := self._keys():
            peer.greeting = InitiatorGreeting(keys, "nixl", descriptor.segment_id)
        self._peers[key] = peer
        self._greet(peer, now)
        return peer

    def may_post(self, peer: Peer, under_way: int) -> bool:
        """Whether a batch with `under_way` requests on their way may hand over another."""
        if self.one_at_a_time:
            return not peer.num_requests
        limits = self._limits
        room = self.num_bytes < limits.window_bytes and self.num_requests < limits.window_requests
        return room and under_way < limits.batch_requests

    def post(self, direction: Direction, peer: Peer, fragments: Sequence[Fragment]) -> Request:
        """Hand fragments to NIXL; one of them, if one at a time. Raises TransferError, and then nothing is held.

        Over TCP the fragment goes through a bounce buffer, registered for good; over RDMA NIXL reads and writes the
        caller's buffers, registered for as long as the request lasts.
        """
        if self.one_at_a_time:
            request = self._post_bounced(direction, peer, fragments[0])
        else:
            request = self._post_in_place(direction, peer, fragments)
        self._requests.add(request)
        self.num_bytes += request.num_bytes
        peer.num_requests += 1
        return request

    def _post_bounced(self, direction: Direction, peer: Peer, fragment: Fragment) -> Request:
        size = fragment.view.nbytes
        bounce = self._bounces.pop() if self._bounces else self._new_bounce()
        if direction == "write":
            bounce[:size] = fragment.view
        remote = [(peer.base + fragment.offset, size)]
        try:
            handle = self._agent.post(direction, [(address_of(memoryview(bounce)), size)], remote, peer.name)
        except TransferError:
            self._bounces.append(bounce)
            raise
        return Request(handle, direction, peer, [fragment], size, bounce=bounce)

    def _new_bounce(self) -> bytearray:
        bounce = bytearray(FRAGMENT_BYTES)
        self._registrations.add(address_of(memoryview(bounce)), len(bounce))
        return bounce

    def _post_in_place(self, direction: Direction, peer: Peer, fragments: Sequence[Fragment]) -> Request:
        ranges: list[RegisteredRange] = []
        local: list[tuple[int, int]] = []
        used: list[Fragment] = []
        try:
            for fragment in fragments:
                registered, found = self._registered(direction, fragment)
                ranges.append(found)
                used.append(registered)
                local.append((address_of(registered.view), registered.view.nbytes))
            remote = [(peer.base + fragment.offset, fragment.view.nbytes) for fragment in fragments]
            handle = self._agent.post(direction, local, remote, peer.name)
        except TransferError:
            for one in ranges:
                self._registrations.release(one)
            raise
        return Request(handle, direction, peer, used, sum(size for _, size in local), ranges=ranges)

    def over(self, request: Request) -> bool:
        """Whether a request has ended; if so its bytes are where they belong, and it is released.

        Raises PeerUnreachableError if it failed, released too.
        """
        try:
            if not self._agent.finished(request.handle):
                return False
            request.deliver()
        except PeerUnreachableError:
            self._release(request)
            raise
        self._release(request)
        return True

    def abandon(self, request: Request) -> bool:
        """Have a request end without its caller, if it touches no memory of the caller's. Its peer waits for it."""
        if request.bounce is not None:
            request.fragments = ()
            self._abandoned.append(request)
        return request.bounce is not None

    def reap(self) -> None:
        """Release what was abandoned and has ended. Moves the agent on."""
        for request in self._abandoned[:]:
            try:
                if not self.over(request):
                    continue
            except PeerUnreachableError as error:
                request.peer.fail(error)
            self._abandoned.remove(request)

    def listen(self, now: float) -> None:
        """Collect answers, greet again who has not answered, drop failed connections that nothing is on.

        Moves the agent on.
        """
        for sender, messages in self._agent.messages().items():
            for message in messages:
                self._receive(sender, message)
        for peer in list(self._peers.values()):
            unanswered = not peer.confirmed and peer.error is None
            if unanswered and now - peer.greeted_at >= self._limits.greet_again_s:
                self._greet(peer, now)
            if peer.error is not None and not peer.num_batches and not peer.num_requests:
                self._drop(peer)

    def close(self) -> None:
        """Cut everything off. Requests under way are over: nothing touches their memory any more."""
        for request in self._requests:
            self._agent.release(request.handle)
        self._requests.clear()
        self._agent.close()

    def _registered(self, direction: Direction, fragment: Fragment) -> tuple[Fragment, RegisteredRange]:
        """The fragment with registered memory: its own, or a copy where another batch's overlaps it."""
        try:
            found = self._registrations.acquire(address_of(fragment.view), fragment.view.nbytes)
            if found is None:
                copied = bytearray(fragment.view.nbytes) if direction == "read" else bytearray(fragment.view)
                fragment = Fragment(fragment.offset, memoryview(copied), fragment.parts or (fragment.view,))
                found = self._registrations.acquire(address_of(fragment.view), fragment.view.nbytes)
        except ConfigError as error:
            raise TransferError(error.message) from error
        assert found is not None, "fresh memory overlaps nothing"
        return fragment, found

    def _release(self, request: Request) -> None:
        self._requests.discard(request)
        self.num_bytes -= request.num_bytes
        request.peer.num_requests -= 1
        self._agent.release(request.handle)
        if request.bounce is not None:
            self._bounces.append(request.bounce)
        for found in request.ranges:
            self._registrations.release(found)

    def _greet(self, peer: Peer, now: float) -> None:
        peer.greeted_at = now
        if peer.greeting is not None:
            body = vouched(peer.greeting.keys, peer.greeting.hello(), self._hello)
            self._send(peer, pack_step(NixlStep(GreetingStep.HELLO, peer.nonce, body, self._hello)))
        else:
            self._send(peer, pack_hello(NixlHello(peer.nonce, peer.descriptor.segment_id, self._hello)))

    def _send(self, peer: Peer, message: bytes) -> None:
        try:
            self._agent.send(peer.name, message)
        except PeerUnreachableError as error:
            peer.fail(PeerUnreachableError(f"segment {peer.descriptor.segment_id}: {error.message}"))

    def _receive(self, sender: str, message: bytes) -> None:
        if not message:  # a host asking whether we are still here
            return
        try:
            parsed = parse_step(message) if message.startswith(MAGIC) else parse_welcome(message)
        except TransferProtocolError as error:
            self._log.say(logging.WARNING, "transfer.peer_broke_protocol", "protocol", sender, error=error.message)
            return
        for peer in self._peers.values():
            if (peer.name, peer.nonce) == (sender, parsed.nonce) and peer.error is None and not peer.confirmed:
                if isinstance(parsed, NixlWelcome):
                    self._answered(peer, parsed.answer)
                elif peer.greeting is not None:
                    self._proving(peer, peer.greeting, parsed)

    def _proving(self, peer: Peer, greeting: InitiatorGreeting, message: NixlStep) -> None:
        """A challenge is answered each time that it comes, as the host says it again to a greeting that comes again."""
        try:
            if message.step is GreetingStep.CHALLENGE:
                self._send(peer, pack_step(NixlStep(GreetingStep.PROOF, peer.nonce, greeting.answer(message.body))))
            elif message.step is GreetingStep.PLACE and greeting.answered:
                peer.base, metadata = parse_place(open_place(greeting.direction_keys, message.body))
                if self._agent.load(metadata) != peer.name:
                    raise TransferProtocolError("the metadata that its host told is another agent's")
                self._confirm(peer)
        except TransferError as error:
            peer.fail(error)

    def _answered(self, peer: Peer, answer: HelloAnswer) -> None:
        segment = peer.descriptor.segment_id
        if answer is HelloAnswer.UNKNOWN:
            peer.fail(SegmentUnknownError(f"segment {segment} is not at its address any more"))
        elif answer is HelloAnswer.FULL:
            peer.fail(PeerUnreachableError(f"segment {segment}: its node takes no more connections"))
        elif peer.greeting is not None:
            peer.fail(TransferProofError(f"what serves segment {segment} gives no proof of this cluster's secret"))
        else:
            self._confirm(peer)

    def _confirm(self, peer: Peer) -> None:
        peer.confirmed = True
        log_fields(_LOG, logging.INFO, "transfer.nixl_connected", segment=peer.descriptor.segment_id)

    def _make_room(self) -> None:
        idle = [peer for peer in self._peers.values() if not peer.num_batches and not peer.num_requests]
        if not idle:
            raise PeerUnreachableError(
                f"{self._limits.max_peers} connections are in use, and none is left for another segment"
            )
        self._drop(min(idle, key=lambda peer: peer.used_at))

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.key]
        if not any(other.name == peer.name for other in self._peers.values()):
            self._agent.drop(peer.name)
