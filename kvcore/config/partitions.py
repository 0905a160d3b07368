"""The `metadata_server.partitions` of a cluster file: several servers that share the chunk index. Values only."""

import msgspec

from kvcore.config.fields import Port, Section, Text


class PartitionConfig(Section, frozen=True, kw_only=True):
    """One of them. Which chunks it knows follows from the names of all (docs/metadata.md)."""

    name: str
    """In the index's records, in logs and in status. Letters, digits, `-` and `_`."""
    host: str = "127.0.0.1"
    """What it listens on, and the address that all nodes and the router use."""
    port: Port
    """Of its HTTP API and its `/metrics`."""
    standbys: list[Text] = msgspec.field(default_factory=list)
    """`HOST:PORT` of further servers of this partition, as `metadata_server.standbys`."""
