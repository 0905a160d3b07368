"""One leader among several metadata servers, by a record that lives with its lease.

Who finds no such record makes it; the revision of its making is the term's token. It stands behind every grant of the
term, and every write of the leader is guarded by the record. Invariants: of two terms the later one has the greater
token; who takes itself for the leader has a lease that by its own clock, counted from before it asked for it, is not
over. So a process that stood still past its lease refuses every call until a renewal has told it that it still leads.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from kvcore.clock import Clock
from kvcore.errors import NotLeaderError, OverloadedError, RecordsUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.leading.limits import ElectionLimits
from metadata_server.records.base import ABSENT, Guard, PutOutcome, Records

LEADER = "leader"
_logger = logging.getLogger("metadata_server")
_AWAY = (RecordsUnavailableError, OverloadedError)


class Election:
    """One server's part in it; `run` it. `lead` makes ready for a term, given its guard, and may raise as records do;
    `follow` ends what was begun. Both are called by `run` only."""

    def __init__(
        self,
        records: Records,
        clock: Clock,
        url: str,
        lease_s: float,
        *,
        lead: Callable[[Guard], Awaitable[None]],
        follow: Callable[[], None],
        limits: ElectionLimits = ElectionLimits(),
    ) -> None:
        """`clock`: one that goes on while the machine sleeps. `url`: where the others and our callers find us."""
        self._records = records
        self._clock = clock
        self._url = url
        self._lease_s = lease_s
        self._lead = lead
        self._follow = follow
        self._limits = limits
        self._guard: Guard | None = None
        self._lease = 0
        self._until = 0.0
        self._ready = False
        self.leader = ""
        """The URL of who led when we looked last, if that is another; empty: nobody is known to."""

    def __repr__(self) -> str:
        if self._guard is None:
            return f"<Election {self._url} follows {self.leader or 'nobody'}>"
        left_s = self._until - self._clock.now()
        return f"<Election {self._url} leads, token {self.token}, for {left_s:.2f} s, ready {self._ready}>"

    @property
    def token(self) -> int:
        """Of the term that we lead, or may still lead; 0: none."""
        return 0 if self._guard is None else self._guard.revision

    @property
    def leads(self) -> bool:
        """Whether we may grant now."""
        return self._ready and self._clock.now() < self._until

    def check(self) -> None:
        """Raise NotLeaderError, with who leads, unless we may grant now."""
        if self.leads:
            return
        if self._guard is not None:
            what = "has not renewed its lease in time" if self._ready else "is making ready to lead"
            raise NotLeaderError(f"the metadata server at {self._url} {what}")
        raise NotLeaderError(f"the metadata server at {self._url} does not lead", leader=self.leader)

    async def run(self) -> None:
        """Until cancelled; gives up what it leads then. Records that are away end nothing here."""
        try:
            while True:
                with suppress(*_AWAY):
                    await self._campaign()
                if self._guard is None:
                    await asyncio.sleep(self._lease_s * self._limits.poll_share)
                    continue
                await self._hold(self._guard)
        finally:
            lease, led = self._lease, self._guard is not None
            self._step_down("the server ends")
            if led:
                with suppress(*_AWAY):
                    await self._records.revoke(lease)

    async def _campaign(self) -> None:
        """Look who leads, and lead if nobody does."""
        found = await self._records.get(LEADER)
        if found is not None:
            self._see(found.value)
            return
        asked_at = self._clock.now()
        lease = await self._records.grant(self._lease_s)
        try:
            reply = await self._records.put(LEADER, self._url.encode(), expect=ABSENT, lease=lease)
        except _AWAY:
            with suppress(*_AWAY):  # it may have been made: it must not stand in anybody's way
                await self._records.revoke(lease)
            raise
        if reply.outcome is PutOutcome.WRITTEN and reply.record is not None:
            self._lease, self._guard = lease, Guard(LEADER, reply.record.revision)
            self._until, self.leader = asked_at + self._lease_s * self._limits.trusted_share, ""
            return
        self._see(reply.record.value if reply.record is not None else b"")
        await self._records.revoke(lease)

    def _see(self, value: bytes) -> None:
        leader = value.decode("utf-8", "replace")
        leader = "" if leader == self._url else leader  # an earlier process of ours, whose lease is not over
        if leader != self.leader:
            self.leader = leader
            log_fields(_logger, logging.INFO, "follows", leader=leader or "nobody")

    async def _hold(self, guard: Guard) -> None:
        """Lead until the lease is lost."""
        preparing = asyncio.ensure_future(self._prepare(guard))
        try:
            why = await self._renew(guard)
            self._step_down(why)
        finally:
            preparing.cancel()
            await asyncio.wait({preparing})

    async def _prepare(self, guard: Guard) -> None:
        pause_s = self._lease_s * self._limits.poll_share
        while True:
            try:
                await self._lead(guard)
            except _AWAY as error:
                log_fields(_logger, logging.WARNING, "cannot_lead_yet", token=guard.revision, reason=error.message)
                await asyncio.sleep(pause_s)
            except NotLeaderError:  # the renewal will find it, too
                return
            else:
                self._ready = True
                log_fields(_logger, logging.INFO, "leads", token=guard.revision)
                return

    async def _renew(self, guard: Guard) -> str:
        """Renew until it cannot be; returns why."""
        pause_s = self._lease_s * self._limits.renew_share
        while True:
            await asyncio.sleep(pause_s)
            asked_at = self._clock.now()
            try:
                if not await self._records.renew(self._lease):
                    return "its lease has ended"
                found = await self._records.get(LEADER)
            except _AWAY:  # until its time is over it leads on, and then refuses
                pause_s = self._lease_s * self._limits.poll_share
                continue
            if found is None or found.revision != guard.revision:
                return "its record was taken away"
            pause_s = self._lease_s * self._limits.renew_share
            self._until = asked_at + self._lease_s * self._limits.trusted_share

    def _step_down(self, why: str) -> None:
        if self._guard is None:
            return
        log_fields(_logger, logging.WARNING, "leads_no_longer", token=self._guard.revision, reason=why)
        self._guard, self._ready, self.leader = None, False, ""
        self._follow()
