"""Every metric of kvferry: name, help and labels, in one place, so that dashboards and tests have one list.

Names begin with `kvferry_`, units come last, counters end in `_total`. Labels have few values each: never a request
or a key.
"""

from dataclasses import dataclass
from enum import StrEnum


class MetricKind(StrEnum):
    """What Prometheus calls its type."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric's description; `kvcore.telemetry.Metrics` makes the thing itself."""

    kind: MetricKind
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


_CALL_SECONDS = (0.0001, 0.00025, 0.0005, *(limit for limit in _SECONDS if limit <= 5.0))
"""Of calls that are answered from memory."""


def _counter(name: str, help_text: str, *labels: str) -> Metric:
    return Metric(MetricKind.COUNTER, f"kvferry_{name}", help_text, labels)


def _gauge(name: str, help_text: str, *labels: str) -> Metric:
    return Metric(MetricKind.GAUGE, f"kvferry_{name}", help_text, labels)


def _seconds(name: str, help_text: str, *labels: str) -> Metric:
    return Metric(MetricKind.HISTOGRAM, f"kvferry_{name}", help_text, labels, _SECONDS)


# --- every HTTP listener ---------------------------------------------------------------------------------------
HTTP_CONNECTIONS = _gauge("http_connections", "Connections that are served", "listener")
HTTP_HELD_BYTES = _gauge("http_held_bytes", "Bytes of bodies that are not whole yet", "listener")
HTTP_REFUSED = _counter("http_refused_total", "Refused connections and requests, by the bound", "listener", "reason")

# --- router ----------------------------------------------------------------------------------------------------
ROUTER_REQUESTS = _counter("router_requests_total", "Requests ended, by endpoint and HTTP status", "endpoint", "status")
ROUTER_ACTIVE = _gauge("router_active_requests", "Requests under way")
ROUTER_TTFT = _seconds("router_ttft_seconds", "From the request's arrival to its first token")
ROUTER_REQUEST_SECONDS = _seconds("router_request_seconds", "From the request's arrival to its end")
ROUTER_PROMPT_TOKENS = _counter("router_prompt_tokens_total", "Prompt tokens of answered requests")
ROUTER_CACHED_TOKENS = _counter("router_cached_tokens_total", "Prompt tokens that no node had to compute")
ROUTER_APPROXIMATE_TOKENS = _counter(
    "router_approximate_tokens_total", "Prompt tokens reused of documents that were computed elsewhere"
)
ROUTER_DOCUMENTS = _counter(
    "router_document_prompts_total",
    "Prompts that name documents, by how they are named and whether nodes may reuse them or compute them",
    *("named_by", "use"),
)
ROUTER_COMPLETION_TOKENS = _counter("router_completion_tokens_total", "Tokens sent to clients")
ROUTER_RETRIES = _counter("router_retries_total", "Legs tried again, by leg and the code of the failure", "leg", "code")
ROUTER_SUSPECTED = _counter(
    "router_suspected_total", "Times that a node was silent for longer than it should ever be", "role"
)
ROUTER_IN_NEED = _counter("router_in_need_total", "Requests that a prefiller decoded, as no decoder could")
ROUTER_ROUTES = _counter("router_routes_total", "Routing decisions, by reason", "reason")
ROUTER_FAILED = _counter("router_failed_total", "Accepted requests that ended in an error, by its code", "code")
ROUTER_CANCELLED = _counter("router_cancelled_total", "Requests whose client left")
ROUTER_FORECAST_ERROR = _seconds(
    "router_forecast_error_seconds",
    "Between when a first token was expected and when it came; way: who computed, or tier where one had some of it",
    "way",
)
ROUTER_WAITING = _gauge("router_waiting_requests", "Requests that wait for their turn, as no node has room")
ROUTER_WAITED = _seconds("router_waited_seconds", "How long requests waited for their turn; 0: not at all")
ROUTER_REFUSED = _counter(
    "router_refused_total", "Requests refused as their first token would be too late: late, missed or full", "why"
)
ROUTER_NODES = _gauge("router_nodes", "Nodes known to the router; state is usable or unusable", "role", "state")
ROUTER_INDEX_CONNECTED = _gauge("router_index_connected", "1 while the event stream of the metadata server is up")
ROUTER_INDEX_KEYS = _gauge("router_index_keys", "Chunk keys in the router's index")
CACHE_TOKENS = _counter("cache_tokens_total", "Cached prompt tokens: `engine`, `memory` or a tier's name", "source")
CACHE_MISSED_TOKENS = _counter(
    "cache_missed_tokens_total", "Other prompt tokens: `last_chunk`, `gone`, `new` or `unknown`", "why"
)
ROUTER_SHADOW = _counter(
    "router_shadow_total",
    "Requests that were to be computed in full too: `exact` or `documents`; `same`, `diverged`, `compared`, ...",
    "reuse",
    "outcome",
)
ROUTER_WRONG_CHUNKS = _counter("router_wrong_chunks_total", "Chunks reused by prefix that were not what tokens give")
ROUTER_BLEND_OFF = _gauge(
    "router_blend_off", "1: documents of this kind are not reused, as that cost too much", "model", "kind"
)
CACHE_UNUSED_TOKENS = _counter("cache_unused_tokens_total", "Prompt tokens promoted from a tier and then not used")

