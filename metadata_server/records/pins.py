"""Pins as records: what was pinned before a restart of the metadata server is pinned after it.

Owns the records below `pins/`: by a chunk's key, until when (wall time; null: until it is unpinned). Invariant: once a
call is answered, the records say what the index was told by it.
"""

import asyncio
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import islice

import msgspec

from kvcore.clock import Clock
from kvcore.errors import NotLeaderError, OverloadedError, RecordsUnavailableError
from kvcore.types import ChunkKey
from metadata_server.cache_messages import PinRequest
from metadata_server.index.pins import pin_end
from metadata_server.index.state import MetadataState
from metadata_server.records.base import Guard, Records
from metadata_server.records.limits import RecordsLimits

PREFIX = "pins/"


class PinRecord(msgspec.Struct, frozen=True):
    """The value of one."""

    until: float | None


class PinRecords:
    """Told of every pin that the index took, and of every one that was ended."""

    def __init__(
        self, records: Records, clock: Clock, limits: RecordsLimits = RecordsLimits(), *, guard: Guard | None = None
    ) -> None:
        """`guard`: of every write."""
        self._records = records
        self._guard = guard
        self._clock = clock
        self._limits = limits
        self._ends: dict[ChunkKey, float] = {}
        """On the clock that never goes back, as in the index; infinity: never."""
        self._writing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<PinRecords of {len(self._ends)} keys>"

    async def restore(self, state: MetadataState) -> None:
        """Pin again what was pinned, for the time that is left."""
        now, wall = self._clock.now(), self._clock.wall()
        for record in (await self._records.listing(PREFIX)).records:
            key = ChunkKey(bytes.fromhex(record.key.removeprefix(PREFIX)))
            until = msgspec.json.decode(record.value, type=PinRecord).until
            if state.speaks.part is not None and not state.speaks.part.owns(key):
                continue  # another partition's since the set was changed
            left_s = None if until is None else until - wall
            self._ends[key] = pin_end(now, left_s)
            if left_s is None or left_s > 0:
                state.pin(PinRequest(keys=[key], ttl_s=left_s), now)

    async def pinned(self, request: PinRequest, done: int, now: float) -> None:
        """The index has pinned the first `done` of the request's keys. Raises RecordsUnavailableError."""
        until = pin_end(now, request.ttl_s)
        keys = list(islice(dict.fromkeys(request.keys), done))
        for key in keys:
            self._ends[key] = max(until, self._ends.get(key, -math.inf)) if request.extend else until
        await self._write(keys)

    async def unpinned(self, keys: Iterable[ChunkKey]) -> None:
        """The index has ended these pins, where there were any. Raises RecordsUnavailableError."""
        ended = [key for key in dict.fromkeys(keys) if self._ends.pop(key, None) is not None]
        await self._write(ended)

    async def run(self) -> None:
        """Remove the records of pins whose time is up, until cancelled."""
        while True:
            await asyncio.sleep(self._limits.sweep_s)
            await self.sweep()

    async def sweep(self) -> None:
        """Remove the records of pins whose time is up."""
        now = self._clock.now()
        ended = [key for key, end in self._ends.items() if end <= now]
        for key in ended:
            del self._ends[key]
        with suppress(RecordsUnavailableError, NotLeaderError, OverloadedError):  # the next start finds them
            await self._write(ended)

    async def _write(self, keys: Sequence[ChunkKey]) -> None:
        """Make the records say what is pinned now."""
        for at in range(0, len(keys), self._limits.pins_at_once):
            async with self._writing:  # of two calls about one key the later one's is what stays
                await asyncio.gather(*(self._follow(key) for key in keys[at : at + self._limits.pins_at_once]))

    async def _follow(self, key: ChunkKey) -> None:
        name, end = f"{PREFIX}{key.hex()}", self._ends.get(key)
        if end is None:
            await self._records.delete(name, guard=self._guard)
            return
        until = None if end == math.inf else self._clock.wall() + end - self._clock.now()
        await self._records.put(name, msgspec.json.encode(PinRecord(until)), guard=self._guard)
