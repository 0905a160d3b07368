"""Generations of chunks in a tier with an index: counted from its index, and what was noted of them. Pure."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from kvstore.tiers.base import ChunkName, Generation, GenerationList, GenerationMark


@dataclass(slots=True)
class _Count:
    chunks: int = 0
    num_bytes: int = 0
    used: tuple[float, float] | None = None


class GenerationNotes:
    """What was noted of generations, in memory: for tiers that have no better place."""

    def __init__(self, wall: Callable[[], float]) -> None:
        self._wall = wall
        self._notes: dict[bytes, str] = {}
        self._marks: dict[bytes, dict[str, float]] = {}

    def mark(self, fingerprint: bytes, owner: str, note: str, ttl_s: float) -> None:
        """See `Tier.mark`."""
        self._marks.setdefault(fingerprint, {})[owner] = self._wall() + ttl_s
        if ttl_s > 0:
            self._notes[fingerprint] = note

    def marks(self, fingerprint: bytes) -> tuple[GenerationMark, ...]:
        """Those that hold now, by owner."""
        marks, now = self._marks.get(fingerprint, {}), self._wall()
        return tuple(GenerationMark(owner, until) for owner, until in sorted(marks.items()) if until > now)

    def note(self, fingerprint: bytes) -> str:
        """The latest one; empty: none."""
        return self._notes.get(fingerprint, "")

    def forget(self, fingerprints: Iterable[bytes]) -> None:
        """They were cleared."""
        for fingerprint in fingerprints:
            self._notes.pop(fingerprint, None)
            self._marks.pop(fingerprint, None)


def counted(
    chunks: Iterable[tuple[ChunkName, int, float | None]], notes: GenerationNotes | None = None
) -> GenerationList:
    """Of a whole index: each chunk's name, its bytes, and when it was used last in Unix seconds, if that is known."""
    counts: dict[bytes, _Count] = {}
    for name, num_bytes, used_at in chunks:
        count = counts.setdefault(name.fingerprint, _Count())
        count.chunks += 1
        count.num_bytes += num_bytes
        if used_at is not None:
            oldest, newest = count.used or (used_at, used_at)
            count.used = min(oldest, used_at), max(newest, used_at)
    found = []
    for fingerprint, count in sorted(counts.items()):
        note = notes.note(fingerprint) if notes is not None else ""
        marks = notes.marks(fingerprint) if notes is not None else ()
        found.append(Generation(fingerprint, count.chunks, count.num_bytes, note, marks, count.used))
    return GenerationList(tuple(found))


def is_spared(marks: Iterable[GenerationMark], own: Collection[str] | None) -> bool:
    """Whether `Tier.clear` leaves a generation alone that is marked so."""
    return own is not None and any(mark.owner not in own for mark in marks)
