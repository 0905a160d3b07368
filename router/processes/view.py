"""What is asked of a router, whichever of its processes is asked: their counts together, a request of any of them.

One that does not answer is left out of sums and lists, and `/v1/cluster` says so.
"""

from collections.abc import Callable
from urllib.parse import quote

import msgspec

from kvcore.telemetry import merged_exposition
from router.cache.replay import CacheReplay
from router.cache.report import CacheCounts, CacheStats
from router.metrics import RouterMetrics
from router.processes.reports import OWN, OwnRecords, ProcessReport
from router.processes.siblings import Said, Siblings
from router.requests.records import RING, RequestLog, RequestRecord
from router.status import ClusterStatus, ProcessStatus, RequestTotals, StatusView

Shown = Callable[[str], bool]
"""Whether a tenant's requests are."""


class RouterView:
    """`siblings` None: this process is the whole router."""

    def __init__(
        self,
        status: StatusView,
        log: RequestLog,
        metrics: RouterMetrics,
        siblings: Siblings | None = None,
        *,
        name: str = "",
    ) -> None:
        self._status, self._log, self._metrics = status, log, metrics
        self._siblings, self._name = siblings, name
        self.problem = status.problem
        """Why this process can serve no request now; None: it can."""

    @property
    def cache(self) -> CacheReplay:
        """Of what this process was asked."""
        return self._status.cache

    def own(self) -> ProcessReport:
        """Of this process alone; so with the next ones."""
        status, log = self._status.status(), self._log
        return ProcessReport(
            name=self._name,
            stopping=status.stopping,
            requests=status.requests,
            prompt_tokens=log.prompt_tokens,
            cached_tokens=log.cached_tokens,
            cache=self._status.cache.stats(),
        )

    def own_metrics(self) -> bytes:
        """As Prometheus reads them."""
        return self._metrics.metrics.render()

    def own_records(self, request_id: str | None = None) -> OwnRecords:
        """The last ones, without their explanations, or what there is of one request."""
        if request_id is None:
            return OwnRecords(self._log.briefs())
        return OwnRecords(self._log.named(request_id))

    async def cluster(self) -> ClusterStatus:
        """Nodes as this process sees them; counts of all processes."""
        status = self._status.status()
        if self._siblings is None:
            return status
        said = await self._siblings.structs(OWN, ProcessReport)
        own = self.own()
        reports = [own, *(one.value for one in said if one.value is not None)]
        status.requests = _sum(reports)
        prompt, cached = (sum(getattr(one, f"{kind}_tokens") for one in reports) for kind in ("prompt", "cached"))
        status.hit_rate = cached / prompt if prompt else 0.0
        lines = [ProcessStatus(name=self._name, in_flight=own.requests.in_flight, stopping=own.stopping)]
        status.processes = sorted([*lines, *map(_line, said)], key=lambda line: (len(line.name), line.name))
        return status

    async def cache_stats(self) -> CacheStats:
        """Counts of all processes; what more room would have hit is judged by what this one was asked."""
        stats = self._status.cache.stats()
        for said in [] if self._siblings is None else await self._siblings.structs(OWN, ProcessReport):
            if said.value is not None:
                for kind in ("minute", "hour", "start"):
                    counts: CacheCounts = getattr(stats, kind)
                    counts.add(getattr(said.value.cache, kind))
                    counts.rated()
        return stats

    async def metrics(self) -> bytes:
        """Every series with a label that says of which process it is: a counter of each restarts by itself."""
        own = self.own_metrics()
        if self._siblings is None:
            return own
        said = await self._siblings.texts(f"{OWN}/metrics")
        texts = {self._name: own, **{one.sibling.name: one.value for one in said if one.value is not None}}
        return merged_exposition(texts, label="process")

    async def newest(self, shown: Shown) -> list[RequestRecord]:
        """The last ones of all processes, newest first, without their explanations."""
        records = self._log.briefs(shown)
        if self._siblings is None:
            return records
        said = await self._siblings.structs(f"{OWN}/requests", OwnRecords)
        others = [record for one in said if one.value is not None for record in one.value.requests]
        records += [record for record in others if shown(record.tenant)]
        return sorted(records, key=lambda record: record.began_at, reverse=True)[:RING]

    async def find(self, request_id: str, shown: Shown) -> RequestRecord | None:
        """By the id of the answer, or by the client's own X-Request-Id (the newest with it)."""
        found = self._log.find(request_id, shown)
        if self._siblings is None or (found is not None and found.id == request_id):
            return found
        said = await self._siblings.structs(f"{OWN}/requests/{quote(request_id, safe='')}", OwnRecords)
        others = [one for each in said if each.value is not None for one in each.value.requests if shown(one.tenant)]
        candidates = [*others, *([found] if found is not None else [])]
        return max(candidates, key=lambda one: (one.id == request_id, one.began_at), default=None)


def _line(said: Said[ProcessReport]) -> ProcessStatus:
    if said.value is None:
        return ProcessStatus(name=said.sibling.name, problem=said.problem)
    return ProcessStatus(name=said.sibling.name, in_flight=said.value.requests.in_flight, stopping=said.value.stopping)


def _sum(reports: list[ProcessReport]) -> RequestTotals:
    counts = [msgspec.structs.asdict(one.requests) for one in reports]
    return RequestTotals(**{name: sum(each[name] for each in counts) for name in counts[0]})
