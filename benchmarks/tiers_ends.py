"""What benchmarks.tiers measures from end to end: all of a cluster is stopped and started again, over one tier.

A cluster with a disk computes the prompts. For each other tier in turn its server is started, a cluster that has both
brings the prompts from the disk, which fills the tier, and a new cluster that has the tier alone is asked for them: so
no prompt is computed twice, and memory holds what is in one server, and SEGMENT_PROMPTS prompts in each segment.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tiers_cluster import Cluster, Engine, Prompts, cluster
from benchmarks.tiers_servers import KINDS, servers
from benchmarks.vllm_pd_client import Measured
from benchmarks.vllm_pd_processes import Setting

CHUNK_TOKENS = 64
COLD_PROMPTS = 2
"""New ones, of each cluster."""
SEGMENT_PROMPTS = 12
"""That a node's segment has room for."""
_KV_CACHE_PROMPTS = 4
"""That an engine's own blocks hold: what is asked for again to see the segments' speed is not among the last ones."""


@dataclass(slots=True)
class TierEnds:
    """One tier's answers after a restart. Seconds are until the first token; `cold_s`: of new prompts."""

    hit: int = 0
    """Prompts of which every full chunk came from the cache."""
    same: int = 0
    """Answers that have the tokens which computing gave."""
    wanted: int = 0
    ttft_s: list[float] = field(default_factory=list)
    cold_s: list[float] = field(default_factory=list)

    def add(self, prompt: Sequence[int], answer: Measured, before: Measured) -> None:
        """Count one answer."""
        self.wanted += 1
        self.hit += (answer.cached_tokens or 0) >= num_chunks(prompt) * CHUNK_TOKENS
        self.same += answer.token_ids == before.token_ids
        self.ttft_s.append(answer.ttft_s)

    @property
    def all_hit(self) -> bool:
        """Whether nothing was computed again, and nothing answered otherwise."""
        return self.hit == self.same == self.wanted

    def row(self) -> dict[str, Any]:
        """For the table."""
        return {
            "ttft_s": statistics.median(self.ttft_s),
            "cold_ttft_s": statistics.median(self.cold_s),
            "hit": f"{self.hit} of {self.wanted}",
            "same_tokens": f"{self.same} of {self.wanted}",
        }

    def __str__(self) -> str:
        median_s = statistics.median(self.ttft_s)
        return f"{median_s:.3f} s, hit {self.hit} of {self.wanted}, the same tokens {self.same} of {self.wanted}"


def num_chunks(prompt: Sequence[int]) -> int:
    """Full ones that a cache can have of it: the last token is computed in any case."""
    return (len(prompt) - 1) // CHUNK_TOKENS


async def end_to_end(
    setting: Setting, prompts: Prompts, options: argparse.Namespace
) -> tuple[dict[str, TierEnds], dict[str, str]]:
    """Each tier's, and `memory`'s; and why a tier is not among them."""
    subject = _Subject(setting, prompts, options)
    size_bytes = (options.prompts + options.rounds * COLD_PROMPTS + 4) * prompts.kv_bytes * 3 // 2 + (1 << 30)
    missing: dict[str, str] = {}
    async with servers(setting.folder / "ends", size_bytes, options.host, ["disk"]) as local:
        await subject.fill(local.sections, "disk")
        await subject.ask_again("disk", local.sections)
        for kind in KINDS:
            if kind == "disk":
                continue
            async with servers(setting.folder / f"ends-{kind}", size_bytes, options.host, [kind]) as found:
                missing |= found.missing
                if found.sections:
                    await subject.fill({**local.sections, **found.sections}, kind)
                    await subject.ask_again(kind, found.sections)
    return subject.ends, missing


class _Subject:
    """The prompts, and what the first cluster answered."""

    def __init__(self, setting: Setting, prompts: Prompts, options: argparse.Namespace) -> None:
        self.ends: dict[str, TierEnds] = {}
        self._setting, self._prompts, self._rounds = setting, prompts, options.rounds
        self._wanted = prompts.fresh(options.prompts)
        self._before: list[Measured] = []
        section = {"kind": "torch", "threads": 1, "block_size": CHUNK_TOKENS}
        kv_cache = {"kv_cache": _KV_CACHE_PROMPTS * prompts.kv_bytes}
        self._engine = Engine(python=Path(sys.executable), section=section | kv_cache, chunk_tokens=CHUNK_TOKENS)
        self._segment_bytes = SEGMENT_PROMPTS * prompts.kv_bytes * 5 // 4

    async def fill(self, tiers: Mapping[str, Any], kind: str) -> None:
        """One prompt after the other, each once the one before it is in `kind`."""
        async with self._cluster(tiers) as running:
            answers = list[Measured]()
            for nth, prompt in enumerate(self._wanted, 1):
                answers.append(await running.ask(prompt))
                await running.until_saved([kind], nth * num_chunks(prompt))
        self._before = self._before or answers
        print(f"{len(answers)} prompts of {len(self._wanted[0])} tokens are in {kind}", flush=True)

    async def ask_again(self, kind: str, tiers: Mapping[str, Any]) -> None:
        """Round by round a new cluster is asked for all of them."""
        ends = self.ends.setdefault(kind, TierEnds())
        for nth in range(self._rounds):
            async with self._cluster(tiers) as running:
                for prompt, before in zip(self._wanted, self._before, strict=True):
                    ends.add(prompt, await running.ask(prompt), before)
                cold_s = [(await running.ask(prompt)).ttft_s for prompt in self._prompts.fresh(COLD_PROMPTS)]
                ends.cold_s += cold_s
                if len(self._wanted) >= SEGMENT_PROMPTS // 2:
                    memory = self.ends.setdefault("memory", TierEnds())
                    memory.cold_s += cold_s
                    for at in (-6, -5):
                        memory.add(self._wanted[at], await running.ask(self._wanted[at]), self._before[at])
            print(f"  {kind}, round {nth}: {ends}", flush=True)

    def _cluster(self, tiers: Mapping[str, Any]) -> AbstractAsyncContextManager[Cluster]:
        return cluster(self._setting, self._engine, tiers, segment_bytes=self._segment_bytes)
