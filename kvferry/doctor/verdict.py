"""What a measured pair of nodes is worth: fine, slower than its link, on another transport than asked for. Pure.

Latencies are held against ten times what 4 KiB gets take on two busy cores (docs/benchmarks.md: shm 13 us, tcp 117, ucx
over tcp 168; nixl over tcp 350, by this probe): a machine that does something else gives no warning, a wrong route or a
sleeping core does. RDMA has not been measured: its own time is small beside ours.
"""

from dataclasses import dataclass
from enum import StrEnum

from nodeapi.messages import ProbeReport

_SLOW_GETS = {  # seconds; a get of 4 KiB that takes longer is worth a warning
    "shm": 130e-6,
    "tcp": 1.2e-3,
    "ucx": 1.7e-3,
    "nixl": 3.5e-3,
}
_SHARE = 0.5
"""Of what the link should give; below it is worth a warning."""
_SHM_SHARE = 0.7
"""Of a copy in the node's own memory: what shared memory should give."""
_JUDGED_BYTES = 4 << 20
"""A smaller batch is all latency."""
_REMEDIES = {
    "silent": "is its process up (kvferry status), or stopped? See its log",
    "node_unavailable": "kvferry status shows which nodes are up; the node's log says why it is not",
    "overloaded": "ask again in some seconds",
    "peer_unreachable": "is the peer up (kvferry status), and does a firewall let its transfer port through?",
    "transfer_timeout": "the peer does not move: is its process stopped, or the way to it cut? See its log",
    "deadline_exceeded": "the peer does not move: is its process stopped, or the way to it cut? See its log",
    "segment_unknown": "the peer has started again meanwhile: ask again",
    "metadata_unavailable": "start the metadata server, or see its log",
    "invalid_request_error": "all nodes and this command need the same version of kvferry",
}
_OTHERWISE = "see the log of the node that was asked"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"
    WRONG = "wrong"


@dataclass(frozen=True, slots=True)
class Problem:
    """Why a pair could not be measured."""

    code: str
    """Of an error of `kvcore.errors`."""
    message: str


@dataclass(frozen=True, slots=True)
class Outcome:
    """One ordered pair of nodes, measured or not."""

    source: str
    target: str
    result: ProbeReport | Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """One line about a pair. `remedy` is empty iff it is ok."""

    level: Level
    subject: str
    detail: str
    remedy: str = ""


def judge(outcome: Outcome) -> list[Verdict]:
    """All that there is to say about one pair; one line that says ok if there is nothing wrong."""
    subject, result = f"{outcome.source} -> {outcome.target}", outcome.result
    if isinstance(result, Problem):
        return [wrong(subject, result)]
    warnings = [*_transport(result), *_rates(result), *_latency(result)]
    if warnings:
        return [Verdict(Level.WARN, subject, detail, remedy) for detail, remedy in warnings]
    return [Verdict(Level.OK, subject, f"{result.shown}{_unjudged(result)}")]


def wrong(subject: str, problem: Problem) -> Verdict:
    """A node or a pair that cannot be measured, and what to do."""
    return Verdict(Level.WRONG, subject, problem.message, _REMEDIES.get(problem.code, _OTHERWISE))


def _transport(report: ProbeReport) -> list[tuple[str, str]]:
    if report.asked in ("auto", report.transport):
        return []
    detail = f"{report.transport} is used, the fallback; the configuration asks for {report.asked}"
    return [(detail, f"kvferry doctor on {report.node} and on {report.peer} says what {report.asked} lacks there")]


def _rates(report: ProbeReport) -> list[tuple[str, str]]:
    expected, why = _expected(report)
    if expected is None or report.num_bytes < _JUDGED_BYTES:
        return []
    slow = [
        f"{name} {gigabytes(rate)}"
        for name, rate in (("put", report.put_rate), ("get", report.get_rate))
        if rate < _SHARE * expected
    ]
    if not slow:
        return []
    if report.transport == "shm":
        remedy = "is the machine busy or short of memory bandwidth? nodes.*.numa_node keeps a segment near its engine"
    elif report.transport == "tcp":
        remedy = "look at load, MTU and switches (iperf3); raise transport.streams; fast links need transport: ucx"
    else:
        remedy = "look at load, MTU and losslessness (ib_write_bw shows the link without kvferry); see docs/rdma.md"
    return [(f"{' and '.join(slow)}, below half of {gigabytes(expected)}, {why}", remedy)]


def _latency(report: ProbeReport) -> list[tuple[str, str]]:
    most_s = _SLOW_GETS.get(report.transport)
    if most_s is None or report.latency_s <= most_s:
        return []
    detail = f"a get of 4 KiB takes {report.latency_s * 1e6:.0f} us; over {report.transport} {most_s * 1e6:.0f} is much"
    return [(detail, "are both machines' processors free, and is the way between them short (ping)?")]


def _expected(report: ProbeReport) -> tuple[float | None, str]:
    """Bytes/s, and where that is from."""
    if report.transport == "shm":
        return _SHM_SHARE * report.copy_rate, f"{_SHM_SHARE:g} of a copy in memory"
    if report.link_rate is None:
        return None, ""
    return report.link_rate, f"the rate of {', '.join(report.devices)}"


def _unjudged(report: ProbeReport) -> str:
    if report.num_bytes < _JUDGED_BYTES:
        return f"; {report.num_bytes} bytes are too few to judge rates: the segment has little free room"
    if _expected(report)[0] is None:
        devices = ", ".join(report.devices)
        return f"; {devices or 'its way'} states no rate, so rates are not judged"
    return ""


def gigabytes(rate: float) -> str:
    """Bytes/s for people."""
    return f"{rate / 1e9:.2f} GB/s"
