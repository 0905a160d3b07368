"""What the router's `/v1/cache` calls answer; `kvferry cache` reads this same shape.

Readers ignore fields that they do not know; a field that is added has a default.
"""

from typing import Annotated

import msgspec


class HeldTokens(msgspec.Struct, kw_only=True):
    """So many of a prompt's tokens lie in one tier; of a node, or of all of them."""

    tier: str
    node: str = ""
    tokens: int


class PromptLookup(msgspec.Struct, kw_only=True):
    """Where one prompt's KV lies. Its tokens are, in this order, `memory_tokens`, `tier_tokens`, `new_tokens`."""

    tokens: int
    chunks: int
    """Full ones."""
    memory_tokens: int
    """Leading ones that lie in segments."""
    memory: dict[str, int] = {}
    """Node -> how many leading tokens lie in its segment."""
    tier_tokens: int = 0
    """Those that follow, up to the first that is neither in a segment nor in a tier."""
    tiers: list[HeldTokens] = []
    new_tokens: int = 0
    """What would be computed; the rest behind the last full chunk, and a token at least, are of it."""


class LookupReply(msgspec.Struct, kw_only=True):
    """Answer of `POST /v1/cache/lookup`, a line a prompt. `problems`: what could not be asked."""

    fingerprint: str
    chunk_tokens: int
    prompts: list[PromptLookup]
    problems: list[str] = []


class PromptWarmed(msgspec.Struct, kw_only=True):
    """What a prefill leg without a decode leg did for one prompt."""

    tokens: int
    cached_tokens: int
    computed_tokens: int
    stored_tokens: int
    """Leading ones whose KV was in the store when it had ended."""
    node: str
    seconds: float
    no_room: bool = False


class WarmReply(msgspec.Struct, kw_only=True):
    """Answer of `POST /v1/cache/warm`, a line a prompt."""

    prompts: list[PromptWarmed]


class PlaceCount(msgspec.Struct, kw_only=True):
    """How many chunks an order met in one place: in all segments (`memory`), or in a tier; of a node or of all."""

    place: str
    node: str = ""
    chunks: int
    problem: str = ""


class OrderReply(msgspec.Struct, kw_only=True):
    """Answer of `POST /v1/cache/{pin,unpin,expire,evict,prefetch}`. `chunks`: full ones of the prompts."""

    prompts: int
    tokens: int
    chunks: int
    places: list[PlaceCount]
    problems: list[str] = []


class GenerationPlace(msgspec.Struct, kw_only=True):
    """How much of a generation lies in one place."""

    place: str
    node: str = ""
    chunks: int
    num_bytes: int


class MarkedBy(msgspec.Struct, kw_only=True):
    """A node of another cluster that uses a generation. `until`: Unix seconds."""

    owner: str
    until: float


class GenerationLine(msgspec.Struct, kw_only=True):
    """The chunks of one fingerprint. `state`: `live` (engines of this cluster use it), `marked` (those of another one),
    else `stale`."""

    fingerprint: str
    """Hex."""
    state: str
    note: str = ""
    """Model, dtype, weights and cluster, as far as anybody has noted it."""
    nodes: list[str] = []
    """Of this cluster, whose engines use it."""
    marks: list[MarkedBy] = []
    places: list[GenerationPlace]
    oldest_use: float | None = None
    """Unix seconds, of its chunks on disks."""
    newest_use: float | None = None


class GenerationsReport(msgspec.Struct, kw_only=True):
    """Answer of `GET /v1/cache/generations`. `incomplete`: what was not seen whole, and why."""

    generations: list[GenerationLine]
    incomplete: list[str] = []


class ClearOrder(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/cache/clear`. `force`: also what other clusters have marked, and what is stale as far as those
    nodes say that answer."""

    stale: bool = False
    """Those that nobody uses; else all."""
    fingerprints: list[str] | None = None
    """Only these of them: beginnings of their hex. None: any."""
    force: bool = False


class ClearReport(msgspec.Struct, kw_only=True):
    """Its answer. `kept`: generation -> why it was left alone."""

    cleared: list[str]
    places: list[PlaceCount]
    kept: dict[str, str] = {}
    incomplete: list[str] = []


class WeightsOrder(msgspec.Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """Body of `POST /v1/weights`: the weights behind `model.path` are others now, and go by the name `version`."""

    version: Annotated[str, msgspec.Meta(min_length=1, max_length=200)]
    wait_s: Annotated[float, msgspec.Meta(ge=0, le=3600)] = 30.0
    """So long may requests under way go on with the old weights; then they are cut."""


class NodeWeights(msgspec.Struct, kw_only=True):
    """What became of one node's engine. `problem`: why it does not have the new weights; empty: it does."""

    node: str
    fingerprint: str = ""
    """Of its KV from now on, hex."""
    cut: int = 0
    """Legs that had not ended."""
    seconds: float = 0.0
    problem: str = ""


class WeightsReport(msgspec.Struct, kw_only=True):
    """Its answer, with status 200 if every node has the new weights."""

    version: str
    nodes: list[NodeWeights]
