"""One NIXL agent of an initiator, the peers that it is connected to and the requests that it has under way.

A peer carries no batch before it has said that it holds the segment: over TCP UCX writes wherever it is told to, in
whatever process listens at the address by then. NIXL cannot take a request back: one that a silent peer holds may
write into its buffer, whatever NIXL says, until the whole agent is closed. Over TCP bytes therefore go through memory
of ours, which outlives whoever gave up waiting; over RDMA the agent is closed.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError, TransferError, TransferProtocolError
from kvcore.telemetry import log_fields
from transfer.base import Direction
from transfer.nixl.binding import NixlAgent, NixlLibrary, address_of
from transfer.nixl.descriptor import Answer, Hello, NixlDescriptor, pack_hello, parse_welcome
from transfer.nixl.peer import Peer, Request
from transfer.nixl.registrations import Claim, Registrations
from transfer.pieces import PIECE_BYTES, Piece

_LOG = logging.getLogger("transfer")
MAX_PEERS = 256
"""Connections of one process; the one that was longest idle goes first."""
WINDOW_BYTES = 256 << 20
WINDOW_REQUESTS = 64
"""In NIXL's hands at once, of all batches."""
REQUEST_BYTES = 32 << 20
REQUEST_PIECES = 256
_REQUESTS_A_BATCH = 2
"""The next is handed over while one moves."""
_AGAIN_S = 0.1
"""A greeting is said again until it was answered: saying it is also how a dead peer shows."""


