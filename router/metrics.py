"""The router's Prometheus metrics, by the names of kvcore.metric_names."""

from collections.abc import Callable

from prometheus_client import Counter

from kvcore import metric_names as names
from kvcore.telemetry import Metrics
from router.admission.gate import Admission
from router.cache.watch import CacheWatch
from router.nodes.cluster import Cluster
from router.requests.records import RequestLog, RequestRecord


class RouterMetrics:
    """Made once a process. `connected`: whether the event stream of the metadata server is up; None: there is none."""

    def __init__(
        self, cluster: Cluster, log: RequestLog, connected: Callable[[], bool] | None, cache: CacheWatch
    ) -> None:
        self.metrics = metrics = Metrics()
        self._cluster = cluster
        self._requests = metrics.counter(names.ROUTER_REQUESTS)
        self._answered: dict[tuple[str, int], Counter] = {}
        self._ttft = metrics.histogram(names.ROUTER_TTFT)
        self._forecast_error = metrics.histogram(names.ROUTER_FORECAST_ERROR)
        self._seconds = metrics.histogram(names.ROUTER_REQUEST_SECONDS)
        self._prompt_tokens = metrics.counter(names.ROUTER_PROMPT_TOKENS)
        self._cached_tokens = metrics.counter(names.ROUTER_CACHED_TOKENS)
        self._approximate_tokens = metrics.counter(names.ROUTER_APPROXIMATE_TOKENS)
        self._documents = metrics.counter(names.ROUTER_DOCUMENTS)
        self._completion_tokens = metrics.counter(names.ROUTER_COMPLETION_TOKENS)
        self._retries = metrics.counter(names.ROUTER_RETRIES)
        self._routes = metrics.counter(names.ROUTER_ROUTES)
        self._in_need = metrics.counter(names.ROUTER_IN_NEED)
        suspected = metrics.counter(names.ROUTER_SUSPECTED)
        cluster.stalls.on_suspect.append(lambda node: suspected.labels(node.role.value).inc())
        self._failed = metrics.counter(names.ROUTER_FAILED)
        self._cancelled = metrics.counter(names.ROUTER_CANCELLED)
        metrics.sampled(names.ROUTER_ACTIVE, lambda: [((), log.in_flight)])
        metrics.sampled(names.ROUTER_INDEX_KEYS, lambda: [((), len(cluster.index))])
        if connected is not None:
            metrics.sampled(names.ROUTER_INDEX_CONNECTED, lambda: [((), float(connected()))])
        metrics.sampled(names.ROUTER_NODES, self._nodes)
        metrics.sampled(names.CACHE_TOKENS, lambda: [((key,), num) for key, num in cache.start.by_source.items()])
        metrics.sampled(names.CACHE_MISSED_TOKENS, lambda: [((key,), num) for key, num in cache.start.missed.items()])
        metrics.sampled(names.CACHE_UNUSED_TOKENS, lambda: [((), cache.start.unused_tokens)])
        log.observers.append(self._ended)

    def watch_admission(self, admission: Admission) -> None:
        """Show who waits, for how long, and who was refused."""
        metrics = self.metrics
        metrics.sampled(names.ROUTER_WAITING, lambda: [((), len(admission))])
        metrics.sampled(names.ROUTER_REFUSED, lambda: [((why,), num) for why, num in admission.refused.items()])
        admission.on_admitted.append(metrics.histogram(names.ROUTER_WAITED).observe)

    def answered(self, endpoint: str, status: int) -> None:
        """An HTTP request of any endpoint was answered."""
        counter = self._answered.get((endpoint, status))
        if counter is None:
            counter = self._answered[endpoint, status] = self._requests.labels(endpoint, str(status))
        counter.inc()

    def _ended(self, record: RequestRecord) -> None:
        self._completion_tokens.inc(record.completion_tokens)
        if record.route is not None:
            self._routes.labels(record.route.reason.partition(":")[0]).inc()
        if (named := record.documents) is not None:
            self._documents.labels(named.named_by, "compute" if named.why_computed else "reuse").inc()
        self._in_need.inc(record.in_need)
        for leg, code in record.retried_legs:
            self._retries.labels(leg, code).inc()
        if record.ttft_s is not None:
            self._ttft.observe(record.ttft_s)
        if (error_s := record.forecast_error_s) is not None:
            self._forecast_error.labels(record.way).observe(abs(error_s))
        if record.total_s is not None:
            self._seconds.observe(record.total_s)
        if record.state == "ok":
            self._prompt_tokens.inc(record.prompt_tokens)
            self._cached_tokens.inc(record.cached_tokens)
            self._approximate_tokens.inc(record.approximate_tokens)
        if record.state == "cancelled":
            self._cancelled.inc()
        if record.state == "failed":
            self._failed.labels((record.error or "").partition(":")[0]).inc()

    def _nodes(self) -> list[tuple[tuple[str, ...], float]]:
        counts: dict[tuple[str, ...], float] = {}
        for node in self._cluster.nodes.values():
            state = "usable" if self._cluster.why_unused(node) is None else "unusable"
            counts[node.role, state] = counts.get((node.role, state), 0) + 1
        return list(counts.items())
