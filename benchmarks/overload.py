"""Load beyond what the nodes can take, in virtual time: what is answered in time, and how one client bears another.

    python -m benchmarks.overload

The router's own admission, policy and requests over nodes that are queues (`tests/support/sim_load.py`): it measures
decisions, so a busy machine changes no figure. The last line is `RESULT` and JSON.
"""

import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from support.sim_load import Flow, Machine, goodput, p99, run_load

MACHINE = Machine(prefillers=4, decoders=4)
CAPACITY = MACHINE.prefillers * MACHINE.prefill_rate / 195
"""Requests a second: a Flow's prompts have so many tokens."""
SECONDS = 30.0
SEEDS = range(3)


def overload(times: float, *, admits: bool) -> dict[str, float]:
    """Means over the seeds. A second: answers whose first token came within one."""
    found, drains, refused = [], [], []
    for seed in SEEDS:
        seen = run_load([Flow(times * CAPACITY, until_s=SECONDS)], seed, MACHINE, admits=admits)
        found.append(goodput(seen, until_s=SECONDS))
        drains.append(max(one.at_s + (one.total_s or 0.0) for one in seen) - max(one.at_s for one in seen))
        refused.append(sum(one.error is not None for one in seen) / len(seen))
    mean = statistics.fmean
    return {"goodput": round(mean(found), 2), "drain_s": round(mean(drains), 2), "refused": round(mean(refused), 3)}


def beside(seed: int, *, admits: bool) -> float:
    """p99 of the TTFT of a client at 0.2 of capacity, beside one at 1.6, over what it is alone."""
    quiet, loud = Flow(0.2 * CAPACITY, "B", 60.0), Flow(1.6 * CAPACITY, "A", 60.0)
    alone = run_load([quiet], seed, MACHINE, admits=admits)
    return p99(run_load([quiet, loud], seed, MACHINE, admits=admits), "B") / p99(alone, "B")


def main() -> None:
    """Print a table and the result."""
    result: dict[str, object] = {"capacity_per_s": round(CAPACITY, 1)}
    for admits, name in ((True, "admission"), (False, "without")):
        rows = {f"x{times:g}": overload(times, admits=admits) for times in (0.5, 1, 2, 5)}
        ratio = statistics.fmean(beside(seed, admits=admits) for seed in SEEDS)
        for load, row in rows.items():
            print(f"{name:10} {load:5} goodput {row['goodput']:6.2f}/s refused {row['refused']:.1%}")
        print(f"{name:10} B at 0.2 beside A at 1.6: p99 of its TTFT {ratio:.2f} times what it is alone", flush=True)
        result[name] = {**rows, "beside": round(ratio, 2)}
    print("RESULT", json.dumps(result))


if __name__ == "__main__":
    main()
