"""Records in this process: a RecordsTable, its leases' time, its watchers, and a journal that flushes what is staged.

Owns no format: `memory` has no journal, `sqlite` writes a file. A flush takes all that waits, so that many writers
share one (group commit).
"""

import asyncio
import secrets
from collections.abc import AsyncIterator
from typing import Protocol

from kvcore.clock import Clock
from kvcore.errors import OverloadedError, RecordsUnavailableError
from metadata_server.records.base import NO_LEASE, Guard, Listing, PutReply, Record, RecordsUpdate
from metadata_server.records.limits import RecordsLimits
from metadata_server.records.table import Batch, RecordsTable
from metadata_server.records.watching import Watchers


class Journal(Protocol):
    """Where batches become durable, one after the other."""

    async def write(self, batch: Batch) -> None:
        """Flushed when it returns. Raises RecordsUnavailableError: the batch may be there or not."""
        ...

    async def aclose(self) -> None:
        """No batch comes after this."""
        ...


class EmbeddedRecords:
    """`Records` over a table. Give it to one event loop."""

    def __init__(
        self, table: RecordsTable, clock: Clock, journal: Journal | None = None, limits: RecordsLimits = RecordsLimits()
    ) -> None:
        self._table = table
        self._clock = clock
        self._journal = journal
        self._limits = limits
        self._watchers = Watchers(table.listing, limits.watch_backlog)
        self._leases = {lease: _Lease(ttl_s, clock.now()) for lease, ttl_s in table.leases.items()}  # each anew
        self._looked_at = clock.now()
        self._waiting: list[asyncio.Future[None]] = []
        self._staged = asyncio.Event()
        self._sooner = asyncio.Event()
        self._closed = False
        self._together = 0
        """Writes that shared the last flush."""

    def __repr__(self) -> str:
        return f"<EmbeddedRecords {len(self._waiting)} writes waiting: {self._table}>"

    async def run(self) -> None:
        """See Records."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._flush(), name="records flush")
            tasks.create_task(self._end_leases(), name="records leases")

    async def get(self, key: str) -> Record | None:
        """See Records."""
        self._check_open()
        return self._table.get(key)

    async def listing(self, prefix: str) -> Listing:
        """See Records."""
        self._check_open()
        return self._table.listing(prefix)

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect: int | None = None,
        lease: int = NO_LEASE,
        guard: Guard | None = None,
    ) -> PutReply:
        """See Records."""
        self._check_room()
        self._table.check_guard(guard)
        reply = self._table.put(key, value, expect, lease)
        await self._flushed()
        return reply

    async def delete(self, key: str, *, expect: int | None = None, guard: Guard | None = None) -> bool:
        """See Records."""
        self._check_room()
        self._table.check_guard(guard)
        done = self._table.delete(key, expect)
        await self._flushed()
        return done

    async def grant(self, ttl_s: float) -> int:
        """See Records."""
        self._check_room()
        lease = secrets.randbits(62) + 1  # no earlier life of ours had it
        self._table.grant(lease, ttl_s)
        self._leases[lease] = _Lease(ttl_s, self._clock.now())  # ends even if the caller is cancelled
        self._sooner.set()
        await self._flushed()
        return lease

    async def renew(self, lease: int) -> bool:
        """See Records. Not written down: after a restart a lease has its whole time again."""
        self._check_open()
        if lease not in self._leases:
            return False
        self._leases[lease].begin(self._clock.now())
        return True

    async def revoke(self, lease: int) -> None:
        """See Records."""
        self._check_room()
        self._leases.pop(lease, None)
        self._table.revoke(lease)
        await self._flushed()

    async def watch(self, prefix: str) -> AsyncIterator[RecordsUpdate]:
        """See Records."""
        self._check_open()
        async for update in self._watchers.watch(prefix):
            yield update

    async def aclose(self) -> None:
        """See Records. Writes that wait are refused."""
        if self._closed:
            return
        self._closed = True
        self._watchers.close()
        self._refuse(RecordsUnavailableError("the records are closed"))
        if self._journal is not None:
            await self._journal.aclose()

    def _check_open(self) -> None:
        if self._closed:
            raise RecordsUnavailableError("the records are closed")

    def _check_room(self) -> None:
        self._check_open()
        if len(self._waiting) >= self._limits.max_waiting:
            raise OverloadedError(f"{self._limits.max_waiting} writes wait to be flushed")

    async def _flushed(self) -> None:
        """Until all that is staged now is flushed."""
        done = asyncio.get_running_loop().create_future()
        self._waiting.append(done)
        self._staged.set()
        await done

    async def _flush(self) -> None:
        while True:
            await self._staged.wait()
            await self._gather()
            if self._closed:  # who waited was refused, and the journal takes nothing any more
                return
            self._staged.clear()
            batch, waiting, self._waiting = self._table.cut(), self._waiting, []
            try:
                if batch and self._journal is not None:
                    await self._journal.write(batch)
            except RecordsUnavailableError as error:
                self._table.drop()
                self._refuse(error, waiting)
            else:
                if batch:
                    self._table.settle(batch)
                    self._watchers.tell(batch)
                _settle(waiting, None)

    async def _gather(self) -> None:
        """Let those write too who did so together the last time, if their requests come in the next turns of the loop.

        A flush costs far more than those turns, and while it runs its thread and the loop hinder each other."""
        quiet = 0
        while len(self._waiting) < self._limits.gathered and quiet < self._limits.quiet_turns:
            seen = len(self._waiting)
            await asyncio.sleep(0)
            quiet = quiet + 1 if len(self._waiting) == seen else 0
            if quiet and seen >= self._together:
                break
        self._together = len(self._waiting)

    def _refuse(self, error: Exception, flushing: "list[asyncio.Future[None]] | None" = None) -> None:
        waiting, self._waiting = [*(flushing or ()), *self._waiting], []
        _settle(waiting, error)

    async def _end_leases(self) -> None:
        while True:
            now = self._clock.now()
            if now - self._looked_at > self._limits.pulse_s + self._limits.stall_s:  # nobody could renew
                for lease in self._leases.values():
                    lease.begin(now)
            self._looked_at = now
            for number, lease in list(self._leases.items()):
                if lease.end <= now:
                    await self._end(number, lease)
            next_end = min((lease.end for lease in self._leases.values()), default=float("inf"))
            self._sooner.clear()
            try:
                async with asyncio.timeout(max(0.0, min(next_end, now + self._limits.pulse_s) - self._clock.now())):
                    await self._sooner.wait()
            except TimeoutError:
                pass

    async def _end(self, number: int, lease: "_Lease") -> None:
        try:
            await self.revoke(number)
        except (RecordsUnavailableError, OverloadedError):  # its records go when they can be written again
            lease.end = self._clock.now() + self._limits.pulse_s
            self._leases[number] = lease


class _Lease:
    def __init__(self, ttl_s: float, now: float) -> None:
        self.ttl_s = ttl_s
        self.end = now + ttl_s

    def begin(self, now: float) -> None:
        """Its time, anew."""
        self.end = now + self.ttl_s


def _settle(waiting: "list[asyncio.Future[None]]", error: Exception | None) -> None:
    for done in waiting:
        if done.done():  # whoever waited was cancelled
            continue
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)
