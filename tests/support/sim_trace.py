"""Traces of prompts for `support.sim_caches`, read from a file or made here, and what a run over one came to."""

import heapq
import json
import random
import statistics
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from support.router_fakes import VOCAB
from support.sim_caches import Asked, CachingMachine, TraceLoad
from support.sim_load import Seen
from support.sim_loop import run_sim

BLOCK = 512
"""Tokens that one number of the trace stands for."""
TICK_S = 3.0
"""All requests of one tick of the trace have the same time."""


@dataclass(frozen=True)
class Row:
    """One request of a trace. `blocks`: names of its prompt's blocks; the last may not be full."""

    at_s: float
    tokens: int
    output_tokens: int
    blocks: tuple[int, ...]


def read_rows(trace: Path, count: int) -> list[Row]:
    """The first ones of Mooncake's conversation trace."""
    with trace.open() as lines:
        raw = [json.loads(line) for line, _ in zip(lines, range(count), strict=False)]
    return [
        Row(one["timestamp"] / 1000, one["input_length"], one["output_length"], tuple(one["hash_ids"])) for one in raw
    ]


def talks(seed: int, count: int, *, people: int = 40, first: int = 8, more: int = 2, per_s: float = 3.0) -> list[Row]:
    """So many requests of people who talk on: each turn is the one before and a little more, behind a beginning that
    all share."""
    dice, names, rows = random.Random(seed), iter(range(1, 10**6)), []
    known = [[0, *(next(names) for _ in range(dice.randint(1, 2 * first)))] for _ in range(people)]
    for number in range(count):
        talk = dice.choice(known)
        talk += [next(names) for _ in range(more)]
        rows.append(Row(TICK_S * (number // round(TICK_S * per_s)), BLOCK * len(talk), 64, tuple(talk)))
    return rows


def asked_of(rows: Sequence[Row], stretch: float, *, bursts: bool, seed: int = 1) -> list[Asked]:
    """As they are sent: the requests of a tick at once, or anywhere in it."""
    dice, blocks = random.Random(seed), dict[int, list[int]]()
    asked = []
    for row in rows:
        prompt: list[int] = []
        for name in row.blocks:
            if name not in blocks:
                blocks[name] = random.Random(name).choices(range(VOCAB), k=BLOCK)
            prompt += blocks[name]
        at_s = stretch * (row.at_s + (0.0 if bursts else TICK_S * dice.random()))
        asked.append(Asked(at_s, prompt[: row.tokens], row.output_tokens))
    return sorted(asked, key=lambda one: one.at_s)


def ideal_cached(asked: Iterable[Asked], chunk_tokens: int, capacity_tokens: int) -> list[int]:
    """Of each prompt the tokens that need not be computed where one cache of that size serves all in their order."""
    cache, found, most = OrderedDict[int, None](), list[int](), capacity_tokens // chunk_tokens
    for one in asked:
        ends, name = range(chunk_tokens, len(one.prompt) + 1, chunk_tokens), 0
        names = [name := hash((name, *one.prompt[end - chunk_tokens : end])) for end in ends]
        usable = names[: (len(one.prompt) - 1) // chunk_tokens]
        hits = next((place for place, each in enumerate(usable) if each not in cache), len(usable))
        found.append(hits * chunk_tokens)
        for each in reversed(names):
            cache[each] = None
            cache.move_to_end(each)
        while len(cache) > most:
            cache.popitem(last=False)
    return found


@dataclass(frozen=True)
class Figures:
    """What a run came to. `goodput`: answers a second whose first token came within one."""

    hit_rate: float
    of_ideal: float
    ttft_p50_s: float
    ttft_p99_s: float
    goodput: float
    refused: float


def capacity(machine: CachingMachine) -> int:
    """Tokens of which the whole cluster can keep the KV: what prefillers choose from."""
    if machine.plain:
        return (machine.prefillers or machine.decoders) * machine.engine_tokens
    return (machine.prefillers + machine.decoders) * machine.segment_tokens


def stretch_of(rows: Sequence[Row], machine: CachingMachine, load: float) -> float:
    """By what times of a trace are multiplied so that its prefillers are so busy if all that can be cached is."""
    asked = asked_of(rows, 1.0, bursts=True)
    computed = sum(row.tokens for row in rows) - sum(ideal_cached(asked, machine.chunk_tokens, capacity(machine)))
    last_s = rows[-1].at_s + TICK_S
    return computed / (machine.prefill_rate * machine.prefillers * load * last_s)


def ideal_figures(asked: Sequence[Asked], machine: CachingMachine) -> Figures:
    """What prefillers with one queue, in order of arrival, and one cache as large as all of theirs would come to: none
    is idle while a prompt waits, and none computes what another one has. Only what was computed is handed over. Who
    chooses among nodes with caches of their own can hardly do better, unless short prompts overtake."""
    cached = ideal_cached(asked, machine.chunk_tokens, capacity(machine))
    free, ttft = [0.0] * machine.prefillers, list[float]()
    for one, hits in zip(asked, cached, strict=True):
        computed = len(one.prompt) - hits
        done_s = max(heapq.heappop(free), one.at_s) + computed / machine.prefill_rate
        heapq.heappush(free, done_s)
        handed_s = computed * machine.token_bytes / machine.far_rate
        ttft.append(done_s - one.at_s + handed_s + 2 * machine.net_s + machine.step_s)
    rate = sum(cached) / sum(len(one.prompt) for one in asked)
    return _figures(rate, rate, ttft, [one.at_s for one in asked], refused=0.0)


def run_trace(
    asked: Sequence[Asked], machine: CachingMachine, make: Callable[[], TraceLoad] | None = None, **router: object
) -> tuple[Figures, TraceLoad]:
    """Play it to a cluster. `make`: of another sort."""
    loads: list[TraceLoad] = []

    async def main() -> list[Seen]:
        loads.append(make() if make is not None else TraceLoad(machine, router=dict(router)))
        return await loads[0].play(asked)

    seen = run_sim(main, limit_s=1e6)
    load = loads[0]
    answered = [record for record in load.records if record.state == "ok"]
    tokens, hits = (sum(getattr(one, name) for one in answered) for name in ("prompt_tokens", "cached_tokens"))
    ideal = sum(ideal_cached(asked, machine.chunk_tokens, capacity(machine))) / sum(len(one.prompt) for one in asked)
    ttft = [one.ttft_s for one in seen if one.ttft_s is not None]
    refused = sum(one.error is not None for one in seen) / len(seen)
    return _figures(hits / tokens, ideal, ttft, [one.at_s for one in seen], refused=refused), load


def _figures(rate: float, ideal: float, ttft: list[float], at_s: list[float], *, refused: float) -> Figures:
    last_s, ttft = max(at_s) - min(at_s) + TICK_S, sorted(ttft)
    return Figures(
        hit_rate=rate,
        of_ideal=rate / ideal,
        ttft_p50_s=statistics.median(ttft),
        ttft_p99_s=ttft[int(0.99 * len(ttft))],
        goodput=sum(one < 1.0 for one in ttft) / last_s,
        refused=refused,
    )
