"""`kvferry status`: ask the router and the metadata server what they see, and show it; one of them may be down.

Answers of the router are read leniently: a field it does not send is left out.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import metadata_urls, operators_url_of, secured_url, urls_of
from kvcore.handoff import HandoffKind, has_store
from kvcore.ports import why_unreachable
from kvcore.process.http_client import http_session, operators_session
from kvcore.trust.opening import OPEN, ClusterTrust
from kvferry.hit_rate import hit_rate_lines
from kvferry.machine import size_text
from kvferry.router_url import key_headers
from metadata_server.account_messages import Stats
from metadata_server.partitions.merging import merged_stats
from nodeapi.messages import TierReport
from router.cache.report import CacheStats
from router.status import ProcessStatus

_Value = TypeVar("_Value")


class NodeLine(msgspec.Struct, frozen=True, kw_only=True):
    """A node as the router sees it."""

    id: str
    role: str = ""
    url: str = ""
    healthy: bool = False
    reason: str | None = None
    running: int | None = None
    waiting: int | None = None
    used_blocks: int | None = None
    total_blocks: int | None = None
    engine_restarts: int = 0
    tiers: list[TierReport] = []

    @property
    def load(self) -> str:
        """The load in words; empty while the node has not reported."""
        if self.running is None:
            return ""
        blocks = f", {self.used_blocks}/{self.total_blocks} blocks" if self.total_blocks else ""
        restarts = f", engine restarted {self.engine_restarts}x" if self.engine_restarts else ""
        return f"{self.running} running, {self.waiting or 0} waiting{blocks}{restarts}"


class RequestCounts(msgspec.Struct, frozen=True, kw_only=True):
    """Requests since the router started."""

    in_flight: int = 0
    total: int = 0
    ok: int = 0
    failed: int = 0
    cancelled: int = 0
    retried: int = 0
    in_need: int = 0


class ClusterAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`GET /v1/cluster`."""

    nodes: list[NodeLine] = []
    requests: RequestCounts = RequestCounts()
    hit_rate: float | None = None
    handoff: str = HandoffKind.KVFERRY
    problems: list[str] = []
    stopping: bool = False
    processes: list[ProcessStatus] = []


@dataclass(frozen=True, slots=True)
class ServerAnswer(Generic[_Value]):
    """What one server answered, or why it did not."""

    url: str
    raw: object = None
    value: _Value | None = None
    problem: str | None = None

    def plain(self) -> dict[str, object]:
        """The whole answer, for JSON."""
        return {"url": self.url, "problem": self.problem, "answer": self.raw}


def addresses(config: ClusterConfig) -> tuple[str, str | None]:
    """URLs of router (for operators) and first metadata server; None: servers that are not ours have none."""
    if not config.handoff.traits.has_store:
        return operators_url_of(config), None
    return operators_url_of(config), secured_url(config, metadata_urls(config.metadata_server)[0])


def standbys_of(config: ClusterConfig) -> list[str]:
    """URLs of the metadata servers that stand by, of an index of one partition."""
    server = config.metadata_server
    urls = metadata_urls(server)[1:] if config.handoff.traits.has_store and not server.partitions else []
    return [secured_url(config, url) for url in urls]


def partition_urls(config: ClusterConfig) -> dict[str, list[str]]:
    """URLs of the servers of each of the index's partitions, by name; empty: it has none."""
    server = config.metadata_server
    if not config.handoff.traits.has_store:
        return {}
    return {partition.name: [secured_url(config, url) for url in urls_of(partition)] for partition in server.partitions}


