"""Which processes of a cluster file run already: asked at their own addresses, so that the doctor takes none for a
stranger that holds a port. Owns the calls.
"""

import asyncio
from dataclasses import dataclass
from typing import TypeVar

import aiohttp
import msgspec

from kvcore.config.checks import metadata_ports
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import internal_url, metadata_urls, operators_urls_of, secured_url
from kvcore.errors import ConfigError, NotLeaderError
from kvcore.process.http_client import http_session, operators_session
from kvcore.trust.opening import OPEN, open_trust, trust_source
from kvcore.types import NodeInfo
from kvferry.status import ClusterAnswer
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


class _FollowerError(msgspec.Struct, frozen=True):
    code: str


class _Follower(msgspec.Struct, frozen=True):
    """What a metadata server that does not lead says to every call."""

    error: _FollowerError


async def find_running(config: ClusterConfig, timeout_s: float = 1.0) -> RunningParts:
    """Ask all at the same time; whoever does not answer within `timeout_s`, or as another's, does not run."""
    try:
        trust = open_trust(trust_source(config))
    except ConfigError:  # another check says so
        trust = OPEN
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        operators_session(trust=trust, timeout=timeout) as outer,
        http_session(trust=trust, timeout=timeout) as session,
        asyncio.TaskGroup() as tasks,
    ):
        routers = [
            tasks.create_task(_ask(outer, f"{url}/v1/cluster", _NamedCluster)) for url in operators_urls_of(config)
        ]
        names_of = [path.removesuffix(".port") for path, _, _ in metadata_ports(config.metadata_server)]
        urls = [f"{secured_url(config, url)}/v1/stats" for url in metadata_urls(config.metadata_server)]
        metadata = [tasks.create_task(_ask(session, url, Stats)) for url in urls]
        following = [tasks.create_task(_ask(session, url, _Follower, status=503)) for url in urls]
        nodes = {
            name: tasks.create_task(_ask(session, f"{internal_url(config, node.host, node.port)}/v1/info", _NodeAnswer))
            for name, node in config.nodes.items()
            if node.url is None
        }
    own = ("", config.cluster)
    names = {
        name
        for name, task in nodes.items()
        if (answer := task.result()) is not None and answer.node.id == name and answer.node.cluster in own
    }
    for name, asked, refused in zip(names_of, metadata, following, strict=True):
        stats, follower = asked.result(), refused.result()
        ours = stats is not None and all(node.cluster in own for node in stats.nodes)
        if ours or (follower is not None and follower.error.code == NotLeaderError.code):
            names.add(name)
    here = {
        f"routers[{number - 1}]" if number else "router": found
        for number, task in enumerate(routers)
        if (found := task.result()) is not None and found.cluster == config.cluster
    }
    names |= set(here)
    if not here:
        return RunningParts(frozenset(names))
    cluster = next(iter(here.values()))
    away = [f"{node.role} {node.id} is not used: {node.reason}" for node in cluster.nodes if not node.healthy]
    return RunningParts(frozenset(names), (*away, *cluster.problems))


async def _ask(session: aiohttp.ClientSession, url: str, kind: type[_Answer], *, status: int = 200) -> _Answer | None:
    try:
        async with session.get(url, headers={"Accept": "application/json"}) as reply:
            return msgspec.json.decode(await reply.read(), type=kind) if reply.status == status else None
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
