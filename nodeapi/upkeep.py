"""Messages of a node's API about the chunks that it keeps: what lies where, orders about it, and its engine's weights.

For operators' commands, by way of the router. The rules of `nodeapi.messages` hold: requests are strict, replies
tolerant, and a node that is older than one of these calls answers 404.
"""

from typing import Literal

import msgspec

ChunkAction = Literal["find", "remove", "expire", "pin", "unpin"]


class _UpkeepRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A request."""


class _UpkeepReply(msgspec.Struct, frozen=True, kw_only=True):
    """A reply, or a part of one."""


class GenerationsRequest(_UpkeepRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/upkeep/generations`: what lies in the node's segment and in these of its tiers?"""

    tiers: list[str]
    deadline_s: float


class GenerationMarked(_UpkeepReply, frozen=True, kw_only=True):
    """Somebody uses a generation. `until`: Unix seconds."""

    owner: str
    until: float


class GenerationHeld(_UpkeepReply, frozen=True, kw_only=True):
    """The chunks of one fingerprint in one place."""

    fingerprint: bytes
    num_chunks: int
    num_bytes: int
    note: str = ""
    marks: list[GenerationMarked] = []
    used: tuple[float, float] | None = None
    """When the one was used that was used longest ago, and the last one: Unix seconds."""
    keys: list[bytes] = []
    """Of the segment's alone: what its headers say was there. The index knows which of them are."""


class GenerationsPlace(_UpkeepReply, frozen=True, kw_only=True):
    """A segment (`memory`) or a tier. `incomplete`: why there may be more; empty: this is all."""

    name: str
    shared: bool = False
    held: list[GenerationHeld] = []
    incomplete: str = ""


class GenerationsReply(_UpkeepReply, frozen=True, kw_only=True):
    """`owner`: as whom the node marks what it uses in shared tiers. Empty: it marks nothing."""

    places: list[GenerationsPlace] = []
    owner: str = ""


class ChunksRequest(_UpkeepRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/upkeep/chunks`: an order about chunks in these of the node's tiers.

    `remove`: from there; also for a node that is named no tier it means not to rely on their being there. `expire`:
    after `ttl_s` from now, or never by time. `pin`, `unpin`: whether they may be evicted, where a tier can tell.
    """

    action: ChunkAction
    fingerprint: bytes
    keys: list[bytes]
    tiers: list[str]
    ttl_s: float | None = None
    deadline_s: float


class ChunksPlace(_UpkeepReply, frozen=True, kw_only=True):
    """One tier. `find` says of each key whether it is there; the others how many were known there."""

    name: str
    shared: bool = False
    found: list[bool] = []
    num_chunks: int = 0
    problem: str = ""
    """Why the tier could not do it; empty: it did."""


class ChunksReply(_UpkeepReply, frozen=True, kw_only=True):
    """A place for each tier that was named, is there and can do such a thing."""

    places: list[ChunksPlace] = []


class ClearRequest(_UpkeepRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/upkeep/clear`: remove these generations from these of the node's tiers.

    `own`: what is marked by an owner who is not among these is left alone. None: nothing is.
    """

    fingerprints: list[bytes]
    tiers: list[str]
    own: list[str] | None = None
    deadline_s: float


class ClearedPlace(_UpkeepReply, frozen=True, kw_only=True):
    """`incomplete`: why some may be there still; empty: none are."""

    name: str
    shared: bool = False
    num_chunks: int = 0
    incomplete: str = ""


class ClearReply(_UpkeepReply, frozen=True, kw_only=True):
    """A place for each tier that was named and is there."""

    places: list[ClearedPlace] = []


class WeightsRequest(_UpkeepRequest, frozen=True, kw_only=True):
    """Body of `POST /v1/weights`: the weights behind `model.path` are others now, and go by this name.

    Legs under way may end within `wait_s`, and new ones are refused; then the engine is started anew.
    """

    version: str
    wait_s: float
    deadline_s: float


class WeightsReply(_UpkeepReply, frozen=True, kw_only=True):
    """The engine that is ready now. `cut`: so many legs had not ended."""

    fingerprint: bytes
    version: str
    cut: int = 0
    seconds: float = 0.0
