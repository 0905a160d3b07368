"""What the load and save jobs of one engine share: the store, the clock, the totals and the limits."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvcore.clock import Clock
from kvstore.store import KVStore
from kvstore.types import MovedBytes
from nodeapi.messages import Moved


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Batch sizes and pauses of the jobs."""

    read_chunks: int = 8
    """Chunks of one get at most: loaded chunks count as soon as their batch is in."""
    commit_chunks: int = 4
    """Chunks are committed as soon as so many are written, and others read them while the next ones are written."""
    ask_chunks: int = 16
    """What is waited for is asked about so many chunks at a time, or four times what came last: a prompt's cost is
    linear in its chunks, however few come at a time."""
    retry_s: float = 0.05
    """Pause after a wait that ended at once with nothing: the metadata server is away."""
    reserve_again_s: float = 20.0
    """A reservation that is no longer good may have expired if its session is older than this: ask once more."""
    follow_s: float = 1.0
    """What another node is writing is waited for as long as one more chunk becomes complete within this time: longer
    than a chunk takes, shorter than it takes the metadata server to give up a dead node."""
    follow_document_s: float = 5.0
    """At most what another node is computing of a document is waited for: its chunks are written once all of it is
    computed, so that it gets the time of each of them."""
    follow_poll_s: float = 0.25
    """Meanwhile it is asked so often whether that node is still at it."""
    warn_s: float = 60.0
    """Between two warnings that the store has no room."""
    cancel_s: float = 2.0
    """A cancelled write releases its memory within this, else it is left behind; it is never committed."""


@dataclass(frozen=True, slots=True)
class JobContext:
    """One for all jobs of an engine."""

    store: KVStore
    clock: Clock
    counters: Counter[str]
    timeout_s: float
    """For one call of the store."""
    limits: JobLimits = JobLimits()


def as_moved(moves: Sequence[MovedBytes]) -> list[Moved]:
    """One entry for each transport, direction and machine."""
    sums: dict[tuple[str, str, str], tuple[int, float, int]] = {}
    for move in moves:
        way = move.transport, str(move.direction), move.machine
        size, seconds, late = sums.get(way, (0, 0.0, 0))
        sums[way] = (size + move.num_bytes, seconds + move.seconds, late + move.late_bytes)
    return [
        Moved(transport=transport, direction=way, num_bytes=size, seconds=seconds, machine=machine, late_bytes=late)
        for (transport, way, machine), (size, seconds, late) in sums.items()
    ]
