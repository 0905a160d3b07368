"""Counts over the last minute, the last hour, and since start. Pure: whoever asks says what time it is."""

from collections import deque

from router.cache.report import CacheCounts


class RollingCounts:
    """The sum of what came in the last `span_s` seconds, in `buckets` steps: up to one step less than the span."""

    def __init__(self, span_s: float, buckets: int) -> None:
        self._step_s = span_s / buckets
        self._num = buckets
        self._buckets: deque[tuple[int, CacheCounts]] = deque()

    def __repr__(self) -> str:
        return f"<RollingCounts of {self._num} times {self._step_s:g} s>"

    def add(self, counts: CacheCounts, now: float) -> None:
        """`now` never goes back."""
        step = int(now // self._step_s)
        if not self._buckets or self._buckets[-1][0] != step:
            self._expire(step)
            self._buckets.append((step, CacheCounts()))
        self._buckets[-1][1].add(counts)

    def total(self, now: float) -> CacheCounts:
        """With its hit rate; the caller's own."""
        self._expire(int(now // self._step_s))
        total = CacheCounts()
        for _, counts in self._buckets:
            total.add(counts)
        return total.rated()

    def _expire(self, step: int) -> None:
        while self._buckets and self._buckets[0][0] <= step - self._num:
            self._buckets.popleft()


class CountWindows:
    """The last minute, the last hour, and all since start. Adding is one sum; the rest is done every five seconds."""

    def __init__(self) -> None:
        self._minute, self._hour = RollingCounts(60.0, 12), RollingCounts(3600.0, 60)
        self._before = CacheCounts()
        self._open, self._step = CacheCounts(), 0

    def __repr__(self) -> str:
        return f"<CountWindows of {self.start().requests} requests>"

    def add(self, counts: CacheCounts, now: float) -> None:
        """`now` never goes back."""
        if (step := int(now // 5.0)) != self._step:
            self._fold()
            self._step = step
        self._open.add(counts)

    def minute(self, now: float) -> CacheCounts:
        """The caller's own, as the others."""
        self._fold()
        return self._minute.total(now)

    def hour(self, now: float) -> CacheCounts:
        """See RollingCounts."""
        self._fold()
        return self._hour.total(now)

    def start(self) -> CacheCounts:
        """Of everything."""
        self._fold()
        total = CacheCounts()
        total.add(self._before)
        return total.rated()

    def _fold(self) -> None:
        for window in (self._minute, self._hour):
            window.add(self._open, 5.0 * self._step)
        self._before.add(self._open)
        self._open = CacheCounts()
