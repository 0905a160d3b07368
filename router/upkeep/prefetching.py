"""Prompts brought from tiers into memory before anybody asks for them. Nothing is computed, and no request waits."""

from collections.abc import Sequence

import msgspec

from kvcore.chunk_keys import owner_of
from kvcore.clock import Clock
from kvcore.errors import KVFerryError
from kvcore.types import ChunkKey, Role
from nodeapi.messages import PROMOTE_OWNER, NodeReport, Promoted, PromoteRequest
from router.nodes.cluster import Cluster, KnownNode
from router.requests.spec import RequestSpec
from router.upkeep.limits import UpkeepLimits
from router.upkeep.nodes import UpkeepClient
from router.upkeep.prompts import UsedKv, used_kv
from router.upkeep.reports import OrderReply, PlaceCount


class PromptPrefetcher:
    """Asks nodes to do what they do when a prompt comes: one after the other, as what lies on a node's disk is brought
    into that node's segment."""

    def __init__(self, cluster: Cluster, client: UpkeepClient, clock: Clock, limits: UpkeepLimits) -> None:
        self._cluster, self._client, self._clock, self._limits = cluster, client, clock, limits

    async def prefetch(self, specs: Sequence[RequestSpec]) -> OrderReply:
        """What came from where. Raises NodeUnavailableError while no engine is there."""
        counts: dict[tuple[str, str], int] = {}
        problems: list[str] = []
        num_chunks = 0
        for kv in used_kv(self._cluster):
            nodes = self._keepers(kv)
            brought: dict[tuple[str, str], int] = {}
            num_chunks = max(num_chunks, len({key for spec in specs for key in kv.keys(spec)}))
            for spec in specs if nodes else ():
                problems += await self._bring(spec, kv, nodes, brought)
            for where, parts in brought.items():
                counts[where] = counts.get(where, 0) + parts // kv.spec.tp_size
        return OrderReply(
            prompts=len(specs),
            tokens=sum(len(spec.prompt_token_ids) for spec in specs),
            chunks=num_chunks,
            places=[PlaceCount(place=tier, node=node, chunks=n) for (tier, node), n in sorted(counts.items())],
            problems=list(dict.fromkeys(problems)),
        )

    async def _bring(
        self, spec: RequestSpec, kv: UsedKv, nodes: Sequence[KnownNode], brought: dict[tuple[str, str], int]
    ) -> list[str]:
        """Until none of the nodes brings any more, or time is up; what went wrong."""
        keys, end = kv.keys(spec), self._clock.now() + self._limits.prefetch_s
        problems: list[str] = []
        useful = list(nodes) if keys else []
        while useful and self._clock.now() < end:
            came = False
            for node in tuple(useful):
                try:
                    promoted = await self._ask(node, spec, kv, keys)
                except KVFerryError as error:
                    problems.append(f"{node.id}: {error.message}")
                    useful.remove(node)
                    continue
                came |= bool(promoted)
                for one in promoted:
                    where = one.tier, "" if _is_shared(node.report, one.tier) else node.id
                    brought[where] = brought.get(where, 0) + one.num_chunks
            if not came:
                break
        return problems

    async def _ask(self, node: KnownNode, spec: RequestSpec, kv: UsedKv, keys: list[ChunkKey]) -> list[Promoted]:
        knows_owners = node.report is not None and node.report.protocol >= PROMOTE_OWNER
        request = PromoteRequest(
            fingerprint=kv.fingerprints[0],
            keys=list(keys),
            deadline_s=self._limits.find_s,
            owner=owner_of(spec.cache_salt) if knows_owners else msgspec.UNSET,
        )
        timeout_s = self._limits.find_s + self._limits.reply_s
        return (await self._client.promote(node.url, request, timeout_s=timeout_s)).promoted

    def _keepers(self, kv: UsedKv) -> list[KnownNode]:
        """Nodes with an engine of this kind and a tier, prefillers first: they compute what follows."""
        nodes = [self._cluster.nodes[name] for name in kv.nodes]
        nodes = [node for node in nodes if node.report is not None and node.report.tiers]
        return sorted(nodes, key=lambda node: node.role is not Role.PREFILLER)


def _is_shared(report: NodeReport | None, tier: str) -> bool:
    return any(one.shared for one in (report.tiers if report is not None else ()) if one.name == tier)
