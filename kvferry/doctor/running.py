"""Which processes of a cluster file run already: asked at their own addresses, so that the doctor takes none for a
stranger that holds a port; and which of them hold one and say nothing. Owns the calls.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import aiohttp
import msgspec

from kvcore.clock import SystemClock
from kvcore.config.checks import metadata_ports
from kvcore.config.file import load_config
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import internal_url, metadata_urls, operators_urls_of, secured_url
from kvcore.errors import ConfigError, NotLeaderError
from kvcore.ports import holder_of
from kvcore.process.http_client import http_session, operators_session
from kvcore.trust.opening import OPEN, ClusterTrust, open_trust, trust_source
from kvcore.types import NodeInfo
from kvferry.status import ClusterAnswer
from metadata_server.account_messages import Stats

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class RunningParts:
    """`names`: `router`, `metadata_server` and nodes that answer as this cluster's. `problems`: what the router says is
    wrong, a sentence each. `clocks`: by the host of whoever says what time it is, how far it is ahead of ours, in
    seconds, to one."""

    names: frozenset[str] = frozenset()
    problems: tuple[str, ...] = ()
    clocks: Mapping[str, float] = field(default_factory=dict)


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
    clocks = await _clocks(config, replace(trust, secrets=None), timeout)
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
    for name, found in here.items():  # in the order of their ports
        names |= {f"{name}.processes[{at}]" for at, one in enumerate(found.processes) if one.problem is None}
    if not here:
        return RunningParts(frozenset(names), clocks=clocks)
    cluster = next(iter(here.values()))
    away = [f"{node.role} {node.id} is not used: {node.reason}" for node in cluster.nodes if not node.healthy]
    processes = (one for found in here.values() for one in found.processes)
    away += [f"process {one.name} of the router is not there: {one.problem}" for one in processes if one.problem]
    return RunningParts(frozenset(names), (*away, *cluster.problems), clocks)


def silent_holder(config: ClusterConfig, port: int) -> tuple[str, str] | None:
    """Of a port that was asked and gave no answer as this cluster's: what is wrong and what to do, if one of its own
    processes holds it. None: another's does, or nobody may see whose."""
    found = holder_of(port)
    if found is None or _cluster_of(*found) != config.cluster:
        return None
    pid, words = found
    what = f"is held by this cluster's own process {pid} ({' '.join(words)[:80]}), which"
    again = f"else end it (`kill -9 {pid}`) and start it anew, unless `kvferry up` does"
    if _is_stopped(pid):
        return f"{what} is stopped (SIGSTOP)", f"`kill -CONT {pid}` lets it go on; {again}"
    return (
        f"{what} runs and does not answer, or not as this file expects",
        f"if it has just begun wait a little; its log says why (`kill -USR1 {pid}`: what it does now); {again}",
    )


def _cluster_of(pid: int, words: list[str]) -> str | None:
    """Of the file that a command line names, in whatever place: a rollout has its own copies."""
    given = (words[at + 1] for at, word in enumerate(words[:-1]) if word == "--config")
    file = next(given, next((word.partition("=")[2] for word in words if word.startswith("--config=")), None))
    try:
        return None if file is None else load_config(Path(f"/proc/{pid}/cwd", file)).cluster
    except ConfigError:
        return None


def _is_stopped(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in ("T", "t")
    except (OSError, IndexError):  # it has just ended
        return False


async def _clocks(config: ClusterConfig, trust: ClusterTrust, timeout: aiohttp.ClientTimeout) -> dict[str, float]:
    """Asked without a proof: whose clock is too far off takes none."""
    inner = [secured_url(config, url) for url in metadata_urls(config.metadata_server)]
    inner += [internal_url(config, node.host, node.port) for node in config.nodes.values() if node.url is None]
    outer = operators_urls_of(config)
    async with (
        operators_session(trust=trust, timeout=timeout) as operators,
        http_session(trust=trust, timeout=timeout) as session,
    ):
        asked = [*((operators, url) for url in outer), *((session, url) for url in inner)]
        found = await asyncio.gather(*(_clock(*one) for one in asked))
    ahead = zip([*outer, *inner], found, strict=True)
    return {urlsplit(url).hostname or url: seconds for url, seconds in ahead if seconds is not None}


async def _clock(session: aiohttp.ClientSession, url: str) -> float | None:
    """By the Date of an answer, which leaves a second's parts out."""
    clock = SystemClock()
    before = clock.wall()
    try:
        async with session.get(f"{url}/health") as reply:
            theirs = parsedate_to_datetime(reply.headers["Date"]).timestamp() + 0.5
    except (aiohttp.ClientError, TimeoutError, OSError, KeyError, ValueError):
        return None
    return theirs - (before + clock.wall()) / 2


async def _ask(session: aiohttp.ClientSession, url: str, kind: type[_Answer], *, status: int = 200) -> _Answer | None:
    try:
        async with session.get(url, headers={"Accept": "application/json"}) as reply:
            return msgspec.json.decode(await reply.read(), type=kind) if reply.status == status else None
    except (aiohttp.ClientError, TimeoutError, OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
