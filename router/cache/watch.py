"""Looks at each request when it has ended, and counts what the cache gave it and what was missed.

Owns what is remembered of prompts, all of it hashes. On the event loop: up to 40 ns a prompt token, within a budget.
"""

from collections.abc import Sequence

from kvcore.clock import Clock
from kvcore.types import KVSpec
from router.cache.divergence import RepeatedText
from router.cache.limits import WatchLimits
from router.cache.prefixes import KnownHashes, PrefixHasher, packed
from router.cache.report import CacheCounts, CacheStats
from router.cache.sources import cached_by_source
from router.cache.trace import PromptTrace
from router.cache.window import CountWindows
from router.nodes.cluster import Cluster
from router.requests.records import RequestLog, RequestRecord
from router.requests.spec import RequestSpec


class CacheWatch:
    """One a router."""

    def __init__(
        self,
        cluster: Cluster,
        log: RequestLog,
        clock: Clock,
        *,
        seed: int = 0,
        saves_output: bool = True,
        limits: WatchLimits = WatchLimits(),
    ) -> None:
        """`seed`: of the hashes. `saves_output`: whether engines store the chunks of answers."""
        self._saves_output = saves_output
        self._cluster = cluster
        self._clock = clock
        self._hasher = PrefixHasher(seed)
        self._known = KnownHashes(limits.known_prefixes)
        self._text = RepeatedText(limits.known_runs)
        self._budget = _TokenBudget(limits.tokens_per_s, clock.now())
        self.trace = PromptTrace(limits.trace_s, limits.trace_bytes)
        self._windows = CountWindows()
        log.prompt_observers.append(self.ended)

    def __repr__(self) -> str:
        return f"<CacheWatch {self.start.requests} requests, {self.start.prompt_tokens} prompt tokens>"

    @property
    def start(self) -> CacheCounts:
        """Since the router started."""
        return self._windows.start()

    def ended(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int]) -> None:
        """A request has ended; `output`: the tokens of its first completion."""
        now = self._clock.now()
        answered = record.state == "ok"
        counts = self._counts(record, asked, output, now) if answered else CacheCounts(unanswered=1)
        self._windows.add(counts, now)

    def counts(self) -> CacheStats:
        """As of now; what takes a replay is left out."""
        now, windows = self._clock.now(), self._windows
        return CacheStats(minute=windows.minute(now), hour=windows.hour(now), start=windows.start())

    def _counts(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int], now: float) -> CacheCounts:
        spec, num_tokens, cached = self._kv_spec(record), record.prompt_tokens, record.cached_tokens
        sources, unused = cached_by_source(record.legs, cached, spec)
        counts = CacheCounts(
            requests=1, prompt_tokens=num_tokens, cached_tokens=cached, by_source=sources, unused_tokens=unused
        )
        if spec is None or not self._budget.take(num_tokens, now):
            counts.unknown_tokens = num_tokens - cached
            return counts
        tokens = packed([*asked.prompt_token_ids, *output] if self._saves_output else asked.prompt_token_ids)
        prefixes = self._hasher.prefixes(tokens, spec.fingerprint + asked.cache_salt)
        known = min(self._known.known_tokens(prefixes), num_tokens - 1)
        self._known.add(prefixes.hashes)
        self.trace.add(prefixes.steps, num_tokens, now)
        parted = self._text.look(tokens, max(known, cached), num_tokens)
        in_chunks = known // spec.chunk_tokens * spec.chunk_tokens
        counts.gone_tokens = max(0, in_chunks - cached)
        counts.last_chunk_tokens = max(0, known - max(in_chunks, cached))
        counts.new_tokens = num_tokens - max(known, cached)
        counts.repeated_tokens = parted.repeated_tokens
        if parted.left_at is not None:
            counts.left_at[parted.left_at] = 1
        return counts

    def _kv_spec(self, record: RequestRecord) -> KVSpec | None:
        """Of the engine that decoded; None: it is no longer known, or shares no store."""
        node = self._cluster.nodes.get(record.route.decoder) if record.route is not None else None
        return node.report.engine.kv_spec if node is not None and node.report and node.report.engine else None


class _TokenBudget:
    """So many tokens a second, saved up for one second at most; a prompt of any length is taken if there is some."""

    def __init__(self, tokens_per_s: float, now: float) -> None:
        self._rate = self._left = tokens_per_s
        self._at = now

    def take(self, tokens: int, now: float) -> bool:
        """Whether these may be looked at."""
        self._left = min(self._rate, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left <= 0:
            return False
        self._left -= tokens
        return True
