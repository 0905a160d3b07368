"""All that a connector needs to reach the store: `kv_connector_extra_config["kvferry"]` of vLLM, as a typed value."""

import msgspec

from kvcore.config.fields import ByteSize
from kvcore.errors import ConfigError
from kvstore.settings import KVStoreSettings

EXTRA_CONFIG_NAME = "kvferry"


class Provenance(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the KV comes from (see KVSpec); the worker half measures dtype, layout and sizes."""

    model_id: str
    weights_digest: str
    tokenizer_digest: str
    attention: str
    declared: tuple[tuple[str, str], ...] = ()
    """Before vLLM runs what the cluster file declares; what vLLM itself does is known once its model is loaded
    (`kv_factors`)."""


class ConnectorSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Of one engine. Every part is what the cluster file says."""

    store: KVStoreSettings
    chunk_tokens: int
    save_output: bool
    """Save full chunks of generated tokens too."""
    provenance: Provenance
    bus: str | None = None
    """Path of the engine front's Unix socket. None: nothing is reported, and no wait for a handoff is ended early."""
    cpus: tuple[int, ...] = ()
    """Cores for the worker halves' threads; empty: those of the thread that starts them. On a CPU vLLM binds that
    thread to the core that computes."""


def to_extra_config(settings: ConnectorSettings) -> dict[str, str]:
    """What goes into vLLM's `kv_connector_extra_config`: JSON text, so that it survives any of vLLM's copies."""
    return {EXTRA_CONFIG_NAME: msgspec.json.encode(settings, enc_hook=_encode_custom).decode()}


def from_extra_config(extra: dict[str, object]) -> ConnectorSettings:
    """Raises ConfigError that says where the settings come from."""
    text = extra.get(EXTRA_CONFIG_NAME)
    if not isinstance(text, str):
        raise ConfigError(
            "vLLM's kv_connector_extra_config has no entry 'kvferry': KVFerryConnector is started by kvferry "
            "(`engine: {kind: vllm}` or kvferry.LLM), not by hand"
        )
    try:
        return msgspec.json.decode(text, type=ConnectorSettings, dec_hook=_decode_custom)
    except msgspec.MsgspecError as error:
        raise ConfigError(f"kv_connector_extra_config['kvferry'] is not ours: {error}") from error


def _encode_custom(value: object) -> int:
    if isinstance(value, ByteSize):
        return int(value)
    raise NotImplementedError(f"{type(value).__name__} does not go into the connector's settings")


def _decode_custom(kind: type, value: object) -> object:
    if kind is ByteSize and isinstance(value, int):
        return ByteSize(value)
    raise NotImplementedError(f"{kind.__name__} does not come from the connector's settings")
