"""What Mooncake's clients do with their metadata: get, put and delete a value, over records. No HTTP.

Invariants: an answer is durable; a name that a live client holds is given to no other; the same value again changes
nothing, and what we are removing at that moment is written again.
"""

import asyncio
import logging

import msgspec

from kvcore.config.mooncake_metadata import MooncakeMetadataConfig
from kvcore.errors import InvalidRequestError, OverloadedError, PayloadTooLargeError, RecordsUnavailableError
from kvcore.telemetry import log_fields
from metadata_server.mooncake.keys import MARK, address_of, owned
from metadata_server.mooncake.limits import DialectLimits
from metadata_server.mooncake.liveness import Liveness
from metadata_server.mooncake.store import DialectStore
from metadata_server.records.base import PutOutcome, Record

_logger = logging.getLogger("metadata_server")


class NameHeld(msgspec.Struct, frozen=True):
    """A put was refused: the key is a live client's."""

    why: str


class MooncakeDialect:
    """Await its `run`, else nobody's death is seen. Calls may raise RecordsUnavailableError and OverloadedError."""

    def __init__(
        self,
        store: DialectStore,
        liveness: Liveness,
        config: MooncakeMetadataConfig,
        limits: DialectLimits = DialectLimits(),
    ) -> None:
        self._store = store
        self._liveness = liveness
        self._max_keys = config.max_keys
        self._max_value = int(config.max_value)
        self._limits = limits

    def __repr__(self) -> str:
        return f"<MooncakeDialect {self._store.num_keys} keys: {self._liveness}>"

    @property
    def num_keys(self) -> int:
        """How many there are."""
        return self._store.num_keys

    @property
    def max_value(self) -> int:
        """Bytes of the longest value."""
        return self._max_value

    async def restore(self) -> None:
        """Take over what earlier lives left."""
        self._liveness.found(await self._store.listing())

    async def run(self) -> None:
        """Look after owners until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._liveness.run(), name="mooncake liveness")
            tasks.create_task(self._list(), name="mooncake listing")

    async def _list(self) -> None:
        while True:
            await asyncio.sleep(self._limits.listing_s)
            try:
                await self.restore()
            except (RecordsUnavailableError, OverloadedError) as error:
                log_fields(_logger, logging.WARNING, "mooncake_listing_failed", error=error.message)

    async def get(self, key: str) -> bytes | None:
        """The value."""
        record = await self._store.get(key)
        return None if record is None else record.value

    async def put(self, key: str, value: bytes) -> NameHeld | None:
        """Write it. Raises InvalidRequestError, PayloadTooLargeError."""
        self._check(key, value)
        record = await self._store.get(key)
        if record is not None and record.value == value and not self._store.is_going(key):
            self._liveness.wrote(key, value, record.revision)
            return None
        for _ in range(self._limits.put_tries):
            held = await self._holder(key, record, value)
            if held is not None:
                log_fields(_logger, logging.WARNING, "mooncake_put_refused", key=key, reason=held)
                return NameHeld(held)
            if record is None and self._store.num_keys >= self._max_keys:
                raise OverloadedError(f"there are {self._max_keys} metadata keys already")
            reply = await self._store.put(key, value, record)
            if reply.outcome is PutOutcome.WRITTEN:
                assert reply.record is not None
                await self._wrote(key, value, record, reply.record)
                return None
            record = reply.record
        raise OverloadedError("too many write this metadata key at once")

    async def delete(self, key: str) -> bool:
        """Remove it. False: there was nothing."""
        done = await self._store.delete(key)
        if done:
            self._liveness.removed(key)
        return done

    async def ownerless(self) -> dict[str, Record]:
        """Memory of clients that are not registered and of whom nobody can be asked; by its key."""
        return self._liveness.unjudged(await self._store.listing())

    async def remove_ownerless(self, key: str, record: Record) -> bool:
        """Remove one, if it is still as it was, and its owner still not registered."""
        mine = owned(key)
        return mine is not None and await self._store.remove_unregistered(key, record, mine[0])

    def _check(self, key: str, value: bytes) -> None:
        size = len(key.encode())
        if size > self._limits.max_key_bytes or not key.isprintable():
            raise InvalidRequestError(
                f"metadata key: at most {self._limits.max_key_bytes} bytes of printable characters", param="key"
            )
        if len(value) > self._max_value:
            raise PayloadTooLargeError(f"metadata value: {len(value)} bytes; at most {self._max_value} are taken")

    async def _holder(self, key: str, record: Record | None, value: bytes) -> str | None:
        """Why somebody else has the key; None: nobody, or the writer of this value itself."""
        if record is None:
            return None
        before, now = address_of(key, record.value), address_of(key, value)
        if before is not None and before == now:
            return None
        if MARK in key:
            return await self._liveness.holder(key, record)
        mine = owned(key)
        if mine is None or before is None or now is None:
            return None
        registration = await self._store.get(mine[0])
        if registration is None or registration.revision > record.revision:  # lent in an earlier life
            return None
        return await self._liveness.lender(key, record, before)

    async def _wrote(self, key: str, value: bytes, before: Record | None, record: Record) -> None:
        self._liveness.wrote(key, value, record.revision)
        if before is None or MARK not in key or address_of(key, before.value) == address_of(key, value):
            return
        mine = owned(key)
        if mine is None or key != mine[0]:
            return
        log_fields(_logger, logging.INFO, "mooncake_owner_replaced", key=key, was=before.value.decode(errors="replace"))
        lent = await self._store.get(mine[1])  # by the dead one: nobody shall read there
        if lent is not None and lent.revision < record.revision:
            await self._store.remove(mine[1], lent)
