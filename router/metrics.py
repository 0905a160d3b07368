"""The router's Prometheus metrics, by the names of kvcore.metric_names."""

from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial

from kvcore import metric_names as names
from kvcore.metric_names import Metric
from kvcore.telemetry import Metrics, Sample
from router.admission.gate import Admission
from router.cache.watch import CacheWatch
from router.nodes.cluster import Cluster
from router.requests.records import RequestLog, RequestRecord


class RouterMetrics:
    """Made once a process. `connected`: whether the event stream of the metadata server is up; None: there is none.

    What each request changes is counted in numbers of its own or of `log`, which are read when somebody asks.
    """

    def __init__(
        self, cluster: Cluster, log: RequestLog, connected: Callable[[], bool] | None, cache: CacheWatch
    ) -> None:
        self.metrics = metrics = Metrics()
        self._cluster = cluster
        self._ttft = metrics.tally(names.ROUTER_TTFT).row()
        self._forecast_error = metrics.tally(names.ROUTER_FORECAST_ERROR)
        self._seconds = metrics.tally(names.ROUTER_REQUEST_SECONDS).row()
        self._approximate_tokens = self._completion_tokens = 0
        self._answered = self._counted(names.ROUTER_REQUESTS)
        self._documents = self._counted(names.ROUTER_DOCUMENTS)
        self._retries = self._counted(names.ROUTER_RETRIES)
        self._routes = self._counted(names.ROUTER_ROUTES)
        self._failed = self._counted(names.ROUTER_FAILED)
        suspected = metrics.counter(names.ROUTER_SUSPECTED)
        cluster.stalls.on_suspect.append(lambda node: suspected.labels(node.role.value).inc())
        totals: Mapping[Metric, Callable[[], float]] = {
            names.ROUTER_PROMPT_TOKENS: lambda: log.prompt_tokens,
            names.ROUTER_CACHED_TOKENS: lambda: log.cached_tokens,
            names.ROUTER_APPROXIMATE_TOKENS: lambda: self._approximate_tokens,
            names.ROUTER_COMPLETION_TOKENS: lambda: self._completion_tokens,
            names.ROUTER_IN_NEED: lambda: log.in_need,
            names.ROUTER_CANCELLED: lambda: log.cancelled,
            names.ROUTER_ACTIVE: lambda: log.in_flight,
            names.ROUTER_INDEX_KEYS: lambda: len(cluster.index),
            names.CACHE_UNUSED_TOKENS: lambda: cache.start.unused_tokens,
        }
        if connected is not None:
            totals = {**totals, names.ROUTER_INDEX_CONNECTED: connected}
        for metric, total in totals.items():
            metrics.sampled(metric, partial(_alone, total))
        metrics.sampled(names.ROUTER_NODES, self._nodes)
        metrics.sampled(names.CACHE_TOKENS, lambda: [((key,), num) for key, num in cache.start.by_source.items()])
        metrics.sampled(names.CACHE_MISSED_TOKENS, lambda: [((key,), num) for key, num in cache.start.missed.items()])
        log.observers.append(self._ended)

    def watch_admission(self, admission: Admission) -> None:
        """Show who waits, for how long, and who was refused."""
        metrics = self.metrics
        metrics.sampled(names.ROUTER_WAITING, lambda: [((), len(admission))])
        metrics.sampled(names.ROUTER_REFUSED, lambda: [((why,), num) for why, num in admission.refused.items()])
        admission.on_admitted.append(metrics.tally(names.ROUTER_WAITED).row().observe)

    def answered(self, endpoint: str, status: int) -> None:
        """An HTTP request of any endpoint was answered."""
        self._answered[endpoint, str(status)] += 1

    def _counted(self, metric: Metric) -> Counter[tuple[str, ...]]:
        """By label values."""
        counts: Counter[tuple[str, ...]] = Counter()
        self.metrics.sampled(metric, counts.items)
        return counts

    def _ended(self, record: RequestRecord) -> None:
        self._completion_tokens += record.completion_tokens
        if (route := record.route) is not None:
            self._routes[(route.reason.partition(":")[0],)] += 1
        if (named := record.documents) is not None:
            self._documents[named.named_by, "compute" if named.why_computed else "reuse"] += 1
        for retried in record.retried_legs:
            self._retries[retried] += 1
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        if (error_s := record.forecast_error_s) is not None:
            self._forecast_error.row(record.way).observe(abs(error_s))
        if record.total_s is not None:
            self._seconds.observe(record.total_s)
        if record.state == "ok":
            self._approximate_tokens += record.approximate_tokens
        if record.state == "failed":
            self._failed[((record.error or "").partition(":")[0],)] += 1

    def _nodes(self) -> list[tuple[tuple[str, ...], float]]:
        counts: dict[tuple[str, ...], float] = {}
        for node in self._cluster.nodes.values():
            state = "usable" if self._cluster.why_unused(node) is None else "unusable"
            counts[node.role, state] = counts.get((node.role, state), 0) + 1
        return list(counts.items())


def _alone(total: Callable[[], float]) -> list[Sample]:
    return [((), float(total()))]
