"""How a process tells what it does: one-line logs, and its Prometheus registry.

Owns the log format and the registry; the metrics' names are in `kvcore.metric_names`. Nothing here is global: a
process makes one `Metrics` and passes it on.
"""

import asyncio
import json
import logging
import re
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import TextIO

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client import Metric as Family
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from kvcore.metric_names import Metric, MetricKind

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[Sequence[str], float]
"""Label values, in the order of the metric's label names, and the value."""

_PLAIN = re.compile(r"[A-Za-z0-9_\-.:/@+,\[\]%]+")


def log_fields(logger: logging.Logger, level: int, event: str, **fields: object) -> None:
    """Log `event key=value ...` on one line. Fields that are None are left out; odd values are quoted as JSON text."""
    if logger.isEnabledFor(level):
        said = [f"{name}={shown(value)}" for name, value in fields.items() if value is not None]
        logger.log(level, "%s", " ".join([event, *said]))


def log_line(logger: logging.Logger, level: int, line: Callable[[], str]) -> None:
    """Log a line that is often said, made as `log_fields` makes one, without a look at where that was."""
    if logger.isEnabledFor(level):
        logger.handle(logger.makeRecord(logger.name, level, __file__, 0, line(), (), None))


def shown(value: object) -> str:
    """A field's value."""
    if isinstance(value, bytes):
        return value.hex()
    text = f"{value:.6g}" if isinstance(value, float) else str(value)
    if _PLAIN.fullmatch(text):
        return text
    return json.dumps(text, ensure_ascii=not text.isprintable())  # a terminal would obey control characters


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes lines of an event loop together, `within_s` of the first; a warning, and what was logged elsewhere, at
    once. Killed, a process says no more of what it did in that time."""

    def __init__(self, stream: TextIO, within_s: float = 0.1) -> None:
        super().__init__(stream)
        self._within_s = within_s
        self._lines: list[str] = []
        self._due: asyncio.AbstractEventLoop | None = None
        """The loop that will write them."""

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        try:
            loop = _running_loop()
            self._lines.append(self.format(record))
            if loop is None or record.levelno >= logging.WARNING:
                self.flush()
            elif loop is not self._due:
                self._due = loop
                loop.call_later(self._within_s, self.flush)
        except Exception:  # as every handler of logging does: what it cannot say ends nothing
            self.handleError(record)

    def flush(self) -> None:
        """Write what there is. From any thread."""
        with self.lock or nullcontext():
            self._due = None
            lines, self._lines = self._lines, []
            if lines:
                self.stream.write("\n".join([*lines, ""]))
            super().flush()


class _Formatter(logging.Formatter):
    """`TIME LEVEL PROCESS LOGGER MESSAGE`. Makes the text of a second once."""

    _second, _time = -1, ""

    def __init__(self, process_name: str) -> None:
        super().__init__("%(message)s")
        self._process = process_name

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        """See logging.Formatter."""
        second = int(record.created)
        if second != self._second:
            self._second, self._time = second, self.formatTime(record, "%Y-%m-%dT%H:%M:%S")
        milliseconds = int(record.msecs)
        return f"{self._time}.{milliseconds:03d} {record.levelname} {self._process} {record.name} {record.message}"


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def configure_logging(process_name: str, level: str = "info") -> None:
    """Send the root logger to stderr, one line a record, with `process_name` in it. Replaces earlier handlers.

    Third parties speak from warning up. Raises ValueError for a level that logging does not know.
    """
    number = logging.getLevelNamesMapping().get(level.upper())
    if number is None:
        raise ValueError(f"unknown log level {level!r}")
    handler = LineHandler(sys.stderr)
    handler.setFormatter(_Formatter(process_name))
    logging.getLogger().handlers[:] = [handler]
    set_log_level(level)


def say_nothing_of_origins() -> None:
    """What no line of ours shows need not be found out for each (logging's own documentation, "Optimization"). Only for
    a process that has no loggers of others: vLLM's lines name the process and the place, or end as a traceback."""
    logging._srcfile = None
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False


def set_log_level(level: str) -> None:
    """From now on. Third parties speak from warning up."""
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.getLogger().setLevel(number)
    for chatty in ("uvicorn", "aiohttp", "asyncio"):
        logging.getLogger(chatty).setLevel(max(number, logging.WARNING))


class Metrics:
    """One process's (or, in tests, one component's) Prometheus registry; memory, CPU and open files are in it."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)

    def counter(self, metric: Metric) -> Counter:
        """A counter that the caller increments. Made once a metric; a second call raises ValueError."""
        assert metric.kind is MetricKind.COUNTER
        return Counter(metric.name, metric.help, metric.labels, registry=self.registry)

    def gauge(self, metric: Metric) -> Gauge:
        """A gauge that the caller sets."""
        assert metric.kind is MetricKind.GAUGE
        return Gauge(metric.name, metric.help, metric.labels, registry=self.registry)

    def histogram(self, metric: Metric) -> Histogram:
        """A histogram over `metric.buckets`."""
        assert metric.kind is MetricKind.HISTOGRAM
        return Histogram(metric.name, metric.help, metric.labels, buckets=metric.buckets, registry=self.registry)

    def tally(self, metric: Metric) -> "Tally":
        """A histogram over `metric.buckets` for one event loop, which adds to it for each request."""
        assert metric.kind is MetricKind.HISTOGRAM
        tally = Tally(metric)
        self.registry.register(tally)
        return tally

    def sampled(self, metric: Metric, sample: Callable[[], Iterable[Sample]]) -> None:
        """A counter or gauge whose samples are asked for when `render` is called; `sample` must not block."""
        assert metric.kind is not MetricKind.HISTOGRAM
        self.registry.register(_Sampled(metric, sample))

    def render(self) -> bytes:
        """The text exposition format, `METRICS_CONTENT_TYPE`."""
        return generate_latest(self.registry)


def exposition(registry: Collector, *, prefix: str, labels: Mapping[str, str], max_bytes: int) -> bytes:
    """The families of a registry of somebody else's whose names begin with `prefix`, with `labels` on every sample.

    Text as `Metrics.render` has it. A label that a sample has already stays as `exported_NAME`, as Prometheus would do
    it. Families that would make the text longer than `max_bytes` are left out, whole.
    """
    text = b""
    for family in registry.collect():
        if family.name.startswith(prefix):
            part = generate_latest(_Only(_labelled(family, labels)))
            text += part if len(text) + len(part) <= max_bytes else b""
    return text


def merged_exposition(texts: Mapping[str, bytes], *, label: str) -> bytes:
    """The families of several processes of one program, each text as `Metrics.render` has it and by the value that
    `label` has on its samples. A text that is none is left out."""
    families: dict[str, Family] = {}
    for value, text in texts.items():
        try:
            parsed = list(text_string_to_metric_families(text.decode()))
        except ValueError:
            continue
        for family in parsed:
            found = _labelled(family, {label: value})
            if (known := families.setdefault(found.name, found)) is not found:
                known.samples += found.samples
    return b"".join(generate_latest(_Only(family)) for family in families.values())


def _labelled(family: Family, labels: Mapping[str, str]) -> Family:
    copy = Family(family.name, family.documentation, family.type, family.unit)
    for sample in family.samples:
        own = {f"exported_{name}" if name in labels else name: value for name, value in sample.labels.items()}
        copy.samples.append(sample._replace(labels={**own, **labels}))
    return copy


class _Only(Collector):
    def __init__(self, family: Family) -> None:
        self._family = family

    def collect(self) -> Iterable[Family]:
        """The one."""
        return [self._family]


class TallyRow:
    """What was observed under some label values."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        """Of each bucket alone; the last is of what is over all bounds."""
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Once more."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value


class Tally(Collector):
    """A histogram without locks: adding takes a tenth of what prometheus_client's takes. For one thread."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric
        self._rows: dict[tuple[str, ...], TallyRow] = {}
        if not metric.labels:
            self.row()

    def row(self, *labels: str) -> TallyRow:
        """That of these label values, in the order of the metric's label names."""
        row = self._rows.get(labels)
        if row is None:
            row = self._rows[labels] = TallyRow(self._metric.buckets)
        return row

    def describe(self) -> Iterable[HistogramMetricFamily]:
        """The empty family."""
        return [HistogramMetricFamily(self._metric.name, self._metric.help, labels=self._metric.labels)]

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """One family as of now."""
        (family,) = self.describe()
        names = [*map(floatToGoString, self._metric.buckets), "+Inf"]
        for labels, row in self._rows.items():
            family.add_metric(labels, list(zip(names, accumulate(row.counts), strict=True)), row.total)
        return [family]


class _Sampled(Collector):
    def __init__(self, metric: Metric, sample: Callable[[], Iterable[Sample]]) -> None:
        self._metric = metric
        self._sample = sample

    def describe(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """The empty family: registering must not ask for samples."""
        kind = CounterMetricFamily if self._metric.kind is MetricKind.COUNTER else GaugeMetricFamily
        return [kind(self._metric.name, self._metric.help, labels=self._metric.labels)]

    def collect(self) -> Iterable[CounterMetricFamily | GaugeMetricFamily]:
        """One family with the samples of now."""
        (family,) = self.describe()
        for labels, value in self._sample():
            family.add_metric(list(labels), value)
        return [family]
