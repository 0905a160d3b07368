"""The log line of a request, made in one go, is what `log_fields` would write of the same fields."""

import logging
from functools import partial

from hypothesis import given
from hypothesis import strategies as st

from kvcore.telemetry import log_fields, log_line
from nodeapi.messages import Moved, Timings
from router.requests import records
from router.requests.records import LegRecord, RequestRecord, RouteRecord

texts = st.one_of(st.sampled_from(["", "plain-1", "two words", 'a "b"', "k=v", "zeile\n2", "\x1b[2J"]), st.text())
seconds = st.floats(0.0, 1e6)
timings = st.builds(Timings, queue_s=seconds, wait_s=seconds, load_s=seconds, compute_s=seconds, save_s=seconds)
moved = st.builds(Moved, transport=st.just("shm"), direction=st.just("get"), num_bytes=st.integers(0), seconds=seconds)
legs = st.builds(
    LegRecord,
    id=st.sampled_from(["r.p0", "r.d1"]),
    node=texts,
    kind=st.sampled_from(["prefill", "decode"]),
    moved=st.lists(moved, max_size=2),
    timings=st.none() | timings,
    in_need=st.booleans(),
)
routes = st.builds(RouteRecord, prefiller=st.none() | texts, decoder=texts, reason=texts)
requests = st.builds(
    RequestRecord,
    id=texts,
    client_request_id=st.none() | texts,
    tenant=texts,
    adapter=texts,
    state=st.sampled_from(["ok", "failed", "cancelled"]),
    prompt_tokens=st.integers(0, 9999),
    cached_tokens=st.integers(0, 9999),
    approximate_tokens=st.integers(0, 1),
    completion_tokens=st.integers(0, 9999),
    waited_s=st.just(0.0) | seconds,
    ttft_s=st.none() | seconds,
    total_s=st.none() | seconds,
    route=st.none() | routes,
    legs=st.lists(legs, max_size=2, unique_by=lambda leg: (leg.kind, leg.id)),
    retries=st.integers(0, 2),
    error=st.none() | texts,
)


class Kept(logging.Handler):
    """What was said."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@given(requests)
def test_a_requests_line_has_the_fields_of_its_record(record: RequestRecord) -> None:
    logger, kept, route = logging.Logger("test.line"), Kept(), record.route
    logger.addHandler(kept)
    spent = [(leg, leg.timings) for leg in record.legs if leg.timings is not None]
    facts = {
        f"{leg.kind}_{leg.id.rpartition('.')[2]}": f"node:{leg.node},queue:{took.queue_s:.3f},wait:{took.wait_s:.3f},"
        f"load:{took.load_s:.3f},compute:{took.compute_s:.3f},save:{took.save_s:.3f},"
        f"moved:{sum(move.num_bytes for move in leg.moved)}"
        for leg, took in spent
    }
    log_fields(
        logger,
        logging.INFO,
        "request",
        id=record.id,
        client_id=record.client_request_id,
        tenant=record.tenant or None,
        adapter=record.adapter or None,
        state=record.state,
        prompt_tokens=record.prompt_tokens,
        cached_tokens=record.cached_tokens,
        approximate_tokens=record.approximate_tokens or None,
        completion_tokens=record.completion_tokens,
        waited_s=record.waited_s or None,
        ttft_s=record.ttft_s,
        total_s=record.total_s,
        prefiller=route.prefiller if route else None,
        decoder=route.decoder if route else None,
        reason=route.reason if route else None,
        retries=record.retries or None,
        in_need=record.in_need or None,
        error=record.error,
        **facts,
    )
    log_line(logger, logging.INFO, partial(records._line, record))
    assert kept.lines[0] == kept.lines[1]
