"""What lies in tiers and is nobody's: chunks of any generation by their keys, and generations that nobody uses.

Reads only; `kvferry janitor` is told by it what the metadata server cannot know.
"""

from collections.abc import Sequence

from kvcore.errors import NodeUnavailableError
from kvcore.types import ChunkKey
from router.nodes.cluster import Cluster
from router.upkeep.generations import ClusterGenerations
from router.upkeep.nodes import KeepingNodes, answers


class TierSight:
    """Both answer with what they saw, and a sentence for each thing that they could not see."""

    def __init__(self, cluster: Cluster, nodes: KeepingNodes, generations: ClusterGenerations) -> None:
        self._cluster, self._nodes, self._generations = cluster, nodes, generations

    async def stale(self) -> tuple[list[str], list[str]]:
        """Fingerprints of the generations that no live node uses, here or elsewhere."""
        try:
            report = await self._generations.report()
        except NodeUnavailableError as error:
            return [], [error.message]
        away = [f"{name} is away: it is not known which KV it will use" for name in self._nodes.without_engine()]
        stale = [line.fingerprint for line in report.generations if line.state == "stale"]
        return stale, away + report.incomplete

    async def lying(self, keys: Sequence[ChunkKey]) -> tuple[set[ChunkKey], list[str]]:
        """Which of these lie in a tier, under whatever fingerprint anything lies there."""
        if not keys:
            return set(), []
        try:
            report = await self._generations.report()
        except NodeUnavailableError as error:
            return set(), [error.message]
        away = [node.id for node in self._cluster.nodes.values() if not answers(node)]
        problems = report.incomplete + [f"{name} does not answer: its disk is not known" for name in away]
        found: set[ChunkKey] = set()
        for line in report.generations:
            places, wrong = await self._nodes.order("find", bytes.fromhex(line.fingerprint), list(keys))
            problems += wrong
            for _, place in places:
                found |= {key for key, is_there in zip(keys, place.found, strict=False) if is_there}
        return found, list(dict.fromkeys(problems))