class Port:
    """All of it runs in the worker's thread, or before it starts. Opening raises ConfigError.

    `one_at_a_time`: a peer has one request at a time on its way, of one piece. Over TCP, UCX (1.13 to 1.23) aborts the
    *target's* process when an initiator dies with several reads on their way: in 8 of 105 such deaths; with one at a
    time in none of 210.
    """

    def __init__(
        self, library: NixlLibrary, options: Mapping[str, str], regions: Sequence[memoryview], *, one_at_a_time: bool
    ) -> None:
        self.one_at_a_time = one_at_a_time
        self.close_by: float | None = None
        """Set when it takes no new batches any more."""
        self._agent = NixlAgent(library, f"kvferry.{secrets.token_hex(8)}", options, progress=False)
        self._hello = self._agent.metadata()
        self._registrations = Registrations(self._agent)
        self._peers: dict[str, Peer] = {}
        self._requests: set[Request] = set()
        self._abandoned: list[Request] = []
        self._slabs: list[bytearray] = []
        self.num_bytes = 0
        """Of the requests under way."""
        try:
            for region in regions:
                self.register(region)
        except ConfigError:
            self.close()
            raise

    @property
    def num_requests(self) -> int:
        """Under way, those included that were abandoned."""
        return len(self._requests)

    @property
    def waiting(self) -> bool:
        """Whether a peer has still to answer."""
        return any(not peer.welcome and peer.error is None for peer in self._peers.values())

    def register(self, region: memoryview) -> None:
        """Register memory for good. Raises ConfigError."""
        self._registrations.add(address_of(region), region.nbytes)

    def peer(self, key: str, descriptor: NixlDescriptor, now: float) -> Peer:
        """The connection to a segment, made if need be. Raises PeerUnreachableError."""
        found = self._peers.get(key)
        if found is not None and found.error is None:
            found.used_at = now
            return found
        if found is not None and (found.jobs or found.num_requests):
            raise found.error or PeerUnreachableError(f"segment {descriptor.segment_id}: the connection broke")
        if found is not None:
            self._drop(found)
        if len(self._peers) >= MAX_PEERS:
            self._make_room()
        name = self._agent.load(descriptor.metadata)
        peer = Peer(key, descriptor, name, secrets.randbits(63), made_at=now, used_at=now)
        self._peers[key] = peer
        self._greet(peer, now)
        return peer

    def may_post(self, peer: Peer, under_way: int) -> bool:
        """Whether a batch with `under_way` requests on their way may hand over another."""
        if self.one_at_a_time:
            return not peer.num_requests
        room = self.num_bytes < WINDOW_BYTES and self.num_requests < WINDOW_REQUESTS
        return room and under_way < _REQUESTS_A_BATCH

    def post(self, direction: Direction, peer: Peer, pieces: Sequence[Piece]) -> Request:
        """Hand pieces to NIXL; one piece, if one at a time. Raises TransferError."""
        if self.one_at_a_time:
            request = self._post_slab(direction, peer, pieces[0])
        else:
            request = self._post_claims(direction, peer, pieces)
        self._requests.add(request)
        self.num_bytes += request.num_bytes
        peer.num_requests += 1
        return request

    def _post_slab(self, direction: Direction, peer: Peer, piece: Piece) -> Request:
        size = piece.view.nbytes
        slab = self._slabs.pop() if self._slabs else self._new_slab()
        if direction == "write":
            slab[:size] = piece.view
        remote = [(peer.descriptor.base + piece.offset, size)]
        try:
            handle = self._agent.post(direction, [(address_of(memoryview(slab)), size)], remote, peer.name)
        except TransferError:
            self._slabs.append(slab)
            raise
        return Request(handle, direction, peer, [piece], size, slab=slab)

    def _new_slab(self) -> bytearray:
        slab = bytearray(PIECE_BYTES)
        self._registrations.add(address_of(memoryview(slab)), len(slab))
        return slab

    def _post_claims(self, direction: Direction, peer: Peer, pieces: Sequence[Piece]) -> Request:
        claims: list[Claim] = []
        local: list[tuple[int, int]] = []
        used: list[Piece] = []
        try:
            for piece in pieces:
                taken, claim = self._claim(direction, piece)
                claims.append(claim)
                used.append(taken)
                local.append((address_of(taken.view), taken.view.nbytes))
            remote = [(peer.descriptor.base + piece.offset, piece.view.nbytes) for piece in pieces]
            handle = self._agent.post(direction, local, remote, peer.name)
        except TransferError:
            for claim in claims:
                self._registrations.give(claim)
            raise
        return Request(handle, direction, peer, used, sum(size for _, size in local), claims=claims)

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
        if request.slab is not None:
            request.pieces = ()
            self._abandoned.append(request)
        return request.slab is not None

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
        """Hear answers, greet again who has not answered, let go of broken connections. Moves the agent on."""
        for sender, messages in self._agent.messages().items():
            for message in messages:
                self._hear(sender, message)
        for peer in list(self._peers.values()):
            if not peer.welcome and peer.error is None and now - peer.greeted_at >= _AGAIN_S:
                self._greet(peer, now)
            if peer.error is not None and not peer.jobs and not peer.num_requests:
                self._drop(peer)

    def close(self) -> None:
        """Cut everything off. Requests under way are over: nothing touches their memory any more."""
        for request in self._requests:
            self._agent.release(request.handle)
        self._requests.clear()
        self._agent.close()

    def _claim(self, direction: Direction, piece: Piece) -> tuple[Piece, Claim]:
        """Registered memory for a piece: its own, or a copy where another batch's overlaps it."""
        try:
            claim = self._registrations.take(address_of(piece.view), piece.view.nbytes)
            if claim is None:
                copied = bytearray(piece.view.nbytes) if direction == "read" else bytearray(piece.view)
                piece = Piece(piece.offset, memoryview(copied), piece.parts or (piece.view,))
                claim = self._registrations.take(address_of(piece.view), piece.view.nbytes)
        except ConfigError as error:
            raise TransferError(error.message) from error
        assert claim is not None, "fresh memory overlaps nothing"
        return piece, claim

    def _release(self, request: Request) -> None:
        self._requests.discard(request)
        self.num_bytes -= request.num_bytes
        request.peer.num_requests -= 1
        self._agent.release(request.handle)
        if request.slab is not None:
            self._slabs.append(request.slab)
        for claim in request.claims:
            self._registrations.give(claim)

    def _greet(self, peer: Peer, now: float) -> None:
        peer.greeted_at = now
        hello = Hello(peer.nonce, peer.descriptor.segment_id, self._hello)
        try:
            self._agent.send(peer.name, pack_hello(hello))
        except PeerUnreachableError as error:
            peer.fail(PeerUnreachableError(f"segment {peer.descriptor.segment_id}: {error.message}"))

    def _hear(self, sender: str, message: bytes) -> None:
        if not message:  # a host asking whether we are still here
            return
        try:
            said = parse_welcome(message)
        except TransferProtocolError as error:
            log_fields(_LOG, logging.WARNING, "transfer.peer_broke_protocol", peer=sender, error=error.message)
            return
        for peer in self._peers.values():
            if (peer.name, peer.nonce) == (sender, said.nonce) and peer.error is None:
                self._answered(peer, said.answer)

    def _answered(self, peer: Peer, answer: Answer) -> None:
        segment = peer.descriptor.segment_id
        if answer is Answer.UNKNOWN:
            peer.fail(SegmentUnknownError(f"segment {segment} is not at its address any more"))
        elif answer is Answer.FULL:
            peer.fail(PeerUnreachableError(f"segment {segment}: its node takes no more connections"))
        elif not peer.welcome:
            peer.welcome = True
            log_fields(_LOG, logging.INFO, "transfer.nixl_connected", segment=segment)

    def _make_room(self) -> None:
        idle = [peer for peer in self._peers.values() if not peer.jobs and not peer.num_requests]
        if not idle:
            raise PeerUnreachableError(f"{MAX_PEERS} connections are in use, and none is left for another segment")
        self._drop(min(idle, key=lambda peer: peer.used_at))

    def _drop(self, peer: Peer) -> None:
        del self._peers[peer.key]
        if not any(other.name == peer.name for other in self._peers.values()):
            self._agent.drop(peer.name)
