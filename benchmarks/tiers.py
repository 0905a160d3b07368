"""How fast a prompt's KV comes back from each tier, against computing it, and against LMCache where it is installed.

end to end   whole clusters of the torch engine on the demo model, a prefiller and a decoder. One computes the
             prompts; all of it is stopped. Then, tier by tier and round by round, a new cluster with only that tier is
             asked for them: each answer must have every chunk from the cache, and the tokens that computing gave.
             Beside them new prompts are computed (cold), and some are asked for once more (memory).
moving       one process and one tier, chunks of 4 MiB, no cluster: GB/s and processor seconds a GB, beside a copy in
             memory, a plain file on the same disk, and LMCache's C++ Redis client on the same server; by turns.
vLLM         with --lmcache-python: one vLLM with kvferry, one with LMCache, over the same Redis and the same disk; both
             are stopped, started again, and asked for what they computed before.

Without a program or a package a tier is left out, and the reason is in RESULT. With root and `ip` all of it runs in a
network namespace of its own, as Mooncake's clients want an address that is not loopback.

python -m benchmarks.tiers [--rounds 3] [--prompts 6] [--lmcache-python FOLDER/lmcache/bin/python]
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp

from benchmarks.tiers_cluster import Cluster, Engine, Prompts, cluster
from benchmarks.tiers_ends import TierEnds, end_to_end
from benchmarks.tiers_peers import adapters, lmcache
from benchmarks.tiers_servers import KINDS, Servers, servers
from benchmarks.tiers_turns import move_all
from benchmarks.transfer_places import places
from benchmarks.vllm_pd_client import Measured
from benchmarks.vllm_pd_processes import BLOCK, Setting
from kvcore.process.http_client import http_session
from kvferry.demo.model import prepare_demo_model


def check(prompt: list[int], answer: Measured, before: Measured, chunk_tokens: int, where: str) -> None:
    """Raises RuntimeError unless all chunks were cached and the tokens are those of before."""
    whole = (len(prompt) - 1) // chunk_tokens * chunk_tokens
    if answer.cached_tokens is None or answer.cached_tokens < whole:
        raise RuntimeError(f"{where}: {answer.cached_tokens} of {whole} tokens were cached")
    if answer.token_ids != before.token_ids:
        raise RuntimeError(f"{where}: the answer is another one")


async def ask_all(subject: Cluster, prompts: Sequence[list[int]]) -> list[Measured]:
    """One after the other."""
    return [await subject.ask(prompt) for prompt in prompts]


async def on_vllm(setting: Setting, found: Servers, prompts: Prompts, options: argparse.Namespace) -> dict[str, float]:
    """`NAME_TIER` -> seconds until the first token from what was there before the start; and of computing."""
    args = {"block-size": BLOCK, "enforce-eager": True, "kv-cache-memory-bytes": setting.kv_cache_bytes}
    section = {"kind": "vllm", "args": args}
    engine = Engine(options.vllm_python, section, chunk_tokens=BLOCK, roles=("decoder",))
    segment_bytes = 16 * prompts.kv_bytes
    result: dict[str, float] = {}
    disk = setting.folder / "lmcache-disk"
    for kind, adapter in adapters(found.redis_port, disk).items():
        if kind not in found.sections:
            continue
        wanted, others = prompts.fresh(options.prompts), prompts.fresh(options.prompts)
        tiers = {kind: found.sections[kind]}
        chunks = options.prompts * ((options.tokens - 1) // BLOCK)
        async with cluster(setting, engine, tiers, segment_bytes=segment_bytes) as subject:
            before = await ask_all(subject, wanted)
            await subject.until_saved(tiers, chunks)
        async with cluster(setting, engine, tiers, segment_bytes=segment_bytes) as subject:
            answers = await ask_all(subject, wanted)
            for prompt, answer, first in zip(wanted, answers, before, strict=True):
                check(prompt, answer, first, BLOCK, f"vLLM, {kind}")
            new = await ask_all(subject, others)
        result[f"kvferry_{kind}_ttft_s"] = statistics.median(one.ttft_s for one in answers)
        result[f"vllm_cold_{kind}_ttft_s"] = statistics.median(one.ttft_s for one in new)
        answers = await of_lmcache(setting, adapter, wanted, options)
        cached = [one.cached_tokens or 0 for one in answers]
        same = sum(one.token_ids == other.token_ids for one, other in zip(answers, before, strict=True))
        print(f"  LMCache, {kind}: cached {cached}, {same} of {len(wanted)} answers as kvferry's", flush=True)
        result[f"lmcache_{kind}_ttft_s"] = statistics.median(one.ttft_s for one in answers)
        result[f"lmcache_{kind}_cached_tokens"] = statistics.median(cached)
    return result


async def of_lmcache(
    setting: Setting, adapter: Mapping[str, Any], wanted: Sequence[list[int]], options: argparse.Namespace
) -> list[Measured]:
    """What it answers after a restart."""
    async with lmcache(setting, options.lmcache_python, adapter) as server:
        for prompt in wanted:
            await server.ask(prompt)
        await asyncio.sleep(options.settle)  # nothing tells when its second level has all
    async with lmcache(setting, options.lmcache_python, adapter) as server:
        return [await server.ask(prompt) for prompt in wanted]


@asynccontextmanager
async def prepared(model: Path, context_bytes: int) -> AsyncIterator[Setting]:
    """Folders on a disk, and a client."""
    connector = aiohttp.TCPConnector(keepalive_timeout=600)
    with tempfile.TemporaryDirectory(dir=Path.home() / ".cache") as folder:
        async with http_session(connector=connector) as session:
            yield Setting(model, Path(folder), Path(folder), context_bytes, session)


async def run(options: argparse.Namespace) -> None:
    """Print the tables and RESULT."""
    model = await asyncio.to_thread(prepare_demo_model)
    prompts = Prompts(model, options.tokens)
    size_bytes = 2 * options.prompts * prompts.kv_bytes * 3 // 2 + (1 << 30)
    with_vllm = options.lmcache_python is not None and "vllm" in options.parts
    kinds = KINDS if "moving" in options.parts else ("disk", "redis") if with_vllm else ()
    result: dict[str, Any] = {"rounds": options.rounds, "prompts": options.prompts, "tokens": options.tokens}
    async with prepared(model, 2 * prompts.kv_bytes) as setting:
        ends, missing = await end_to_end(setting, prompts, options) if "ends" in options.parts else ({}, {})
        async with servers(setting.folder, size_bytes, options.host, kinds) as found:
            moved = await move_all(found, options) if "moving" in options.parts else {}
            result["not_measured"] = missing | found.missing
            if with_vllm:
                result |= await on_vllm(setting, found, prompts, options)
    rows = [row(kind, moved, ends) for kind in ("memory", *KINDS) if kind in moved or kind in ends]
    print_table(rows)
    result |= {name: round(value, 4) for name, value in moved.items() if isinstance(value, float)}
    print("RESULT " + json.dumps({"tiers": rows, **result}))
    if missed := [kind for kind, one in ends.items() if not one.all_hit]:
        sys.exit(f"not every prompt was found, or answered as before, with {', '.join(missed)}")


def row(kind: str, moved: dict[str, Any], ends: dict[str, TierEnds]) -> dict[str, Any]:
    """One tier's, as far as it was measured."""
    figures = (ends[kind].row() if kind in ends else {}) | moved.get(kind, {})
    return {"name": kind} | {name: round(it, 4) if isinstance(it, float) else it for name, it in figures.items()}


def print_table(rows: Sequence[dict[str, Any]]) -> None:
    """A line a tier."""
    names = list(dict.fromkeys(name for one in rows for name in one))
    print("".join(f"{name:>20}" for name in names))
    for one in rows:
        print("".join(f"{one.get(name) if one.get(name) is not None else '-':>20}" for name in names))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--lmcache-python", type=Path, help="has vLLM and LMCache (scripts/make_peer_venvs.sh)")
    parser.add_argument("--vllm-python", type=Path, default=Path(".venv-vllm/bin/python"), help="has vLLM and kvferry")
    parser.add_argument("--settle", type=float, default=10.0, help="seconds that LMCache gets to save in")
    parser.add_argument("--parts", type=lambda text: text.split(","), default=["moving", "ends", "vllm"])
    parser.add_argument("--host", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.host is not None:
        asyncio.run(run(options))
        return
    with places() as (found, _):
        place = found[0]
        command = [*place.initiator, sys.executable, "-m", "benchmarks.tiers", "--host", place.initiator_host]
        sys.exit(subprocess.run([*command, *sys.argv[1:]], check=False, env=os.environ).returncode)


if __name__ == "__main__":
    main()
