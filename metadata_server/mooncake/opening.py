"""Makes the dialect that a cluster file asks for, and the port of its own if it has one."""

import os
import ssl

from kvcore.clock import Clock
from kvcore.config.mooncake_metadata import LivenessKind, MooncakeMetadataConfig
from kvcore.errors import ConfigError
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


def tls_of(config: MooncakeMetadataConfig) -> ssl.SSLContext | None:
    """With the certificate as its files are now. Raises ConfigError: they cannot be used."""
    if config.cert is None or config.key is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(config.cert, config.key, password=lambda: "")
    except (OSError, ValueError) as error:  # ssl's errors are OSErrors
        raise ConfigError(
            f"metadata_server.mooncake.cert, key: {config.cert} and {config.key} are no certificate with its key in"
            f" PEM form: {error}"
        ) from error
    return context
