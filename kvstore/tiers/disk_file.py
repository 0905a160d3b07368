"""The slab's file: a header block, a table of entries, then room for chunks; past the page cache where that can be.

Owns the descriptor, the lock on it and the bytes of the table. Blocks: every method runs on a thread of the tier's.
Layout (docs/wire-formats.md, "A disk's slab"): block 0: magic, version, size of the file, number of entries; then the
table, 16 entries of 256 bytes a block; then extents of 4096-byte units. An entry is the chunk's own header, and where
the chunk lies. Invariant: an entry is on the disk only while the whole chunk is: it is cleared before its extent is
written again.
"""

import errno
import fcntl
import mmap
import os
import struct
import threading
import zlib
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from kvcore.errors import ConfigError
from kvcore.extents import ALIGNMENT, aligned
from kvcore.types import OwnerTag
from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.codecs.frame import MORE_BYTES
from kvstore.tiers.base import ChunkName

_MAGIC = b"KVFSLAB1"
_HEAD = struct.Struct("<8sQQ")
_EXTRA = struct.Struct("<QQdd")
"""Offset, length (header and payload), last use and end (Unix seconds; 0: none)."""
ENTRY_BYTES = 256
_CRC = struct.Struct("<I")
_CRC_AT = HEADER_BYTES + _EXTRA.size
_ENTRIES_A_BLOCK = ALIGNMENT // ENTRY_BYTES
_BYTES_AN_ENTRY = 16 << 10
"""One entry for so many bytes of the file: 1.6 % of it is table."""
_READ_BYTES = 8 << 20


@dataclass(slots=True)
class SlabEntry:
    """A chunk that lies in the slab. `raw_header`: its first HEADER_BYTES."""

    number: int
    """Of its place in the table."""
    raw_header: bytes
    offset: int
    num_bytes: int
    used_at: float
    ends_at: float
    """Unix seconds; 0: never."""

    def pack(self) -> bytes:
        """ENTRY_BYTES."""
        body = self.raw_header + _EXTRA.pack(self.offset, self.num_bytes, self.used_at, self.ends_at)
        return (body + _CRC.pack(zlib.crc32(body))).ljust(ENTRY_BYTES, b"\0")


