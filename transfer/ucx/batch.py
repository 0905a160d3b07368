"""One batch on one endpoint: its puts or gets handed to UCX as there is room, and over when UCX holds none of them.

All of it runs in the worker's thread, or in the caller's while that one sleeps. Over TCP one message at a time is on
its way: UCX (1.13 and 1.22 alike) aborts the *target's* process when an initiator dies with several, for it finds no
way to answer the second. Seen in a quarter of such deaths; with one at a time never.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence

from kvcore.errors import PeerUnreachableError, TransferError
from transfer.base import Direction
from transfer.fragments import Fragment, cut
from transfer.ucx.binding import Pointer, UcxLibrary, ffi
from transfer.ucx.descriptor import UcxDescriptor
from transfer.ucx.endpoint import UcxEndpoint


class UcxBatch:
    """On one segment, in one direction. `done` is called once, when UCX has let go of every buffer."""

    def __init__(
        self,
        direction: Direction,
        descriptor: UcxDescriptor,
        fragments: Sequence[Fragment],
        done: Callable[[TransferError | None], None],
    ) -> None:
        self.descriptor = descriptor
        self.num_bytes = sum(fragment.view.nbytes for fragment in fragments)
        self.endpoint: UcxEndpoint | None = None
        self.error: TransferError | None = None
        self.give_up_at: float | None = None
        self._reading = direction == "read"
        self._done = done
        self._uncut = fragments
        self._fragments: Iterator[Fragment] | None = None
        self._issued_all = False
        self._requests: deque[tuple[Pointer, Fragment | None]] = deque()
        """In UCX's hands, oldest first; without a fragment: a flush."""
        self._requested_bytes = 0
        self._last_flush: Pointer | None = None

    def __repr__(self) -> str:
        direction = "read" if self._reading else "write"
        state = f"stopping: {self.error.message}" if self.error else "all issued" if self._issued_all else "issuing"
        return (
            f"<UcxBatch {direction} {self.descriptor.segment_id} bytes={self.num_bytes} "
            f"requests={len(self._requests)} {state}>"
        )

    def stop(self, error: TransferError, give_up_at: float) -> None:
        """Issue nothing more and end with `error`; what UCX still holds at `give_up_at` costs the endpoint."""
        self.error = self.error or error
        self.give_up_at = give_up_at if self.give_up_at is None else self.give_up_at

    def finish(self) -> None:
        """Tell the caller. The batch is over."""
        self._done(self.error or (self.endpoint.error if self.endpoint else None))

    def abandon(self) -> None:
        """UCX does not let go of it: count it no longer, or all others would wait for it."""
        if self.endpoint is not None:
            self.endpoint.window.add(-self._requested_bytes, -len(self._requests))

    def advance(self, library: UcxLibrary, param: Pointer) -> bool:
        """Collect what is done and issue what has room; True when UCX holds nothing of it any more.

        What is to be issued depends on the endpoint:
        1. the batch was stopped or the endpoint failed: nothing more, as if all were issued;
        2. the peer has not confirmed the segment yet: nothing so far;
        3. else as much as `_may_issue` allows.

        Once all was issued and collected, what is left depends on the direction and on how far it came:
        4. a read has its bytes; on a failed endpoint, or one that never carried a byte, there is nothing to wait for;
           over TCP each write had its own flush (`_issue`): over;
        5. a write over RDMA: its bytes have left, and one flush tells when they have landed.
        A flush that was begun (case 5) is waited for even if case 4 applies by now, for UCX still holds it.
        """
        endpoint = self.endpoint
        assert endpoint is not None, "a batch needs an endpoint"
        self._collect(library)
        if self.error is not None or endpoint.error is not None:  # case 1
            self._issued_all = True
        elif endpoint.confirmed and not self._issued_all:  # case 3
            self._issue(library, endpoint, param)
            self._collect(library)
        if not self._issued_all or self._requests:
            return False
        if self._reading or endpoint.error is not None or not endpoint.confirmed or endpoint.one_at_a_time:  # case 4
            return self._last_flush is None or self._flushed(library, endpoint)
        if self._last_flush is None:  # case 5
            self._last_flush = library.lib.ucp_ep_flush_nbx(endpoint.handle, param)
        return self._flushed(library, endpoint)

    def _issue(self, library: UcxLibrary, endpoint: UcxEndpoint, param: Pointer) -> None:
        """Hand over fragments while there is room. Over TCP that is one, for a write with the flush that ends it."""
        lib, handle, base, rkey = library.lib, endpoint.handle, endpoint.base, endpoint.rkey
        move = lib.ucp_get_nbx if self._reading else lib.ucp_put_nbx
        single = endpoint.one_at_a_time
        if self._fragments is None:
            self._fragments = cut(self._uncut, reading=self._reading, one_at_a_time=single)
        while self._may_issue(endpoint):
            fragment = next(self._fragments, None)
            if fragment is None:
                self._issued_all = True
                return
            size = fragment.view.nbytes
            local = ffi.from_buffer(fragment.view, require_writable=self._reading)
            self._requests.append((move(handle, local, size, base + fragment.offset, rkey, param), fragment))
            self._requested_bytes += size
            endpoint.window.add(size, 1)
            if single:
                endpoint.sender = self
                if not self._reading:
                    self._requests.append((lib.ucp_ep_flush_nbx(handle, param), None))
                    endpoint.window.add(0, 1)

    def _may_issue(self, endpoint: UcxEndpoint) -> bool:
        if endpoint.one_at_a_time:
            return endpoint.sender is None
        limits = endpoint.window.limits
        mine = self._requested_bytes < limits.batch_bytes and len(self._requests) < limits.batch_requests
        return mine and endpoint.window.has_room

    def _collect(self, library: UcxLibrary) -> None:
        """Requests of one endpoint end about in order, so only the oldest is asked."""
        while self._requests:
            request, fragment = self._requests[0]
            status = library.status_of(request)
            if status is None:
                return
            self._requests.popleft()
            library.free(request)
            self._note(library, status)
            size = fragment.view.nbytes if fragment is not None else 0
            self._requested_bytes -= size
            if self.endpoint is not None:
                self.endpoint.window.add(-size, -1)
            if fragment is not None and status == 0:
                fragment.scatter()
        if self.endpoint is not None and self.endpoint.sender is self:
            self.endpoint.sender = None

    def _flushed(self, library: UcxLibrary, endpoint: UcxEndpoint) -> bool:
        status = library.status_of(self._last_flush)
        if status is None:
            return False
        library.free(self._last_flush)
        self._last_flush = ffi.NULL  # done; never asked for again
        self._note(library, status)
        return True

    def _note(self, library: UcxLibrary, status: int) -> None:
        """A request that failed costs the endpoint."""
        if status and self.endpoint is not None:
            self.endpoint.fail(PeerUnreachableError(f"segment {self.endpoint.segment_id}: {library.text(status)}"))
