"""Records and leases as a state machine without I/O: writes are staged, cut into batches, and settled once flushed.

Invariants: a write is judged by all that were staged before it; nothing staged is seen by readers; when a batch cannot
be flushed, all that was staged with it and after it is dropped.
"""

import bisect
from collections.abc import Iterable, Mapping

import msgspec

from kvcore.errors import NotLeaderError, OverloadedError
from metadata_server.records.base import NO_LEASE, Guard, Listing, PutOutcome, PutReply, Record, check_record
from metadata_server.records.limits import RecordsLimits


class Batch(msgspec.Struct, kw_only=True):
    """Changes that are flushed together. Of several to one key the last is here."""

    revision: int
    """After it."""
    records: dict[str, Record | None] = {}
    """None: removed."""
    leases: dict[int, float | None] = {}
    """The time of each new one, in seconds; None: ended."""

    def __bool__(self) -> bool:
        return bool(self.records or self.leases)


class RecordsTable:
    """Mutated by its one shell."""

    def __init__(
        self, records: Iterable[Record], leases: Mapping[int, float], revision: int, limits: RecordsLimits
    ) -> None:
        self._records = {record.key: record for record in records}
        self._keys = sorted(self._records)
        self._limits = limits
        self.leases = dict(leases)
        """Time of each that is not over, in seconds."""
        self.revision = revision
        """Of the last change that was flushed."""
        self._ahead = Batch(revision=revision)
        """All that is staged or being flushed; for each key the last change."""
        self._next = Batch(revision=revision)

    def __repr__(self) -> str:
        return f"<RecordsTable {len(self._records)} records, {len(self.leases)} leases, revision {self.revision}>"

    def __len__(self) -> int:
        return len(self._records)

    # --- what is flushed ----------------------------------------------------------------------------------------

    def get(self, key: str) -> Record | None:
        """The record called so."""
        return self._records.get(key)

    def listing(self, prefix: str) -> Listing:
        """All whose keys begin so."""
        found: list[Record] = []
        for at in range(bisect.bisect_left(self._keys, prefix), len(self._keys)):
            if not self._keys[at].startswith(prefix):
                break
            found.append(self._records[self._keys[at]])
        return Listing(records=tuple(found), revision=self.revision)

    # --- staging ------------------------------------------------------------------------------------------------

    def check_guard(self, guard: Guard | None) -> None:
        """Raise NotLeaderError if the guard's record is at another revision."""
        if guard is None:
            return
        found = self._latest(guard.key)
        if found is None or found.revision != guard.revision:
            raise NotLeaderError(f"the record {guard.key} is no longer at revision {guard.revision}")

    def put(self, key: str, value: bytes, expect: int | None, lease: int) -> PutReply:
        """Stage a write; the reply holds once it is flushed. Raises InvalidRequestError, OverloadedError."""
        check_record(key, value, self._limits)
        current = self._latest(key)
        if expect is not None and expect != (current.revision if current else 0):
            return PutReply(outcome=PutOutcome.CONFLICT, record=current)
        if lease != NO_LEASE and not self._has_lease(lease):
            return PutReply(outcome=PutOutcome.LEASE_ENDED, record=current)
        if current is None and len(self._records) + len(self._ahead.records) >= self._limits.max_records:
            raise OverloadedError(f"there are {self._limits.max_records} records already")
        record = Record(key=key, value=bytes(value), revision=self._step(), lease=lease)
        self._stage(key, record)
        return PutReply(outcome=PutOutcome.WRITTEN, record=record)

    def delete(self, key: str, expect: int | None) -> bool:
        """Stage a removal. False: there is nothing to remove."""
        current = self._latest(key)
        if current is None or expect not in (None, current.revision):
            return False
        self._step()
        self._stage(key, None)
        return True

    def grant(self, lease: int, ttl_s: float) -> None:
        """Stage a new lease; `lease` is a number that none has had."""
        assert not self._has_lease(lease), "a lease's number is its own"
        if len(self.leases) + len(self._ahead.leases) >= self._limits.max_leases:
            raise OverloadedError(f"there are {self._limits.max_leases} leases already")
        self._ahead.leases[lease] = self._next.leases[lease] = ttl_s

    def revoke(self, lease: int) -> None:
        """Stage a lease's end, and its records'."""
        if not self._has_lease(lease):
            return
        for key in {*self._records, *self._ahead.records}:
            record = self._latest(key)
            if record is not None and record.lease == lease:
                self.delete(key, None)
        self._ahead.leases[lease] = self._next.leases[lease] = None

    # --- flushing -----------------------------------------------------------------------------------------------

    def cut(self) -> Batch:
        """What was staged since the last cut, to be flushed, then settled or dropped before the next."""
        batch, self._next = self._next, Batch(revision=self._next.revision)
        return batch

    def settle(self, batch: Batch) -> None:
        """It is flushed: readers see it from now on."""
        for key, record in batch.records.items():
            if record is None:
                if self._records.pop(key, None) is not None:
                    del self._keys[bisect.bisect_left(self._keys, key)]
            else:
                if key not in self._records:
                    bisect.insort(self._keys, key)
                self._records[key] = record
            if key not in self._next.records:
                self._ahead.records.pop(key, None)
        for lease, ttl_s in batch.leases.items():
            if ttl_s is None:
                self.leases.pop(lease, None)
            else:
                self.leases[lease] = ttl_s
            if lease not in self._next.leases:
                self._ahead.leases.pop(lease, None)
        self.revision = batch.revision

    def drop(self) -> None:
        """A batch could not be flushed. What stood on it falls too; its revisions are not used again."""
        self._ahead = Batch(revision=self._next.revision)
        self._next = Batch(revision=self._next.revision)

    def _step(self) -> int:
        self._next.revision += 1
        return self._next.revision

    def _latest(self, key: str) -> Record | None:
        return self._ahead.records[key] if key in self._ahead.records else self._records.get(key)

    def _has_lease(self, lease: int) -> bool:
        ahead = self._ahead.leases
        return ahead[lease] is not None if lease in ahead else lease in self.leases

    def _stage(self, key: str, record: Record | None) -> None:
        self._ahead.records[key] = self._next.records[key] = record