class SlabFile:
    """Opened by `open`; close it once."""

    def __init__(self, path: Path, fd: int, size_bytes: int, *, direct: bool) -> None:
        self.path = path
        self.direct = direct
        """Whether the page cache is passed by."""
        self.num_entries = max(_ENTRIES_A_BLOCK, size_bytes // _BYTES_AN_ENTRY)
        self.num_entries -= self.num_entries % _ENTRIES_A_BLOCK
        self.data_offset = ALIGNMENT + self.num_entries * ENTRY_BYTES
        self.data_bytes = max(0, (size_bytes - self.data_offset) // ALIGNMENT * ALIGNMENT)
        self._fd = fd
        self._size_bytes = size_bytes
        self._live: dict[int, dict[int, SlabEntry]] = {}
        """Block of the table -> its entries on the disk, by number."""
        self._table_lock = threading.Lock()
        self._scratch = threading.local()

    @classmethod
    def open(cls, path: Path, size_bytes: int, *, buffered: bool) -> tuple["SlabFile", str]:
        """The file, made or made anew where it is not as it should be, and what there is to say of that.

        Raises ConfigError: another process has it, there is no room, it cannot be written.
        """
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        direct, said = not buffered, ""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                fd = os.open(path, flags | (os.O_DIRECT if direct else 0), 0o600)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                fd, direct = os.open(path, flags, 0o600), False
                said = "the file system refuses O_DIRECT: chunks go through the page cache"
            slab = cls(path, fd, size_bytes, direct=direct)
            try:
                slab._take(size_bytes)
            except BaseException:
                os.close(fd)
                raise
        except OSError as error:
            raise ConfigError(f"tiers.disk: {path}: {error.strerror}", param="tiers.disk") from error
        return slab, said

    def _take(self, size_bytes: int) -> None:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"tiers.disk: {self.path} is another process's: each node needs a folder of its own ({{node}} in path)",
                param="tiers.disk",
            ) from None
        if self.data_bytes < ALIGNMENT:
            raise ConfigError("tiers.disk.size: too small for one chunk", param="tiers.disk.size")
        if os.fstat(self._fd).st_size != size_bytes or self._read_block(0)[: _HEAD.size] != self._head():
            os.ftruncate(self._fd, 0)  # what lay there was of another size or format
            os.posix_fallocate(self._fd, 0, size_bytes)
            self._write_block(0, self._head())

    def entries(self) -> Iterator[SlabEntry]:
        """What the table says, damaged entries left out. To be used up once, before anything else."""
        step = _READ_BYTES // ALIGNMENT * ALIGNMENT
        for start in range(ALIGNMENT, self.data_offset, step):
            part = self._read(start, min(step, self.data_offset - start))
            occupied = np.flatnonzero(np.frombuffer(part, dtype="<u8")[:: ENTRY_BYTES // 8])
            for at in (occupied * ENTRY_BYTES).tolist():
                number = (start - ALIGNMENT + at) // ENTRY_BYTES
                entry = _entry_of(number, part[at : at + ENTRY_BYTES])
                if entry is not None and self._is_inside(entry):
                    self._live.setdefault(number // _ENTRIES_A_BLOCK, {})[number] = entry
                    yield entry

    def write_chunk(self, entry: SlabEntry, memory: Sequence[memoryview]) -> None:
        """Payload first, then its entry. Raises OSError."""
        direct, rest = self._parts(memory, entry.num_bytes)
        if rest is not None:
            rest[1][: len(rest[0])] = rest[0]
        views = [*direct, *([rest[1]] if rest is not None else [])]
        _all_written(self._fd, views, entry.offset)
        self.put_entries([entry])

    def read_chunk(self, entry: SlabEntry, memory: Sequence[memoryview]) -> bool:
        """Whether all of it came. Raises OSError."""
        if sum(view.nbytes for view in memory) != entry.num_bytes:
            return False
        direct, rest = self._parts(memory, entry.num_bytes)
        views = [*direct, *([rest[1]] if rest is not None else [])]
        if not _all_read(self._fd, views, entry.offset, entry.num_bytes):
            return False
        if rest is not None:
            _scatter(rest[1], memory, sum(view.nbytes for view in direct), entry.num_bytes)
        return True

    def put_entries(self, entries: Sequence[SlabEntry]) -> None:
        """Write these entries, of chunks that lie there whole. Raises OSError."""
        self._change({entry.number: entry for entry in entries})

    def clear_entries(self, numbers: Sequence[int]) -> None:
        """Forget these. Raises OSError: then they are on the disk still."""
        self._change(dict.fromkeys(numbers))

    def close(self) -> None:
        """Lets go of the file and its lock."""
        os.close(self._fd)

    def _change(self, changes: dict[int, SlabEntry | None]) -> None:
        by_block: dict[int, dict[int, SlabEntry | None]] = {}
        for number, entry in changes.items():
            by_block.setdefault(number // _ENTRIES_A_BLOCK, {})[number] = entry
        with self._table_lock:
            for block, changed in sorted(by_block.items()):
                after = self._live.get(block, {}) | changed
                there = {number: entry for number, entry in after.items() if entry is not None}
                image = bytearray(ALIGNMENT)
                for number, entry in there.items():
                    at = number % _ENTRIES_A_BLOCK * ENTRY_BYTES
                    image[at : at + ENTRY_BYTES] = entry.pack()
                self._write_block(ALIGNMENT + block * ALIGNMENT, image)
                self._live[block] = there

    def _parts(
        self, memory: Sequence[memoryview], num_bytes: int
    ) -> tuple[list[memoryview], tuple[bytes, memoryview] | None]:
        """What goes straight from or to `memory`, and the rest with a block of our own for it: what is shorter than a
        block, or all of it where the memory is not as the disk needs it."""
        if not self.direct:
            return list(memory), None
        if len(memory) == 1 and _address(memory[0]) % ALIGNMENT == 0:
            straight = num_bytes // ALIGNMENT * ALIGNMENT
            if straight == num_bytes:
                return [memory[0]], None
            rest = bytes(memory[0][straight:])
            return ([memory[0][:straight]] if straight else []), (rest, self._buffer(ALIGNMENT))
        whole = b"".join(memory)
        return [], (whole, self._buffer(aligned(num_bytes)))

    def _buffer(self, size_bytes: int) -> memoryview:
        """Aligned, of this thread."""
        held: memoryview | None = getattr(self._scratch, "view", None)
        if held is None or held.nbytes < size_bytes:
            held = self._scratch.view = memoryview(mmap.mmap(-1, size_bytes))
        return held[:size_bytes]

    def _is_inside(self, entry: SlabEntry) -> bool:
        end = entry.offset + aligned(entry.num_bytes)
        return self.data_offset <= entry.offset and end <= self._size_bytes and entry.offset % ALIGNMENT == 0

    def _head(self) -> bytes:
        return _HEAD.pack(_MAGIC, self._size_bytes, self.num_entries)

    def _read(self, offset: int, num_bytes: int) -> bytes:
        buffer = self._buffer(aligned(num_bytes))
        if not _all_read(self._fd, [buffer], offset, num_bytes):
            raise OSError(errno.EIO, "the file ends too soon")
        return bytes(buffer[:num_bytes])

    def _read_block(self, offset: int) -> bytes:
        return self._read(offset, ALIGNMENT)

    def _write_block(self, offset: int, content: bytes | bytearray) -> None:
        buffer = self._buffer(ALIGNMENT)
        buffer[:] = bytes(content).ljust(ALIGNMENT, b"\0")
        _all_written(self._fd, [buffer], offset)


def name_of_entry(entry: SlabEntry) -> ChunkName:
    """What its header says."""
    header = parse(entry.raw_header)
    assert header is not None, "the file gives out entries with a whole header only"
    return ChunkName(header.fingerprint, header.key)


def owner_of_entry(entry: SlabEntry) -> OwnerTag | None:
    """Whose it is, as its header says."""
    header = parse(entry.raw_header)
    return None if header is None else header.owner


def disjoint(entries: Sequence[SlabEntry], now: float) -> list[SlabEntry]:
    """Those that count, least recently used first: of two that overlap, or of one chunk, the one used last."""
    kept, names = list[SlabEntry](), set[ChunkName]()
    starts, ends = list[int](), list[int]()
    for entry in sorted(entries, key=lambda entry: -entry.used_at):
        if 0 < entry.ends_at <= now or (name := name_of_entry(entry)) in names:
            continue
        start, end = entry.offset, entry.offset + aligned(entry.num_bytes)
        at = bisect_left(starts, end)
        if at > 0 and ends[at - 1] > start:
            continue
        starts.insert(at, start)
        ends.insert(at, end)
        names.add(name)
        kept.append(entry)
    return kept[::-1]


def _entry_of(number: int, raw: bytes) -> SlabEntry | None:
    if _CRC.unpack_from(raw, _CRC_AT)[0] != zlib.crc32(raw[:_CRC_AT]):
        return None
    header = parse(raw[:HEADER_BYTES])
    offset, num_bytes, used_at, ends_at = _EXTRA.unpack_from(raw, HEADER_BYTES)
    if header is None or num_bytes > HEADER_BYTES + header.payload_length + MORE_BYTES:  # another length: it is encoded
        return None
    return SlabEntry(number, raw[:HEADER_BYTES], offset, num_bytes, used_at, ends_at)


def _address(view: memoryview) -> int:
    return int(np.frombuffer(view, dtype=np.uint8).ctypes.data)


def _all_written(fd: int, views: Sequence[memoryview], offset: int) -> None:
    left = [view for view in views if view.nbytes]
    while left:
        written = os.pwritev(fd, left, offset)
        if written == 0:
            raise OSError(errno.EIO, "nothing was written")
        offset += written
        left = _behind(left, written)


def _all_read(fd: int, views: Sequence[memoryview], offset: int, num_bytes: int) -> bool:
    left, came = [view for view in views if view.nbytes], 0
    while left and came < num_bytes:
        read = os.preadv(fd, left, offset + came)
        if read == 0:
            return False
        came += read
        left = _behind(left, read)
    return True


def _behind(views: list[memoryview], num_bytes: int) -> list[memoryview]:
    """What follows the first `num_bytes`."""
    for at, view in enumerate(views):
        if num_bytes < view.nbytes:
            return [view[num_bytes:], *views[at + 1 :]]
        num_bytes -= view.nbytes
    return []


def _scatter(source: memoryview, memory: Sequence[memoryview], start: int, end: int) -> None:
    """The bytes [start, end) of a chunk, from the beginning of `source` to their places."""
    at, begin = 0, 0
    for view in memory:
        low, high = max(start, begin), min(end, begin + view.nbytes)
        if low < high:
            view[low - begin : high - begin] = source[at : at + high - low]
            at += high - low
        begin += view.nbytes
