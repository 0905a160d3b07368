"""What clients see of faults: processes killed, stopped, hanging, slow or sick, one of them or two, under load.

Systems: `sim` and `torch` are kvferry's own cluster of real processes (two prefillers, two decoders, a store, a
metadata server, a router), with its defaults and the simulated or the embedded engine; `plain` is its router in front
of four mock servers; `sglang-router`, `vllm-router` and `smg` are others' routers in front of the same, with their
defaults. A mock decoder needs no KV from anybody: it answers whether or not its prefiller did, which others' routers
gain by. A cell is a fault, or two at once, that come once a quarter of its requests is answered and stay until its
end; what was killed is started again by kvferry's launcher, and by nobody among mock servers. Every second request is
streamed.

Judged in each cell: every request is answered; each text is what a system that nothing has happened to answers
(greedy); a first token, the longest silence of a stream and a whole answer take at most 2 s more than without a fault,
beyond what the fault itself takes (a process that hangs: 5 s before a first token and 2 s between two, as nobody can
know it before; `benchmarks.faults_cells`); 5 s after the last answer no reservation, read lease, waiter or request is
held by anybody who can be asked.

Estimate: a cell takes 8 to 20 s, and a minute where requests are never answered: half an hour for all of kvferry's.
Run: python -m benchmarks.faults [--systems sim torch plain] [--cells "stop decode-0"] [--requests 40]
Others' routers, from an environment of their own (pip install sglang-router==0.3.2 vllm-router==0.1.17 smg==1.13.0):
python -m benchmarks.faults --systems plain sglang-router vllm-router smg --peers-python FOLDER/bin/python
"""

import argparse
import asyncio
import json
import logging
import random
import secrets
import sys
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

from benchmarks.children import scratch_folder
from benchmarks.faults_cells import HELD_S, OF_A_CLUSTER, OF_SERVERS, Cell, Fault, Own, Verdict, cell, judge, normal
from benchmarks.faults_load import AT_ONCE, Load, Seen
from benchmarks.faults_own import ENGINES, own_cluster
from benchmarks.faults_servers import COMMANDS, PEERS, servers
from kvcore.process.service import loop_factory

BUSY_S = 3.0
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "keys", "and", "values", "go", "on")


class System(Protocol):
    """What is hurt: kvferry's own cluster, or a router with its servers."""

    url: str
    model: str
    max_tokens: int
    fresh: bool
    """Whether each cell needs one of its own."""

    def more(self, cell: str) -> dict[str, object]:
        """Fields of each body."""
        ...

    async def texts(self, prompts: Sequence[str]) -> list[str]:
        """The right answers."""
        ...

    async def busy(self, whom: str) -> bool:
        """Whether it works for a request now; true of what is no node."""
        ...

    async def strike(self, fault: Fault) -> None:
        """It has happened when this returns."""
        ...

    def heal(self) -> None:
        """It goes on no longer."""
        ...

    async def held(self) -> str:
        """What anybody holds for a request; empty: nothing."""
        ...

    async def record(self, request_id: str) -> str:
        """What the router knows of the request; empty: nothing."""
        ...

    async def again(self) -> bool:
        """Whether another cell may begin, with a router that knows nothing of this one."""
        ...


