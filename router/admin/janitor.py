"""What of a cluster's state is orphaned, for operators: the metadata server's account, and what it cannot know.

Owns nothing. A pin is orphaned only if its chunk lies in no tier either, an order about a node only if this router does
not know it, alive or not.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from kvcore.errors import InvalidRequestError
from kvcore.types import ChunkKey
from metadata_server.account_messages import JANITOR, OrphansOfKind, OrphansRequest, RemoveOrphansRequest
from metadata_server.client import MetadataClient
from router.admin.rebalance import check_speaks
from router.admin.reports import JanitorOrder, JanitorRemoved, JanitorReport
from router.nodes.cluster import Cluster

PINS = "pins"


class TiersSeen(Protocol):
    """`router.upkeep.anywhere`."""

    async def stale(self) -> tuple[list[str], list[str]]:
        """Generations that nobody uses, and what was not seen."""
        ...

    async def lying(self, keys: Sequence[ChunkKey]) -> tuple[set[ChunkKey], list[str]]:
        """Which of these lie in a tier, and what was not seen."""
        ...


class ClusterJanitor:
    """Both raise MetadataUnavailableError, and InvalidRequestError for a metadata server that is too old."""

    def __init__(self, cluster: Cluster, metadata: MetadataClient, tiers: TiersSeen) -> None:
        self._cluster, self._metadata, self._tiers = cluster, metadata, tiers

    def __repr__(self) -> str:
        return f"<ClusterJanitor that knows {len(self._cluster.nodes)} nodes>"

    async def look(self, older_s: float) -> JanitorReport:
        """Changes nothing."""
        await check_speaks(self._metadata, JANITOR)
        reply = await self._metadata.orphans(OrphansRequest(known=list(self._cluster.nodes), older_s=older_s))
        problems = [f"metadata server: {reply.unknown}"] if reply.unknown else []
        kinds = []
        for one in reply.kinds:
            kept, unseen = await self._without_chunk([orphan.id for orphan in one.listed], one.kind)
            problems += unseen
            kinds.append(_only(one, kept))
        stale, unseen = await self._tiers.stale()
        problems = list(dict.fromkeys(problems + unseen))
        return JanitorReport(kinds=[one for one in kinds if one.count], stale_generations=stale, problems=problems)

    async def remove(self, order: JanitorOrder) -> JanitorRemoved:
        """What was listed and is orphaned still."""
        await check_speaks(self._metadata, JANITOR)
        ids, problems = await self._without_chunk(order.ids, order.kind)
        known = list(self._cluster.nodes)
        request = RemoveOrphansRequest(kind=order.kind, ids=sorted(ids), known=known, older_s=order.older_s)
        reply = await self._metadata.remove_orphans(request)
        problems += [f"metadata server: {reply.unknown}"] if reply.unknown else []
        return JanitorRemoved(removed=reply.removed, problems=problems)

    async def _without_chunk(self, ids: Sequence[str], kind: str) -> tuple[set[str], list[str]]:
        """Of pins those whose chunk lies in no tier, as far as all tiers were seen; of other kinds all."""
        if kind != PINS or not ids:
            return set(ids), []
        try:
            keys = [ChunkKey(bytes.fromhex(name)) for name in ids]
        except ValueError:
            raise InvalidRequestError("ids: pins are named by their keys in hex", param="ids") from None
        lying, unseen = await self._tiers.lying(keys)
        if unseen:
            return set(), [f"pins: {why}" for why in unseen]
        return {name for name, key in zip(ids, keys, strict=True) if key not in lying}, []


def _only(found: OrphansOfKind, kept: set[str]) -> OrphansOfKind:
    listed = [orphan for orphan in found.listed if orphan.id in kept]
    if len(listed) == len(found.listed):
        return found
    ages = [orphan.age_s for orphan in listed if orphan.age_s is not None]
    count = found.count - (len(found.listed) - len(listed)) if listed else 0
    return msgspec.structs.replace(found, count=count, oldest_s=max(ages, default=None), listed=listed)
