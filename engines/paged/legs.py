"""The legs under way, by the id of their request: how one is opened, and all the ways in which one ends.

Owns deadlines. Invariant: a leg in the table holds whatever it likes; a closed one holds no sequence in the scheduler,
no timer, no load and, unless it succeeded, no save.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator

from engines.paged.leg import Leg
from engines.paged.scheduler import Scheduler
from kvcore.errors import CancelledByPeerError, DeadlineExceededError, KVFerryError
from nodeapi.messages import FinishReason, TokenDelta


class LegTable:
    """`wake` is called whenever there is something new to schedule."""

    def __init__(self, scheduler: Scheduler, counters: Counter[str], wake: Callable[[], None]) -> None:
        self._scheduler = scheduler
        self._counters = counters
        self._wake = wake
        self._by_id: dict[str, Leg] = {}

    def __getitem__(self, request_id: str) -> Leg:
        return self._by_id[request_id]

    def __iter__(self) -> Iterator[Leg]:
        return iter(self._by_id.values())

    def __len__(self) -> int:
        return len(self._by_id)

    def get(self, request_id: str) -> Leg | None:
        """The leg of that request, if it is under way."""
        return self._by_id.get(request_id)

    def open(self, leg: Leg, deadline_s: float) -> None:
        """Queue a leg; it fails after `deadline_s`. Raises OverloadedError.

        A request whose id is in use replaces the older one, which fails: its owner has started again."""
        if older := self._by_id.get(leg.request_id):
            self.fail(older, CancelledByPeerError(f"request {leg.request_id} was started again"))
        self._scheduler.add(leg.first)
        self._by_id[leg.request_id] = leg
        late = DeadlineExceededError(f"request {leg.request_id} did not finish in {deadline_s:.3f} s")
        leg.deadline_timer = asyncio.get_running_loop().call_later(max(0.0, deadline_s), self.fail, leg, late)
        self._wake()

    def fail(self, leg: Leg, error: KVFerryError) -> None:
        """End a leg with an error. Of one that has ended already, nothing but its reader hears it."""
        leg.fail(error)
        self.close(leg)

    def fail_all(self, error: KVFerryError) -> None:
        """End every leg with an error."""
        for leg in list(self._by_id.values()):
            self.fail(leg, error)

    def abort(self, leg: Leg) -> None:
        """End a leg as its client wishes: a prefill with CancelledByPeerError, a decode with FinishReason.ABORT for
        each index that has not finished."""
        if leg.is_prefill:
            leg.fail(CancelledByPeerError(f"prefill {leg.request_id} was aborted"))
        else:
            for index in leg.unfinished_indices:
                leg.stream.put_nowait(TokenDelta(index=index, finish_reason=FinishReason.ABORT))
        self.close(leg)

    def abort_all(self) -> None:
        """Abort every leg."""
        for leg in list(self._by_id.values()):
            self.abort(leg)

    def close(self, leg: Leg) -> None:
        """Free all that the leg holds. A decode leg whose sequences all finished goes on saving in the background.
        Nothing happens to one that is closed already."""
        if self._by_id.get(leg.request_id) is not leg:
            return
        del self._by_id[leg.request_id]
        if leg.deadline_timer is not None:
            leg.deadline_timer.cancel()
        self._counters["aborted"] += not leg.succeeded
        for task in (leg.load_task, leg.documents_task):
            if task is not None:
                task.cancel()
        if leg.save is not None and leg.save_task is not None:
            leg.save.close()
            if not leg.succeeded:
                leg.save_task.cancel()
        for sequence in leg.sequences:
            self._scheduler.remove(sequence)
        self._wake()
