"""Orders about the chunks of prompts: an end in time, removal, pins. Carried out in every tier and segment.

A prompt's chunks are those of all its full chunks, for every kind of KV that engines of this cluster use now: whoever
shares a prefix shares the order.
"""

from collections.abc import Sequence

from nodeapi.upkeep import ChunkAction
from router.nodes.cluster import Cluster
from router.requests.spec import RequestSpec
from router.upkeep.memory import MEMORY, OrderKind, SegmentOrders
from router.upkeep.nodes import KeepingNodes
from router.upkeep.prompts import used_kv
from router.upkeep.reports import OrderReply, PlaceCount

_IN_TIERS: dict[OrderKind, ChunkAction] = {
    "pin": "pin",
    "unpin": "unpin",
    "expire": "expire",
    "evict": "remove",
}


class ChunkOrders:
    """Carries orders out."""

    def __init__(self, cluster: Cluster, nodes: KeepingNodes, memory: SegmentOrders) -> None:
        self._cluster, self._nodes, self._memory = cluster, nodes, memory

    async def carry_out(self, kind: OrderKind, specs: Sequence[RequestSpec], ttl_s: float | None) -> OrderReply:
        """`ttl_s`: of `expire`; None: never by time. Raises NodeUnavailableError while no engine is there."""
        counts: dict[tuple[str, str], PlaceCount] = {}
        problems: list[str] = []
        num_chunks = 0
        for kv in used_kv(self._cluster):
            keys = list(dict.fromkeys(key for spec in specs for key in kv.keys(spec)))
            num_chunks = max(num_chunks, len(keys))
            every_rank = [key for _, rank_keys in kv.by_rank(keys) for key in rank_keys]
            in_memory = await self._memory.carry_out(kind, every_rank, ttl_s)
            in_memory.chunks //= kv.spec.tp_size
            counts[MEMORY, ""] = in_memory
            problems += [f"{MEMORY}: {in_memory.problem}"] if in_memory.problem else []
            for rank, (fingerprint, rank_keys) in enumerate(kv.by_rank(keys)):
                places, wrong = await self._nodes.order(_IN_TIERS[kind], fingerprint, rank_keys, ttl_s)
                problems += wrong
                for node, place in places if rank == 0 else ():
                    count = counts.setdefault((place.name, node), PlaceCount(place=place.name, node=node, chunks=0))
                    count.chunks += place.num_chunks
        return OrderReply(
            prompts=len(specs),
            tokens=sum(len(spec.prompt_token_ids) for spec in specs),
            chunks=num_chunks,
            places=[counts[where] for where in sorted(counts)],
            problems=list(dict.fromkeys(problems)),
        )
