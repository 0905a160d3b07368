"""Looks at each request when it has ended, and counts what the cache gave it and what was missed.

Owns what is remembered of prompts, all of it hashes. On the event loop: 40 to 60 ns a prompt token, within a budget.
"""

from collections import deque
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
        self._limits = limits
        self._waiting: deque[tuple[RequestRecord, RequestSpec, list[int]]] = deque()
        self._waiting_tokens = 0
        self.rebuilding = False
        """Whether the metadata server does not know yet what lies in segments: what it did not find is not gone."""
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
        if record.state != "ok":
            self._windows.add(CacheCounts(unanswered=1), now)
        elif not self._waiting and self._budget.take(record.prompt_tokens, now):
            self._look(record, asked, output, now)
        elif self._waiting_tokens < self._limits.waiting_tokens:
            self._waiting.append((record, asked, list(output)))
            self._waiting_tokens += record.prompt_tokens
        else:
            self._windows.add(self._cached(record, self._kv_spec(record)), now)

    def catch_up(self) -> None:
        """Look at the prompts that wait, as far as the budget goes. To be called now and then."""
        now = self._clock.now()
        while self._waiting and self._budget.take(self._waiting[0][0].prompt_tokens, now):
            record, asked, output = self._waiting.popleft()
            self._waiting_tokens -= record.prompt_tokens
            self._look(record, asked, output, now)

    def counts(self) -> CacheStats:
        """As of now; what takes a replay is left out."""
        now, windows = self._clock.now(), self._windows
        return CacheStats(minute=windows.minute(now), hour=windows.hour(now), start=windows.start())

    def _cached(self, record: RequestRecord, spec: KVSpec | None) -> CacheCounts:
        """Of a prompt that is not looked at."""
        sources, unused = cached_by_source(record.legs, record.cached_tokens, spec)
        return CacheCounts(
            requests=1,
            prompt_tokens=record.prompt_tokens,
            cached_tokens=record.cached_tokens,
            by_source=sources,
            unknown_tokens=record.prompt_tokens - record.cached_tokens,
            unused_tokens=unused,
        )

    def _look(self, record: RequestRecord, asked: RequestSpec, output: Sequence[int], now: float) -> None:
        spec, num_tokens, cached = self._kv_spec(record), record.prompt_tokens, record.cached_tokens
        counts = self._cached(record, spec)
        if spec is None:
            self._windows.add(counts, now)
            return
        tokens = packed([*asked.prompt_token_ids, *output] if self._saves_output else asked.prompt_token_ids)
        prefixes = self._hasher.prefixes(tokens, spec.fingerprint + asked.cache_salt)
        known = min(self._known.known_tokens(prefixes), num_tokens - 1)
        self._known.add(prefixes.hashes)
        if asked.sampling.prompt_logprobs is not None or record.approximate_tokens:
            # it read no cache, whatever lay there; or its prefix is not what others of these tokens have
            self._windows.add(counts, now)
            return
        self.trace.add(prefixes.steps, num_tokens, now)
        parted = self._text.look(tokens, max(known, cached), num_tokens)
        in_chunks = known // spec.chunk_tokens * spec.chunk_tokens
        counts.gone_tokens = max(0, in_chunks - cached)
        counts.last_chunk_tokens = max(0, known - max(in_chunks, cached))
        counts.new_tokens = num_tokens - max(known, cached)
        counts.repeated_tokens = parted.repeated_tokens
        if parted.left_at is not None:
            counts.left_at[parted.left_at] = 1
        counts.unknown_tokens = 0
        if self.rebuilding:
            counts.unknown_tokens, counts.gone_tokens = counts.gone_tokens, 0
        self._windows.add(counts, now)

    def _kv_spec(self, record: RequestRecord) -> KVSpec | None:
        """Of the engine that decoded; None: it is no longer known, or shares no store."""
        node = self._cluster.nodes.get(record.route.decoder) if record.route is not None else None
        return node.report.engine.kv_spec if node is not None and node.report and node.report.engine else None


class _TokenBudget:
    """So many tokens a second, saved up for a twentieth of one; a prompt of any length is taken if there are some."""

    def __init__(self, tokens_per_s: float, now: float) -> None:
        self._rate, self._most = tokens_per_s, tokens_per_s / 20
        self._left = self._most
        self._at = now

    def take(self, tokens: int, now: float) -> bool:
        """Whether these may be looked at."""
        self._left = min(self._most, self._left + (now - self._at) * self._rate)
        self._at = now
        if self._left <= 0:
            return False
        self._left -= tokens
        return True
