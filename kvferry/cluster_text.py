"""A cluster's configuration as YAML from which it can be read again, without the values that are defaults. Pure."""

from enum import Enum

import msgspec
import yaml

from kvcore.config.fields import ByteSize
from kvcore.config.schema import ClusterConfig

_SIZES = ((1 << 40, "TiB"), (1 << 30, "GiB"), (10**9, "GB"), (1 << 20, "MiB"), (10**6, "MB"), (1 << 10, "KiB"))


def cluster_text(config: ClusterConfig) -> str:
    """`load_config` of it gives an equal configuration."""
    return yaml.safe_dump(_plain(config), sort_keys=False, allow_unicode=True, width=120)


def size_text(size: int) -> str | int:
    """`8GiB` or `10GB` where it comes out even, else the bytes."""
    return next((f"{size // unit}{name}" for unit, name in _SIZES if size % unit == 0), int(size))


def _plain(value: object) -> object:
    match value:
        case msgspec.Struct():
            return _section(value)
        case dict():
            return {key: _plain(item) for key, item in value.items()}
        case list():
            return [_plain(item) for item in value]
        case Enum():
            return value.value
        case ByteSize():
            return size_text(value)
        case _:
            return value


def _section(section: msgspec.Struct) -> dict[str, object]:
    kind = section.__struct_config__
    plain: dict[str, object] = {} if kind.tag_field is None else {kind.tag_field: kind.tag}
    for field in msgspec.structs.fields(section):
        value = getattr(section, field.name)
        default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
        if value != default:
            plain[field.encode_name] = _plain(value)
    return plain
