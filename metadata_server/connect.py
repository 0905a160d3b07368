"""The one place where clients of a metadata server are made: of its calls, and of its event stream."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import msgspec

from kvcore.clock import Clock
from kvcore.config.schema import MetadataServerConfig
from kvcore.config.servers import metadata_urls, urls_of
from kvcore.partitions import Part, Partitions
from kvcore.process.descriptors import soft_limit
from kvcore.trust.opening import OPEN, ClusterTrust
from metadata_server.client import MetadataClient
from metadata_server.http_transport import HttpEventSource, HttpMetadataTransport
from metadata_server.leading.following import FollowingSource, FollowingTransport
from metadata_server.limits import ClientLimits
from metadata_server.partitions.client import PartitionedMetadataClient
from metadata_server.partitions.subscription import PartitionedSubscription
from metadata_server.subscription import EventSource, IndexSink, IndexSubscription
from metadata_server.versions import SPOKEN


class MetadataEndpoints(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a cluster's metadata servers are asked, and how long one call may take."""

    urls: tuple[str, ...]
    """http://host:port of each, at least one. Of several of one partition the one that leads is asked."""
    timeout_s: float
    partitions: dict[str, tuple[str, ...]] = {}
    """Name -> those of `urls` that are its servers, in the cluster file's order. Empty: the index is one server's."""

    def parts(self) -> list[tuple[Part | None, tuple[str, ...]]]:
        """Each partition, and where it is asked."""
        if not self.partitions:
            return [(None, self.urls)]
        whole = Partitions(tuple(self.partitions))
        return [(Part(whole, number), urls) for number, urls in enumerate(self.partitions.values())]


def endpoints_of(server: MetadataServerConfig) -> MetadataEndpoints:
    """What a cluster file says of its metadata servers."""
    return MetadataEndpoints(
        urls=tuple(metadata_urls(server)),
        timeout_s=server.timeout_s,
        partitions={partition.name: tuple(urls_of(partition)) for partition in server.partitions},
    )


def connect_client(endpoints: MetadataEndpoints, clock: Clock, trust: ClusterTrust = OPEN) -> MetadataClient:
    """Typed calls over HTTP. Opens no connection yet; close it with `aclose`. Waits take at most a quarter of the
    descriptors that this process may have."""
    most, parts = ClientLimits(), endpoints.parts()
    limits = replace(most, max_waits=min(most.max_waits, soft_limit() // 4) // len(parts))
    way = partial(HttpMetadataTransport, limits=limits, trust=trust)
    clients = [
        MetadataClient(
            way(urls[0]) if len(urls) == 1 else FollowingTransport(urls, way),
            clock,
            endpoints.timeout_s,
            speaks=replace(SPOKEN, part=part),
            limits=limits,
        )
        for part, urls in parts
    ]
    first = parts[0][0]
    return clients[0] if first is None else PartitionedMetadataClient(clients, first.whole, clock, limits)


def connect_subscription(
    endpoints: MetadataEndpoints, sink_of: Callable[[Part | None], IndexSink], clock: Clock, trust: ClusterTrust = OPEN
) -> IndexSubscription | PartitionedSubscription:
    """Follows the event stream of each partition over HTTP, into a sink of its own (None: the index is one server's),
    once its `run` is awaited; close it with `aclose` after that has ended."""
    parts, way = endpoints.parts(), partial(HttpEventSource, trust=trust)
    streams = [_subscription(part, urls, sink_of(part), clock, way) for part, urls in parts]
    return streams[0] if parts[0][0] is None else PartitionedSubscription(streams)


def _subscription(
    part: Part | None, urls: Sequence[str], sink: IndexSink, clock: Clock, way: Callable[[str], EventSource]
) -> IndexSubscription:
    source = way(urls[0]) if len(urls) == 1 else FollowingSource(urls, way)
    return IndexSubscription(source, sink, clock, speaks=replace(SPOKEN, part=part))
