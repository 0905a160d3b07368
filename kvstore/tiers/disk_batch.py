"""What one call of the disk tier has a thread do with the slab. Owns no index: its results are applied by the tier."""

from collections.abc import Callable
from dataclasses import dataclass, field

from kvstore.tiers.base import TierChunk
from kvstore.tiers.disk_file import SlabEntry, SlabFile


@dataclass(slots=True)
class HeldChunk:
    """A chunk in the slab. `busy`: reads and writes of it under way; `gone`: it is no longer in the index, and its
    extent is given back when nobody is busy with it."""

    entry: SlabEntry
    busy: int = 0
    gone: bool = False


@dataclass(slots=True)
class DiskBatch:
    """What a thread is to do, and how it went."""

    slab: SlabFile
    work: list[tuple[int, HeldChunk, TierChunk]] = field(default_factory=list)
    """Each with its position in the call."""
    entries: list[SlabEntry] = field(default_factory=list)
    """Of chunks in the slab, to be written again."""
    done: dict[int, bool] = field(default_factory=dict)
    """Position in the call -> whether it came or was written."""
    problem: str = ""
    stopped: bool = False

    def stop(self) -> None:
        """From any thread: what is not begun is left."""
        self.stopped = True

    def read(self) -> None:
        """Each chunk of `work` into its memory."""
        for at, held, chunk in self.work:
            if self.stopped:
                return
            try:
                self.done[at] = self.slab.read_chunk(held.entry, chunk.memory)
            except OSError as error:
                self._failed(error)

    def writing(self, to_clear: list[int]) -> Callable[[], None]:
        """The job that clears these places of the table, which leaves the list empty, and then writes all else."""

        def write() -> None:
            try:
                cleared = to_clear.copy()
                self.slab.clear_entries(cleared)
                del to_clear[: len(cleared)]
                self.slab.put_entries(self.entries)
                for at, held, chunk in self.work:
                    if self.stopped:
                        return
                    self.slab.write_chunk(held.entry, chunk.memory)
                    self.done[at] = True
            except OSError as error:
                self._failed(error)

        return write

    def _failed(self, error: OSError) -> None:
        self.problem = f"{self.slab.path}: {error.strerror}"
