"""Faults of simulated tiers, and what must hold of tiers whatever happens."""

import random
from collections import Counter
from collections.abc import Mapping

from support.sim_network import SimNetwork, SimProcess
from support.sim_nodes import SimNode
from support.sim_tiers import Medium, SimTiers

from kvcore.types import ChunkKey
from kvstore.tiers.guarded import GuardedTier

_DAMAGED = ("quarantined_checksum", "quarantined_foreign", "quarantined_malformed", "at_rest_checksum")
_LAG_S = 2.5
"""The metadata server speaks at least so often."""
RETURN_S = 5.0
"""So long after its return a tier is in use again."""


class TierWatch:
    """Of one run."""

    def __init__(self, tiers: SimTiers, nodes: Mapping[str, SimNode], network: SimNetwork, seed: int) -> None:
        self.problems: set[str] = set()
        self._tiers, self._nodes, self._network = tiers, nodes, network
        self._dice = random.Random(f"tier watch {seed}")
        self._kill_in: list[tuple[str, str]] = []
        self._cut_in_promote: list[str] = []
        self._over = False
        self._always = tiers.plan.admission == "always"
        for medium in tiers.media().values():
            medium.on_call = self._on_call
        for node in nodes.values():
            node.on_promote = self._on_promote

    def do(self, what: str, *where: str) -> None:
        """One planned fault."""
        media = self._tiers.media()
        match what, where:
            case "become", (name, state):
                media[name].become(state)
            case "lose", (name, share):
                self._network.trace.counts["tier_chunks_lost"] += media[name].lose(float(share))
            case "damage", (name, share):
                self._network.trace.counts["tier_chunks_damaged"] += media[name].damage(float(share))
            case "kill_in", (operation, target):
                self._kill_in.append((operation, target))
            case "cut_in_promote", (way,):
                self._cut_in_promote.append(way)
            case _:
                raise AssertionError(f"no such fault: {what} {where}")

    def end(self) -> None:
        """Peace: all media are well."""
        self._over = True
        self._tiers.calm()

    def check(self) -> None:
        """A tier that is well again is in use soon."""
        now = self._network.loop.time()
        for node in self._nodes.values():
            for guard, medium in self._guards(node):
                paused = guard.away and now < guard._closed_until
                if paused and medium.well and now > medium.well_since + RETURN_S:
                    since = f"{medium.well_since:.3f}"
                    self.problems.add(f"{medium.name} is well since {since} and not used by {node.name}")

    def held(self) -> dict[str, int]:
        """What is under way in tiers."""
        held = {f"calls of {medium.name}": medium.calls for medium in self._tiers.media().values()}
        for name, node in self._nodes.items():
            if node.tiers is not None:
                following = node.subscription
                held[f"{name}: events"] = following is None or following.lag > _LAG_S or not following.connected
                promoter, filler = node.tiers.promoter, node.tiers.filler
                held[f"{name}: promotions"] = len(promoter.work) + len(promoter._under_way)
                held[f"{name}: chunks to be saved"] = sum(len(lane.queue) for lane in filler._lanes)
                for guard, medium in self._guards(node):
                    held[f"{name}: bytes under way of {medium.name}"] = guard._under_way
                    held[f"{name}: a try of {medium.name}"] = guard._trying
        return {name: count for name, count in held.items() if count}

    async def check_use(self) -> None:
        """In peace every tier of every node is asked."""
        for node in self._nodes.values():
            for guard, medium in self._guards(node):
                names = [name for name in list(medium.memory.chunks) if medium.memory._alive(name) is not None][:1]
                if guard.away or (names and not any(await guard.find(names, timeout_s=1.0))):
                    self.problems.add(f"{medium.name} is not used by {node.name} in peace: {guard.stats().problem}")

    def unsaved(self, stored: Mapping[str, set[ChunkKey]]) -> list[str]:
        """In peace, what lies in a node's segment and not in its tiers, that kept all they were given and had room.
        `stored`: by segment."""
        found = []
        for node in self._nodes.values():
            if node.tiers is None or node.tiers.filler.full_bytes == {}:
                continue
            for guard, medium in self._guards(node):
                took_all = medium.whole and not medium.memory.stats().evicted
                there = {name.key for name in medium.memory.chunks}
                missing = stored.get(node.segment.id, set()) - there
                counts = node.tiers.filler.counts
                if took_all and self._always and missing and not counts[guard.name, "dropped"]:
                    found.append(f"{len(missing)} chunks of {node.name} are not in {medium.name}")
        return found

    def damaged_behind(self, counts: Counter[str]) -> list[str]:
        """Where nothing but tiers damages chunks: those that were found damaged in a segment, so came out of tiers."""
        return [f"{counts[name]} {name}" for name in _DAMAGED if counts[name]]

    def _guards(self, node: SimNode) -> list[tuple[GuardedTier, Medium]]:
        if node.tiers is None or not node.service.alive:
            return []
        media: list[Medium] = [medium for _, medium in self._tiers.of(node.name, node.service)]
        return list(zip(node.tiers.tiers, media, strict=True))

    def _on_call(self, operation: str, process: SimProcess) -> None:
        for armed in self._kill_in:
            if armed[0] == operation and not self._over:
                self._kill_in.remove(armed)
                delay_s = self._dice.choice([0.0, 0.0005, 0.003])
                self._network.loop.call_later(delay_s, self._kill, process, armed[1])
                return

    def _kill(self, process: SimProcess, target: str) -> None:
        node = self._nodes[process.name]
        if self._over or node.service is not process or not process.alive:
            return
        self._network.trace("killed_in_move", process.name, target)
        back_s = self._dice.choice([0.01, 0.3])
        if target == "node" or node.is_store:
            node.kill()
            self._network.loop.call_later(back_s, self._start, node)
        elif node.engine_process.alive:
            node.kill_engine()
            self._network.loop.call_later(back_s, self._start_engine, node)

    def _start(self, node: SimNode) -> None:
        if not node.service.alive and not self._over:
            node.start()

    def _start_engine(self, node: SimNode) -> None:
        if node.service.alive and not node.engine_process.alive and not self._over:
            node.start_engine()

    def _on_promote(self, name: str) -> None:
        if self._over or not self._cut_in_promote:
            return
        way = self._cut_in_promote.pop()
        self._network.trace("cut_in_promote", name, way)
        for other in self._nodes:
            if other != name:
                pair = (other, name) if way == "to" else (name, other)
                self._network.cut(*pair)
                self._network.loop.call_later(self._dice.choice([0.2, 1.5]), self._network.heal, *pair)
