"""Generations of KV over a whole cluster: which there are, who uses them, and how those that nobody uses are cleared.

A generation is live while an engine of this cluster uses it, marked while a node of another cluster says so in a tier
that both share, else stale.
"""

from dataclasses import dataclass, field

import msgspec

from kvcore.errors import NodeUnavailableError
from kvcore.types import ChunkKey
from nodeapi.upkeep import (
    ClearReply,
    ClearRequest,
    GenerationHeld,
    GenerationsPlace,
    GenerationsReply,
    GenerationsRequest,
)
from router.nodes.cluster import Cluster
from router.upkeep.limits import UpkeepLimits
from router.upkeep.memory import MEMORY, SegmentOrders
from router.upkeep.nodes import AskedNode, KeepingNodes
from router.upkeep.prompts import used_kv
from router.upkeep.reports import (
    ClearOrder,
    ClearReport,
    GenerationLine,
    GenerationPlace,
    GenerationsReport,
    MarkedBy,
    PlaceCount,
)


@dataclass(slots=True)
class _Seen:
    """What nodes said. `owners`: as whom this cluster's nodes mark."""

    lines: dict[bytes, GenerationLine] = field(default_factory=dict)
    owners: list[str] = field(default_factory=list)
    incomplete: list[str] = field(default_factory=list)
    keys: dict[bytes, set[bytes]] = field(default_factory=dict)
    """Fingerprint -> what lies in segments."""

    def line(self, fingerprint: bytes) -> GenerationLine:
        """Of this generation; a new one is stale until something else is known."""
        new = GenerationLine(fingerprint=fingerprint.hex(), state="stale", places=[])
        return self.lines.setdefault(fingerprint, new)

    def add(self, node_id: str, place: GenerationsPlace, held: GenerationHeld) -> None:
        """What lies in one place of one node, or of all."""
        line = self.line(held.fingerprint)
        line.note = line.note or held.note
        self.keys.setdefault(held.fingerprint, set()).update(held.keys)
        where = "" if place.shared else node_id
        line.places.append(
            GenerationPlace(place=place.name, node=where, chunks=held.num_chunks, num_bytes=held.num_bytes)
        )
        foreign = [mark for mark in held.marks if mark.owner not in self.owners]
        line.marks += [MarkedBy(owner=mark.owner, until=mark.until) for mark in foreign]
        if foreign and line.state == "stale":
            line.state = "marked"
        if held.used is not None:
            line.oldest_use = min(held.used[0], line.oldest_use or held.used[0])
            line.newest_use = max(held.used[1], line.newest_use or held.used[1])


class ClusterGenerations:
    """Lists and clears."""

    def __init__(self, cluster: Cluster, nodes: KeepingNodes, memory: SegmentOrders, limits: UpkeepLimits) -> None:
        self._cluster, self._nodes, self._memory, self._limits = cluster, nodes, memory, limits

    async def report(self) -> GenerationsReport:
        """Live ones first. Raises NodeUnavailableError while no engine is there."""
        seen = await self._look()
        order = {"live": 0, "marked": 1, "stale": 2}
        lines = sorted(seen.lines.values(), key=lambda line: (order[line.state], line.fingerprint))
        return GenerationsReport(generations=lines, incomplete=seen.incomplete)

    async def clear(self, order: ClearOrder) -> ClearReport:
        """Of every segment and tier. Raises NodeUnavailableError where it cannot be known what is stale."""
        away = self._nodes.without_engine()
        if order.stale and away and not order.force:
            raise NodeUnavailableError(
                f"it is not known which KV {', '.join(away)} will use: start it, or force the clearing"
            )
        seen = await self._look()
        chosen, kept = self._choose(seen, order)
        places: list[PlaceCount] = []
        problems: list[str] = []
        if chosen:
            keys = [ChunkKey(key) for one in chosen for key in seen.keys.get(one, ())]
            in_memory = await self._memory.carry_out("evict", keys) if keys else None
            places, problems = await self._clear(chosen, None if order.force else seen.owners)
            if in_memory is not None:
                places.insert(0, in_memory)
                problems += [f"{MEMORY}: {in_memory.problem}"] if in_memory.problem else []
        return ClearReport(
            cleared=[one.hex() for one in chosen], places=places, kept=kept, incomplete=seen.incomplete + problems
        )

    async def _look(self) -> _Seen:
        seen = _Seen()
        for kv in used_kv(self._cluster):
            for fingerprint in kv.fingerprints:
                line = seen.line(fingerprint)
                line.state, line.nodes, line.note = "live", list(kv.nodes), kv.spec.title

        async def ask(node: AskedNode) -> GenerationsReply:
            request = GenerationsRequest(tiers=list(node.tiers), deadline_s=self._limits.list_s)
            timeout_s = self._limits.list_s + self._limits.reply_s
            return await self._nodes.client.generations(node.url, request, timeout_s=timeout_s)

        answers, seen.incomplete = await self._nodes.each(ask)
        seen.owners = [reply.owner for _, reply in answers if reply.owner]
        for node, reply in answers:
            for place in reply.places:
                if place.incomplete:
                    seen.incomplete.append(f"{node.id}: {place.name}: {place.incomplete}")
                for held in place.held:
                    there = held if place.name != MEMORY else self._indexed(node.id, held)
                    if there.num_bytes:
                        seen.add(node.id, place, there)
        return seen

    def _indexed(self, node_id: str, held: GenerationHeld) -> GenerationHeld:
        """Of chunks by their headers in a segment those that the index has there: the others were evicted."""
        keys = self._cluster.index.held_by(node_id, [ChunkKey(key) for key in held.keys])
        num_bytes = held.num_bytes * len(keys) // max(1, held.num_chunks)
        return msgspec.structs.replace(held, num_chunks=len(keys), num_bytes=num_bytes, keys=keys)

    def _choose(self, seen: _Seen, order: ClearOrder) -> tuple[list[bytes], dict[str, str]]:
        chosen, kept = list[bytes](), dict[str, str]()
        for fingerprint, line in sorted(seen.lines.items()):
            if order.fingerprints is not None and not line.fingerprint.startswith(tuple(order.fingerprints)):
                continue
            if line.marks and not order.force:
                kept[line.fingerprint] = f"used by {line.marks[0].owner}"
            elif not order.stale or line.state == "stale":
                chosen.append(fingerprint)
        return chosen, kept

    async def _clear(self, chosen: list[bytes], own: list[str] | None) -> tuple[list[PlaceCount], list[str]]:
        async def ask(node: AskedNode) -> ClearReply:
            request = ClearRequest(
                fingerprints=chosen, tiers=list(node.tiers), own=own, deadline_s=self._limits.clear_s
            )
            timeout_s = self._limits.clear_s + self._limits.reply_s
            return await self._nodes.client.clear(node.url, request, timeout_s=timeout_s)

        answers, problems = await self._nodes.each(ask)
        places = []
        for node, reply in answers:
            for place in reply.places:
                where, problem = "" if place.shared else node.id, place.incomplete
                places.append(PlaceCount(place=place.name, node=where, chunks=place.num_chunks, problem=problem))
                if place.incomplete:
                    problems.append(f"{node.id}: {place.name}: {place.incomplete}")
        return places, problems
