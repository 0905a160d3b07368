"""Other weights behind the model's path while the cluster runs: every node's engine takes them over, or is named.

Owns no weights and no version: each node has its own. All nodes at once, so that the time in which some answer with the
old weights and some with the new ones is as short as it can be.
"""

from collections.abc import Awaitable, Callable

import msgspec

from kvcore.clock import Clock
from kvcore.errors import KVFerryError, NodeUnavailableError
from kvcore.types import Role
from nodeapi.upkeep import WeightsReply, WeightsRequest
from router.nodes.cluster import Cluster
from router.upkeep.limits import UpkeepLimits
from router.upkeep.nodes import AskedNode, KeepingNodes
from router.upkeep.reports import NodeWeights, WeightsOrder, WeightsReport


class ClusterWeights:
    """`probe` asks all nodes for their reports: what is routed next goes by what they say then."""

    def __init__(
        self,
        cluster: Cluster,
        nodes: KeepingNodes,
        probe: Callable[[], Awaitable[None]],
        clock: Clock,
        *,
        start_s: float,
        limits: UpkeepLimits,
    ) -> None:
        self._cluster, self._nodes, self._probe, self._clock = cluster, nodes, probe, clock
        self._start_s, self._limits = start_s, limits

    async def change(self, order: WeightsOrder) -> WeightsReport:
        """Have every node with an engine start it anew. A node that cannot is in the report, with why: it has no engine
        of the old weights either, unless it says that nothing was changed."""
        deadline_s = order.wait_s + self._start_s

        async def ask(node: AskedNode) -> WeightsReply:
            request = WeightsRequest(version=order.version, wait_s=order.wait_s, deadline_s=deadline_s)
            timeout_s = deadline_s + self._limits.reply_s
            return await self._nodes.client.weights(node.url, request, timeout_s=timeout_s)

        nodes = [
            AskedNode(node.id, node.url, ())
            for node in self._cluster.nodes.values()
            if node.role is not Role.STORE and node.unfit is None
        ]
        if not nodes:
            raise NodeUnavailableError("this cluster has no node with an engine")
        answers, silent = await self._nodes.each(ask, nodes)
        lines = {
            node.id: NodeWeights(
                node=node.id, fingerprint=reply.fingerprint.hex(), cut=reply.cut, seconds=round(reply.seconds, 3)
            )
            for node, reply in answers
        }
        for node in nodes:
            if node.id not in lines:
                said = next(text for text in silent if text.startswith(f"{node.id}: "))
                lines[node.id] = NodeWeights(node=node.id, problem=said.partition(": ")[2])
        for node_id in lines:
            self._cluster.renewed(node_id)
        await self._probe()
        return WeightsReport(version=order.version, nodes=[lines[node.id] for node in nodes])


def failure(report: WeightsReport) -> KVFerryError | None:
    """What is wrong with a change of weights; None: every node has them, and all the same."""
    failed = [f"{line.node}: {line.problem}" for line in report.nodes if line.problem]
    if failed:
        return NodeUnavailableError(f"not every node has taken the weights over: {'; '.join(failed)}")
    return None


def with_error(report: WeightsReport, error: KVFerryError) -> dict[str, object]:
    """The report with an `error` as OpenAI's, for the body of an answer that is none of 200."""
    detail = {"message": error.message, "type": "server_error", "param": None, "code": error.code}
    return {"error": detail, **msgspec.to_builtins(report)}