# --- metadata server -------------------------------------------------------------------------------------------
METADATA_NODES = _gauge("metadata_nodes", "Live nodes", "role")
METADATA_OBJECTS = _gauge("metadata_objects", "Chunks with a complete replica")
METADATA_REBUILDING = _gauge("metadata_rebuilding_segments", "Segments whose nodes have not told all that lies there")
METADATA_RESERVATIONS = _gauge("metadata_reservations", "Reservations neither committed nor given back")
METADATA_OLDEST_RESERVATION = _gauge(
    "metadata_oldest_reservation_seconds", "For how long the oldest reservation has been open; 0: there is none"
)
METADATA_LEADS = _gauge("metadata_leads", "1: this metadata server leads, or is the only one; 0: another one does")
METADATA_READ_LEASES = _gauge("metadata_read_leases", "Read leases held")
METADATA_WAITERS = _gauge("metadata_waiters", "Long polls under way")
METADATA_SUBSCRIBERS = _gauge("metadata_subscribers", "Open event streams")
METADATA_SEGMENT_BYTES = _gauge("metadata_segment_bytes", "Bytes of segments, by state", "segment", "state")
METADATA_EVENTS = _counter("metadata_events_total", "Index events published")
METADATA_TOTALS = _counter("metadata_totals_total", "Counters of the index, by name", "name")
METADATA_MOONCAKE_KEYS = _gauge("metadata_mooncake_keys", "Keys that Mooncake's clients keep under /metadata")
METADATA_MOONCAKE_SECONDS = _seconds("metadata_mooncake_seconds", "Time to answer one call of Mooncake's clients")
METADATA_EVENT_LOG = _gauge("metadata_event_log", "Seq of the `oldest` event kept and of the `next`", "position")
METADATA_SUBSCRIBER_LAG = _gauge("metadata_subscriber_lag_events", "Events that the slowest event stream was not sent")
METADATA_CALL_SECONDS = Metric(
    MetricKind.HISTOGRAM,
    "kvferry_metadata_call_seconds",
    "Time to answer one call; of a long poll, with the wait",
    ("endpoint",),
    _CALL_SECONDS,
)

# --- nodes: service, engine, store -----------------------------------------------------------------------------
NODE_READY = _gauge("node_ready", "1 while the node serves")
NODE_REGISTERED = _gauge("node_registered", "1 while the metadata server knows the node, as far as the node has heard")
NODE_ACTIVE = _gauge("node_active_requests", "Legs under way", "leg")
NODE_LEGS = _counter("node_legs_total", "Legs ended, by outcome code (`ok` or an error's)", "leg", "outcome")
NODE_ENGINE_RESTARTS = _counter("node_engine_restarts_total", "Engine processes that died and were started again")
NODE_HOST_RESTARTS = _counter(
    "node_host_restarts_total", "Processes serving the segment by ucx or nixl that ended and were started again"
)
NODE_TRANSFER_REFUSED = _counter(
    "node_transfer_refused_total",
    "Connections to the node's segment that it ended, by reason: protocol, proof or forged",
    "transport",
    "reason",
)
NODE_REGISTRATIONS = _counter("node_registrations_total", "Times the node joined the metadata server")
NODE_HEARTBEAT_FAILURES = _counter("node_heartbeat_failures_total", "Heartbeats that got no answer")
NODE_SEGMENT_BYTES = _gauge("node_segment_bytes", "Size of the node's segment")
TIER_CHUNKS = _counter(
    "tier_chunks_total",
    "Chunks by what became of them: saved, there, dropped, gone, failed, promoted, damaged, forged, unproven, missing, "
    "computed, no_room",
    "tier",
    "what",
)
TIER_BYTES = _counter("tier_bytes_total", "Bytes that arrived, by direction (`load` or `save`)", "tier", "direction")
TIER_USED_BYTES = _gauge("tier_used_bytes", "What lies in the tier, as far as it knows", "tier")
TIER_PROBLEM = _gauge("tier_problem", "1 while something is wrong with the tier; `status` says what", "tier")
NODE_PEER_TRANSPORT = _gauge(
    "node_peer_transport", "Always 1: this transport reaches this segment of a peer", "segment", "transport"
)
ENGINE_STATE = _gauge(
    "engine_state", "Sample of the engine: running, waiting, loading, used_blocks, cached_blocks, ...", "field"
)
ENGINE_TOTALS = _counter("engine_totals_total", "Counters of the engine, by name", "name")
STORE_MOVED_BYTES = _counter("store_moved_bytes_total", "KV bytes moved", "transport", "direction")
STORE_MOVED_SECONDS = _counter("store_moved_seconds_total", "Time of the calls that moved KV", "transport", "direction")
STORE_TOTALS = _counter("store_totals_total", "Counters of the store as the engine uses it, by name", "name")
