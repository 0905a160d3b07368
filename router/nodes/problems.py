"""What is wrong between nodes, though each by itself may be well: for status, and once for the log.

Owns what was said and since when the metadata server has not known a node. Decides nothing: who is used is the
cluster's and the policies' matter.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvcore.clock import Clock
from kvcore.kv_parts import describe_difference
from kvcore.telemetry import log_fields
from kvcore.types import KVSpec, Role
from router.nodes.cluster import Cluster, KnownNode
from router.nodes.limits import NodeHealthLimits

_log = logging.getLogger("router")


class ClusterProblems:
    """One a router. `connected`: whether the metadata server's events come; None: there is no such server."""

    def __init__(
        self,
        cluster: Cluster,
        clock: Clock,
        connected: Callable[[], bool] | None,
        limits: NodeHealthLimits = NodeHealthLimits(),
    ) -> None:
        self._cluster = cluster
        self._clock = clock
        self._connected = connected
        self._limits = limits
        self._unknown_since: dict[tuple[str, int], float] = {}
        """By id and incarnation of a node that is used."""
        self._said: set[str] = set()

    def __repr__(self) -> str:
        return f"<ClusterProblems {len(self._said)} said, {len(self._unknown_since)} unknown nodes>"

    def lines(self) -> list[str]:
        """As of now, a sentence each."""
        used = [node for node in self._cluster.nodes.values() if node.problem is None]
        between = [*kv_problems(used), *size_problems(used), *tier_problems(used)]
        return [*self._need(), *between, *self._unknown_nodes(used)]

    def say(self) -> None:
        """Log what is new since the last time. For every round of probes."""
        lines = self.lines()
        for line in lines:
            if line not in self._said:
                log_fields(_log, logging.WARNING, "cluster_problem", problem=line)
        self._said = set(lines)

    def _need(self) -> Iterator[str]:
        """No decoder is left, and prefillers stand in."""
        view = self._cluster.view()
        if view.prefillers and not view.decoders:
            why = "; ".join(f"{item.node}: {item.reason}" for item in view.unusable if item.role is Role.DECODER)
            yield f"no decoder can be used, so prefillers decode until one is back ({why})"

    def _unknown_nodes(self, used: Iterable[KnownNode]) -> Iterator[str]:
        """Those that the metadata server has not known for some time, though it can be asked."""
        before, self._unknown_since = self._unknown_since, {}
        if self._connected is None or not self._connected():
            return
        now = self._clock.now()
        for node in used:
            why, lost = _why_unknown(node), "nothing that it computes is stored"
            if why is None and node.report is not None and (away := self._cluster.leases.lacking(node.report.node)):
                why = f"the metadata server's partition {', '.join(away)} does not know it"
                lost = "of what it computes nothing that belongs there is stored"
            if why is not None and node.report is not None:
                start = (node.id, node.report.node.incarnation)
                self._unknown_since[start] = since = before.get(start, now)
                if now - since >= self._limits.unknown_s:
                    yield f"{node.role} {node.id} at {node.url} is used, but {why}: {lost}"


def _why_unknown(node: KnownNode) -> str | None:
    """Why this process's KV goes into no store; None: the metadata server knows it."""
    assert node.report is not None, "a node without problem has reported"
    lease, here = node.lease, node.report
    if here.refused:
        return f"the metadata server refuses it ({here.refused})"
    if lease is None:
        return "the metadata server does not know it"
    if lease.incarnation != here.node.incarnation:
        return f"what the metadata server knows as {node.id} is another process, at {lease.control_url}"
    return None


def kv_problems(used: Sequence[KnownNode]) -> Iterator[str]:
    """Which nodes share no KV with the others, and what differs. The others: the kind that most decoders have."""
    kinds: dict[bytes, list[KnownNode]] = {}
    for node in used:
        if node.role is not Role.STORE:
            kinds.setdefault(node.fingerprint, []).append(node)
    main = max(kinds.values(), key=lambda nodes: (len(_decoders(nodes)), len(nodes)), default=[])
    if not _decoders(main):
        return
    most = _names(_decoders(main))
    for nodes in kinds.values():
        if nodes is main:
            continue
        differs = describe_difference(_spec(nodes[0]), _spec(main[0]))
        if decoders := _decoders(nodes):
            yield (
                f"{_names(decoders)} and {most} share no KV, and an answer that began at one cannot go on at the "
                f"other, as their KV differs: {differs}"
            )
        else:
            yield f"{_names(nodes)} can serve no decoder, as KV there differs from that of {most}: {differs}"


def size_problems(used: Sequence[KnownNode]) -> Iterator[str]:
    """Chunks that no prompt fills, and segments that hold none."""
    specs = [_spec(node) for node in used if node.role is Role.DECODER]
    for node in used:
        engine = node.report.engine if node.report else None
        spec = engine.kv_spec if engine else next(iter(specs), None)
        if engine is not None and engine.kv_spec.chunk_tokens > engine.max_context:
            yield (
                f"kv.chunk_tokens {engine.kv_spec.chunk_tokens} is over the context of {node.role} {node.id}, "
                f"{engine.max_context}: nothing is ever stored"
            )
        joined_to_read = node.role is Role.STORE and not node.static  # an offline LLM's; it stores elsewhere
        for segment in node.report.segments if node.report and not joined_to_read else ():
            if spec is not None and segment.size_bytes < spec.chunk_bytes:
                sizes = f"{segment.size_bytes} bytes and one chunk {spec.chunk_bytes}"
                yield f"the segment of {node.role} {node.id} has {sizes}: nothing is ever stored there"


def _decoders(nodes: Sequence[KnownNode]) -> list[KnownNode]:
    return [node for node in nodes if node.role is Role.DECODER]


def _spec(node: KnownNode) -> KVSpec:
    assert node.report is not None and node.report.engine is not None, "a node without problem has reported"
    return node.report.engine.kv_spec


def _names(nodes: Sequence[KnownNode], shown: int = 8) -> str:
    """Of nodes of any roles, the first few."""
    names = [f"{node.role} {node.id}" for node in nodes[:shown]]
    if len(nodes) > shown:
        names.append(f"{len(nodes) - shown} others")
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def tier_problems(nodes: Iterable[KnownNode]) -> Iterator[str]:
    """Tiers that nodes say something is wrong with."""
    for node in nodes:
        for tier in node.report.tiers if node.report is not None else ():
            if tier.problem:
                yield f"tier {tier.name} of node {node.id}: {tier.problem}"
