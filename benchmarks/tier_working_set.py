"""A working set four times the memory: what a disk keeps of the hit rate, and what it costs the first token.

The conversations of Mooncake's trace, played to the simulated cluster in virtual time, three times: with segments of a
quarter of what the trace's prompts take and nothing else; with the same segments and a disk a node; with segments that
hold everything. One simulated token stands for 32 of the trace's. The simulated model's KV, prefill and disk are those
of the options; arrivals are stretched so that prefillers would be `--load` busy if nothing was cached twice.

Needs the trace (github.com/kvcache-ai/Mooncake, FAST25-release/traces/conversation_trace.jsonl):

    python -m benchmarks.tier_working_set TRACE [--requests 600]
"""

import argparse
import json
import logging
import random
import statistics
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support import sim_cluster
from support.sim_cluster import SimCluster, Variant
from support.sim_loop import SimSeedLoop, run_sim
from support.sim_plan import Plan, Wanted
from support.sim_tiers import TierPlan

from kvcore.config.schema import RouterConfig, SimEngineConfig, StoreConfig
from kvnode.tiers.limits import MoveLimits
from nodeapi.sampling import SamplingParams
from router.requests.records import RequestRecord

SCALE = 32
"""Tokens of the trace to one of the simulation."""
CHUNK = 512 // SCALE
TOKEN_BYTES = 128
"""Of the simulation."""
ROOM = 4096
"""That a chunk takes in a segment of the simulation."""
NODES = ("p1", "p2", "d1", "d2")
PREFILLERS = 2


@dataclass(frozen=True)
class World:
    """What is simulated, in the trace's tokens."""

    prefill_rate: float
    kv_bytes: int
    """Of one token."""
    disk_rate: float
    load: float

    @property
    def shrunk(self) -> float:
        """Bytes to one of the simulation."""
        return self.kv_bytes * SCALE / TOKEN_BYTES


@dataclass(frozen=True)
class Row:
    """One run."""

    name: str
    hit_rate: float
    ttft_p50_s: float
    ttft_p99_s: float
    promoted: int
    """Chunks."""
    failed: int


