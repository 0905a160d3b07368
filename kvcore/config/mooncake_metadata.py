"""The `metadata_server.mooncake` of a cluster file: `/metadata` for Mooncake's own clients. Values only."""

from enum import StrEnum

from kvcore.config.fields import ByteSize, Count, Port, Seconds, Section, Text


class LivenessKind(StrEnum):
    """What says whether the owner of a record is alive."""

    PROBE = "probe"
    """The port that it registered: it is asked. Needs connections from the metadata server to Mooncake's clients."""
    TTL = "ttl"
    """That it writes again within `ttl_s`. Mooncake's own clients do not, up to 0.3.13."""


class MooncakeMetadataConfig(Section, frozen=True, kw_only=True):
    """`/metadata` for Mooncake's own clients ([metadata.md](metadata.md#for-mooncakes-own-clients))."""

    enabled: bool = True
    """Whether it is served."""
    port: Port | None = None
    """A port of its own for it, with nothing beside it but `/health`. Not set: it is on `metadata_server.port`."""
    token_env: Text | None = None
    """The environment variable with the token that callers must bring. Not set: none is asked for."""
    cert: Text | None = None
    """A PEM file with the certificate and those between it and the root: TLS on `port`. Read again when it changes."""
    key: Text | None = None
    """The PEM file with its key, which is not encrypted."""
    liveness: LivenessKind = LivenessKind.PROBE
    """What says whether the owner of a record is alive."""
    every_s: Seconds = 5.0
    """With `probe`: how often each owner's port is asked."""
    misses: Count = 3
    """With `probe`: an owner whose port refused so often in a row is dead, and its records are removed. The name of one
    that was silent so often may be taken by another client."""
    silent_s: Seconds = 600.0
    """With `probe`: an owner that was silent for so long is dead, too: it may only be cut off from here."""
    ttl_s: Seconds = 60.0
    """With `ttl`: the records of an owner that did not write for so long are removed."""
    max_keys: Count = 100_000
    """More are refused with 503."""
    max_value: ByteSize = ByteSize(1 << 20)
    """Longest value; a longer one is refused with 413."""
