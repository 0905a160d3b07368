"""The one place where clients of a metadata server are made: of its calls, and of its event stream."""

from dataclasses import replace

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import MetadataServerConfig
from kvcore.ports import base_url
from kvcore.process.descriptors import soft_limit
from metadata_server.client import MetadataClient
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.limits import ClientLimits
from metadata_server.subscription import IndexSink, IndexSubscription


class MetadataEndpoints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a cluster's metadata servers are asked, and how long one call may take."""

    urls: tuple[str, ...]
    """http://host:port of each, at least one. Only the first is asked today."""
    timeout_s: float


def endpoints_of(server: MetadataServerConfig) -> MetadataEndpoints:
    """What a cluster file says of its metadata server."""
    return MetadataEndpoints(urls=(base_url(server.host, server.port),), timeout_s=server.timeout_s)


def connect_client(endpoints: MetadataEndpoints, clock: Clock) -> MetadataClient:
    """Typed calls over HTTP. Opens no connection yet; close it with `aclose`. Waits take at most a quarter of the
    descriptors that this process may have."""
    most = ClientLimits()
    limits = replace(most, max_waits=min(most.max_waits, soft_limit() // 4))
    way = HttpMetadataTransport(endpoints.urls[0], limits)
    return MetadataClient(way, clock, endpoints.timeout_s, limits=limits)


def connect_subscription(endpoints: MetadataEndpoints, sink: IndexSink, clock: Clock) -> IndexSubscription:
    """Follows the event stream over HTTP once its `run` is awaited; close it with `aclose` after that has ended."""
    return IndexSubscription(HttpEventSource(endpoints.urls[0]), sink, clock)
