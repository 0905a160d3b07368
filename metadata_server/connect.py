"""The one place where clients of a metadata server are made: of its calls, and of its event stream."""

from dataclasses import replace
from functools import partial

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import MetadataServerConfig
from kvcore.config.servers import metadata_urls
from kvcore.process.descriptors import soft_limit
from kvcore.trust.opening import OPEN, ClusterTrust
from metadata_server.client import MetadataClient
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.leading.following import FollowingSource, FollowingTransport
from metadata_server.limits import ClientLimits
from metadata_server.subscription import IndexSink, IndexSubscription


class MetadataEndpoints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a cluster's metadata servers are asked, and how long one call may take."""

    urls: tuple[str, ...]
    """http://host:port of each, at least one. Of several the one that leads is asked."""
    timeout_s: float


def endpoints_of(server: MetadataServerConfig) -> MetadataEndpoints:
    """What a cluster file says of its metadata server."""
    return MetadataEndpoints(urls=tuple(metadata_urls(server)), timeout_s=server.timeout_s)


def connect_client(endpoints: MetadataEndpoints, clock: Clock, trust: ClusterTrust = OPEN) -> MetadataClient:
    """Typed calls over HTTP. Opens no connection yet; close it with `aclose`. Waits take at most a quarter of the
    descriptors that this process may have."""
    most, urls = ClientLimits(), endpoints.urls
    limits = replace(most, max_waits=min(most.max_waits, soft_limit() // 4))
    way = partial(HttpMetadataTransport, limits=limits, trust=trust)
    transport = way(urls[0]) if len(urls) == 1 else FollowingTransport(urls, way)
    return MetadataClient(transport, clock, endpoints.timeout_s, limits=limits)


def connect_subscription(
    endpoints: MetadataEndpoints, sink: IndexSink, clock: Clock, trust: ClusterTrust = OPEN
) -> IndexSubscription:
    """Follows the event stream over HTTP once its `run` is awaited; close it with `aclose` after that has ended."""
    urls = endpoints.urls
    way = partial(HttpEventSource, trust=trust)
    source = way(urls[0]) if len(urls) == 1 else FollowingSource(urls, way)
    return IndexSubscription(source, sink, clock)
