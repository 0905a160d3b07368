"""What a node and its client of Mooncake say to each other: a line of JSON each, over a socket. Values only."""

from enum import StrEnum

import msgspec


class MooncakeOperation(StrEnum):
    """What the client is asked to do."""

    FIND = "find"
    """A code a key: 1 it is there, 0 it is not."""
    SIZES = "sizes"
    """A code a key: the value's bytes, as they lie there."""
    LOAD = "load"
    """A code a key: the value's bytes, now in the buffer."""
    SAVE = "save"
    """A code a key, 0: it is there."""
    REMOVE = "remove"
    """A code a key, 0: it was there."""
    CLEAR = "clear"
    """`keys` are regular expressions. A code each: how many keys went."""


class MooncakeSetup(msgspec.Struct, frozen=True):
    """What the client's process is started with."""

    options: dict[str, str]
    """As Mooncake's `setup` takes them."""
    socket_fd: int
    buffer_fd: int
    buffer_bytes: int
    threads: int


class MooncakeRequest(msgspec.Struct, frozen=True, omit_defaults=True):
    """One call. `starts`, `sizes`: where each key's value lies in the buffer, or is to lie."""

    id: int
    operation: MooncakeOperation
    keys: list[str]
    starts: list[int] = []
    sizes: list[int] = []


class MooncakeReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """Mooncake's codes, below 0 for what failed. `id` 0: of its set-up, which is done if there is no `error`."""

    id: int = 0
    codes: list[int] = []
    error: str = ""
