"""What the fields of a request may hold: lengths, ranges, names. Pure.

A violation is a MetadataProtocolError whose `param` is the path of the field.
"""

from collections.abc import Sequence

from kvcore.chunk_keys import KEY_BYTES
from kvcore.errors import MetadataProtocolError
from kvcore.types import ChunkKey, ReplicaRef
from metadata_server.messages import ManifestEntry

MAX_ITEMS = 65_536
"""Keys, items or ids in one request; manifest entries are bounded by the body's size."""
MAX_SECONDS = 3600.0
MAX_WAIT_SECONDS = 600.0
MAX_KEEP_SECONDS = 366 * 86_400.0
"""Of a pin or a chunk's time."""
MAX_NAME = 256
MAX_TEXT = 4096
MAX_BYTES = 1 << 50
MAX_GENERATION = 1 << 63
MAX_ADDRESSES = 16


def require(ok: bool, param: str, what: str) -> None:
    """Raise MetadataProtocolError for the field `param` unless `ok`."""
    if not ok:
        raise MetadataProtocolError(f"{param}: {what}", param=param)


def check_name(value: str, param: str, *, empty: bool = False) -> None:
    """At most MAX_NAME printable characters, at least one unless `empty` is allowed."""
    require(len(value) <= MAX_NAME and (empty or bool(value)) and value.isprintable(), param, "not a usable name")


def check_text(value: str, param: str) -> None:
    """At most MAX_TEXT printable characters."""
    require(len(value) <= MAX_TEXT and value.isprintable(), param, "too long or not printable")


def check_seconds(value: float, param: str, *, zero: bool = False, most: float = MAX_SECONDS) -> None:
    """Above 0 (or 0 where `zero` is allowed) and at most `most`."""
    require((value >= 0 if zero else value > 0) and value <= most, param, f"not within 0 .. {most:g} seconds")


def check_incarnation(value: int, param: str) -> None:
    """A number that fits 63 bits."""
    require(0 <= value < MAX_GENERATION, param, "out of range")


def check_items(values: Sequence[object], param: str) -> None:
    """At most MAX_ITEMS of them."""
    require(len(values) <= MAX_ITEMS, param, f"more than {MAX_ITEMS} items")


def check_key(key: ChunkKey, param: str) -> None:
    """The length of a chunk key."""
    require(len(key) == KEY_BYTES, param, f"a chunk key has {KEY_BYTES} bytes, got {len(key)}")


def check_keys(keys: Sequence[ChunkKey], param: str = "keys") -> None:
    """At most MAX_ITEMS chunk keys."""
    check_items(keys, param)
    for at, key in enumerate(keys):
        if len(key) != KEY_BYTES:
            check_key(key, f"{param}[{at}]")


def check_extent(entry: ManifestEntry | ReplicaRef, param: str) -> None:
    """A place in a segment and the key of what lies there."""
    check_key(entry.key, f"{param}.key")
    require(0 <= entry.offset < MAX_BYTES, f"{param}.offset", "out of range")
    require(0 < entry.length < MAX_BYTES, f"{param}.length", "out of range")
    require(0 <= entry.generation < MAX_GENERATION, f"{param}.generation", "out of range")
