"""`--tier` of `kvferry serve`: `disk:PATH:SIZE`, `redis://HOST:PORT`, a bucket -> `tiers` of a cluster file. Pure."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

import msgspec

from kvcore.config.parse import nearest, parse_byte_size
from kvcore.config.tiers import (
    DiskTierConfig,
    MooncakeTierConfig,
    ObjectTierConfig,
    RedisTierConfig,
    TierConfig,
    TiersConfig,
)
from kvcore.errors import ConfigError
from kvstore.tiers.objects.place import OBJECT_FORMS, OBJECT_SCHEMES, object_place
from kvstore.tiers.places.redis_url import REDIS_SCHEMES, parse_redis_url

_REDIS_FORMS = "redis://HOST:PORT, rediss://HOST:PORT, redis-sentinel://..., redis-cluster://..."
TIER_FORMS = f"disk:PATH:SIZE, {_REDIS_FORMS}, mooncake://HOST:PORT, {OBJECT_FORMS}"
_MOONCAKE_SCHEMES = ("mooncake", "mooncakestore")
_MOONCAKE_PORT = 50051
"""Of `mooncake_master`, unless told otherwise."""
_SECTIONS: dict[type[TierConfig], str] = {
    DiskTierConfig: "disk",
    RedisTierConfig: "redis",
    MooncakeTierConfig: "mooncake",
    ObjectTierConfig: "object",
}


def parse_tiers(given: Sequence[str]) -> TiersConfig:
    """One tier of each kind at most. Raises ConfigError that names the text and what is expected."""
    tiers = TiersConfig()
    for text in given:
        tier = parse_tier(text)
        section = _SECTIONS[type(tier)]
        if getattr(tiers, section) is not None:
            raise ConfigError(f"--tier {shown(text)}: there is a {section} tier already, and one of each kind is all")
        tiers = msgspec.structs.replace(tiers, **{section: tier})
    return tiers


def parse_tier(text: str) -> TierConfig:
    """The section that `text` stands for. A relative path is the working directory's. Raises ConfigError."""
    kind = text.partition(":")[0].strip().lower()
    if kind == "disk":
        return _disk(text)
    if kind in REDIS_SCHEMES:
        return RedisTierConfig(url=check_redis_url(text.strip(), f"--tier {shown(text)}"))
    if kind in OBJECT_SCHEMES:
        config = ObjectTierConfig(url=text.strip())
        object_place(config, "--tier")
        return config
    if kind in _MOONCAKE_SCHEMES:
        return MooncakeTierConfig(master=mooncake_master(text.strip(), f"--tier {text}"))
    meant = nearest(kind, ["disk", *REDIS_SCHEMES, *_MOONCAKE_SCHEMES, *OBJECT_SCHEMES])
    raise ConfigError(f"--tier {shown(text)}: unknown kind {kind!r}{meant}; expected {TIER_FORMS}")


def check_redis_url(url: str, subject: str, environ: Mapping[str, str] = os.environ) -> str:
    """`url` itself. Raises ConfigError that begins with `subject` and shows no password."""
    scheme = url.partition("://")[0].lower()
    if "-" in scheme:  # sentinels or a cluster
        try:
            parse_redis_url(url, environ)
        except ConfigError as error:
            raise ConfigError(f"{subject}: {error.message.removeprefix('tiers.redis.url').lstrip(': ')}") from None
        return url
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        several = ", or several servers as redis-sentinel:// or redis-cluster://" if "," in url else ""
        raise ConfigError(f"{subject}: its host or port cannot be read; {_expected_redis('redis')}{several}") from None
    if not parts.hostname:
        raise ConfigError(f"{subject}: it names no host; {_expected_redis(parts.scheme)}")
    if port == 0:
        raise ConfigError(f"{subject}: nothing listens on port 0; {_expected_redis(parts.scheme)}")
    if parts.path.strip("/") and not parts.path.strip("/").isdecimal():
        raise ConfigError(f"{subject}: {parts.path} is no number of a database; {_expected_redis(parts.scheme)}")
    return url


def mooncake_master(url: str, subject: str) -> str:
    """`HOST:PORT` of `mooncake://HOST[:PORT]`, or `mooncakestore:`. Raises ConfigError that begins with `subject`."""
    expected = "expected mooncake://HOST:PORT"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        raise ConfigError(f"{subject}: its host or port cannot be read; {expected}") from None
    if not host or port == 0 or parts.username is not None or parts.path.strip("/") or parts.query:
        raise ConfigError(f"{subject}: {expected}, of mooncake_master")
    return f"{f'[{host}]' if ':' in host else host}:{port or _MOONCAKE_PORT}"


def shown(text: str) -> str:
    """`text`, with `***` for a password in its URL."""
    try:
        parts = urlsplit(text)
        password = parts.password
    except ValueError:
        return text.partition("@")[2] or text
    return text if password is None else _without_password(parts)


def _without_password(parts: SplitResult) -> str:
    user, _, place = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}:***@{place}").geturl()


def _disk(text: str) -> DiskTierConfig:
    path, separator, size = text.partition(":")[2].rpartition(":")
    if not separator or not path.strip():
        raise ConfigError(f"--tier {text}: expected disk:PATH:SIZE, e.g. disk:/nvme/kvferry:200GiB")
    try:
        parsed = parse_byte_size(size)
    except ValueError as error:
        raise ConfigError(f"--tier {text}: {size!r}: {error}; the whole is disk:PATH:SIZE") from None
    return DiskTierConfig(path=str(Path(path.strip()).expanduser().absolute()), size=parsed)


def _expected_redis(scheme: str) -> str:
    return f"expected {scheme}://[USER:PASSWORD@]HOST:PORT[/DB]"
