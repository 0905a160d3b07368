"""What a tier is: a place for whole chunks, header and payload as in a segment, that may lose or damage any of them.

A tier needs honesty, not durability: what it does not have whole is MISSING. All failures are values; a tier raises for
misuse only. `tests/conformance/test_tier_conformance.py` holds every kind to this page.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from kvcore.types import ChunkKey, OwnerTag
from kvstore.chunk_format import HEADER_BYTES


class TierOutcome(StrEnum):
    """What became of one chunk that was loaded or saved."""

    OK = "ok"
    MISSING = "missing"
    """It is not there, or not whole."""
    FULL = "full"
    """No room, and none may be made: it was not saved."""
    TOO_LARGE = "too_large"
    """Saved: larger than the tier takes. Loaded: of another size than the memory that was given for it."""
    UNAVAILABLE = "unavailable"
    """The tier did not answer in time or cannot be reached. Nothing is known of the chunk."""
    DAMAGED = "damaged"
    """The tier itself found it damaged. The caller's own check finds more."""


@dataclass(frozen=True, slots=True)
class ChunkName:
    """What a chunk is called in a tier that several clusters, models and revisions of weights may share."""

    fingerprint: bytes
    """Of the KVSpec, 16 bytes."""
    key: ChunkKey

    @property
    def text(self) -> str:
        """`FINGERPRINT/KEY` in hex."""
        return f"{self.fingerprint.hex()}/{self.key.hex()}"


@dataclass(frozen=True, slots=True)
class TierChunk:
    """One chunk on its way. `memory`: its header and payload, one after the other; C-contiguous views, of a segment
    usually one. `save` reads them, `load` fills all of them, writable then. Their contents are undefined after any
    outcome of `load` but OK."""

    name: ChunkName
    memory: Sequence[memoryview]

    @property
    def num_bytes(self) -> int:
        """Header and payload."""
        return sum(view.nbytes for view in self.memory)

    def header(self) -> bytes:
        """A copy of the first HEADER_BYTES."""
        raw = bytearray()
        for view in self.memory:
            raw += view[: HEADER_BYTES - len(raw)]
        return bytes(raw)


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier knows of itself without asking anybody. None: it cannot know."""

    num_chunks: int | None = None
    used_bytes: int | None = None
    capacity_bytes: int | None = None
    evicted: int = 0
    """Chunks that the tier itself gave up to make room, since start."""
    problem: str | None = None
    """What is wrong with it now, for people: `http://cache:6379 refused the connection`."""
    partly: bool = False
    """The problem is of a part of it: what lies elsewhere in it is to be had."""


@dataclass(frozen=True, slots=True)
class GenerationMark:
    """Somebody uses the chunks of one fingerprint."""

    owner: str
    """Which process: the same after its restart, and nobody else's."""
    until: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Generation:
    """All chunks of one fingerprint: of a model's weights, dtype and layout as they were at one time."""

    fingerprint: bytes
    num_chunks: int
    num_bytes: int
    """As they lie there, of chunks that lack a part too."""
    note: str = ""
    """What it is, in the words of whoever marked it last: `llama-8b of cluster prod, bfloat16`. Empty: not known."""
    marks: tuple[GenerationMark, ...] = ()
    used: tuple[float, float] | None = None
    """When the chunk was used that was used longest ago, and when the last one: Unix seconds. None: not known."""


@dataclass(frozen=True, slots=True)
class GenerationList:
    """What a tier says of the generations in it. `incomplete`: why there may be more; empty: this is all."""

    found: tuple[Generation, ...] = ()
    incomplete: str = ""


@dataclass(frozen=True, slots=True)
class Cleared:
    """What became of a clearing. `incomplete`: why some may be there still; empty: none are."""

    num_chunks: int = 0
    incomplete: str = ""


class Tier(Protocol):
    """A place for chunks. All methods may be called at once, on one event loop.

    Before a method returns or raises, by cancellation too, it has let go of the memory that it was given. Each call
    ends within its `timeout_s`, plus what a system call under way takes to be given up.
    """

    name: str
    """`disk`, `redis`, ...: in metrics, explain and the cluster file."""
    shared: bool
    """Whether what is saved here is seen by other nodes, and by other clusters."""
    max_chunk_bytes: int
    """Header and payload of the largest chunk that it takes."""

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """Whether each is there now, as far as the tier can tell in time; False where it cannot."""
        ...

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """How long each is as it was saved, header and payload; or why that cannot be told, MISSING as a rule."""
        ...

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """Fill each chunk's memory. OK: all of it, as it was saved. What one chunk meets does not spoil the others."""
        ...

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """Keep a copy of each, for `ttl_s` at most where it is given. What is there already is OK, and counts as used.

        Chunks are content-addressed: whoever saves a name saves the same bytes, but for the header's generation.
        """
        ...

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """Forget these, as far as the tier can be reached."""
        ...

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """Forget these after `ttl_s` from now, or never by time; of how many that is known. 0 too if it cannot."""
        ...

    async def generations(self, *, timeout_s: float) -> GenerationList | None:
        """What lies here, by fingerprint, with those that are marked. It looks as far as the time allows. None: it
        cannot list."""
        ...

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """Say for the next `ttl_s` that `owner` uses this generation; 0: not any longer. `note` outlives the mark.

        For shared tiers: what other clusters use is not to be cleared as stale. A tier of one node does nothing.
        """
        ...

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """Remove all chunks of these generations, as far as the time allows, and what was noted of them.

        `own`: a generation that an owner has marked who is not among these is left alone. None: nothing is.
        """
        ...

    def stats(self) -> TierStats:
        """No I/O."""
        ...

    async def aclose(self) -> None:
        """End what is under way, and let go of everything. Idempotent. From then on all is UNAVAILABLE."""
        ...


class LocalTier(Tier, Protocol):
    """A tier that one node has for itself, and of which it knows what lies in it: `shared` is False."""

    on_change: Callable[[Sequence[ChunkName], Sequence[ChunkName]], None]
    """Called with what came and what left, on the loop. Its user sets it."""

    def names(self) -> list[ChunkName]:
        """All chunks in it, those that were used most or last first. No I/O."""
        ...

    def owners(self, names: Sequence[ChunkName]) -> list[OwnerTag | None]:
        """Whose each is, as far as it lies here and that is known. No I/O."""
        ...

    def link(self, names: Sequence[ChunkName]) -> None:
        """Each continues the one before it, whether they lie here or are to come: none goes to make
        room before what continues it. No I/O."""
        ...

    def pin(self, names: Sequence[ChunkName], ttl_s: float | None) -> tuple[int, int]:
        """Keep these from eviction for so long (None: until they are unpinned), whether they lie here or are to come.
        Of those that lie here, how many are kept, and how many, from the first that is one too many on, are not:
        pins have a share of the room. Nothing is noted for a later start. No I/O."""
        ...

    def unpin(self, names: Sequence[ChunkName]) -> int:
        """End pins; of how many chunks that lie here. No I/O."""
        ...

    def pinned(self, names: Sequence[ChunkName]) -> list[bool]:
        """Whether each lies here and is kept. No I/O."""
        ...
