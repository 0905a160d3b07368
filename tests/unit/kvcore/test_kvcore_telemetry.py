import asyncio
import io
import logging
import os
import re

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families

from kvcore import metric_names
from kvcore.metric_names import ENGINE_TOTALS, METADATA_NODES, ROUTER_REQUESTS, ROUTER_TTFT, Metric, MetricKind
from kvcore.telemetry import LineHandler, Metrics, configure_logging, exposition, log_fields


@pytest.fixture
def root_logger():
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield root
    root.handlers[:] = handlers
    root.setLevel(level)


def test_a_line_stays_one_line_whatever_the_values(caplog):
    with caplog.at_level(logging.INFO, logger="t"):
        log_fields(
            logging.getLogger("t"), logging.INFO, "moved", path="a b", text='x"\ny', key=b"\x01\xff", s=0.25, none=None
        )
    assert caplog.messages == ['moved path="a b" text="x\\"\\ny" key=01ff s=0.25']


def test_empty_values_are_quoted_so_that_the_line_parses(caplog):
    with caplog.at_level(logging.INFO, logger="t"):
        log_fields(logging.getLogger("t"), logging.INFO, "e", a="", b="k=v")
    assert caplog.messages == ['e a="" b="k=v"']


def test_an_unknown_level_is_refused(root_logger):
    with pytest.raises(ValueError, match="loud"):
        configure_logging("p", "loud")


def test_logs_go_to_stderr_with_the_process_name(root_logger, capsys):
    configure_logging("prefill-0", "info")
    log_fields(logging.getLogger("kvnode"), logging.INFO, "ready", port=8000)
    configure_logging("prefill-0", "info")
    log_fields(logging.getLogger("kvnode"), logging.DEBUG, "hidden")
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert " INFO prefill-0 kvnode ready port=8000\n" in err


