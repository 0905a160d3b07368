"""Answers what is orphaned, and removes what is ordered to be removed and is orphaned still.

Invariants: nothing is removed while not all nodes were heard; what the index holds is looked at and removed in one turn
of the loop; an answer of a removal comes when it is written down.
"""

import heapq
from collections.abc import Iterable
from typing import TYPE_CHECKING

from kvcore.clock import Clock
from kvcore.types import ChunkKey
from metadata_server.account_messages import (
    Orphan,
    OrphansOfKind,
    OrphansReply,
    OrphansRequest,
    RemoveOrphansReply,
    RemoveOrphansRequest,
)
from metadata_server.index.orphans import Look
from metadata_server.janitor.leftovers import DoctorLeftovers, Leftovers, MooncakeLeftovers
from metadata_server.janitor.limits import JanitorLimits
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.records.base import Records

if TYPE_CHECKING:
    from metadata_server.core import MetadataCore


class Janitor:
    """Of one core, whatever index it has at the time."""

    def __init__(self, core: "MetadataCore", clock: Clock, limits: JanitorLimits = JanitorLimits()) -> None:
        self._core, self._clock, self._limits = core, clock, limits
        self._leftovers: dict[str, Leftovers] = {}

    def __repr__(self) -> str:
        return f"<Janitor of the index, {', '.join(self._leftovers) or 'and of no records'}>"

    def look_after(self, records: Records, dialect: MooncakeDialect | None) -> None:
        """Of these records, too."""
        self._leftovers["doctor_records"] = DoctorLeftovers(records)
        if dialect is not None:
            self._leftovers["mooncake"] = MooncakeLeftovers(dialect)

    async def look(self, request: OrphansRequest, now: float) -> OrphansReply:
        """See OrphansRequest. Raises RecordsUnavailableError."""
        state, look = self._core.state, self._look(request, now)
        state.tick(now)
        found = [self._of_kind(kind, state.orphans.find(kind, look)) for kind in state.orphans.kinds]
        unknown = state.why_unknown(now)
        found += [self._of_kind(kind, await leftovers.find()) for kind, leftovers in self._leftovers.items()]
        return OrphansReply(kinds=[one for one in found if one.count], unknown=unknown)

    async def remove(self, request: RemoveOrphansRequest, now: float) -> RemoveOrphansReply:
        """See RemoveOrphansRequest; once it is written down. Raises RecordsUnavailableError."""
        core, ids = self._core, frozenset(request.ids)
        core.state.tick(now)
        unknown = core.state.why_unknown(now)
        if unknown:
            return RemoveOrphansReply(removed=[], unknown=unknown)
        if request.kind not in core.state.orphans.kinds:
            leftovers = self._leftovers.get(request.kind)
            return RemoveOrphansReply(removed=await leftovers.remove(ids) if leftovers is not None else [])
        gone = core.state.orphans.remove(request.kind, ids, self._look(request, now))
        if request.kind == "node_orders":
            await core.orders.write()
        elif request.kind == "pins":
            await core.forget_pins(ChunkKey(bytes.fromhex(name)) for name in gone)
        return RemoveOrphansReply(removed=gone)

    def _look(self, request: OrphansRequest | RemoveOrphansRequest, now: float) -> Look:
        return Look(now, self._clock.wall(), frozenset(request.known), request.older_s)

    def _of_kind(self, kind: str, orphans: Iterable[Orphan]) -> OrphansOfKind:
        count, oldest_s = 0, None

        def counted() -> Iterable[Orphan]:
            nonlocal count, oldest_s
            for orphan in orphans:
                count += 1
                oldest_s = max(oldest_s or 0.0, orphan.age_s) if orphan.age_s is not None else oldest_s
                yield orphan

        listed = heapq.nlargest(self._limits.most_listed, counted(), key=lambda orphan: orphan.age_s or 0.0)
        return OrphansOfKind(kind=kind, count=count, oldest_s=oldest_s, listed=listed)
