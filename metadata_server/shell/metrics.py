"""What the metadata server exposes to Prometheus: samples of the state, and the time of calls."""

from collections.abc import Callable, Iterator

from kvcore import metric_names as names
from kvcore.clock import Clock
from kvcore.telemetry import Metrics, Sample
from metadata_server.core import MetadataCore
from metadata_server.mooncake.dialect import MooncakeDialect


def register(core: MetadataCore, clock: Clock, metrics: Metrics) -> Callable[[str], Callable[[float], None]]:
    """Make the metrics; returns what gives, for an endpoint, the function that takes a call's seconds."""

    def roles() -> Iterator[Sample]:
        counts: dict[str, int] = {}
        for node in core.state.nodes(clock.now()).nodes:
            counts[node.role.value] = counts.get(node.role.value, 0) + 1
        yield from (((role,), count) for role, count in counts.items())

    def segments() -> Iterator[Sample]:
        for use in core.state.stats(clock.now(), core.num_waiters).segments:
            complete = use.used_bytes - use.reserved_bytes - use.retiring_bytes
            yield (use.segment.id, "complete"), complete
            yield (use.segment.id, "reserved"), use.reserved_bytes
            yield (use.segment.id, "retiring"), use.retiring_bytes
            yield (use.segment.id, "free"), use.room_bytes - use.used_bytes

    def event_log() -> Iterator[Sample]:
        log = core.state.log
        yield ("oldest",), log.first_seq
        yield ("next",), log.next_seq

    metrics.sampled(names.METADATA_NODES, roles)
    metrics.sampled(names.METADATA_SEGMENT_BYTES, segments)
    metrics.sampled(names.METADATA_OBJECTS, lambda: [((), core.state.num_objects)])
    metrics.sampled(names.METADATA_REBUILDING, lambda: [((), core.state.report.num_rebuilding)])
    metrics.sampled(names.METADATA_RESERVATIONS, lambda: [((), core.state.num_reservations)])
    metrics.sampled(names.METADATA_OLDEST_RESERVATION, lambda: [((), core.state.oldest_reservation_s(clock.now()))])
    metrics.sampled(names.METADATA_LEADS, lambda: [((), float(core.leader.leads))])
    metrics.sampled(names.METADATA_READ_LEASES, lambda: [((), core.state.num_read_leases)])
    metrics.sampled(names.METADATA_WAITERS, lambda: [((), core.num_waiters)])
    metrics.sampled(names.METADATA_SUBSCRIBERS, lambda: [((), core.num_subscribers)])
    metrics.sampled(names.METADATA_EVENTS, lambda: [((), core.state.log.next_seq - 1)])
    metrics.sampled(names.METADATA_EVENT_LOG, event_log)
    metrics.sampled(names.METADATA_SUBSCRIBER_LAG, lambda: [((), core.subscriber_lag)])
    metrics.sampled(names.METADATA_TOTALS, lambda: [((name,), total) for name, total in core.state.counters.items()])
    seconds = metrics.histogram(names.METADATA_CALL_SECONDS)
    return lambda path: seconds.labels(path).observe


def register_mooncake(dialect: MooncakeDialect, metrics: Metrics) -> Callable[[float], None]:
    """Make those of Mooncake's dialect; returns what takes a call's seconds."""
    metrics.sampled(names.METADATA_MOONCAKE_KEYS, lambda: [((), dialect.num_keys)])
    return metrics.histogram(names.METADATA_MOONCAKE_SECONDS).observe
