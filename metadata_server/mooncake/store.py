"""Mooncake's keys among the records: read, written and removed under prefixes of ours."""

from collections.abc import Mapping
from contextlib import suppress

import msgspec

from kvcore.errors import OverloadedError, RecordsUnavailableError
from metadata_server.mooncake.keys import ANSWERED, VALUES, owned
from metadata_server.records.base import ABSENT, PutOutcome, PutReply, Record, Records


class DialectListing(msgspec.Struct, frozen=True):
    """All that there is."""

    values: Mapping[str, Record]
    """By Mooncake's key."""
    answered: Mapping[str, int]
    """The revision of a registration whose owner has answered us, by its key."""
    revision: int
    """Of the records when they were read."""


class DialectStore:
    """Every call may raise RecordsUnavailableError."""

    def __init__(self, records: Records) -> None:
        self._records = records
        self._going: set[str] = set()
        self.num_keys = 0
        """How many there are; of those that another server writes as of the last listing."""

    def is_going(self, key: str) -> bool:
        """We are removing it: that it is still there says nothing."""
        return key in self._going

    async def get(self, key: str) -> Record | None:
        """What is kept under Mooncake's key."""
        return await self._records.get(VALUES + key)

    async def put(self, key: str, value: bytes, over: Record | None) -> PutReply:
        """Write it over what was there."""
        reply = await self._records.put(VALUES + key, value, expect=over.revision if over else ABSENT)
        self.num_keys += over is None and reply.outcome is PutOutcome.WRITTEN
        return reply

    async def delete(self, key: str) -> bool:
        """Remove whatever is there. False: nothing is."""
        done = await self._records.delete(VALUES + key)
        self.num_keys -= done
        return done

    async def remove(self, key: str, over: Record) -> bool:
        """Remove it unasked, if it is what was there."""
        self._going.add(key)
        try:
            done = await self._records.delete(VALUES + key, expect=over.revision)
        finally:
            self._going.discard(key)
        self.num_keys -= done
        return done

    async def remove_unregistered(self, key: str, over: Record, registration: str) -> bool:
        """The same, if there is no such registration. A client that comes back and writes what it lends once more
        finds that it is going, and so writes it anew, whatever it was."""
        self._going.add(key)
        try:
            if await self.get(registration) is not None:
                return False
            return await self.remove(key, over)
        finally:
            self._going.discard(key)

    async def listing(self) -> DialectListing:
        """All keys. What has answered and is registered no more, or anew, is removed on the way, if it can be."""
        found = await self._records.listing(VALUES)
        values = {record.key.removeprefix(VALUES): record for record in found.records}
        answered = {}
        for record in (await self._records.listing(ANSWERED)).records:
            key, revision = record.key.removeprefix(ANSWERED), int(record.value)
            if key in values and values[key].revision == revision:
                answered[key] = revision
            elif revision <= found.revision:
                with suppress(RecordsUnavailableError, OverloadedError):
                    await self._records.delete(record.key, expect=record.revision)
        self.num_keys = len(values)
        return DialectListing(values, answered, found.revision)

    async def has_answered(self, key: str, revision: int) -> None:
        """Note that the port of a registration has answered, for our next life."""
        await self._records.put(ANSWERED + key, b"%d" % revision)

    async def remove_owner(self, key: str, revision: int) -> tuple[str, ...]:
        """Remove a registration that is still at `revision`, and what memory its owner lent. Returns the keys that are
        gone. Whoever registers meanwhile keeps what is its own."""
        memory = (owned(key) or (key, key))[1]
        registration, lent = await self.get(key), await self.get(memory)
        if registration is None or registration.revision != revision or not await self.remove(key, registration):
            return ()
        if memory != key and lent is not None and await self.remove(memory, lent):
            return key, memory
        return (key,)
