"""Move bytes by every way there is, in turns: memcpy, iperf3, kvferry's transports and store, Mooncake over TCP.

Two places: one host, and two network namespaces joined by veth (needs root). Each round asks each path for some pairs
of a put and the get after it; figures are of all rounds but the first. A pair's rate counts its bytes both ways. The
segment's owner, the metadata server, Mooncake's owner and its master are processes of their own at the target's end.
`batched` is 16 operations in one call, or as many as 128 MiB take.

Estimate: over shm each way is one copy: memcpy's rate by one thread (6 to 14 GB/s from memory), up to 1.5 times that by
two that write past the cache. Over TCP the kernel copies twice, each on a core of its own: iperf3's rate at best, whose
one megabyte never leaves the cache. 4 KiB cost a round trip (20 to 30 us) and two wake-ups.

Mooncake: `python3.11 -m venv .venv-mooncake && .venv-mooncake/bin/pip install mooncake-transfer-engine-non-cuda`. Its
clients refuse a host that has loopback alone, so it runs where there are namespaces.
Run: python -m benchmarks.transfer [--rounds 7] [--paths tcp,ucx] [--mooncake-python .venv-mooncake/bin/python]
"""

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.children import Child, program
from benchmarks.transfer_link import Link, worker
from benchmarks.transfer_places import Place, places
from benchmarks.transfer_report import LARGE, OBJECTS, Case, Sample, Samples, print_table, result
from kvcore.process.service import loop_factory

