"""The words of the store: what a match, a read and a move of bytes are. Values only.

Invariant: nothing here holds memory of a segment or a connection.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol, TypeVar

from kvcore.types import ReplicaRef, Segment

T = TypeVar("T")


class GetOutcome(StrEnum):
    """What became of one chunk that was read. Everything but OK is a miss: compute it."""

    OK = "ok"
    CHECKSUM = "checksum"
    """The payload is not what the header says."""
    STALE = "stale"
    """A well-formed chunk of another key or generation: the place was given to somebody else."""
    FOREIGN = "foreign"
    """A chunk of other weights, layout or tokenizer, or another tenant's."""
    MALFORMED = "malformed"
    """No header, a damaged one, or one of another length than announced."""
    FORGED = "forged"
    """Its MAC, or tag, is wrong, and its checksum is not: somebody without the cluster's secret made it."""
    UNPROVEN = "unproven"
    """It has no MAC, or one under a secret that is not accepted: it is of before, or of another cluster. Or it is not
    encrypted where all is, or encrypted where nothing is."""
    UNREACHABLE = "unreachable"
    """No replica could be read in time."""


class Direction(StrEnum):
    """Which way bytes went, seen from this process."""

    PUT = "put"
    GET = "get"


@dataclass(frozen=True, slots=True)
class MovedBytes:
    """Header and payload bytes that crossed one transport in one call, and the time that the call took. `machine`: by
    its host id, out of whose memory they were read; empty: not said. `late_bytes`: that had not crossed when time was
    up, where none had: they take longer than that."""

    transport: str
    direction: Direction
    num_bytes: int
    seconds: float
    machine: str = ""
    late_bytes: int = 0


@dataclass(slots=True, eq=False)
class Lease:
    """A reader's claim on chunks, at the metadata server. `until`: when it ends, on the clock, unless it is renewed; 0:
    it is known to have ended."""

    id: int
    until: float


@dataclass(frozen=True, slots=True)
class Match:
    """The longest complete prefix of some keys. `replicas[i]`: where chunk i lies, never empty.

    `segments` has every segment that the replicas name. `lease` None: none is held.
    """

    replicas: tuple[tuple[ReplicaRef, ...], ...] = ()
    lease: Lease | None = None
    segments: Mapping[str, Segment] = field(default_factory=dict)
    writers: tuple[str, ...] = ()
    """The nodes that are writing the first key behind them, the one that has been at it for longest first."""
    num_writing: int = 0
    """How many keys behind them, one after the other, are being written."""

    @property
    def num_chunks(self) -> int:
        """How many leading keys are complete."""
        return len(self.replicas)


@dataclass(frozen=True, slots=True)
class GetResult:
    """`outcomes[i]` belongs to `buffers[i]`; the contents of a buffer that is not OK are undefined."""

    outcomes: list[GetOutcome]
    moved: list[MovedBytes]


class RunBlocking(Protocol):
    """Runs a function that may take milliseconds and awaits its result: `asyncio.to_thread`, or `run_inline`."""

    def __call__(self, function: Callable[[], T], /) -> Awaitable[T]:
        """Run `function` to its end, even if the caller is cancelled meanwhile; its error is raised here."""
        ...


async def run_inline(function: Callable[[], T], /) -> T:
    """Run `function` on the caller's own thread: for a simulation, which has no threads."""
    return function()
