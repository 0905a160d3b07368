"""The one place where a cluster file becomes what a process trusts: its secrets, or none."""

from dataclasses import dataclass

import msgspec

from kvcore.config.schema import ClusterConfig
from kvcore.config.security import SecretConfig
from kvcore.trust.secrets import Secrets, open_secrets


class TrustSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a process of a cluster finds what it trusts. Serialisable, and no secret itself."""

    cluster: str = ""
    secret: SecretConfig | None = None
    router_cert: str = ""
    """File of the router's certificate, by which its clients here know it; empty: it has none."""


@dataclass(frozen=True, slots=True)
class ClusterTrust:
    """What one process trusts. Made once, and passed on."""

    cluster: str = ""
    secrets: Secrets | None = None
    """None: everybody is trusted who reaches us."""
    source: TrustSource = TrustSource()
    """For a child process, which reads it itself."""


OPEN = ClusterTrust()
"""A cluster without a secret."""


def trust_source(config: ClusterConfig) -> TrustSource:
    """What a cluster file says."""
    tls = config.router.tls
    router_cert = "" if tls is None else tls.cert
    return TrustSource(cluster=config.cluster, secret=config.security.secret, router_cert=router_cert)


def open_trust(source: TrustSource) -> ClusterTrust:
    """Reads the secret. Blocking, once a process. Raises ConfigError."""
    return ClusterTrust(source.cluster, open_secrets(source.secret), source)
