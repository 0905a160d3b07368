"""What of a cluster file each process goes by, where two files differ, and a name for what a node goes by. Pure."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec

from kvcore.config.schema import ClusterConfig

Settings = Mapping[str, object]
"""Values by their paths in the file, `router.port`; what is not set is left out."""

_EVERY = ("cluster", "handoff", "security", "service")
_METADATA_ADDRESSES = tuple(
    f"metadata_server.{name}" for name in ("host", "port", "standbys", "partitions", "timeout_s", "node_ttl_s")
)
_KV = ("kv.chunk_tokens", "kv.verify", "kv.encrypt")
_ROUTER = (
    *(*_EVERY, *_METADATA_ADDRESSES, "router", "routers", "model", "kv"),
    *("engine.kind", "engine.vocab_size", "engine.save_output"),
    *("store.pin_share", "store.low_watermark", "store.high_watermark"),
)
_METADATA_SERVER = (*_EVERY, "metadata_server", "store", "model.name")
_NODE = (*_EVERY, *_METADATA_ADDRESSES, "model", "engine", *_KV, "transport", "store", "tiers")
_NODE_FOR_ROUTER = re.compile(r"nodes\..+\.(role|host|port|url|bootstrap_port)")
_PLACE = re.compile(r"nodes\..+\.(host|port|url)")
_USER = re.compile(r"//[^/@\"]*@")


@dataclass(frozen=True, slots=True)
class SettingChange:
    """One value that two files do not share. None: it is not set there."""

    path: str
    before: object
    after: object

    def __str__(self) -> str:
        return f"{self.path}: {_shown(self.before)} -> {_shown(self.after)}"


def all_settings(config: ClusterConfig) -> dict[str, object]:
    """Everything that the file sets or leaves at its default. Lists are values."""
    return dict(_leaves("", msgspec.to_builtins(config, enc_hook=int)))


def node_settings(config: ClusterConfig, name: str) -> dict[str, object]:
    """What the process of this node goes by. Not its role, which can be changed while it runs."""
    own = f"nodes.{name}."
    return {
        path: value
        for path, value in all_settings(config).items()
        if _is_below(path, _NODE) or (path.startswith(own) and path != f"{own}role")
    }


def router_settings(config: ClusterConfig) -> dict[str, object]:
    """What a router goes by. Of a node's role it goes by the order, where there is one."""
    return {
        path: value
        for path, value in all_settings(config).items()
        if _is_below(path, _ROUTER) or _NODE_FOR_ROUTER.fullmatch(path)
    }


def metadata_settings(config: ClusterConfig) -> dict[str, object]:
    """What a metadata server goes by."""
    return {
        path: value
        for path, value in all_settings(config).items()
        if _is_below(path, _METADATA_SERVER) or _PLACE.fullmatch(path)
    }


def changes_between(before: Settings, after: Settings) -> list[SettingChange]:
    """By path."""
    return [
        SettingChange(path, before.get(path), after.get(path))
        for path in sorted({*before, *after})
        if before.get(path) != after.get(path)
    ]


def settings_name(settings: Settings) -> str:
    """16 hex digits that differ where the settings do. Passwords in URLs are no part of it: it is told to others."""
    text = _USER.sub("//", json.dumps(settings, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def node_settings_name(config: ClusterConfig, name: str) -> str:
    """Of what the process of this node goes by: what it tells in its report."""
    return settings_name(node_settings(config, name))


def _is_below(path: str, sections: Iterable[str]) -> bool:
    return any(path == section or path.startswith(f"{section}.") for section in sections)


def _leaves(path: str, value: object) -> Iterable[tuple[str, object]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), item)
    elif value is not None:
        yield path, value


def _shown(value: object) -> str:
    text = "not set" if value is None else json.dumps(value, default=str)
    return _USER.sub("//", text)[:80]
