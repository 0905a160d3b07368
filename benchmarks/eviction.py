"""Eviction policies on one trace of prompts: which share of the tokens each finds in a memory that is too small.

Pure: the policies of `kvcore.eviction` with chains, as segments use them; no clock, no bytes. A prompt's chunks stay
while it is served. Bounds: unlimited memory, and Belady's optimum, which knows the future and evicts what is used again
last. Without a trace a made-up one is taken: conversations of several turns over a few system prompts, and prompts that
come once. The trace of the figures in docs/benchmarks.md is Mooncake's (github.com/kvcache-ai/Mooncake,
FAST25-release/traces/conversation_trace.jsonl).

    python -m benchmarks.eviction [TRACE] [--requests N]
"""

import argparse
import heapq
import json
import random
from array import array
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kvcore.eviction.evictor import POLICY_NAMES, Evictor, PolicyName, new_policy
from kvcore.eviction.row_chains import FIRST, RowChains

SHARES = (2, 4, 8, 16)
CHUNK = 512
UNLIMITED, OPTIMUM = "unlimited", "belady"


@dataclass(frozen=True)
class Prompt:
    """Names of its chunks, and tokens of each."""

    chunks: list[int]
    tokens: list[int]


def read_trace(path: Path, count: int | None) -> list[Prompt]:
    """The trace's first requests."""
    prompts = []
    with path.open() as lines:
        for at, line in enumerate(lines):
            if at == count:
                break
            row = json.loads(line)
            names, length = row["hash_ids"], row["input_length"]
            prompts.append(Prompt(names, [max(1, min(CHUNK, length - CHUNK * n)) for n in range(len(names))]))
    return prompts


def made_up(count: int) -> list[Prompt]:
    """Two of three requests are the next turn of one of the latest conversations, the third a prompt of its own."""
    dice, fresh = random.Random(1), iter(range(1, 1 << 40))
    systems = [[next(fresh) for _ in range(4)] for _ in range(8)]
    talks: deque[list[int]] = deque(maxlen=400)
    prompts = []
    for _ in range(count):
        if dice.random() < 0.33 or not talks:
            chunks = [*dice.choice(systems), *(next(fresh) for _ in range(dice.randint(2, 40)))]
            talks.append(chunks)
        else:
            at = -1 - min(int(dice.expovariate(1 / 60)), len(talks) - 1)
            chunks = talks[at] = [*talks[at], *(next(fresh) for _ in range(dice.randint(1, 4)))]
        prompts.append(Prompt(chunks, [CHUNK] * len(chunks)))
    return prompts


def hit_tokens(prompts: list[Prompt], policy: PolicyName, capacity: int) -> int:
    """Tokens of the longest prefixes that are found, with room for `capacity` chunks."""
    count = 1 + max(chunk for prompt in prompts for chunk in prompt.chunks)
    parents, children = array("i", [FIRST]) * count, array("i", [0]) * count
    chains = RowChains(parents, children)
    serving: set[int] = set()
    evictor = Evictor[int](new_policy(policy), lambda chunk: chunk in serving or children[chunk] > 0)
    there: set[int] = set()
    hits = 0
    for prompt in prompts:
        found = _prefix(prompt, there)
        hits += sum(prompt.tokens[:found])
        serving.update(prompt.chunks)
        stored = [chunk for chunk in prompt.chunks if chunk in there]
        for chunk in reversed(stored):
            evictor.use(chunk)
        new = []
        for at in range(found, len(prompt.chunks)):
            chunk = prompt.chunks[at]
            if chunk in there:
                continue
            if len(there) == capacity:
                victim = evictor.evict()
                if victim is None:
                    break
                there.discard(victim)
                if (parent := chains.left(victim)) != FIRST:
                    evictor.let_go(parent)
            there.add(chunk)
            if at:
                chains.join(chunk, prompt.chunks[at - 1])
            new.append(chunk)
        for chunk in reversed(new):
            evictor.add(chunk)
        serving.clear()
        for chunk in reversed([*stored, *new]):
            evictor.refresh(chunk)
    return hits


def best_tokens(prompts: list[Prompt], capacity: int) -> int:
    """The same for Belady's optimum. What continues a chunk is never used sooner than it: prefixes stay."""
    upcoming: dict[int, deque[int]] = {}
    for number, prompt in enumerate(prompts):
        for chunk in prompt.chunks:
            upcoming.setdefault(chunk, deque()).append(number)
    there: dict[int, int] = {}
    order: list[tuple[int, int, int]] = []
    hits = 0
    for prompt in prompts:
        hits += sum(prompt.tokens[: _prefix(prompt, there)])
        for depth, chunk in enumerate(prompt.chunks):
            upcoming[chunk].popleft()
            there[chunk] = upcoming[chunk][0] if upcoming[chunk] else len(prompts)
            heapq.heappush(order, (-there[chunk], -depth, chunk))
        while len(there) > capacity:
            again, _, chunk = heapq.heappop(order)
            if there.get(chunk) == -again:
                del there[chunk]
    return hits


def _prefix(prompt: Prompt, there: set[int] | dict[int, int]) -> int:
    return next((at for at, chunk in enumerate(prompt.chunks) if chunk not in there), len(prompt.chunks))


def rates(prompts: list[Prompt]) -> Iterator[tuple[str, list[float]]]:
    """Name, and the hit rate at each share of the working set."""
    total = sum(sum(prompt.tokens) for prompt in prompts)
    distinct = len({chunk for prompt in prompts for chunk in prompt.chunks})
    capacities = [distinct // share for share in SHARES]
    for policy in POLICY_NAMES:
        yield policy, [hit_tokens(prompts, policy, capacity) / total for capacity in capacities]
    yield OPTIMUM, [best_tokens(prompts, capacity) / total for capacity in capacities]
    yield UNLIMITED, [hit_tokens(prompts, "lru", distinct) / total] * len(SHARES)


def main() -> None:
    """One table, one RESULT."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("trace", nargs="?", type=Path, help="without: a made-up one of 4,000 requests")
    parser.add_argument("--requests", type=int, help="only the first N of the trace")
    options = parser.parse_args()
    prompts = read_trace(options.trace, options.requests) if options.trace else made_up(options.requests or 4000)
    print(f"{len(prompts)} prompts, {sum(sum(prompt.tokens) for prompt in prompts):,} tokens; hit rate in tokens")
    print("| policy | " + " | ".join(f"1/{share} of the working set" for share in SHARES) + " |")
    print("|---|" + "---|" * len(SHARES))
    result = {}
    for name, found in rates(prompts):
        print(f"| {name} | " + " | ".join(f"{100 * rate:.1f} %" for rate in found) + " |", flush=True)
        result[name] = {f"1/{share}": round(rate, 4) for share, rate in zip(SHARES, found, strict=True)}
    print("RESULT " + json.dumps({"hit_rates": result}))


if __name__ == "__main__":
    main()
