"""The benchmark of a working set larger than memory, on a trace of its own kind that is made here."""

import json
import logging
import random

import pytest

from benchmarks.tier_working_set import NODES, ROOM, World, plan_of, read_requests, run


@pytest.mark.slow
def test_a_disk_keeps_the_hit_rate_of_unlimited_memory(tmp_path):
    dice, names, rows = random.Random(1), iter(range(10**6)), []
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
    trace = tmp_path / "trace.jsonl"
    trace.write_text("\n".join(map(json.dumps, rows)))
    world = World(prefill_rate=4000.0, kv_bytes=131_072, disk_rate=1.25e9, load=0.5)
    requests, chunks = read_requests(trace, 100, world)
    logging.disable(logging.CRITICAL)
    try:
        quarter, plenty = chunks * ROOM // 4 // len(NODES), 2 * chunks * ROOM
        none = run("none", plan_of(requests, quarter, world, None))
        disk = run("disk", plan_of(requests, quarter, world, chunks * ROOM))
        unlimited = run("unlimited", plan_of(requests, plenty, world, None))
    finally:
        logging.disable(logging.NOTSET)
    assert none.failed == disk.failed == unlimited.failed == 0
    assert none.hit_rate < unlimited.hit_rate - 0.1, "memory was too small"
    assert disk.hit_rate > unlimited.hit_rate - 0.03
    assert disk.promoted and disk.ttft_p99_s < 1.05 * none.ttft_p99_s
