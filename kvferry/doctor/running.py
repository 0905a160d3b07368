"""Which processes of a cluster file run already: asked at their own addresses, so that the doctor takes none for a
stranger that holds a port. Owns the calls.
"""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import msgspec

from kvcore.config.schema import ClusterConfig
from kvcore.ports import base_url
from kvcore.process.http_client import http_session
from kvcore.types import NodeInfo
from kvferry.status import ClusterAnswer, addresses
from metadata_server.account_messages import Stats

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class RunningParts:
    """`names`: `router`, `metadata_server` and nodes that answer as this cluster's. `problems`: what the router says is
    wrong, a sentence each."""

    names: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()


class _NamedCluster(ClusterAnswer, frozen=True, kw_only=True):
    cluster: str = ""


class _NodeAnswer(msgspec.Struct, frozen=True):
    node: NodeInfo


async def find_running(config: ClusterConfig, timeout_s: float = 1.0) -> RunningParts:
    """Ask all at the same time; whoever does not answer within `timeout_s`, or as another's, does not run."""
    router_url, metadata_url = addresses(config)
    async with (
        http_session(timeout=aiohttp.ClientTimeout(total=timeout_s)) as session,
        asyncio.TaskGroup() as tasks,
    ):
        router = tasks.create_task(_ask(session, f"{router_url}/v1/cluster", _NamedCluster))
        metadata = tasks.create_task(_ask(session, f"{metadata_url or router_url}/v1/stats", Stats))
        nodes = {
            name: tasks.create_task(_ask(session, f"{base_url(node.host, node.port)}/v1/info", _NodeAnswer))
            for name, node in config.nodes.items()
            if node.url is None
        }
    own = ("", config.cluster)
    names = {
        name
        for name, task in nodes.items()
        if (answer := task.result()) is not None and answer.node.id == name and answer.node.cluster in own
    }
    stats, cluster = metadata.result(), router.result()
    if stats is not None and all(node.cluster in own for node in stats.nodes):
        names.add("metadata_server")
    if cluster is None or cluster.cluster != config.cluster:
        return RunningParts(frozenset(names))
    away = [f"{node.role} {node.id} is not used: {node.reason}" for node in cluster.nodes if not node.healthy]
    return RunningParts(frozenset(names | {"router"}), (*away, *cluster.problems))


async def _ask(session: aiohttp.ClientSession, url: str, kind: type[_Answer]) -> _Answer | None:
    try:
        async with session.get(url, headers={"Accept": "application/json"}) as reply:
            return msgspec.json.decode(await reply.read(), type=kind) if reply.status == 200 else None
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
