"""What records are to their users: small values by name, each with the revision at which it was written.

Invariants of every kind: a write that was answered is there after any crash of this process; revisions only grow, also
across restarts, and each change has one of its own; a read or a watch never shows what a crash could still take back.
"""

from collections.abc import AsyncIterator
from enum import Enum, auto
from typing import Protocol

import msgspec

from kvcore.errors import InvalidRequestError, PayloadTooLargeError
from metadata_server.records.limits import RecordsLimits

ABSENT = 0
"""As the revision that a writer expects: there is no such record."""
NO_LEASE = 0


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One value."""

    key: str
    value: bytes
    revision: int
    """Of its last write."""
    lease: int = NO_LEASE
    """With which it ends."""


class Guard(msgspec.Struct, frozen=True):
    """Another record, and the revision at which it must be for a write to happen: the one by which a leader leads."""

    key: str
    revision: int


class PutOutcome(Enum):
    """What became of a write."""

    WRITTEN = auto()
    CONFLICT = auto()
    """Nothing was written: the record is not at the revision that was expected."""
    LEASE_ENDED = auto()
    """Nothing was written: there is no such lease (any more)."""


class PutReply(msgspec.Struct, frozen=True, kw_only=True):
    """What became of a write, and the record that is there now."""

    outcome: PutOutcome
    record: Record | None


class Listing(msgspec.Struct, frozen=True, kw_only=True):
    """All records under a prefix, by key, as they were at one revision."""

    records: tuple[Record, ...]
    revision: int


class RecordsUpdate(msgspec.Struct, frozen=True, kw_only=True):
    """What changed under a watched prefix, up to a revision."""

    reset: bool
    """These are all records that there are: at first, and whenever changes were missed."""
    records: tuple[Record, ...]
    """Written, each as it is now."""
    gone: tuple[str, ...]
    """Keys that are no more: of records that came and went since the last update, too."""
    revision: int


class Records(Protocol):
    """Where records are kept.

    Every call may raise RecordsUnavailableError: nothing is known of a write then, it may have happened. `put` raises
    InvalidRequestError for a key or value out of bounds. With a `guard`, `put` and `delete` raise NotLeaderError, and
    change nothing, when the guard's record is at another revision. A cancelled write may still happen.
    """

    async def run(self) -> None:
        """Keep it going until cancelled; without it no write is answered and no lease ends."""
        ...

    async def get(self, key: str) -> Record | None:
        """The record called so."""
        ...

    async def listing(self, prefix: str) -> Listing:
        """All whose keys begin so."""
        ...

    async def put(
        self,
        key: str,
        value: bytes,
        *,
        expect: int | None = None,
        lease: int = NO_LEASE,
        guard: Guard | None = None,
    ) -> PutReply:
        """Write, if the record is at revision `expect` (ABSENT: if there is none; None: whatever is there)."""
        ...

    async def delete(self, key: str, *, expect: int | None = None, guard: Guard | None = None) -> bool:
        """Remove, if it is at revision `expect`. False: it was not there, or at another revision."""
        ...

    async def grant(self, ttl_s: float) -> int:
        """A new lease. It ends, and its records with it, when it was not renewed for so long, or a little later.

        A time in which the records were not there to renew it (the process of the embedded ones was stopped or started
        again, etcd elected a leader) does not count."""
        ...

    async def renew(self, lease: int) -> bool:
        """Begin the lease's time anew. False: it has ended."""
        ...

    async def revoke(self, lease: int) -> None:
        """End the lease and its records now."""
        ...

    def watch(self, prefix: str) -> AsyncIterator[RecordsUpdate]:
        """First all records under the prefix, then what changes, without end. A watcher too slow gets all again."""
        ...

    async def aclose(self) -> None:
        """Close in good order. Further calls raise RecordsUnavailableError."""
        ...


def check_record(key: str, value: bytes, limits: RecordsLimits) -> None:
    """Raise InvalidRequestError for what no kind of records takes."""
    size = len(key.encode("utf-8", "surrogatepass"))
    if not 0 < size <= limits.max_key_bytes or not key.isprintable():
        raise InvalidRequestError(
            f"a record's key has 1 to {limits.max_key_bytes} bytes of printable characters", param="key"
        )
    if len(value) > limits.max_value_bytes:
        raise PayloadTooLargeError(f"a record has at most {limits.max_value_bytes} bytes, this one {len(value)}")
