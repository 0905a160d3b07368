"""LMCache's C++ Redis client, for benchmarks.tiers: answers each line of stdin as benchmarks.tiers_move does.

Run by a Python that has LMCache; imports nothing of kvferry.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import select
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch  # noqa: F401, the extension links against it

NUM_CHUNKS, CHUNK_BYTES = 32, 4 << 20
_TOTAL = NUM_CHUNKS * CHUNK_BYTES


def native() -> Any:
    """Its extension module, loaded by its file: the package itself takes seconds to import."""
    package = importlib.util.find_spec("lmcache")
    if package is None or not package.submodule_search_locations:
        raise RuntimeError("there is no lmcache in this Python")
    file = next(Path(package.submodule_search_locations[0]).glob("lmcache_redis*.so"))
    spec = importlib.util.spec_from_file_location("lmcache_redis", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def timed(client: Any, submit: Callable[[], object]) -> tuple[float, float]:
    """Seconds and processor seconds of one batch."""
    began, cpu = time.perf_counter(), time.process_time()
    submit()
    event = client.event_fd()
    while not client.drain_completions():
        select.select([event], [], [], 10)
        with contextlib.suppress(BlockingIOError):
            os.read(event, 8)
    return time.perf_counter() - began, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    client = native().LMCacheRedisClient("127.0.0.1", options.port, options.threads, "", "")
    source, target = (memoryview(bytearray(os.urandom(_TOTAL))) for _ in range(2))
    parts = [slice(number * CHUNK_BYTES, (number + 1) * CHUNK_BYTES) for number in range(NUM_CHUNKS)]
    life = os.urandom(4).hex()
    print("ready", flush=True)
    for number in count():
        if not sys.stdin.readline():
            break
        keys = [f"lmcache-{life}-{number}-{at}" for at in range(NUM_CHUNKS)]
        save = timed(client, lambda: client.submit_batch_set(keys, [source[part] for part in parts]))  # noqa: B023
        load = timed(client, lambda: client.submit_batch_get(keys, [target[part] for part in parts]))  # noqa: B023
        if number == 0 and source != target:
            raise RuntimeError("what was loaded is not what was saved")
        names = ("save_s", "save_cpu_s", "load_s", "load_cpu_s")
        print(json.dumps(dict(zip(names, (*save, *load), strict=True))), flush=True)
    client.close()
    os._exit(0)


if __name__ == "__main__":
    main()
