"""One batch on one segment: cut into requests, handed to a port as it has room, and over when none is left.

Runs in the worker's thread.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvcore.errors import PeerUnreachableError, TransferError
from transfer.base import Direction
from transfer.nixl.descriptor import NixlDescriptor
from transfer.nixl.peer import Peer, Request
from transfer.nixl.port import REQUEST_BYTES, REQUEST_PIECES, Port
from transfer.pieces import Piece, cut


class Batch:
    """In one direction. `done` is called once, when NIXL has let go of every buffer of the caller's."""

    def __init__(
        self,
        direction: Direction,
        descriptor: NixlDescriptor,
        pieces: Sequence[Piece],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.descriptor = descriptor
        self.port: Port | None = None
        self.peer: Peer | None = None
        self.error: TransferError | None = None
        self.give_up_at: float | None = None
        self._direction = direction
        self._done = done
        self._uncut = pieces
        self._pieces: Iterator[Piece] | None = None
        self._next: Piece | None = None
        self._issued_all = False
        self._requests: deque[Request] = deque()

    def stop(self, error: TransferError, give_up_at: float) -> None:
        """Hand over nothing more and end with `error`; what NIXL still holds at `give_up_at` costs the agent."""
        self.error = self.error or error
        self.give_up_at = give_up_at if self.give_up_at is None else self.give_up_at

    def finish(self) -> None:
        """Tell the caller. The batch is over."""
        self._done(self.error or (self.peer.error if self.peer else None))

    def advance(self, port: Port, peer: Peer) -> tuple[bool, bool]:
        """Collect what is done, hand over what has room: whether the batch is over, and whether anything moved."""
        moved = self._collect(port, peer)
        if self.error is not None or peer.error is not None:
            self._issued_all = True
            while self._requests and port.abandon(self._requests[0]):
                self._requests.popleft()
        elif peer.welcome and not self._issued_all:
            moved |= self._issue(port, peer)
        return self._issued_all and not self._requests, moved

    def _collect(self, port: Port, peer: Peer) -> bool:
        """Requests of one peer end about in order, so only the oldest is asked."""
        moved = False
        while self._requests:
            try:
                if not port.over(self._requests[0]):
                    return moved
            except PeerUnreachableError as error:
                peer.fail(PeerUnreachableError(f"segment {self.descriptor.segment_id}: {error.message}"))
            self._requests.popleft()
            moved = True
        return moved

    def _issue(self, port: Port, peer: Peer) -> bool:
        moved = False
        while port.may_post(peer, len(self._requests)):
            pieces = self._take(port.one_at_a_time)
            if not pieces:
                self._issued_all = True
                break
            try:
                self._requests.append(port.post(self._direction, peer, pieces))
            except PeerUnreachableError as error:
                peer.fail(PeerUnreachableError(f"segment {self.descriptor.segment_id}: {error.message}"))
                break
            except TransferError as error:
                self.error = self.error or error
                break
            moved = True
        return moved

    def _take(self, one_at_a_time: bool) -> list[Piece]:
        """The next pieces, as many as one request may have."""
        if self._pieces is None:
            self._pieces = cut(self._uncut, reading=self._direction == "read", one_at_a_time=one_at_a_time)
        taken: list[Piece] = []
        size = 0
        while len(taken) < (1 if one_at_a_time else REQUEST_PIECES):
            piece = self._next or next(self._pieces, None)
            self._next = None
            if piece is None:
                break
            size += piece.view.nbytes
            if taken and size > REQUEST_BYTES:
                self._next = piece
                break
            taken.append(piece)
        return taken
