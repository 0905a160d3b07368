"""The generations in a bucket or a folder: listed, marked and cleared by what their objects are called.

Owns the names of notes and marks (docs/wire-formats.md). All of it runs in a thread, which may go on after nobody waits
for it: what was found so far can be read at any time.
"""

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvcore.errors import TransferTimeoutError
from kvstore.tiers.base import Generation, GenerationList, GenerationMark
from kvstore.tiers.generations import is_spared
from kvstore.tiers.limits import ObjectLimits
from transfer.blocking import BatchDeadline

if TYPE_CHECKING:
    from kvstore.tiers.objects.bucket import Bucket

_CHUNK = re.compile(r"([0-9a-f]{32})/[0-9a-f]{32}")
_MARK = re.compile(r"live/([0-9a-f]{32})/((?:[0-9a-f]{2})+)")
_MARKS, _NOTES = "live", "note"
_TIME_UP = "the time was up"


@dataclass(slots=True)
class BucketGenerations:
    """One look at a bucket. `incomplete`: why not all was seen or done; empty: all was."""

    bucket: "Bucket"
    limits: ObjectLimits
    wall: Callable[[], float]
    deadline: BatchDeadline
    incomplete: str = ""
    num_cleared: int = 0
    _counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    """Fingerprint in hex -> chunks and bytes."""
    _marks: dict[str, list[GenerationMark]] = field(default_factory=dict)
    _notes: dict[str, str] = field(default_factory=dict)

    def listed(self, problem: str) -> GenerationList:
        """What `look` found so far; `problem`: what stopped it, if anything."""
        found = []
        for one, (num_chunks, num_bytes) in sorted(dict(self._counts).items()):
            marks = tuple(sorted(self._marks.get(one, ()), key=lambda mark: mark.owner))
            found.append(Generation(bytes.fromhex(one), num_chunks, num_bytes, self._notes.get(one, ""), marks))
        return GenerationList(tuple(found), problem or self.incomplete)

    def look(self) -> None:
        """Count all chunks, and read what was noted of them."""
        self._look_at_marks(_MARKS)
        for page in self.bucket.pages("", self.limits.page_objects):
            for path, num_bytes in page:
                if (chunk := _CHUNK.fullmatch(path)) is None:
                    continue
                if chunk[1] not in self._counts and len(self._counts) >= self.limits.max_generations:
                    self.incomplete = f"there are more than {self.limits.max_generations} generations"
                    continue
                chunks, total = self._counts.get(chunk[1], (0, 0))
                self._counts[chunk[1]] = chunks + 1, total + num_bytes
            if self._is_late():
                return
        for one in self._counts:
            try:
                note = self.bucket.get(f"{_NOTES}/{one}", self.bucket.head(f"{_NOTES}/{one}").num_bytes)[1]
            except FileNotFoundError:
                continue
            if note is not None:
                self._notes[one] = bytes(note).decode(errors="replace")
            if self._is_late():
                return

    def mark(self, fingerprint: bytes, owner: str, note: str, ttl_s: float) -> None:
        """See `Tier.mark`."""
        path = f"{_MARKS}/{fingerprint.hex()}/{owner.encode().hex()}"
        if ttl_s <= 0:
            self.bucket.delete(path)
            return
        text = memoryview(note.encode())
        self.bucket.put(f"{_NOTES}/{fingerprint.hex()}", text, end=None, overwrite=True)
        self.bucket.put(path, memoryview(b""), end=self.wall() + ttl_s, overwrite=True)

    def clear(self, fingerprints: Sequence[bytes], own: Collection[str] | None) -> None:
        """Remove the chunks of these and what was noted of them, but for those that are spared."""
        for one in (fingerprint.hex() for fingerprint in fingerprints):
            if own is not None:
                self._look_at_marks(f"{_MARKS}/{one}")
                if self._is_late():  # others' marks may not have been seen
                    return
                if is_spared(self._marks.get(one, ()), own):
                    continue
            for folder in (one, f"{_MARKS}/{one}"):
                for page in self.bucket.pages(folder, self.limits.page_objects):
                    if page:
                        self.bucket.delete(*(path for path, _ in page))
                    self.num_cleared += len(page) if folder == one else 0
                    if self._is_late():
                        return
            self.bucket.delete(f"{_NOTES}/{one}")

    def _look_at_marks(self, folder: str) -> None:
        """Those that hold now."""
        for page in self.bucket.pages(folder, self.limits.page_objects):
            for path, _ in page:
                if (mark := _MARK.fullmatch(path)) is None or self._is_late():
                    continue
                try:
                    end = self.bucket.head(path).end
                except FileNotFoundError:
                    continue
                if end is not None and end > self.wall():
                    owner = bytes.fromhex(mark[2]).decode(errors="replace")
                    self._marks.setdefault(mark[1], []).append(GenerationMark(owner, end))

    def _is_late(self) -> bool:
        try:
            self.deadline.remaining()
        except TransferTimeoutError:
            self.incomplete = _TIME_UP
        return self.incomplete == _TIME_UP
