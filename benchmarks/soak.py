"""Minutes of mixed load on a whole cluster while processes are killed, stopped and made sick at random.

Two prefillers, two decoders, a store, a metadata server, a router, with their defaults and the simulated engine, whose
answers are known. Three kinds of clients ask without pause: short prompts that share their beginnings, long ones that
nobody has asked before, and ones half of whose clients leave. Every few seconds something happens to a process: -9,
SIGSTOP for one to four seconds, errors or slow streams for as long. Never killed are the router (its clients would lose
their connections), `prefill-1` and `decode-1`, which so grow as old as the run.

Judged: every request is answered, with the right text; of every process that lived for half of the run, memory that is
its own (RssAnon) and open descriptors are flat from the second quarter of its life to the last; after the load nothing
is held; reservations and read leases are as many at the end as at the beginning.

Run: python -m benchmarks.soak [--minutes 20] [--seed 0]
"""

import argparse
import asyncio
import json
import logging
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from benchmarks.children import scratch_folder
from benchmarks.faults_cells import HELD_S, Fault
from benchmarks.faults_load import Load, Seen
from benchmarks.faults_own import OwnCluster, own_cluster, sim_text
from kvcore.process.service import loop_factory

KILLED = ("prefill-0", "decode-0", "prefill-0 engine", "decode-0 engine", "metadata-server", "store-0")
STOPPED = (*KILLED, "prefill-1", "decode-1", "prefill-1 engine", "decode-1 engine", "router")
SICK = ("prefill-0", "prefill-1", "decode-0", "decode-1")
SAMPLE_S = 2.0
GROWTH_MB, GROWTH_SHARE = 10.0, 0.1
"""Of a process's own memory, over half of its life: caches that fill, and what an allocator keeps."""
MORE_DESCRIPTORS = 16
WORDS = ("keys", "values", "tokens", "blocks", "chunks", "leases", "nodes", "tiers", "prompts", "answers")


@dataclass(frozen=True, slots=True)
class Kind:
    """Clients of one kind: how they ask."""

    name: str
    words: int
    max_tokens: int
    at_once: int
    leave: float | None = None
    shared: bool = False
    """Prompts begin as others do, and are asked again."""


KINDS = (
    Kind("short", words=80, max_tokens=24, at_once=6, shared=True),
    Kind("long", words=500, max_tokens=48, at_once=4),
    Kind("leaving", words=120, max_tokens=40, at_once=4, leave=0.7),
)


