"""The one place where a cluster file becomes what a process trusts: its secrets and certificates, or none."""

from dataclasses import dataclass

import msgspec

from kvcore.config.schema import ClusterConfig
from kvcore.config.security import ClusterTlsConfig, SecretConfig
from kvcore.trust.certificates import ProcessCertificate, open_certificate
from kvcore.trust.secrets import Secrets, open_secrets

CLIENT = "client"
"""The name of whatever is no process of the cluster file's: commands, libraries."""


class TrustSource(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where a process of a cluster finds what it trusts. Serialisable, and no secret itself."""

    cluster: str = ""
    secret: SecretConfig | None = None
    tls: ClusterTlsConfig | None = None
    name: str = CLIENT
    """The process's, by which its certificate's files may be called."""
    admin_port: bool = False
    """Whether the router has a port of its own for operators."""
    router_cert: str = ""
    """File of the router's certificate, by which its clients here know it; empty: it has none."""


@dataclass(frozen=True, slots=True)
class ClusterTrust:
    """What one process trusts. Made once, and passed on."""

    cluster: str = ""
    secrets: Secrets | None = None
    """None: there is none."""
    certificate: ProcessCertificate | None = None
    """This process's; None: HTTP between processes is not encrypted, and is proved by the secret if there is one."""
    source: TrustSource = TrustSource()
    """For a child process, which reads it itself."""

    @property
    def proves_http(self) -> bool:
        """Whether requests between processes carry proofs of the secret: where they have no certificates instead."""
        return self.secrets is not None and self.certificate is None

    def url(self, url: str) -> str:
        """The same of an http:// URL of a process that only ours ask."""
        return url if self.certificate is None else url.replace("http:", "https:", 1)


OPEN = ClusterTrust()
"""A cluster without a secret."""


def trust_source(config: ClusterConfig, name: str = CLIENT) -> TrustSource:
    """What a cluster file says to the process `name`."""
    tls = config.router.tls
    router_cert = "" if tls is None else tls.cert
    security = config.security
    return TrustSource(
        cluster=config.cluster,
        secret=security.secret,
        tls=security.tls,
        name=name,
        admin_port=config.router.admin_port is not None,
        router_cert=router_cert,
    )


def open_trust(source: TrustSource) -> ClusterTrust:
    """Reads the secret and the certificate. Blocking, once a process. Raises ConfigError."""
    certificate = open_certificate(source.tls, source.name)
    return ClusterTrust(source.cluster, open_secrets(source.secret), certificate, source)
