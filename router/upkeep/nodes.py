"""The nodes as the keepers of chunks: which of them answer, who is asked about which tier, and all of them at once.

A tier that nodes share is asked through one of them. Owns nothing; never raises for a node that does not answer.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kvcore.errors import KVFerryError
from kvcore.types import ChunkKey, Role
from nodeapi.messages import PromoteReply, PromoteRequest
from nodeapi.upkeep import (
    ChunkAction,
    ChunksPlace,
    ChunksReply,
    ChunksRequest,
    ClearReply,
    ClearRequest,
    GenerationsReply,
    GenerationsRequest,
    WeightsReply,
    WeightsRequest,
)
from router.nodes.cluster import Cluster, KnownNode
from router.upkeep.limits import UpkeepLimits

_Reply = TypeVar("_Reply")


class UpkeepClient(Protocol):
    """The calls of `nodeapi.upkeep` to a node by its URL; `nodeapi.client` makes them."""

    async def generations(self, url: str, request: GenerationsRequest, *, timeout_s: float) -> GenerationsReply:
        """What lies in the node's segment and tiers."""
        ...

    async def chunks(self, url: str, request: ChunksRequest, *, timeout_s: float) -> ChunksReply:
        """An order about chunks in the node's tiers."""
        ...

    async def clear(self, url: str, request: ClearRequest, *, timeout_s: float) -> ClearReply:
        """Remove generations from the node's tiers."""
        ...

    async def weights(self, url: str, request: WeightsRequest, *, timeout_s: float) -> WeightsReply:
        """Have the node's engine started anew with other weights."""
        ...

    async def promote(self, url: str, request: PromoteRequest, *, timeout_s: float) -> PromoteReply:
        """Have the node bring chunks from its own tiers into its segment."""
        ...


@dataclass(frozen=True, slots=True)
class AskedNode:
    """A node, and the tiers about which it is the one to be asked: its own, and what it was chosen for."""

    id: str
    url: str
    tiers: tuple[str, ...]


class KeepingNodes:
    """Asks the nodes of one cluster."""

    def __init__(self, cluster: Cluster, client: UpkeepClient, limits: UpkeepLimits) -> None:
        self._cluster, self._limits = cluster, limits
        self.client = client

    def all(self) -> list[AskedNode]:
        """Those that answer, each with its tiers."""
        chosen: dict[str, str] = {}
        nodes = [node for node in self._cluster.nodes.values() if answers(node)]
        for node in nodes:
            for tier in node.report.tiers if node.report is not None else ():
                if tier.shared and (tier.name not in chosen or not tier.problem):
                    chosen[tier.name] = node.id
        return [
            AskedNode(
                node.id,
                node.url,
                tuple(
                    tier.name
                    for tier in (node.report.tiers if node.report is not None else ())
                    if not tier.shared or chosen[tier.name] == node.id
                ),
            )
            for node in nodes
        ]

    def without_engine(self) -> list[str]:
        """Nodes that should have an engine of which it is not known what it uses: they are away, or starting."""
        return [
            node.id
            for node in self._cluster.nodes.values()
            if node.role is not Role.STORE and node.unfit is None and not (answers(node) and node.fingerprint)
        ]

    async def order(
        self, action: ChunkAction, fingerprint: bytes, keys: Sequence[ChunkKey], ttl_s: float | None = None
    ) -> tuple[list[tuple[str, ChunksPlace]], list[str]]:
        """Have an order about chunks carried out in every tier: (node, if the tier is that node's alone; what came of
        it), and what went wrong."""

        async def ask(node: AskedNode) -> ChunksReply:
            request = ChunksRequest(
                action=action,
                fingerprint=fingerprint,
                keys=list(keys),
                tiers=list(node.tiers),
                ttl_s=ttl_s,
                deadline_s=self._limits.find_s,
            )
            timeout_s = self._limits.find_s + self._limits.reply_s
            return await self.client.chunks(node.url, request, timeout_s=timeout_s)

        nodes = [node for node in self.all() if node.tiers or action == "remove"]
        answers, problems = await self.each(ask, nodes)
        places = []
        for node, reply in answers:
            for place in reply.places:
                places.append(("" if place.shared else node.id, place))
                if place.problem:
                    problems.append(f"{node.id}: {place.name}: {place.problem}")
        return places, problems

    async def each(
        self, call: Callable[[AskedNode], Awaitable[_Reply]], nodes: list[AskedNode] | None = None
    ) -> tuple[list[tuple[AskedNode, _Reply]], list[str]]:
        """All at once. What they answered, and a sentence for each that did not."""
        asked = self.all() if nodes is None else nodes
        replies = await asyncio.gather(*(_told(call, node) for node in asked))
        answers = [(node, reply) for node, reply in zip(asked, replies, strict=True) if not isinstance(reply, str)]
        return answers, [reply for reply in replies if isinstance(reply, str)]


async def _told(call: Callable[[AskedNode], Awaitable[_Reply]], node: AskedNode) -> _Reply | str:
    try:
        return await call(node)
    except KVFerryError as error:
        return f"{node.id}: {error.message}"


def answers(node: KnownNode) -> bool:
    """Whether it can be asked now."""
    return node.report is not None and node.silent_since is None and node.unfit is None
