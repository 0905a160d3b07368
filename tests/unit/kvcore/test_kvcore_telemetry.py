import logging

import pytest

from kvcore import metric_names
from kvcore.metric_names import ENGINE_TOTALS, METADATA_NODES, ROUTER_REQUESTS, ROUTER_TTFT, Metric, MetricKind
from kvcore.telemetry import Metrics, configure_logging, log_fields


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
