"""Whether documents of a kind are reused, as a record: what was turned off stays off, whoever is started anew.

Owns the record `blend/switches`, all of them together: there are a few. Invariant: what is answered is written down.
Keeps nothing in memory but where there are no records.
"""

import asyncio

import msgspec

from metadata_server.cache_messages import BlendSwitchesReply, BlendSwitchesRequest, KindSwitch, latest_switches
from metadata_server.records.base import Guard, Records

KEY = "blend/switches"


class BlendSwitches:
    """Takes what routers tell. `records` None: nothing is written down."""

    def __init__(self, records: Records | None = None, *, guard: Guard | None = None) -> None:
        """`guard`: of every write."""
        self._records, self._guard = records, guard
        self._known: list[KindSwitch] = []
        self._writing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"<BlendSwitches in {self._records!r}>"

    async def told(self, request: BlendSwitchesRequest, now: float) -> BlendSwitchesReply:
        """Take what is newer. Raises RecordsUnavailableError, NotLeaderError."""
        async with self._writing:  # of two changes at once none overwrites the other
            known = await self._read()
            right = latest_switches([*known, *request.switches])
            if right != known:
                await self._write(right)
        return BlendSwitchesReply(switches=right)

    async def _read(self) -> list[KindSwitch]:
        if self._records is None:
            return self._known
        record = await self._records.get(KEY)
        return [] if record is None else msgspec.json.decode(record.value, type=list[KindSwitch])

    async def _write(self, right: list[KindSwitch]) -> None:
        if self._records is None:
            self._known = right
        else:
            await self._records.put(KEY, msgspec.json.encode(right), guard=self._guard)