CASES = tuple(
    Case(size, min(batch, (128 << 20) // size), repeats)
    for size, repeats in ((4 << 10, 40), (256 << 10, 20), (4 << 20, 4), (64 << 20, 1))
    for batch in (1, 16)
)
BUFFER_BYTES = 128 << 20
SEGMENT_BYTES = 1 << 30
IPERF_BYTES = "1G"
CONFIG = """
cluster: transfer
model: {{path: none, name: none}}
engine: {{kind: sim}}
nodes: {{n0: {{role: decoder, port: 8200}}}}
metadata_server: {{host: "{host}", port: 0, node_ttl_s: 600}}
"""


@dataclass(slots=True)
class _Contestant:
    """A worker, the paths that it knows, and the other processes whose time a move costs."""

    link: Link
    paths: Sequence[str]
    processes: Sequence[Child]

    def cpu_s(self) -> float:
        """Of the other processes."""
        return sum(process.cpu_s() for process in self.processes)


@dataclass(slots=True)
class _Field:
    """All that takes part in one place."""

    place: Place
    contestants: list[_Contestant] = field(default_factory=list)
    iperf_port: str = ""
    missing: dict[str, str] = field(default_factory=dict)
    """Path -> why it does not run here."""


async def _kvferry(stack: AsyncExitStack, place: Place) -> tuple[_Contestant, dict[str, str]]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    (folder / "cluster.yaml").write_text(CONFIG.format(host=place.target_host))
    python = [*place.target, sys.executable, "-m"]
    server = await stack.enter_async_context(
        program([*python, "metadata_server", "--config", str(folder / "cluster.yaml")], r"url=\"?(http://[^\s\"]+)")
    )
    ends = ["benchmarks.transfer_worker", "--host", place.target_host, "--device", place.device]
    owner = await stack.enter_async_context(program([*python, *ends, "--own", str(SEGMENT_BYTES)], r"^segment (.*)"))
    link = await stack.enter_async_context(worker([*place.initiator, sys.executable, "-m", ends[0]]))
    known = await link.ask(segment=owner.said, metadata=server.said, device=place.device, buffer=BUFFER_BYTES)
    return _Contestant(link, known["paths"], [owner, server]), known["reasons"]


async def _mooncake(stack: AsyncExitStack, place: Place, python: Path) -> _Contestant:
    master = await stack.enter_async_context(
        program(
            [*place.target, str(python.parent / "mooncake_master"), "--rpc_port", "50951", "--metrics_port", "9951"],
            r"(?i)(starting|started|listen)",
        )
    )
    script = [str(python), str(Path(__file__).with_name("transfer_mooncake.py"))]
    meet = ["--master", f"{place.target_host}:50951", "--host"]
    owner = await stack.enter_async_context(
        program([*place.target, *script, *meet, place.target_host, "--own", str(SEGMENT_BYTES)], r"^(up)$")
    )
    link = await stack.enter_async_context(
        worker([*place.initiator, *script, *meet, place.initiator_host, "--buffer", str(BUFFER_BYTES)])
    )
    return _Contestant(link, ["mooncake"], [owner, master])


@asynccontextmanager
async def _bring_up(place: Place, mooncake_python: Path | None) -> AsyncIterator[_Field]:
    async with AsyncExitStack() as stack:
        found = _Field(place)
        ours, found.missing = await _kvferry(stack, place)
        found.contestants.append(ours)
        if mooncake_python is None:
            found.missing["mooncake"] = "no --mooncake-python"
        elif not place.has_lan_address:
            found.missing["mooncake"] = "its clients refuse a host with loopback alone"
        else:
            found.contestants.append(await _mooncake(stack, place, mooncake_python))
        if shutil.which("iperf3"):
            server = [*place.target, "iperf3", "-s", "-B", place.target_host, "-p", "5951", "--forceflush"]
            await stack.enter_async_context(program(server, r"(listening)"))
            found.iperf_port = "5951"
        else:
            found.missing["iperf3"] = "not installed (apt install iperf3)"
        yield found


async def _ask(one: _Contestant, path: str, case: Case) -> Sample:
    before = one.cpu_s()
    taken = await one.link.ask(path=path, size=case.size, batch=case.batch, repeats=case.repeats)
    return Sample(taken["put"], taken["get"], sum(taken["cpu"]) + one.cpu_s() - before)


async def _iperf(place: Place, port: str) -> Sample:
    process = await asyncio.create_subprocess_exec(
        *[*place.initiator, "iperf3", "-c", place.target_host, "-p", port, "-l", "1M", "-n", IPERF_BYTES, "-J"],
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    end: dict[str, Any] = json.loads(output)["end"]
    sent, used = end["sum_received"], end["cpu_utilization_percent"]
    scale = (64 << 20) / sent["bytes"]  # as one move of 64 MiB
    cpu_s = (used["host_total"] + used["remote_total"]) / 100 * sent["seconds"]
    return Sample([sent["seconds"] * scale], [], cpu_s * scale)


def _runs(path: str, case: Case, place: Place) -> bool:
    """Memory is copied on one host, and the store moves objects."""
    if path == "memcpy":
        return place.one_host
    return case == OBJECTS or not path.startswith(("store-", "unverified-"))


async def _round(found: _Field, samples: Samples | None, wanted: Sequence[str]) -> None:
    """Each path and case once, in turns. `samples` None: a warm-up."""
    place = found.place
    for case in CASES:
        for one in found.contestants:
            for path in one.paths:
                if _runs(path, case, place) and (not wanted or path in wanted):
                    sample = await _ask(one, path, case)
                    if samples is not None:
                        samples.add(place.name, path, case, sample)
    if found.iperf_port:
        sample = await _iperf(place, found.iperf_port)
        if samples is not None:
            samples.add(place.name, "iperf3", LARGE, sample)


async def run(rounds: int, mooncake_python: Path | None, wanted: Sequence[str]) -> None:
    """Both places, one after the other; then the tables and the RESULT."""
    samples = Samples()
    with places() as (there, why_not):
        for place in there:
            async with _bring_up(place, mooncake_python) as found:
                for number in range(rounds + 1):
                    await _round(found, samples if number else None, wanted)
                print_table(samples, place.name, found.missing)
                print(f"runnable processes, one minute's average: {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    if why_not:
        print(f"two network namespaces: not run, {why_not}")
    print("RESULT " + json.dumps(result(samples)))


def main() -> None:
    """Print the tables and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--mooncake-python", type=Path, default=Path(".venv-mooncake/bin/python"))
    parser.add_argument("--paths", default="", help="only these, as memcpy,tcp,store-shm (and iperf3)")
    arguments = parser.parse_args()
    wanted = [path for path in arguments.paths.split(",") if path]
    python = arguments.mooncake_python
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(run(arguments.rounds, python.absolute() if python.exists() else None, wanted))


if __name__ == "__main__":
    main()
