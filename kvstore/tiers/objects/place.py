"""Where an object tier is: the URL of a cluster file or a command line, read and checked. Pure."""

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from kvcore.config.tiers import ObjectTierConfig
from kvcore.errors import ConfigError

OBJECT_FORMS = "s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX or file:///FOLDER"
OBJECT_SCHEMES = ("s3", "gs", "az", "file")
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_PREFIX = re.compile(r"[\w.=+@-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class ObjectPlace:
    """A bucket and what stands before our names in it, or a folder."""

    scheme: str
    """One of OBJECT_SCHEMES."""
    bucket: str = ""
    prefix: str = ""
    folder: Path | None = None
    endpoint: str = ""
    region: str = ""

    @property
    def shown(self) -> str:
        """For people. No credential is ever in it."""
        if self.folder is not None:
            return f"file://{self.folder}"
        return f"{self.scheme}://{'/'.join(part for part in (self.bucket, self.prefix) if part)}"


def object_place(config: ObjectTierConfig, subject: str = "tiers.object.url") -> ObjectPlace:
    """Where `config.url` is. Raises ConfigError that begins with `subject`, and shows no user and no password."""
    expected = f"expected {OBJECT_FORMS}"
    try:
        parts = urlsplit(config.url.strip())
    except ValueError:
        raise ConfigError(f"{subject}: it cannot be read; {expected}") from None
    if "@" in parts.netloc:
        raise ConfigError(f"{subject}: it has a user or a password; credentials are taken from the environment")
    scheme = parts.scheme.lower()
    if scheme not in OBJECT_SCHEMES or parts.query or parts.fragment:
        raise ConfigError(f"{subject}: {config.url!r} is no place for objects; {expected}")
    if scheme == "file":
        folder = Path(unquote(parts.path))
        if parts.netloc not in ("", "localhost") or not folder.is_absolute() or len(folder.parts) < 2:
            raise ConfigError(f"{subject}: {config.url!r} is no absolute path; {expected}")
        if config.endpoint is not None or config.region is not None:
            raise ConfigError(f"{subject}: a folder has no endpoint and no region")
        return ObjectPlace(scheme, folder=folder)
    if not _BUCKET.fullmatch(parts.netloc):
        raise ConfigError(f"{subject}: {config.url!r} names no bucket; {expected}")
    prefix = parts.path.strip("/")
    if prefix and not all(_PREFIX.fullmatch(part) and part.strip(".") for part in prefix.split("/")):
        raise ConfigError(f"{subject}: {prefix!r}: a prefix is made of ASCII letters, digits and . _ - = + @")
    return ObjectPlace(scheme, parts.netloc, prefix, None, _endpoint(config.endpoint), config.region or "")


def _endpoint(url: str | None) -> str:
    if url is None:
        return ""
    expected = "expected http://HOST:PORT or https://HOST:PORT"
    try:
        parts = urlsplit(url.strip())
        usable = parts.port != 0 and bool(parts.hostname) and parts.scheme in ("http", "https")
    except ValueError:
        usable = False
    if not usable or "@" in parts.netloc or parts.query or parts.fragment:
        raise ConfigError(f"tiers.object.endpoint: it is no address of a server; {expected}")
    return url.strip().rstrip("/")