def read_requests(trace: Path, count: int, world: World) -> tuple[list[Wanted], int]:
    """The trace's first requests, and how many chunks their prompts have in all."""
    rows = [json.loads(line) for line, _ in zip(trace.open(), range(count), strict=False)]
    dice, known, new_tokens = random.Random(1), set[int](), 0
    prompts = []
    for row in rows:
        tokens: list[int] = []
        for number, name in enumerate(row["hash_ids"]):
            length = min(512, row["input_length"] - 512 * number)
            tokens += random.Random(name).choices(range(1, 300), k=max(1, length // SCALE))
            new_tokens += 0 if name in known else length
            known.add(name)
        prompts.append(tokens)
    last_s = new_tokens / world.prefill_rate / PREFILLERS / world.load
    stretch = last_s / (1 + max(row["timestamp"] for row in rows))
    wanted = []
    for number, (row, tokens) in enumerate(zip(rows, prompts, strict=True)):
        at_s = 0.5 + stretch * (row["timestamp"] + 3000 * dice.random())  # it ticks every 3 s
        length = max(1, row["output_length"] // SCALE)
        sampling = SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True)
        wanted.append(Wanted(f"r{number}", at_s, tokens, sampling, None))
    return wanted, len(known)


def plan_of(requests: list[Wanted], segment_bytes: int, world: World, disk_bytes: int | None) -> Plan:
    """The cluster with segments of this size, and a disk a node of that."""
    longest = max(len(wanted.prompt) + wanted.sampling.max_tokens for wanted in requests)
    blocks = -(-longest // CHUNK)
    tiers = TierPlan(
        disks=NODES,
        redis=False,
        disk_bytes=disk_bytes or 0,
        redis_bytes=0,
        timeout_s=2.0,
        wait_s=5.0,
        in_flight=int((256 << 20) / world.shrunk),
        bytes_per_s=world.disk_rate / world.shrunk,
        limits=replace(MoveLimits(), batch_bytes=int(MoveLimits().batch_bytes / world.shrunk)),
    )
    return Plan(
        engine=SimEngineConfig(
            block_size=CHUNK,
            num_blocks=blocks + 64,
            bytes_per_token=TOKEN_BYTES,
            max_context=(blocks + 1) * CHUNK,
            vocab_size=300,
            prefill_tokens_per_s=world.prefill_rate / SCALE,
            inter_token_s=0.02,
            max_batch_tokens=8 * CHUNK,
            save_output=False,
        ),
        store=StoreConfig(max_replicas=1),
        segment_bytes=segment_bytes,
        requests=requests,
        faults=[],
        weather=0.0,
        chunk_tokens=CHUNK,
        nodes=NODES,
        tiers=tiers if disk_bytes is not None else None,
    )


def run(name: str, plan: Plan) -> Row:
    """Play it; the simulation's own checks, which look at all that is stored, are left out."""
    records: list[RequestRecord] = []
    last_s = max(wanted.at_s for wanted in plan.requests)
    loop = SimSeedLoop(1, 10 * last_s + 600)
    router = RouterConfig(min_prefill_tokens=8, request_timeout_s=600.0, prefill_timeout_s=300.0)

    async def main() -> SimCluster:
        cluster = SimCluster(1, loop, Variant(peaceful=True, plan=plan))
        cluster.log.observers.append(records.append)
        cluster._check_turn = _nothing
        cluster._check_answer = _nothing
        cluster._check_stored = _at_once
        cluster._check_accounts = _at_once
        await cluster.run()
        return cluster

    with patch.object(sim_cluster, "ROUTER", router):
        cluster = run_sim(main, loop=loop)
    assert not cluster.problems, cluster.problems
    answered = [record for record in records if record.ttft_s is not None and record.state == "ok"]
    ttft = sorted(record.ttft_s or 0.0 for record in answered)
    tokens = sum(record.prompt_tokens for record in answered)
    return Row(
        name=name,
        hit_rate=sum(record.cached_tokens for record in answered) / tokens,
        ttft_p50_s=statistics.median(ttft),
        ttft_p99_s=ttft[int(0.99 * len(ttft))],
        promoted=cluster.trace.counts["tier_promoted"],
        failed=len(records) - len(answered),
    )


def _nothing(_: object) -> None:
    pass


async def _at_once() -> None:
    pass


def main() -> int:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", type=Path)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--prefill-rate", type=float, default=4000.0, help="tokens a second of one prefiller")
    parser.add_argument("--kv-bytes", type=int, default=131_072, help="of one token")
    parser.add_argument("--disk-rate", type=float, default=1.25e9, help="bytes a second of one node's disk")
    parser.add_argument("--load", type=float, default=0.6, help="of the prefillers, with unlimited memory")
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)
    world = World(options.prefill_rate, options.kv_bytes, options.disk_rate, options.load)
    requests, num_chunks = read_requests(options.trace, options.requests, world)
    everything = num_chunks * ROOM
    quarter, plenty = everything // 4 // len(NODES), 2 * everything
    rows = []
    for name, segment, disk in (("no tier", quarter, None), ("disk", quarter, everything), ("unlimited", plenty, None)):
        rows.append(run(name, plan_of(requests, segment, world, disk)))
        one = rows[-1]
        print(
            f"{one.name:10} hit rate {one.hit_rate:6.1%}  ttft p50 {one.ttft_p50_s:6.2f} s  p99 {one.ttft_p99_s:6.2f} s"
            f"  promoted {one.promoted} chunks  failed {one.failed}",
            flush=True,
        )
    none, disk_row, all_row = rows
    result = {
        "working_set_chunks": num_chunks,
        "hit_rate_none": none.hit_rate,
        "hit_rate_disk": disk_row.hit_rate,
        "hit_rate_unlimited": all_row.hit_rate,
        "points_below_unlimited": 100 * (all_row.hit_rate - disk_row.hit_rate),
        "ttft_p99_none_s": none.ttft_p99_s,
        "ttft_p99_disk_s": disk_row.ttft_p99_s,
        "ttft_p99_over_none": disk_row.ttft_p99_s / none.ttft_p99_s,
    }
    print("RESULT " + json.dumps({name: round(value, 4) for name, value in result.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
