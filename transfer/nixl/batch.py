"""One batch on one segment: cut into requests, handed to a port as it has room, and over when none is left.

Runs in the worker's thread.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvcore.errors import PeerUnreachableError, TransferError
from transfer.base import Direction
from transfer.fragments import Fragment, cut
from transfer.nixl.descriptor import NixlDescriptor
from transfer.nixl.peer import Peer, Request
from transfer.nixl.port import REQUEST_BYTES, REQUEST_FRAGMENTS, Port


class NixlBatch:
    """In one direction. `done` is called once, when NIXL has let go of every buffer of the caller's."""

    def __init__(
        self,
        direction: Direction,
        descriptor: NixlDescriptor,
        fragments: Sequence[Fragment],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.descriptor = descriptor
        self.port: Port | None = None
        self.peer: Peer | None = None
        self.error: TransferError | None = None
        self.give_up_at: float | None = None
        self._direction = direction
        self._done = done
        self._uncut = fragments
        self._fragments: Iterator[Fragment] | None = None
        self._next: Fragment | None = None
        self._issued_all = False
        self._requests: deque[Request] = deque()

    def __repr__(self) -> str:
        state = f"stopping: {self.error.message}" if self.error else "all issued" if self._issued_all else "issuing"
        return f"<NixlBatch {self._direction} {self.descriptor.segment_id} requests={len(self._requests)} {state}>"

    def stop(self, error: TransferError, give_up_at: float) -> None:
        """Hand over nothing more and end with `error`; what NIXL still holds at `give_up_at` costs the agent."""
        self.error = self.error or error
        self.give_up_at = give_up_at if self.give_up_at is None else self.give_up_at

    def finish(self) -> None:
        """Tell the caller. The batch is over."""
        self._done(self.error or (self.peer.error if self.peer else None))

    def advance(self, port: Port, peer: Peer) -> tuple[bool, bool]:
        """Collect what is done, hand over what has room: whether the batch is over, and whether anything moved.

        Three cases, after what is done was collected:
        1. the batch was stopped or the peer failed: nothing more is handed over, and requests that touch only the
           port's own memory are left to the port; the others are waited for;
        2. the peer has not confirmed the segment yet: nothing so far;
        3. else as much is handed over as the port has room for.
        """
        moved = self._collect(port, peer)
        if self.error is not None or peer.error is not None:  # case 1
            self._issued_all = True
            while self._requests and port.abandon(self._requests[0]):
                self._requests.popleft()
        elif peer.confirmed and not self._issued_all:  # case 3
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
            fragments = self._take(port.one_at_a_time)
            if not fragments:
                self._issued_all = True
                break
            try:
                self._requests.append(port.post(self._direction, peer, fragments))
            except PeerUnreachableError as error:
                peer.fail(PeerUnreachableError(f"segment {self.descriptor.segment_id}: {error.message}"))
                break
            except TransferError as error:
                self.error = self.error or error
                break
            moved = True
        return moved

    def _take(self, one_at_a_time: bool) -> list[Fragment]:
        """The next fragments, as many as one request may have."""
        if self._fragments is None:
            self._fragments = cut(self._uncut, reading=self._direction == "read", one_at_a_time=one_at_a_time)
        taken: list[Fragment] = []
        size = 0
        while len(taken) < (1 if one_at_a_time else REQUEST_FRAGMENTS):
            fragment = self._next or next(self._fragments, None)
            self._next = None
            if fragment is None:
                break
            size += fragment.view.nbytes
            if taken and size > REQUEST_BYTES:
                self._next = fragment
                break
            taken.append(fragment)
        return taken
