"""What a cluster file says that makes its KV another kind than the same model's elsewhere. Pure."""

from collections.abc import Iterator

from kvcore.config.schema import ClusterConfig
from kvcore.config.tiers import TierConfig

_ENCRYPTION = "aes-256-gcm.v1"
"""What is declared of encrypted KV: how it is."""
LOSSY_CODECS = {"int8": "int8.v1"}
"""Codec -> what is declared: another version of it decodes to other bytes."""


def declared_kv(config: ClusterConfig) -> tuple[tuple[str, str], ...]:
    """For KVSpec's `declared`. KV that went through a lossy codec is not what was computed, so all KV of a cluster with
    one is of another kind, whether it went through it or not: no exact cluster takes it for its own. Encrypted KV is of
    another kind, too: a node that does not encrypt neither finds nor offers any to those that do."""
    lossy = {LOSSY_CODECS[tier.codec] for _, tier in all_tiers(config) if tier.codec in LOSSY_CODECS}
    encrypted = (("kv.encrypt", _ENCRYPTION),) if config.kv.encrypt else ()
    return encrypted + ((("tiers.codec", ",".join(sorted(lossy))),) if lossy else ())


def all_tiers(config: ClusterConfig) -> Iterator[tuple[str, TierConfig]]:
    """Every section of a tier, with its path in the file: the cluster's, then the nodes' own."""
    sections = {f"tiers.{name}": getattr(config.tiers, name) for name in config.tiers.__struct_fields__}
    sections |= {f"nodes.{name}.disk": node.disk for name, node in config.nodes.items()}
    yield from ((path, section) for path, section in sections.items() if isinstance(section, TierConfig))
