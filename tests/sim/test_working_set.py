"""The benchmark of a working set larger than memory, on a trace of its own kind that is made here."""

import json
import logging
import random
from pathlib import Path
from statistics import fmean

import pytest

from benchmarks.tier_working_set import NODES, ROOM, Row, World, plan_of, read_requests, run


def rows_of(seed: int, trace: Path) -> dict[str, Row]:
    """Of 100 requests in 25 talks."""
    dice, names, rows = random.Random(seed), iter(range(10**6)), []
    talks = [[next(names) for _ in range(8)] for _ in range(25)]
    for number in range(100):
        talk = dice.choice(talks)
        rows.append(
            {
                "timestamp": 3000 * (number // 5),
                "input_length": 512 * len(talk),
                "output_length": 64,
                "hash_ids": list(talk),
            }
        )
        talk += [next(names), next(names)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    world = World(prefill_rate=4000.0, kv_bytes=131_072, disk_rate=1.25e9, load=0.5)
    requests, chunks = read_requests(trace, 100, world)
    quarter, plenty = chunks * ROOM // 4 // len(NODES), 2 * chunks * ROOM
    return {
        "none": run("none", plan_of(requests, quarter, world, None)),
        "disk": run("disk", plan_of(requests, quarter, world, chunks * ROOM)),
        "unlimited": run("unlimited", plan_of(requests, plenty, world, None)),
    }


@pytest.mark.slow
def test_a_disk_keeps_the_hit_rate_of_unlimited_memory(tmp_path):
    """Over several traces: of one so short a single choice between loading and computing moves the rate by points."""
    logging.disable(logging.CRITICAL)
    try:
        found = [rows_of(seed, tmp_path / f"trace{seed}.jsonl") for seed in range(1, 6)]
    finally:
        logging.disable(logging.NOTSET)
    assert not any(row.failed for rows in found for row in rows.values())
    none, disk, unlimited = (fmean(rows[name].hit_rate for rows in found) for name in ("none", "disk", "unlimited"))
    assert none < unlimited - 0.1, "memory was too small"
    assert disk > unlimited - 0.15 * (unlimited - none), "of what memory alone loses the disk keeps most"
    assert all(rows["disk"].promoted for rows in found)
    assert fmean(r["disk"].ttft_p99_s for r in found) < 1.05 * fmean(r["none"].ttft_p99_s for r in found)