def make_prompts(count: int) -> list[str]:
    """About 600 bytes each; of four neighbours all begin alike."""
    draw = random.Random(7)
    heads = [" ".join(draw.choices(WORDS, k=60)) for _ in range(-(-count // 4))]
    return [f"{heads[number // 4]} {number} {' '.join(draw.choices(WORDS, k=60))}" for number in range(count)]


async def strike(system: System, fault: Fault, missed: list[str]) -> None:
    """In the midst of its work. Who had none for BUSY_S is added to `missed`."""
    until = asyncio.get_running_loop().time() + BUSY_S
    while not (busy := await system.busy(fault.whom)) and asyncio.get_running_loop().time() < until:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    missed += [] if busy else [fault.whom]
    await system.strike(fault)


async def one_cell(
    system: System, subject: Cell, prompts: Sequence[str], held_s: float = HELD_S
) -> tuple[list[Seen], str, list[str]]:
    """What its clients saw, what was still held `held_s` after them, and who had nothing to do when it was struck."""
    missed: list[str] = []
    load = Load(
        system.url,
        system.model,
        prompts,
        system.max_tokens,
        system.more(f"{subject.name} {secrets.token_hex(4)}"),
        subject.leave_s,
    )
    async with asyncio.TaskGroup() as tasks:
        running = tasks.create_task(load.run())
        await load.ended(len(prompts) // 4)
        for fault in subject.faults:
            tasks.create_task(strike(system, fault, missed))
    if any(fault.whom.startswith("metadata") for fault in subject.faults):
        system.heal()  # who keeps the books is to be asked
    held, until = await system.held(), asyncio.get_running_loop().time() + held_s
    while held and asyncio.get_running_loop().time() < until:
        await asyncio.sleep(0.2)
        held = await system.held()
    system.heal()
    return running.result(), held, missed


class Matrix:
    """Runs the cells of one system after each other, and prints each."""

    def __init__(self, name: str, prompts: Sequence[str], python: str, records: bool) -> None:
        self.verdicts: list[Verdict] = []
        self._name, self._prompts, self._python, self._records = name, prompts, python, records
        self._usual: Own | None = None
        self._texts: list[str] = []

    async def run(self, wanted: Sequence[Cell]) -> list[Verdict]:
        """A system that is not whole again after a cell is replaced by a new one."""
        todo = list(wanted)
        while todo:
            with scratch_folder() as folder:
                async with self._open(Path(folder)) as system:
                    self._texts = self._texts or await system.texts(self._prompts)
                    while todo:
                        subject = todo.pop(0)
                        await self._cell(system, subject)
                        if system.fresh:
                            break
                        if not await system.again():
                            print(f"{self._name:<14} is not whole again after {subject.name}: a new one", flush=True)
                            break
        return self.verdicts

    def _open(self, folder: Path) -> AbstractAsyncContextManager[System]:
        if self._name in ENGINES:
            return own_cluster(self._name, folder)
        return servers(self._name, folder, self._python)

    async def _cell(self, system: System, subject: Cell) -> None:
        seen, held, missed = await one_cell(system, subject, self._prompts)
        if self._usual is None:
            self._usual = normal(seen)
        verdict = judge(subject, seen, self._texts, held, self._usual)
        self.verdicts.append(verdict)
        took = verdict.took
        times = f"{took.first_s:>7.2f}{took.gap_s:>7.2f}{took.whole_s:>7.2f}"
        counts = f"{f'{verdict.answered}/{verdict.wanted}':>8}{verdict.same:>6}"
        what = "; ".join(verdict.problems) or "ok"
        what += f" ({', '.join(missed)} had no request: it shows nothing)" if missed else ""
        print(f"{self._name:<14}{subject.name:<46}{counts}{times}  {what}", flush=True)
        if self._records and verdict.problems:
            worst = max(seen, key=lambda one: (bool(one.problem), one.total_s))
            print(f"{'':<14}{await system.record(worst.id)}", flush=True)


def figures(verdicts: Sequence[Verdict]) -> dict[str, object]:
    """Of one system, for the RESULT."""
    return {
        "cells": len(verdicts),
        "passed": sum(not one.problems for one in verdicts),
        "unanswered": sum(one.wanted - one.answered for one in verdicts),
        "other_texts": sum(one.answered - one.same for one in verdicts),
        "failed": [one.cell for one in verdicts if one.problems],
        "answered": {one.cell: one.answered for one in verdicts},
        "longest_gap_s": round(max(one.took.gap_s for one in verdicts), 2),
    }


async def run(systems: Sequence[str], names: Sequence[str], requests: int, python: str, records: bool) -> bool:
    """Print the matrix and the RESULT; whether every cell of kvferry's passed."""
    prompts, result = make_prompts(requests), dict[str, dict[str, object]]()
    print(f"{'system':<14}{'cell':<46}{'answered':>8}{'same':>6}{'first s':>7}{'gap s':>7}{'whole s':>7}")
    for system in systems:
        known = OF_A_CLUSTER if system in ENGINES else OF_SERVERS
        wanted = [cell(""), *map(cell, names)] if names else known
        result[system] = figures(await Matrix(system, prompts, python, records).run(wanted))
    own = {system: found for system, found in result.items() if system not in PEERS}
    peers = {system: found for system, found in result.items() if system in PEERS}
    print("RESULT " + json.dumps({"requests": requests, "at_once": AT_ONCE, **own, "peers": peers}))
    return all(not found["failed"] for found in own.values())


def main() -> None:
    """Print the matrix; the exit code is 1 if a cell of kvferry's fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*ENGINES, *COMMANDS]
    parser.add_argument("--systems", nargs="+", choices=known, default=[one for one in known if one not in PEERS])
    parser.add_argument("--cells", nargs="+", default=[], help='faults to try, as "kill decode-0 + stop prefill-0"')
    parser.add_argument("--requests", type=int, default=40, help="in each cell")
    parser.add_argument("--peers-python", default=sys.executable, help="the Python that has others' routers")
    parser.add_argument("--records", action="store_true", help="print the record of a failed cell's worst request")
    arguments = parser.parse_args()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # a proxy whose server dies is no news
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        told = (arguments.systems, arguments.cells, arguments.requests, arguments.peers_python, arguments.records)
        passed = runner.run(run(*told))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
