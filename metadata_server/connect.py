"""From a cluster file to a client of its metadata server. The one place where a client is made."""

from kvcore.clock import Clock
from kvcore.config.schema import ClusterConfig
from kvcore.ports import base_url
from metadata_server.client import HttpMetadataTransport, MetadataClient


def metadata_client(config: ClusterConfig, clock: Clock) -> MetadataClient:
    """A client of the cluster's metadata server, to be closed by the caller. Connects on its first call."""
    server = config.metadata_server
    transport = HttpMetadataTransport(base_url(server.host, server.port))
    return MetadataClient(transport, clock, server.timeout_s)
