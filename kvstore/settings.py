"""All that a process needs to know to use the store: what the cluster file says, and whose process it is."""

import msgspec

from kvcore.config.schema import ClusterConfig, StoreConfig, TransportConfig
from kvcore.trust.opening import TrustSource, trust_source
from kvstore.integrity.checks import Verify
from metadata_server.connect import MetadataEndpoints, endpoints_of


class KVStoreSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One process's. Serialisable: an engine's process may be told it in a message."""

    node_id: str
    """The node that the process belongs to: its reservations die with it, and its segment is read first."""
    incarnation: int
    host_id: str
    """Segments of the same host are read before others."""
    metadata: MetadataEndpoints
    transport: TransportConfig
    store: StoreConfig
    verify: Verify = "checksum"
    encrypt: bool = False
    trust: TrustSource = TrustSource()
    """Where the cluster's secret is; the process reads it there itself."""


def store_settings(config: ClusterConfig, *, node_id: str, incarnation: int, host_id: str) -> KVStoreSettings:
    """What a cluster file says to the processes of one node."""
    return KVStoreSettings(
        node_id=node_id,
        incarnation=incarnation,
        host_id=host_id,
        metadata=endpoints_of(config.metadata_server),
        transport=config.transport,
        store=config.store,
        verify=chosen_verify(config),
        encrypt=config.kv.encrypt,
        trust=trust_source(config, node_id),
    )


def chosen_verify(config: ClusterConfig) -> Verify:
    """What a cluster file has checked of chunks."""
    said = config.kv.verify
    if isinstance(said, str):
        return said
    if not said:
        return "header"
    return "checksum" if config.security.secret is None else "mac"