@pytest.mark.parametrize("labels", [(), ("tier",)])
def test_a_tally_says_what_a_histogram_of_prometheus_clients_says(labels):
    metric = Metric(MetricKind.HISTOGRAM, "kvferry_t_seconds", "T", tuple("way" for _ in labels), (0.001, 0.5, 2.0))
    ours, theirs = Metrics(), Metrics()
    tally, histogram = ours.tally(metric), theirs.histogram(metric)
    for value in (0.0, 0.001, 0.002, 0.5, 1.0, 2.0, 3.0):
        tally.row(*labels).observe(value)
        (histogram.labels(*labels) if labels else histogram).observe(value)
    lines = [
        [line for line in one.render().decode().splitlines() if "kvferry_t_seconds" in line and "_created" not in line]
        for one in (ours, theirs)
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 8


def test_loggers_of_others_can_say_where_a_line_comes_from(root_logger):
    """As vLLM's formatter does in an engine's process: each of its lines was a traceback."""
    others, stream = logging.getLogger("others"), io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(logging.Formatter("%(processName)s %(process)d %(threadName)s [%(filename)s:%(lineno)d]"))
    others.addHandler(handler)
    configure_logging("engine")
    others.info("up")
    others.removeHandler(handler)
    assert re.fullmatch(rf"\S+ {os.getpid()} \S+ \[test_kvcore_telemetry\.py:\d+]\n", stream.getvalue())


class Pipe(io.StringIO):
    """Counts the writes."""

    writes = 0

    def write(self, text: str) -> int:
        self.writes += 1
        return super().write(text)


@pytest.fixture
def lines():
    pipe, logger = Pipe(), logging.getLogger("test.lines")
    handler = LineHandler(pipe, within_s=0.01)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield pipe, logger
    logger.removeHandler(handler)


def test_lines_of_a_loop_are_written_together_and_soon(lines):
    pipe, logger = lines

    async def says(*said: str) -> None:
        for one in said:
            logger.info(one)
        assert pipe.writes == 0
        async with asyncio.timeout(60):
            while not pipe.writes:  # noqa: ASYNC110 - a buffer tells nobody
                await asyncio.sleep(0)
        assert (pipe.writes, pipe.getvalue()) == (1, "".join(f"{one}\n" for one in said))

    asyncio.run(says("a", "b", "c"))
    pipe.writes = 0
    pipe.truncate(0)
    pipe.seek(0)
    asyncio.run(says("d"))


def test_a_loop_that_ends_first_does_not_keep_the_lines_of_the_next_one(lines):
    pipe, logger = lines

    async def says() -> None:
        logger.info("a")

    asyncio.run(says())
    assert pipe.getvalue() == ""
    asyncio.run(says())
    logger.info("b")
    assert pipe.getvalue() == "a\na\nb\n"


def test_a_warning_is_written_at_once_after_what_came_before_it(lines):
    pipe, logger = lines

    async def says() -> None:
        logger.info("a")
        logger.warning("b")
        assert (pipe.writes, pipe.getvalue()) == (1, "a\nb\n")
        await asyncio.to_thread(logger.info, "c")
        assert pipe.getvalue() == "a\nb\nc\n"

    asyncio.run(says())


def test_registries_are_separate_and_render_what_was_counted():
    metrics, other = Metrics(), Metrics()
    metrics.counter(ROUTER_REQUESTS).labels("/v1/models", "200").inc()
    metrics.gauge(METADATA_NODES).labels("decoder").set(2)
    metrics.histogram(ROUTER_TTFT).observe(0.2)
    text = metrics.render().decode()
    assert 'kvferry_router_requests_total{endpoint="/v1/models",status="200"} 1.0' in text
    assert 'kvferry_metadata_nodes{role="decoder"} 2.0' in text
    assert 'kvferry_router_ttft_seconds_bucket{le="0.25"} 1.0' in text
    assert "kvferry" not in other.render().decode()
    assert "process_resident_memory_bytes" in text and "process_open_fds" in text


def test_sampled_metrics_are_read_when_rendered_and_not_before():
    metrics = Metrics()
    totals: dict[str, int] = {}
    metrics.sampled(ENGINE_TOTALS, lambda: [([name], value) for name, value in totals.items()])
    totals["prefill_tokens"] = 7
    assert 'kvferry_engine_totals_total{name="prefill_tokens"} 7.0' in metrics.render().decode()


def test_every_metric_has_a_name_a_help_and_makes():
    listed = [value for value in vars(metric_names).values() if isinstance(value, Metric)]
    assert len({metric.name for metric in listed}) == len(listed)
    metrics = Metrics()
    make = {
        MetricKind.COUNTER: metrics.counter,
        MetricKind.GAUGE: metrics.gauge,
        MetricKind.HISTOGRAM: metrics.histogram,
    }
    for metric in listed:
        assert metric.help and (metric.kind is not MetricKind.COUNTER or metric.name.endswith("_total"))
        make[metric.kind](metric)


def exposed(registry: CollectorRegistry, labels: dict[str, str], max_bytes: int = 1 << 20) -> dict:
    """(sample name, labels) -> value, as a scraper reads it."""
    text = exposition(registry, prefix="vllm:", labels=labels, max_bytes=max_bytes).decode()
    families = text_string_to_metric_families(text)
    return {(s.name, frozenset(s.labels.items())): s.value for family in families for s in family.samples}


def test_somebody_elses_metrics_pass_through_with_a_label_more():
    registry = CollectorRegistry()
    odd = 'a\\b"c\nd'
    Gauge("vllm:num_requests_running", "How many.", ["model_name"], registry=registry).labels(odd).set(3)
    Counter("vllm:prompt_tokens", "Prompts.", registry=registry).inc(7)
    Histogram("vllm:ttft_seconds", "First.", ["engine"], buckets=[1.0], registry=registry).labels("0").observe(0.5)
    Gauge("python_gc", "Not asked for.", registry=registry).set(1)
    found = exposed(registry, {"node": 'd"0'})
    node = ("node", 'd"0')
    assert found["vllm:num_requests_running", frozenset({("model_name", odd), node})] == 3
    assert found["vllm:prompt_tokens_total", frozenset({node})] == 7
    assert found["vllm:ttft_seconds_bucket", frozenset({("engine", "0"), ("le", "1.0"), node})] == 1
    assert not [name for name, _ in found if name.startswith("python")]


def test_a_label_that_a_metric_has_already_is_kept_under_another_name():
    registry = CollectorRegistry()
    Gauge("vllm:x", "X.", ["node"], registry=registry).labels("theirs").set(1)
    assert exposed(registry, {"node": "ours"}) == {
        ("vllm:x", frozenset({("exported_node", "theirs"), ("node", "ours")})): 1
    }


def test_somebody_elses_metrics_are_bounded_and_never_cut_within_a_family():
    registry = CollectorRegistry()
    for name, count in (("vllm:a", 1), ("vllm:b", 200), ("vllm:c", 1)):
        gauge = Gauge(name, "G.", ["i"], registry=registry)
        for i in range(count):
            gauge.labels(str(i)).set(i)
    found = exposed(registry, {"node": "d0"}, max_bytes=1000)
    assert {name for name, _ in found} == {"vllm:a", "vllm:c"}
