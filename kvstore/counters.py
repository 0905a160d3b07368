"""What the store counted since start. Names are stable: metrics and tests read them."""

from collections import Counter
from enum import StrEnum

from kvstore.types import Direction, MovedBytes


class Count(StrEnum):
    """Totals. Beside these: `miss_<outcome>` (chunks whose every replica failed, by the last failure) and
    `replica_<outcome>` (single replicas refused or not read)."""

    MATCHES = "matches"
    MATCHED_CHUNKS = "matched_chunks"
    CHUNKS_GOT = "chunks_got"
    CHUNKS_PUT = "chunks_put"
    """Committed."""
    CHUNKS_EXISTED = "chunks_existed"
    """Not written: complete already."""
    DECLINED_BUSY = "declined_busy"
    """Not written: enough others are writing it."""
    DECLINED_FULL = "declined_full"
    """Not written: no room, even after eviction."""
    WRITES_FAILED = "writes_failed"
    FRAMES_FORGED = "frames_forged"
    """Operations on whose way somebody changed what passed (`transport.integrity: frames`)."""
    WRITES_EXPIRED = "writes_expired"
    """Not written: the reservation had nearly run out, and a late writer would write on another chunk's place."""
    COMMITS_REFUSED = "commits_refused"
    """Written in vain: the reservation had expired or the index had begun anew."""
    LEASES_RENEWED = "leases_renewed"
    """Read leases that were extended, as bytes still moved under them."""
    LEASES_LOST = "leases_lost"
    """Read leases that were gone when they were to be extended. What was read is verified in any case."""
    LEFT_TO_EXPIRE = "left_to_expire"
    """Reservations and leases not given back: a write had not ended, or the metadata server was away for too long."""
    REPORTS_DROPPED = "reports_dropped"
    """Quarantine reports not sent: too many were under way, or the metadata server was away."""
    METADATA_UNAVAILABLE = "metadata_unavailable"
    METADATA_PROTOCOL = "metadata_protocol"
    """Answers that the protocol does not allow: a bug on one side."""


class StoreCounters:
    """Totals that only grow. One an event loop; no locks."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter({name.value: 0 for name in Count})
        self._bytes: Counter[tuple[str, Direction]] = Counter()
        self._seconds: dict[tuple[str, Direction], float] = {}

    def add(self, name: str, count: int = 1) -> None:
        """Count `name` (a Count, `miss_<outcome>` or `replica_<outcome>`) up."""
        self._counts[name] += count

    def add_moved(self, moved: MovedBytes) -> None:
        """Add one call's bytes to the totals."""
        way = (moved.transport, moved.direction)
        self._bytes[way] += moved.num_bytes
        self._seconds[way] = self._seconds.get(way, 0.0) + moved.seconds

    def counts(self) -> dict[str, int]:
        """A copy."""
        return dict(self._counts)

    def moved(self) -> list[MovedBytes]:
        """Totals, one entry a (transport, direction)."""
        return [MovedBytes(*way, num_bytes, self._seconds[way]) for way, num_bytes in self._bytes.items()]
