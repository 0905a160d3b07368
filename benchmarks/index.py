"""The router's prefix index: blocks stored a second, microseconds to find a prefix of 32 blocks, a node's death.

    python -m benchmarks.index

Target: 2 M blocks/s stored, 15 us to find 32 blocks held by several nodes. The keys are made before the clock starts.
"""

import json
import os
import time

from kvcore.types import ChunkKey
from router.routing.index import PrefixIndex

BLOCKS = 1_000_000
BATCH = 32
FINDS = 20_000


def main() -> None:
    raw = os.urandom(16 * BLOCKS)
    batches = [
        [ChunkKey(raw[16 * i : 16 * i + 16]) for i in range(start, start + BATCH)] for start in range(0, BLOCKS, BATCH)
    ]
    index = PrefixIndex()
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        index.store(f"node-{number % 8}", batch, "s")
    stored_s = time.perf_counter() - started
    for number in range(0, FINDS, 3):  # several holders, of unequal prefixes
        index.store(f"node-{(number + 1) % 8}", batches[number][: number % BATCH], "s")
    started = time.perf_counter()
    for batch in batches[:FINDS]:
        index.find(batch)
    find_s = time.perf_counter() - started
    steps = []
    index.drop_node("node-0")
    for _ in range(300):
        began = time.perf_counter()
        index.sweep()
        steps.append(time.perf_counter() - began)
    print(f"{BLOCKS} blocks in {stored_s:.3f} s, {FINDS} finds of {BATCH} in {find_s:.3f} s")
    result = {"blocks_per_s": round(BLOCKS / stored_s), "find32_us": round(find_s / FINDS * 1e6, 2)}
    result["death_longest_step_ms"] = round(max(steps) * 1e3, 2)
    print("RESULT " + json.dumps(result))


if __name__ == "__main__":
    main()
