"""Records that nobody owns any more: found, and each removed only as it was when it was found.

An orphan's id is the record's key with the revision at which it was seen.
"""

from collections.abc import Collection
from typing import Protocol

from metadata_server.account_messages import Orphan
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.records.base import Records

DOCTOR = "doctor/"
"""In front of the keys with which `kvferry doctor` tries whether records can be written."""


class Leftovers(Protocol):
    """One kind. Both may raise RecordsUnavailableError."""

    async def find(self) -> list[Orphan]:
        """All of them."""
        ...

    async def remove(self, ids: Collection[str]) -> list[str]:
        """Those that are still so; returns them."""
        ...


class DoctorLeftovers:
    """What doctors wrote that were ended before they removed it. One that is at it now misses nothing."""

    def __init__(self, records: Records) -> None:
        self._records = records

    async def find(self) -> list[Orphan]:
        """See Leftovers."""
        found = (await self._records.listing(DOCTOR)).records
        return [Orphan(id=f"{record.key}@{record.revision}", name=record.key) for record in found]

    async def remove(self, ids: Collection[str]) -> list[str]:
        """See Leftovers."""
        gone = []
        for name in (orphan.id for orphan in await self.find() if orphan.id in ids):
            key, _, revision = name.rpartition("@")
            if await self._records.delete(key, expect=int(revision)):
                gone.append(name)
        return gone


class MooncakeLeftovers:
    """Memory that clients lent who are registered no more, and of whom nobody could be asked."""

    def __init__(self, dialect: MooncakeDialect) -> None:
        self._dialect = dialect

    async def find(self) -> list[Orphan]:
        """See Leftovers."""
        found = await self._dialect.ownerless()
        return [Orphan(id=f"{key}@{record.revision}", name=key) for key, record in sorted(found.items())]

    async def remove(self, ids: Collection[str]) -> list[str]:
        """See Leftovers."""
        gone = []
        for key, record in (await self._dialect.ownerless()).items():
            name = f"{key}@{record.revision}"
            if name in ids and await self._dialect.remove_ownerless(key, record):
                gone.append(name)
        return gone