async def run_status(
    router_url: str,
    metadata_url: str | None,
    *,
    standbys: Sequence[str] = (),
    partitions: Mapping[str, Sequence[str]] = {},
    routers: Sequence[str] = (),
    as_json: bool,
    console: Console,
    timeout_s: float = 5.0,
    trust: ClusterTrust = OPEN,
) -> int:
    """Ask and print; of several metadata servers of one partition the one that leads, and what all partitions say as
    one answer. `routers`: the others, where the file has several; the first that is there is asked. Returns 0 if every
    server that the cluster has answered, 1 otherwise."""
    timeout = aiohttp.ClientTimeout(total=timeout_s)
    async with (
        operators_session(trust=trust, timeout=timeout) as session,
        http_session(trust=trust, timeout=timeout) as inner,
    ):
        health = {url: _ask(session, f"{url}/health", dict) for url in (router_url, *routers) if routers}
        healths = dict(zip(health, await asyncio.gather(*health.values()), strict=True))
        router_url = next((url for url, answer in healths.items() if answer.problem is None), router_url)
        cluster, stats, cache = await asyncio.gather(
            _ask(session, f"{router_url}/v1/cluster", ClusterAnswer, key_headers()),
            _ask_partitions(inner, partitions) if partitions else _ask_metadata(inner, metadata_url, standbys),
            _ask(session, f"{router_url}/v1/cache/stats", CacheStats, key_headers()),  # an older router has none
        )
    if cluster.value is not None and not has_store(cluster.value.handoff):
        stats = None
    if as_json:
        answers = {"router": cluster.plain(), "metadata_server": stats.plain() if stats else None}
        print(json.dumps({**answers, "cache": cache.raw}))
    else:
        for url, answer in healths.items():
            how, style = ("is there", "green") if answer.problem is None else (f"is not there: {answer.problem}", "red")
            console.print(f"router {url} {how}", style=style, markup=False, soft_wrap=True)
        _show_processes(console, cluster.value)
        _show(console, cluster, stats)
        for shown in hit_rate_lines(cache.value) if cache.value is not None else ():
            console.print(shown, soft_wrap=isinstance(shown, str))
    processes = cluster.value.processes if cluster.value is not None else []
    away = any([one.problem for one in healths.values()] + [one.problem for one in processes])
    return 0 if cluster.problem is None and not away and (stats is None or stats.problem is None) else 1


async def _ask_metadata(
    session: aiohttp.ClientSession, url: str | None, standbys: Sequence[str]
) -> ServerAnswer[Stats] | None:
    if url is None:
        return None
    answers = await asyncio.gather(*(_ask(session, f"{each}/v1/stats", Stats) for each in (url, *standbys)))
    return next((answer for answer in answers if answer.value is not None), answers[0])


async def _ask_partitions(
    session: aiohttp.ClientSession, partitions: Mapping[str, Sequence[str]]
) -> ServerAnswer[Stats] | None:
    """What those say that answer, and which do not."""
    asked = await asyncio.gather(*(_ask_metadata(session, urls[0], urls[1:]) for urls in partitions.values()))
    answers = {name: answer for name, answer in zip(partitions, asked, strict=True) if answer is not None}
    away = {name: answer for name, answer in answers.items() if answer.problem is not None}
    stats = [answer.value for answer in answers.values() if answer.value is not None]
    return ServerAnswer(
        ", ".join(answer.url for answer in (away or answers).values()),
        {name: answer.raw for name, answer in answers.items()},
        merged_stats(stats) if stats else None,
        "; ".join(f"partition {name}: {answer.problem}" for name, answer in away.items()) or None,
    )


class _ErrorMessage(msgspec.Struct):
    message: str


class _ErrorReply(msgspec.Struct):
    error: _ErrorMessage


def _message(body: bytes) -> str:
    """What an error body says; the first of its bytes where it is none of ours."""
    try:
        return msgspec.json.decode(body, type=_ErrorReply).error.message
    except (msgspec.DecodeError, UnicodeDecodeError):
        return body[:200].decode("utf-8", "replace")


async def _ask(
    session: aiohttp.ClientSession, url: str, kind: type[_Value], headers: Mapping[str, str] = {}
) -> ServerAnswer[_Value]:
    try:
        async with session.get(url, headers={"Accept": "application/json", **headers}) as reply:
            body = await reply.read()
            if reply.status != 200:
                return ServerAnswer(url, problem=f"HTTP {reply.status}: {_message(body)}")
        return ServerAnswer(url, msgspec.json.decode(body), msgspec.json.decode(body, type=kind))
    except TimeoutError:
        return ServerAnswer(url, problem="no answer in time")
    except (aiohttp.ClientError, OSError) as error:
        return ServerAnswer(url, problem=why_unreachable(error))
    except msgspec.DecodeError as error:
        return ServerAnswer(url, problem=f"an answer that this version does not understand: {error}")


