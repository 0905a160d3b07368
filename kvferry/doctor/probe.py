"""`kvferry doctor --probe`: have the nodes of a running cluster measure their ways to each other, pair after pair.

Asks the metadata server who is there, then each node that has an engine (stores begin no transfer) for every other. One
pair at a time, so that no two share a link. Bounded: a node that does not answer once is not asked again.
"""

from collections.abc import Sequence

import aiohttp
import msgspec
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvcore.clock import SystemClock
from kvcore.config.schema import ClusterConfig
from kvcore.config.servers import metadata_urls
from kvcore.errors import ConfigError, MetadataProtocolError, MetadataUnavailableError
from kvcore.ports import why_unreachable
from kvcore.process.http_client import http_session
from kvcore.trust.opening import ClusterTrust, open_trust, trust_source
from kvcore.types import NodeInfo, Role
from kvferry.doctor.verdict import Level, Outcome, Problem, Verdict, gigabytes, judge, wrong
from kvferry.machine import size_text
from metadata_server.connect import connect_client, endpoints_of
from nodeapi.messages import ProbeReport, ProbeRequest

_SILENT = "silent"
_MSGPACK = {"Accept": "application/msgpack"}
_STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.WRONG: "bold red"}


class _ProbeError(msgspec.Struct, frozen=True):
    code: str
    message: str


class _ProbeErrorBody(msgspec.Struct, frozen=True):
    error: _ProbeError


async def run_probe(config: ClusterConfig, console: Console, *, pair_s: float = 15.0, late_s: float = 10.0) -> int:
    """Measure, print; 0 if every pair could be measured (slow or not), 1 otherwise. Raises ConfigError where no store
    of ours moves the KV. A node has `late_s` beyond a pair's time to close its transport and give back room."""
    if not config.handoff.traits.has_store:
        raise ConfigError(f"handoff: {config.handoff} moves the KV between the servers: nothing of ours to probe")
    trust = open_trust(trust_source(config))
    client = connect_client(endpoints_of(config.metadata_server), SystemClock(), trust)
    try:
        alive = (await client.nodes()).nodes
    except (MetadataUnavailableError, MetadataProtocolError) as error:
        subject = f"metadata server {metadata_urls(config.metadata_server)[0]}"
        return _show_verdicts(console, [wrong(subject, Problem(MetadataUnavailableError.code, error.message))])
    finally:
        await client.aclose()
    names = {node.id for node in alive}
    missing = [
        wrong(name, Problem("node_unavailable", "in the file, but the metadata server does not know it"))
        for name in config.nodes
        if name not in names
    ]
    outcomes = await _measure_all(alive, console, pair_s, late_s, trust)
    if outcomes:
        console.print(_table(outcomes))
    elif not missing:
        console.print("one node alone has no pair to measure")
    return _show_verdicts(console, [*missing, *(verdict for outcome in outcomes for verdict in judge(outcome))])


async def _measure_all(
    nodes: Sequence[NodeInfo], console: Console, pair_s: float, late_s: float, trust: ClusterTrust
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    timeout = aiohttp.ClientTimeout(total=pair_s + late_s)
    async with http_session(trust=trust, timeout=timeout) as session:
        for source in nodes:
            silent = source.role is Role.STORE
            for target in () if silent else nodes:
                if target is source:
                    continue
                result: ProbeReport | Problem
                if silent:
                    result = Problem(_SILENT, f"not asked: {source.id} did not answer before")
                else:
                    with console.status(f"measuring {source.id} -> {target.id}"):
                        result = await _ask(session, source, target, pair_s, late_s)
                silent = isinstance(result, Problem) and result.code == _SILENT
                outcomes.append(Outcome(source.id, target.id, result))
    return outcomes


async def _ask(
    session: aiohttp.ClientSession, source: NodeInfo, target: NodeInfo, pair_s: float, late_s: float
) -> ProbeReport | Problem:
    body = msgspec.msgpack.encode(ProbeRequest(peer=target.id, timeout_s=pair_s))
    try:
        async with session.post(f"{source.control_url}/v1/probe", data=body, headers=_MSGPACK) as reply:
            answer = await reply.read()
            if reply.status == 200:
                return msgspec.msgpack.decode(answer, type=ProbeReport)
            refused = msgspec.msgpack.decode(answer, type=_ProbeErrorBody).error
            return Problem(refused.code, refused.message)
    except TimeoutError:
        return Problem(_SILENT, f"{source.id} did not answer within {pair_s + late_s:g} s ({source.control_url})")
    except (aiohttp.ClientError, OSError) as error:
        return Problem(_SILENT, f"{source.id} is not there: {why_unreachable(error)} ({source.control_url})")
    except msgspec.MsgspecError as error:
        return Problem("invalid_request_error", f"{source.id} gave an answer that is not understood here: {error}")


def _table(outcomes: Sequence[Outcome]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("from", "to", "transport", "device", "4 KiB get", "put", "get", "batch"):
        table.add_column(heading)
    for outcome in outcomes:
        result = outcome.result
        if isinstance(result, Problem):
            table.add_row(outcome.source, outcome.target, Text("not measured", style="red"))
            continue
        table.add_row(
            outcome.source,
            outcome.target,
            result.shown,
            ", ".join(result.devices),
            f"{result.latency_s * 1e6:.0f} us",
            gigabytes(result.put_rate),
            gigabytes(result.get_rate),
            size_text(result.num_bytes),
        )
    return table


def _show_verdicts(console: Console, verdicts: Sequence[Verdict]) -> int:
    width = max((len(verdict.subject) for verdict in verdicts), default=0) + 2
    for verdict in verdicts:
        mark = Text(f"{verdict.level:<6}", style=_STYLES[verdict.level])
        console.print(mark.append(Text(f"{verdict.subject:<{width}}{verdict.detail}", style="default")), soft_wrap=True)
        if verdict.remedy:
            console.print(Text(f"      -> {verdict.remedy}"), soft_wrap=True)
    return 1 if any(verdict.level is Level.WRONG for verdict in verdicts) else 0
