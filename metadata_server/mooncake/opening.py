"""Makes the dialect that a cluster file asks for, and the port of its own if it has one."""

import os

from kvcore.clock import Clock
from kvcore.config.mooncake_metadata import LivenessKind, MooncakeMetadataConfig
from kvcore.config.security import TlsConfig
from kvcore.errors import ConfigError
from kvcore.trust.tls import ServerCertificate
from metadata_server.mooncake.dialect import MooncakeDialect
from metadata_server.mooncake.expiry import TtlLiveness
from metadata_server.mooncake.liveness import Liveness
from metadata_server.mooncake.probe import probe
from metadata_server.mooncake.probing import ProbeLiveness
from metadata_server.mooncake.store import DialectStore
from metadata_server.records.base import Records


async def open_dialect(config: MooncakeMetadataConfig, records: Records, clock: Clock) -> MooncakeDialect:
    """With what earlier lives left; the records must be running. Await its `run`."""
    store = DialectStore(records)
    liveness: Liveness
    if config.liveness is LivenessKind.TTL:
        liveness = TtlLiveness(store, clock, config.ttl_s)
    else:
        liveness = ProbeLiveness(store, clock, config, probe)
    dialect = MooncakeDialect(store, liveness, config)
    await dialect.restore()
    return dialect


def token_of(config: MooncakeMetadataConfig) -> str | None:
    """That callers must bring. Raises ConfigError: the environment has none."""
    if config.token_env is None:
        return None
    token = os.environ.get(config.token_env, "").strip()
    if not token or not token.isascii():
        raise ConfigError(f"metadata_server.mooncake.token_env: the environment has no token in {config.token_env}")
    return token


def tls_of(config: MooncakeMetadataConfig) -> ServerCertificate | None:
    """Await its `follow`. Raises ConfigError: the files cannot be used."""
    if config.cert is None or config.key is None:
        return None
    return ServerCertificate(TlsConfig(cert=config.cert, key=config.key), "metadata_server.mooncake.cert, key")