@dataclass(slots=True)
class Life:
    """Of one process: (memory in MB, descriptors) every SAMPLE_S."""

    name: str
    samples: list[tuple[float, int]] = field(default_factory=list)

    def growth(self) -> dict[str, float]:
        """From the second quarter of its life to the last, medians."""
        quarter = len(self.samples) // 4
        early, late = self.samples[quarter : 2 * quarter], self.samples[-quarter:]
        return {
            "mb": round(statistics.median(mb for mb, _ in early), 1),
            "grown_mb": round(statistics.median(mb for mb, _ in late) - statistics.median(mb for mb, _ in early), 1),
            "descriptors": round(statistics.median(count for _, count in early)),
            "more_descriptors": round(statistics.median(n for _, n in late) - statistics.median(n for _, n in early)),
        }

    def curve(self) -> list[float]:
        """Memory in MB over its life, in eight parts, medians."""
        ends = [len(self.samples) * part // 8 for part in range(9)]
        return [round(statistics.median(mb for mb, _ in self.samples[a:b]), 1) for a, b in pairwise(ends) if a < b]


def is_flat(growth: dict[str, float]) -> bool:
    """Whether nothing grows."""
    most_mb = max(GROWTH_MB, GROWTH_SHARE * growth["mb"])
    return growth["grown_mb"] <= most_mb and growth["more_descriptors"] <= MORE_DESCRIPTORS


class Soak:
    """What is counted while it goes on."""

    def __init__(self, system: OwnCluster, seed: int) -> None:
        self.seen: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.examples: list[str] = []
        self.lives: dict[tuple[str, int], Life] = {}
        self.leases: list[int] = []
        self.longest_s = 0.0
        self._system, self._draw = system, random.Random(seed)
        self._over = False

    async def run(self, minutes: float) -> None:
        """All of it, up to the last answer. May be called again, for more."""
        self._over = False
        async with asyncio.TaskGroup() as tasks:
            for kind in KINDS:
                tasks.create_task(self._ask(kind))
            tasks.create_task(self._hurt())
            tasks.create_task(self._watch())
            end = asyncio.get_running_loop().time() + 60 * minutes
            while (left_s := end - asyncio.get_running_loop().time()) > 0:
                await asyncio.sleep(min(60.0, left_s))
                print(f"{max(0.0, left_s) / 60:5.1f} min left, {dict(self.seen)}, {dict(self.faults)}", flush=True)
            self._over = True

    async def _ask(self, kind: Kind) -> None:
        draw, number = random.Random(kind.name), 0
        heads = [" ".join(draw.choices(WORDS, k=kind.words // 2)) for _ in range(8)]
        while not self._over:
            prompts = []
            for _ in range(4 * kind.at_once):
                number += 1
                head = draw.choice(heads) if kind.shared else f"{number}"
                prompts.append(f"{head} {' '.join(draw.choices(WORDS, k=kind.words // 2))}")
            more = self._system.more(kind.name)
            load = Load(self._system.url, self._system.model, prompts, kind.max_tokens, more, kind.leave, kind.at_once)
            await self._count(kind, prompts, await load.run())

    async def _count(self, kind: Kind, prompts: Sequence[str], seen: Sequence[Seen]) -> None:
        for one in seen:
            what = "left" if one.left else "unanswered" if one.problem else "answered"
            self.longest_s = max(self.longest_s, one.total_s)
            if what == "answered":
                right = await asyncio.to_thread(sim_text, prompts[one.number], kind.max_tokens)
                what = what if one.text == right else "other_text"
            if what in {"unanswered", "other_text"} and len(self.examples) < 10:
                self.examples.append(f"{kind.name}: {what} {one.problem}")
                print(self.examples[-1], flush=True)
            self.seen[what] += 1

    async def _hurt(self) -> None:
        while not self._over:
            await asyncio.sleep(self._draw.uniform(3.0, 8.0))
            kind = self._draw.choice(("kill", "stop", "stop", "error", "slow"))
            whom = self._draw.choice({"kill": KILLED, "stop": STOPPED}.get(kind, SICK))
            self.faults[kind] += 1
            with suppress(ProcessLookupError):  # it is being started again
                if kind == "stop" and whom == "router":
                    await self._system.strike(Fault(kind, whom))
                elif self._system.pid(whom):
                    await self._system.strike(Fault(kind, whom))
                    await asyncio.sleep(self._draw.uniform(1.0, 4.0))
            self._system.heal()

    async def _watch(self) -> None:
        while not self._over:
            for name, pid in self._system.pids():
                with suppress(OSError):
                    life = self.lives.setdefault((name, pid), Life(name))
                    life.samples.append((own_mb(pid), num_descriptors(pid)))
            if (count := await self._system.leases()) is not None:
                self.leases.append(count)
            await asyncio.sleep(SAMPLE_S)

    def old(self, minutes: float) -> dict[str, Life]:
        """Those that lived for half of the time, by name."""
        half = 60 * minutes / SAMPLE_S / 2 * 0.8
        return {life.name: life for life in self.lives.values() if len(life.samples) >= max(8, half)}


def own_mb(pid: int) -> float:
    """Memory that is a process's own: without segments and files that it maps."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise ProcessLookupError(pid)


def num_descriptors(pid: int) -> int:
    """That a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def run(minutes: float, seed: int) -> bool:
    """Print what happens and the RESULT; whether all was as promised."""
    with scratch_folder() as folder:
        async with own_cluster("sim", Path(folder)) as system:
            soak = Soak(system, seed)
            await soak.run(minutes)
            held, until = await system.held(), asyncio.get_running_loop().time() + HELD_S
            while held and asyncio.get_running_loop().time() < until:
                await asyncio.sleep(0.2)
                held = await system.held()
    lives = soak.old(minutes)
    old = {name: life.growth() for name, life in lives.items()}
    third = max(1, len(soak.leases) // 3)
    leases = [statistics.mean(soak.leases[third : 2 * third]), statistics.mean(soak.leases[-third:])]
    grown = [name for name, growth in old.items() if not is_flat(growth)]
    for name, growth in sorted(old.items()):
        print(f"{name:<20}{growth}, MB {lives[name].curve()}{'' if name not in grown else '  GROWS'}")
    problems = [*soak.examples, *(f"{name} grows" for name in grown), *([f"held: {held}"] if held else [])]
    if leases[1] > 2 * leases[0] + 10:
        problems.append(f"leases grow: {leases[0]:.0f} to {leases[1]:.0f}")
    result = {
        "minutes": minutes,
        **{what: soak.seen[what] for what in ("answered", "left", "unanswered", "other_text")},
        "faults": dict(soak.faults),
        "longest_s": round(soak.longest_s, 2),
        "leases": [round(one, 1) for one in leases],
        "processes": old,
        "held": held,
        "problems": problems,
    }
    print("RESULT " + json.dumps(result))
    return not problems


def main() -> None:
    """Print what happens and the RESULT line; the exit code is 1 if anything is not as promised."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--seed", type=int, default=0, help="of what happens to whom")
    arguments = parser.parse_args()
    logging.getLogger("aiohttp.server").setLevel(logging.CRITICAL)  # a proxy whose server dies is no news
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        passed = runner.run(run(arguments.minutes, arguments.seed))
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