def _show(console: Console, cluster: ServerAnswer[ClusterAnswer], stats: ServerAnswer[Stats] | None) -> None:
    asked: list[tuple[str, ServerAnswer[ClusterAnswer] | ServerAnswer[Stats]]] = [("router", cluster)]
    if stats is not None:
        asked.append(("metadata server", stats))
    for name, answer in asked:
        if answer.problem is not None:
            console.print(
                f"{name} is not there: {answer.problem} ({answer.url})", style="red", markup=False, soft_wrap=True
            )
    if cluster.value is not None:
        _show_nodes(console, cluster.value)
    if stats is not None and stats.value is not None:
        _show_segments(console, stats.value)
        for refused in stats.value.refused:
            line = f"problem: the metadata server refuses {refused.node.id}: {refused.reason}"
            console.print(line, style="red", markup=False, soft_wrap=True)


def _show_processes(console: Console, cluster: ClusterAnswer | None) -> None:
    for one in cluster.processes if cluster is not None else ():
        how = f"has {one.in_flight} requests in flight{', and is stopping' if one.stopping else ''}"
        style = "green"
        if one.problem is not None:
            how, style = f"is not there: {one.problem}", "red"
        console.print(f"process {one.name} {how}", style=style, markup=False, soft_wrap=True)


def _show_nodes(console: Console, cluster: ClusterAnswer) -> None:
    table = _table("node", "role", "health", "load", "url")
    for node in cluster.nodes:
        health = Text("ok", style="green") if node.healthy else Text(node.reason or "away", style="red")
        table.add_row(node.id, node.role, health, node.load, node.url)
    console.print(table)
    if cluster.stopping:
        console.print("the router is stopping: it answers what it has and takes no more", style="yellow")
    if any(node.tiers for node in cluster.nodes):
        console.print(tiers_table(cluster))
    for problem in cluster.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    counts = cluster.requests
    need = f", {counts.in_need} decoded by prefillers" if counts.in_need else ""
    hit_rate = "" if cluster.hit_rate is None else f", hit rate {cluster.hit_rate:.1%} of prompt tokens"
    console.print(
        f"requests: {counts.total} ({counts.ok} ok, {counts.failed} failed, {counts.cancelled} cancelled, "
        f"{counts.retried} retried{need}), {counts.in_flight} in flight{hit_rate}"
    )
    if not has_store(cluster.handoff):
        console.print(f"handoff: {cluster.handoff}, by vLLM servers that run by themselves; there is no store")


def tiers_table(cluster: ClusterAnswer) -> Table:
    """A line a tier and node."""
    table = _table("tier", "node", "chunks", "used", "size", "saved", "promoted", "dropped", "load")
    for node in cluster.nodes:
        for tier in node.tiers:
            sizes = ["" if size is None else size_text(size) for size in (tier.used_bytes, tier.capacity_bytes)]
            counts = [str(tier.counts.get(name, 0)) for name in ("saved", "promoted", "dropped")]
            rate = "" if tier.load_rate is None else f"{size_text(int(tier.load_rate))}/s"
            chunks = "" if tier.num_chunks is None else str(tier.num_chunks)
            table.add_row(tier.name, node.id, chunks, *sizes, *counts, rate)
    return table


def _show_segments(console: Console, stats: Stats) -> None:
    known = {node.id for node in stats.nodes}
    table = _table("segment", "node", "used", "reserved", "size", "chunks")
    for line in stats.segments:
        segment = line.segment
        share = line.used_bytes / segment.size_bytes if segment.size_bytes else 0.0
        used = f"{size_text(line.used_bytes)} ({share:.0%})"
        node = segment.node_id if segment.node_id in known else f"{segment.node_id} (gone)"
        sizes = (used, size_text(line.reserved_bytes), size_text(segment.size_bytes))
        table.add_row(segment.id, node, *sizes, str(line.num_replicas))
    console.print(table)
    console.print(
        f"store: {stats.objects} chunks, {stats.reservations} reservations, {stats.read_leases} read leases, "
        f"epoch {stats.epoch}"
    )
    if stats.rebuilding:
        text = f"the index is being rebuilt: {stats.rebuilding} of {len(stats.segments)} segments are not all known yet"
        console.print(text, style="yellow", soft_wrap=True)
    if full := stats.counters.get("declined_full", 0):
        text = f"{full} chunks were not stored since the metadata server started, as no segment had room"
        console.print(f"{text} (nodes.NAME.segment)", style="yellow", soft_wrap=True)
    if over := stats.counters.get("declined_over_share", 0):
        text = f"{over} of them were of tenants that had all of their share (store.tenant_share)"
        console.print(text, style="yellow", soft_wrap=True)


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading)
    return table
