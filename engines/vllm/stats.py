"""A vLLM engine's statistics: those that vLLM gives to a stat logger, and the worker halves' samples. Needs no vLLM."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from engines.vllm.connector.bus_messages import WorkerSample
from nodeapi.messages import EngineStats


class VllmStats:
    """`record` is called as a stat logger of vLLM's is; `samples` are set before the totals are read."""

    def __init__(self) -> None:
        self.samples: Sequence[WorkerSample] = ()
        self._running = 0
        self._waiting = 0
        self._usage = 0.0
        self._totals: Counter[str] = Counter()

    def record(self, scheduler_stats: Any, iteration_stats: Any) -> None:
        """One step's `SchedulerStats` and `IterationStats` of vllm.v1.metrics.stats, either of them None."""
        if scheduler_stats is not None:
            self._running = scheduler_stats.num_running_reqs
            self._waiting = scheduler_stats.num_waiting_reqs + scheduler_stats.num_skipped_waiting_reqs
            self._usage = scheduler_stats.kv_cache_usage
        if iteration_stats is not None:
            prompt = iteration_stats.prompt_token_stats
            self._totals["prefill_tokens"] += prompt.computed
            self._totals["cached_tokens"] += prompt.total - prompt.computed
            self._totals["decode_tokens"] += iteration_stats.num_generation_tokens
            self._totals["preemptions"] += iteration_stats.num_preempted_reqs

    def engine_stats(self, num_blocks: int) -> EngineStats:
        """As of the last step; counters of all ranks added up, gauges of the busiest."""
        counters = Counter(self._totals)
        for sample in self.samples:
            counters.update(sample.counters)
        return EngineStats(
            running=self._running,
            waiting=self._waiting,
            loading=max((sample.loading for sample in self.samples), default=0),
            used_blocks=round(self._usage * num_blocks),
            total_blocks=num_blocks,
            pending_saves=max((sample.pending_saves for sample in self.samples), default=0),
            counters=dict(counters),
        )

    def store_counters(self) -> dict[str, int]:
        """Totals of all ranks together."""
        total: Counter[str] = Counter()
        for sample in self.samples:
            total.update(sample.store)
        return dict(total)

    def transports(self) -> dict[str, str]:
        """Segment id of a peer -> transport: the ranks of one node choose alike."""
        return {segment: kind for sample in self.samples for segment, kind in sample.transports.items()}
