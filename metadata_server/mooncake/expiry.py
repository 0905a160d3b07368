"""Liveness by time: what is not written again in time is removed. For clients that cannot be reached from here."""

import asyncio
import logging

from kvcore.clock import Clock
from kvcore.errors import OverloadedError, RecordsUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.mooncake.keys import Address, owned
from metadata_server.mooncake.limits import DialectLimits
from metadata_server.mooncake.store import DialectListing, DialectStore
from metadata_server.records.base import Record

_logger = logging.getLogger("metadata_server")


class TtlLiveness:
    """`Liveness` of whoever writes again: any write of an owner renews all it has. A restart of ours begins it anew."""

    def __init__(
        self, store: DialectStore, clock: Clock, ttl_s: float, limits: DialectLimits = DialectLimits()
    ) -> None:
        self._store = store
        self._clock = clock
        self._ttl_s = ttl_s
        self._limits = limits
        self._written: dict[str, float] = {}
        """When each owner wrote last, by its registration's key; what is nobody's by its own."""

    def __repr__(self) -> str:
        return f"<TtlLiveness {len(self._written)} owners, {self._ttl_s:g} s>"

    async def run(self) -> None:
        """See Liveness."""
        while True:
            await self.look()
            await asyncio.sleep(self._limits.pulse_s)

    async def look(self) -> None:
        """Remove what has run out."""
        end = self._clock.now() - self._ttl_s
        for owner in [owner for owner, at in self._written.items() if at <= end]:
            try:
                gone = [key for key in owned(owner) or (owner,) if await self._remove(key, owner)]
            except (RecordsUnavailableError, OverloadedError):
                return  # when they can be written again
            if gone:
                fields = {"keys": ",".join(gone), "reason": f"not written for {self._ttl_s:g} s"}
                log_fields(_logger, logging.INFO, "mooncake_owner_removed", **fields)
            if self._written.get(owner, end) <= end:
                self._written.pop(owner, None)

    async def _remove(self, key: str, owner: str) -> bool:
        record = await self._store.get(key)
        if record is None or self._alive(owner):
            return False
        return await self._store.remove(key, record)

    def found(self, listing: DialectListing) -> None:
        """See Liveness."""
        now = self._clock.now()
        for key in listing.values:
            self._written.setdefault(_owner(key), now)

    def wrote(self, key: str, value: bytes, revision: int) -> None:
        """See Liveness."""
        self._written[_owner(key)] = self._clock.now()

    def removed(self, key: str) -> None:
        """See Liveness. What else its owner has goes with its time."""

    def unjudged(self, listing: DialectListing) -> dict[str, Record]:
        """See Liveness. Here all ends with its time."""
        return {}

    async def holder(self, key: str, record: Record) -> str | None:
        """See Liveness."""
        owner = _owner(key)
        if not self._alive(owner):
            return None
        left_s = self._written[owner] + self._ttl_s - self._clock.now()
        return f"it was written {self._ttl_s - left_s:.0f} s ago and stays for another {left_s:.0f} s"

    async def lender(self, key: str, record: Record, address: Address) -> str | None:
        """See Liveness."""
        return await self.holder(key, record)

    def _alive(self, owner: str) -> bool:
        at = self._written.get(owner)
        return at is not None and at > self._clock.now() - self._ttl_s


def _owner(key: str) -> str:
    mine = owned(key)
    return key if mine is None else mine[0]
