"""The routing policies over a trace of conversations, in virtual time: hit rate, first tokens, goodput.

    python -m benchmarks.policies TRACE [--requests 2000] [--loads 0.4 0.7 0.9] [--sizes 2 4] [--only prefix_aware ...]
    python -m benchmarks.policies TRACE --sizes 64 --requests 10000 --only prefix_aware least_loaded --worlds store

The router's own admission, policies and requests over nodes that are queues and cache KV
(`tests/support/sim_caches.py`): an 8B model, 100 Gbit/s between nodes. Worlds: `store`, nodes of ours; `plain`, vLLM
servers, each with a cache of its own. Arrivals: the trace's ticks of 3 s as bursts, or spread over them, in as many
ways as `--spreads` says: then medians are shown, as one prompt of 113k tokens is 5 % of what can be hit. `--loads`: of
the prefillers, if all were cached that can be. Besides the policies that a cluster file can name, `text_tree`, as
SGLang's router chooses (`benchmarks/text_tree.py`), and `ideal`: one queue and one cache for all prefillers. TRACE:
Mooncake's (github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl), or `talks`: conversations
made here, with more in common. The last line is `RESULT` and JSON.
"""

import argparse
import json
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.sim_caches import Asked, CachingMachine, TraceLoad
from support.sim_trace import Figures, asked_of, ideal_figures, read_rows, run_trace, stretch_of, talks

from benchmarks.text_tree import TextTree
from kvcore.config.routing import RoutingPolicy

TEXT_TREE, IDEAL = "text_tree", "ideal"


def figures(asked: list[Asked], machine: CachingMachine, policy: str) -> Figures:
    """One run."""
    if policy == IDEAL:
        return ideal_figures(asked, machine)
    if policy != TEXT_TREE:
        return run_trace(asked, machine, policy=RoutingPolicy(policy))[0]

    def make() -> TraceLoad:
        tree = TextTree()
        return TraceLoad(machine, policy=tree.make(), on_sent=tree.sent, on_ended=tree.ended)

    return run_trace(asked, machine, make)[0]


def main() -> None:
    """Print a table and the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--loads", type=float, nargs="+", default=[0.4, 0.7, 0.9])
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4], help="prefillers, and as many decoders")
    parser.add_argument("--worlds", nargs="+", choices=["store", "plain"], default=["store", "plain"])
    parser.add_argument("--arrivals", nargs="+", choices=["jittered", "bursts"], default=["jittered", "bursts"])
    parser.add_argument("--spreads", type=int, default=1, help="ways in which jittered arrivals are spread")
    parser.add_argument("--only", nargs="+", default=[*(policy.value for policy in RoutingPolicy), TEXT_TREE, IDEAL])
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    made = options.trace == "talks"
    rows = talks(1, options.requests) if made else read_rows(Path(options.trace), options.requests)
    result: dict[str, dict[str, dict[str, float]]] = {}
    for world in options.worlds:
        for size in options.sizes:
            machine = CachingMachine(size, size, plain=world == "plain")
            for load in options.loads:
                stretch = stretch_of(rows, machine, load)
                for arrivals in options.arrivals:
                    bursts = arrivals == "bursts"
                    seeds = range(1, 2 if bursts else options.spreads + 1)
                    spread = [asked_of(rows, stretch, bursts=bursts, seed=seed) for seed in seeds]
                    name = f"{world} {size}P{size}D {arrivals} {load:g}"
                    found = result[name] = {}
                    for policy in options.only:
                        each = [asdict(figures(asked, machine, policy)) for asked in spread]
                        found[policy] = {key: round(median(one[key] for one in each), 4) for key in each[0]}
                        told = "  ".join(f"{key} {value:8.3f}" for key, value in found[policy].items())
                        print(f"{name:28} {policy:16} {told}", flush=True)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
