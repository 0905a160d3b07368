"""What Mooncake's keys and values say: whose record it is, and where its owner listens. Pure.

A client called NAME (`HOST:PORT`) has two: `…/rpc_meta/NAME` from its start to its end, and `…/ram/NAME`, which says
which memory it lends. `…` is `mooncake`, with MC_METADATA_CLUSTER_ID `mooncake/ID`.
"""

import re
from functools import lru_cache
from urllib.parse import unquote_plus

import msgspec

from kvcore.errors import InvalidRequestError

VALUES = "metadata/"
ANSWERED = "metadata-answered/"
"""In front of a key of Mooncake's, as a record's key: its value; the revision of it whose owner's port has answered."""
MARK = "rpc_meta"
"""What makes a key one that only one client may have, to Mooncake's own servers too."""
_OWNED = re.compile(r"(.*/)?(rpc_meta|ram)/([^/]+)", re.DOTALL)
_MAX_PORT = (1 << 16) - 1
_KNOWN, _LONG = 4096, 512
"""So many parsed keys are remembered, if they are no longer than this."""


class Address(msgspec.Struct, frozen=True):
    """Where an owner listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _RpcMeta(msgspec.Struct):
    ip_or_host_name: str
    rpc_port: int


class _Memory(msgspec.Struct):
    """Other protocols than tcp have no port of their own here."""

    tcp_data_host: str = ""
    tcp_data_port: int = 0
    name: str = ""


_rpc_meta = msgspec.json.Decoder(_RpcMeta)
_memory = msgspec.json.Decoder(_Memory)


def key_of(query: bytes) -> str:
    """`key` of a query string, decoded; empty: there is none. Raises InvalidRequestError: it is not UTF-8."""
    return _key_known(query) if len(query) <= _LONG else _key(query)


def _key(query: bytes) -> str:
    for part in query.split(b"&"):
        if part.startswith(b"key="):
            try:
                return unquote_plus(part[4:].decode("ascii"), errors="strict").strip()
            except UnicodeDecodeError as error:
                raise InvalidRequestError("metadata key is not UTF-8", param="key") from error
    return ""


_key_known = lru_cache(_KNOWN)(_key)  # clients ask for few keys, often


def owned(key: str) -> tuple[str, str] | None:
    """The keys of the owner's registration and of its memory; None: nobody's."""
    return _owned_known(key) if len(key) <= _LONG else _parse_owned(key)


def _parse_owned(key: str) -> tuple[str, str] | None:
    found = _OWNED.fullmatch(key)
    if found is None:
        return None
    cluster, _, name = found.groups(default="")
    return f"{cluster}rpc_meta/{name}", f"{cluster}ram/{name}"


_owned_known = lru_cache(_KNOWN)(_parse_owned)


def address_of(key: str, value: bytes) -> Address | None:
    """Where the writer of a value listens, as the value says."""
    mine = owned(key)
    if mine is None:
        return None
    try:
        if key == mine[0]:
            rpc = _rpc_meta.decode(value)
            host, port = rpc.ip_or_host_name, rpc.rpc_port
        else:
            memory = _memory.decode(value)
            host, port = memory.tcp_data_host or memory.name.rpartition(":")[0], memory.tcp_data_port
    except msgspec.MsgspecError:
        return None
    return Address(host, port) if host and 0 < port <= _MAX_PORT else None
