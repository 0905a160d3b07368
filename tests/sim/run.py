"""Replays one seed of the simulation: `python -m tests.sim.run SEED [-q]` prints its trace, counts and problems."""

import sys
from pathlib import Path


def main() -> int:
    """Exit status 1 if the seed fails."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from support.sim_cluster import run_seed

    outcome = run_seed(int(sys.argv[1]))
    if "-q" not in sys.argv:
        print("\n".join(outcome.lines))
    print(dict(sorted(outcome.counts.items())), outcome.digest)
    print("\n".join(f"PROBLEM {problem}" for problem in outcome.problems) or "no problem")
    return bool(outcome.problems)


if __name__ == "__main__":
    sys.exit(main())
