"""`batch_is_exist` of mooncake_master, for benchmarks.metadata: keys a second of 16 threads, in batches of each size.

`python -m benchmarks.metadata_mooncake [--sizes 1 64 1000] [--seconds 2]` starts a master and one real client of it in
a process of its own; the keys exist. Run where `mooncake` is installed.
"""

import argparse
import asyncio
import itertools
import json
import shutil
import sys
import threading
import time
from pathlib import Path

from benchmarks.children import child, program
from benchmarks.metadata_dialect import HOST, free_port

_KEYS, _THREADS = 16_000, 16


def ask(metadata: str, master: str, name: str, sizes: list[int], seconds: float) -> dict[str, float]:
    """In the client's process."""
    from mooncake.store import MooncakeDistributedStore  # the package is only where this runs

    store = MooncakeDistributedStore()
    options = {"local_hostname": name, "metadata_server": metadata, "master_server_addr": master, "protocol": "tcp"}
    code = store.setup({**options, "global_segment_size": str(128 << 20), "local_buffer_size": str(64 << 20)})
    assert code == 0, f"setup returned {code}"
    keys = [f"chunk-{number:032x}" for number in range(_KEYS)]
    for start in range(0, _KEYS, 500):
        assert store.put_batch(keys[start : start + 500], [b"x" * 64] * 500) == 0
    found = {}
    for size in sizes:
        batches = [keys[start : start + size] for start in range(0, _KEYS - size + 1, size)]
        turn, asked, end = itertools.count(), list[int](), time.perf_counter() + seconds

        def run(
            batches: list[list[str]] = batches,
            turn: "itertools.count[int]" = turn,
            asked: list[int] = asked,
            end: float = end,
        ) -> None:
            while time.perf_counter() < end:
                batch = batches[next(turn) % len(batches)]
                assert set(store.batch_is_exist(batch)) == {1}, "a key is not there"
                asked.append(len(batch))

        began = time.perf_counter()
        threads = [threading.Thread(target=run) for _ in range(_THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found[f"mooncake_exist_keys_per_s_{size}"] = sum(asked) / (time.perf_counter() - began)
    return found


async def measure_mooncake(sizes: list[int], seconds: float = 2.0) -> dict[str, float]:
    """`mooncake_exist_keys_per_s_SIZE`; nothing where Mooncake is not installed."""
    master = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
    if master is None:
        return {}
    rpc, http, metrics, own = free_port(), free_port(), free_port(), free_port()
    command = [master, f"--rpc_address={HOST}", f"--rpc_port={rpc}", f"--metrics_port={metrics}"]
    command += [f"--metrics_host={HOST}", "--enable_http_metadata_server=true", "--default_kv_lease_ttl=600000"]
    command += [f"--http_metadata_server_host={HOST}", f"--http_metadata_server_port={http}"]
    where = ["--metadata", f"http://{HOST}:{http}/metadata", "--master", f"{HOST}:{rpc}", "--name", f"{HOST}:{own}"]
    client = ["-m", "benchmarks.metadata_mooncake", *where, "--seconds", str(seconds), "--sizes", *map(str, sizes)]
    async with program(command, "(Master Admin Metrics)"), child(client, "RESULT (.*)") as asked:
        found: dict[str, float] = json.loads(asked.said)
        return found


def main() -> None:
    """The client, where a master is named; else all of it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 64, 1000])
    parser.add_argument("--seconds", type=float, default=2.0)
    for name in ("--metadata", "--master", "--name"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.master is None:
        found = asyncio.run(measure_mooncake(options.sizes, options.seconds))
    else:
        found = ask(options.metadata, options.master, options.name, options.sizes, options.seconds)
    print("RESULT " + json.dumps({name: round(value, 1) for name, value in found.items()}), flush=True)


if __name__ == "__main__":
    main()
