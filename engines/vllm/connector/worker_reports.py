"""What vLLM is to learn of its requests: saves and loads that ended, blocks without their KV. Shared by two threads.

Orders are noted on vLLM's thread before the jobs get them, so an end can never come before its begin.
Invariant: a request is sent at most once, and only for saves ordered after its last preemption; each load is received
once, and its failed blocks not later.
"""

import threading
from collections.abc import Collection
from dataclasses import dataclass, field

from engines.vllm.connector.orders import LoadOrder


@dataclass(eq=False, slots=True)
class SaveTicket:
    """The saves of one request between two preemptions. `revoked`: their blocks may belong to another request by now,
    so nothing more may be committed."""

    request_id: str
    ended: bool = False
    revoked: bool = False


@dataclass(slots=True)
class _NextReport:
    """What `report` will return."""

    sent: set[str] = field(default_factory=set)
    received: set[str] = field(default_factory=set)
    failed_blocks: set[int] = field(default_factory=set)


class TransferReports:
    """See the module. Every method may be called from any thread; only `wait_for_report` waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._report_ready = threading.Condition(self._lock)
        self._saving: dict[str, SaveTicket] = {}
        self._loading: dict[str, list[LoadOrder]] = {}
        self._finished: set[str] = set()
        """Requests of vLLM's that have ended, while their saves go on."""
        self._next = _NextReport()
        self._failed_blocks: set[int] = set()
        """Reported as received with the last report, not yet asked for."""

    def save_ordered(self, request_id: str) -> SaveTicket:
        """The request's open ticket, perhaps a new one."""
        with self._lock:
            return self._saving.setdefault(request_id, SaveTicket(request_id))

    def save_ended(self, ticket: SaveTicket) -> None:
        """Nothing reads the request's blocks any more. A ticket that was preempted is no longer of interest."""
        with self._lock:
            ticket.ended = True
            if self._saving.get(ticket.request_id) is ticket and ticket.request_id in self._finished:
                self._send(ticket)

    def load_ordered(self, order: LoadOrder) -> None:
        """A load begins."""
        with self._lock:
            self._loading.setdefault(order.request_id, []).append(order)

    def load_ended(self, order: LoadOrder, num_good: int) -> None:
        """Nothing writes into the order's blocks any more; its first `num_good` chunks are there. Once an order."""
        with self._lock:
            self._receive(order, num_good)

    def preempted(self, request_ids: Collection[str]) -> tuple[list[SaveTicket], list[str]]:
        """Forget their saves. Returns the tickets of those under way, and the requests that are loading."""
        with self._lock:
            tickets = [ticket for request_id in request_ids if (ticket := self._saving.pop(request_id, None))]
            self._finished.difference_update(request_ids)
            loading = [request_id for request_id in request_ids if request_id in self._loading]
            return [ticket for ticket in tickets if not ticket.ended], loading

    def wait_for_report(self, timeout_s: float) -> None:
        """Until there is something to report, if anything is under way that may bring it; at most `timeout_s`."""
        with self._lock:
            if self._loading or self._finished:
                self._report_ready.wait_for(lambda: self._next.received or self._next.sent, timeout_s)

    def report(self, finished_ids: Collection[str]) -> tuple[set[str], set[str], list[str]]:
        """(sent, received, those of `finished_ids` that have jobs under way, which are to end now)."""
        with self._lock:
            busy = []
            for request_id in finished_ids:
                ticket = self._saving.get(request_id)
                if ticket is not None and ticket.ended:
                    self._send(ticket)
                elif ticket is not None:
                    self._finished.add(request_id)
                if request_id in self._loading or request_id in self._saving:
                    busy.append(request_id)
            report, self._next = self._next, _NextReport()
            self._failed_blocks |= report.failed_blocks
            return report.sent, report.received, busy

    def failed_blocks(self) -> set[int]:
        """Those of loads that were reported as received, each once."""
        with self._lock:
            failed, self._failed_blocks = self._failed_blocks, set()
            return failed

    def end_all(self) -> None:
        """The jobs are gone: no save goes on, and no load comes to anything."""
        with self._lock:
            for orders in list(self._loading.values()):
                for order in list(orders):
                    self._receive(order, 0)
            for ticket in list(self._saving.values()):
                ticket.ended = True
                if ticket.request_id in self._finished:
                    self._send(ticket)

    def _receive(self, order: LoadOrder, num_good: int) -> None:
        orders = self._loading.get(order.request_id, [])
        if order not in orders:  # `end_all` was faster
            return
        orders.remove(order)
        if not orders:
            del self._loading[order.request_id]
        self._next.received.add(order.request_id)
        self._report_ready.notify_all()
        self._next.failed_blocks.update(failed_blocks(order, num_good))

    def _send(self, ticket: SaveTicket) -> None:
        del self._saving[ticket.request_id]
        self._finished.discard(ticket.request_id)
        self._next.sent.add(ticket.request_id)
        self._report_ready.notify_all()


def failed_blocks(order: LoadOrder, num_good: int) -> list[int]:
    """The blocks of all chunks behind the first `num_good`, but for those that held their KV before."""
    blocks = [block_id for place in order.chunks[num_good:] for block_id in place.block_ids]
    return blocks[order.keep_blocks :] if num_good == 0 else blocks
