"""Time to derive the chunk keys of a long prompt: 32,768 tokens in chunks of 256, from a list[int].

Estimate: 128 KiB through SHA-256 at about 1.5 GB/s is 0.09 ms; packing 32,768 Python ints is about 0.2 ms.
Run: python -m benchmarks.chunk_keys [--rounds 300]
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from hashlib import sha256

from kvcore.chunk_keys import chunk_keys, root_key

NUM_TOKENS = 32_768
CHUNK_TOKENS = 256
TARGET_MS = 1.0


def median_ms(work: Callable[[], object], rounds: int) -> float:
    """Median of `rounds` single calls, milliseconds."""
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main() -> None:
    """Print the table and the RESULT line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    draw = random.Random(0)
    token_ids = [draw.randrange(152_000) for _ in range(NUM_TOKENS)]
    raw = bytes(4 * NUM_TOKENS)
    root = root_key(bytes(16))
    whole = median_ms(lambda: chunk_keys(root, token_ids, CHUNK_TOKENS), rounds)
    digest = median_ms(lambda: sha256(raw).digest(), rounds)
    print(f"{'what':<44}{'ms':>8}")
    print(f"{f'chunk_keys, {NUM_TOKENS} tokens by {CHUNK_TOKENS}':<44}{whole:>8.3f}")
    print(f"{'one SHA-256 over the same bytes':<44}{digest:>8.3f}")
    print(f"{'target':<44}{TARGET_MS:>8.3f}")
    print("RESULT " + json.dumps({"ms_per_32768_tokens": round(whole, 4)}))


if __name__ == "__main__":
    main()
