"""What is to be given back to the metadata server: leases, reservations, and what it granted without our seeing it.

Gathered, and said in few calls, again and again until the server has heard it: one that hangs keeps it, and who goes on
meanwhile takes more. What cannot be said in time expires by itself.
"""

import asyncio
import itertools
from collections.abc import Sequence

import msgspec

from kvcore.errors import MetadataProtocolError, MetadataUnavailableError
from kvstore.background import Background
from kvstore.counters import Count, StoreCounters
from kvstore.limits import StoreLimits
from metadata_server.cache_messages import ReleaseRequest
from metadata_server.client import MetadataClient
from metadata_server.messages import ReplicaIds


class GiveBack:
    """Of one store, in its node's name. At most one call is under way; what comes meanwhile goes with the next."""

    def __init__(
        self,
        metadata: MetadataClient,
        *,
        node_id: str,
        incarnation: int,
        counters: StoreCounters,
        background: Background,
        limits: StoreLimits,
    ) -> None:
        self._metadata = metadata
        self._node_id = node_id
        self._incarnation = incarnation
        self._counters = counters
        self._background = background
        self._limits = limits
        self._leases: list[int] = []
        self._unseen: list[int] = []
        self._reservations: list[int] = []
        self._running = False

    def __len__(self) -> int:
        return len(self._leases) + len(self._unseen) + len(self._reservations)

    def __repr__(self) -> str:
        return f"<GiveBack of {len(self)}>"

    def lease(self, lease_id: int) -> None:
        """A read lease is not needed any more."""
        self._leases.append(lease_id)
        self._begin()

    def unseen(self, name: int) -> None:
        """What the server has granted by this name, or will: nobody has heard of it."""
        self._unseen.append(name)
        self._begin()

    def reservations(self, replica_ids: Sequence[int]) -> None:
        """Nothing more is written there."""
        self._reservations += replica_ids
        self._begin()

    def _begin(self) -> None:
        if self._background.closed:
            self._leave_to_expire()
        elif not self._running:
            self._running = True
            self._background.spawn(self._run())

    async def _run(self) -> None:
        limits = self._limits
        pauses_s = (*limits.retry_pauses_s, *itertools.repeat(limits.retry_pauses_s[-1], limits.more_retries))
        pauses = iter(pauses_s)
        try:
            while self:
                try:
                    await self._say_some(limits.max_give_back)
                    pauses = iter(pauses_s)
                except (MetadataUnavailableError, MetadataProtocolError):
                    if (pause_s := next(pauses, None)) is None:
                        return
                    await asyncio.sleep(pause_s)
        finally:
            self._leave_to_expire()
            self._running = False

    async def _say_some(self, most: int) -> None:
        """Each kind by itself: of several partitions one that is away keeps back what is its own, and no other's."""
        try:
            await self._say_reservations(most)
        except (MetadataUnavailableError, MetadataProtocolError):
            await self._say_leases(most)
            raise
        await self._say_leases(most)

    async def _say_reservations(self, most: int) -> None:
        if ids := self._reservations[:most]:
            request = ReplicaIds(node_id=self._node_id, incarnation=self._incarnation, replica_ids=ids)
            await self._metadata.abort(request)
            del self._reservations[: len(ids)]

    async def _say_leases(self, most: int) -> None:
        leases, names = self._leases[:most], self._unseen[:most]
        if leases or names:
            await self._metadata.release(ReleaseRequest(lease_ids=leases, lease_names=names or msgspec.UNSET))
            del self._leases[: len(leases)], self._unseen[: len(names)]

    def _leave_to_expire(self) -> None:
        self._counters.add(Count.LEFT_TO_EXPIRE, len(self))
        for one in (self._leases, self._unseen, self._reservations):
            one.clear()
