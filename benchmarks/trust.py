"""What trust costs: each figure without and with, by turns in one run.

RESULT has
- `mac_gbps`, `mac_two_threads_gbps`: AES-256-GMAC over 64 MiB;
- `mac_over_checksum_get`, `..._put`: the rate of a get (put) of 64 MiB in chunks of 8 over shm, with MACs over with
  checksums; `..._small`: to and from buffers of 64 KiB; `..._tcp`: over tcp;
- `encrypt_over_mac_get`, `..._put`, `..._small`, `..._tcp`: likewise, encrypted (`kv.encrypt`) over with MACs;
- `promote_mac_over_plain`, `promote_encrypt_over_mac`: the rate of promoting 16 chunks of 4 MiB from a disk, likewise;
- `encrypt_gbps`, `decrypt_gbps`: chunks of 4 MiB for a tier, one thread;
- `router_added_us`: processor time of the router that a request costs more where its calls to nodes carry proofs;
- `tcp_proven_over_open_get`: the rate of a get of 64 MiB over tcp on connections that stand, after a greeting with
  proofs over one without; `tcp_greeting_added_us`: what the first get of 4 KiB on a connection takes longer;
- `tcp_frames_over_greeting_get`, `..._put`: the rate of 64 MiB over tcp with a MAC of each frame over one without;
  `tcp_frames_added_us`: what a get of 4 KiB takes longer with them.

Run: python -m benchmarks.trust [--rounds 15] [--only chunks]
"""

import argparse
import asyncio
import json
from collections.abc import Awaitable, Callable

from benchmarks.trust_chunks import measure_chunks
from benchmarks.trust_proofs import measure_proofs, serve_segments
from kvcore.process.service import loop_factory

PARTS: dict[str, Callable[[int], Awaitable[dict[str, float]]]] = {
    "chunks": measure_chunks,
    "proofs": measure_proofs,
}


async def run(parts: list[str], rounds: int) -> None:
    """Tables, one RESULT."""
    result: dict[str, float] = {}
    for part in parts:
        result |= await PARTS[part](rounds)
    print("RESULT " + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=PARTS, action="append")
    parser.add_argument("--serve-segments", metavar="SECRET", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:  # the loop that engines have
        if options.serve_segments:
            runner.run(serve_segments(options.serve_segments))
        else:
            runner.run(run(options.only or list(PARTS), options.rounds))


if __name__ == "__main__":
    main()
