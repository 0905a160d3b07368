"""Segment memory: a sealed, pre-faulted memfd of the node's process, and its mapping by peers on the same host.

Owns the mapping and its file descriptor. A memfd has no name in /dev/shm: it ends with the last process that maps it,
so nothing can be orphaned. It is sealed against resizing, so no peer's access can fault. Knows not what is stored.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import mmap
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from kvcore.errors import ConfigError, PeerUnreachableError, SegmentUnknownError
from kvcore.types import Segment
from transfer.memory.available import available_memory
from transfer.memory.pages import Pages, bind_to_node, choose_pages, default_hugepage_bytes, usable_cpus

_MADV_POPULATE_WRITE = 23
"""Linux 5.14; not in Python's mmap module."""
_MADV_HUGEPAGE = 14
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
_PREFAULT_THREADS = 16
"""At most, and never more than there are processors."""
_SPARE_BYTES = 64 << 20
"""Left for the process itself when a segment's size is checked against what is available."""
_ATTACH_POPULATE_BYTES = 1 << 30
"""Page tables of a mapping are filled up to here at once (0.1 to 0.2 s), beyond it by `populate_rest`."""
_POPULATE_STEP_BYTES = 32 << 20
"""About 8 ms."""


def host_identity() -> str:
    """Equal in two processes iff they can map each other's memory: same boot, pid and network namespace.

    The network namespace is part of it because a container with its own network is meant to be another host.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    spaces = (Path(f"/proc/self/ns/{name}").stat().st_ino for name in ("pid", "net"))
    return "-".join([boot, *map(str, spaces)])


class SegmentMemory:
    """The owner's side. Close it after every SegmentHost that serves it."""

    def __init__(self, segment_id: str, fd: int, mapping: mmap.mmap) -> None:
        self.segment_id = segment_id
        self._fd: int | None = fd
        self._mapping = mapping
        self._view = memoryview(mapping)

    @classmethod
    def create(cls, segment_id: str, size_bytes: int, *, hugepages: bool = False, numa_node: int | None = None) -> Self:
        """Allocate and fault in `size_bytes` of zeros; about 1 s a GB, so call it before the loop serves anything.

        Raises ConfigError, before anything is faulted in, when the machine or a cgroup has too little memory, or no
        huge pages or NUMA node as asked for.
        """
        node = f"nodes.{segment_id.rpartition('.')[0] or segment_id}"
        key = f"{node}.segment"
        if size_bytes <= 0:
            raise ConfigError(f"{key}: a segment needs at least one byte, got {size_bytes}", param=key)
        try:
            pages = choose_pages(size_bytes, hugepages=hugepages, numa_node=numa_node)
        except ConfigError as error:
            raise ConfigError(f"{node}.{error.message}", param=node) from error
        if pages is not Pages.RESERVED:
            _check_available(key, size_bytes)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if pages is Pages.RESERVED else 0)
        fd = os.memfd_create(_memfd_name(segment_id), flags)
        try:
            os.ftruncate(fd, size_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            mapping = mmap.mmap(fd, size_bytes, mmap.MAP_SHARED)
            try:
                _place(mapping, pages, numa_node)
                _prefault(mapping)
            except BaseException:
                _unmap(memoryview(mapping), mapping)
                raise
        except OSError as error:
            os.close(fd)
            raise ConfigError(f"{key}: cannot allocate {size_bytes} bytes: {error}", param=key) from error
        except BaseException:
            os.close(fd)
            raise
        return cls(segment_id, fd, mapping)

    @property
    def view(self) -> memoryview:
        """The whole segment, writable. Slices of it keep the memory mapped after `close`."""
        return self._view

    @property
    def size_bytes(self) -> int:
        """Length of the segment."""
        return len(self._mapping)

    @property
    def shm_address(self) -> str:
        """What goes into `Segment.addresses["shm"]`: `<pid>:<fd>`. Dead once this is closed."""
        assert self._fd is not None, "the segment is closed"
        return f"{os.getpid()}:{self._fd}"

    def fileno(self) -> int:
        """The memfd, for a child process to inherit."""
        assert self._fd is not None, "the segment is closed"
        return self._fd

    def close(self) -> None:
        """Close the descriptor, so that peers refuse the segment, and unmap unless someone still holds a slice.

        Idempotent. With slices held, the mapping goes when the last of them goes.
        """
        if self._fd is None:
            return
        os.close(self._fd)
        self._fd = None
        _unmap(self._view, self._mapping)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AttachedSegment:
    """A peer's side: another process's segment, mapped writable. Made by `attach`."""

    def __init__(self, link: str, target: str, mapping: mmap.mmap) -> None:
        self._link = link
        self._target = target
        self._mapping = mapping
        self._size_bytes = len(mapping)
        self._closed = False
        self.view = memoryview(mapping)

    @property
    def unpopulated_bytes(self) -> int:
        """How much of it has no page tables yet after `attach`."""
        return max(0, self._size_bytes - _ATTACH_POPULATE_BYTES)

    def populate_rest(self) -> None:
        """Fill the page tables of what `attach` left out; 0.24 s a GB, in a thread. Ends soon after `close` and after
        the owner's death. Without it the first copy to each page runs at 2 GB/s instead of 8."""
        for start in range(_ATTACH_POPULATE_BYTES, self._size_bytes, _POPULATE_STEP_BYTES):
            if self._closed or not self.alive:
                return
            with contextlib.suppress(OSError, ValueError):  # it only saves faults; closed meanwhile
                _populate(self._mapping, start, min(_POPULATE_STEP_BYTES, self._size_bytes - start))

    @property
    def alive(self) -> bool:
        """Whether the owner still lives and holds the segment open. One readlink, about 2 µs.

        The answer can be out of date at once: an owner that dies after it leaves the memory readable and writable.
        """
        try:
            return os.readlink(self._link) == self._target  # noqa: PTH115  (Path.readlink costs three times as much)
        except OSError:
            return False

    def close(self) -> None:
        """Unmap, unless someone still holds a slice: then with the last slice. Idempotent."""
        self._closed = True
        _unmap(self.view, self._mapping)


def attach(segment: Segment) -> AttachedSegment:
    """Map a segment of a process on this host. Blocks for the page tables, 0.1 to 0.2 s a GB: call it off the loop.

    Raises SegmentUnknownError when the address names something that is not (or no longer) this segment, or not of this
    size, and PeerUnreachableError when its owner is gone or may not be looked into.
    """
    address = segment.addresses.get("shm", "")
    pid, _, number = address.partition(":")
    if not (pid.isdecimal() and number.isdecimal()):
        raise SegmentUnknownError(f"segment {segment.id}: {address!r} is no shm address (<pid>:<fd>)")
    link, target = f"/proc/{pid}/fd/{number}", f"/memfd:{_memfd_name(segment.id)} (deleted)"
    try:
        fd = _open_checked(segment, link, target)
    except OSError as error:
        raise PeerUnreachableError(f"segment {segment.id}: cannot open {link}: {error}") from error
    try:
        mapping = mmap.mmap(fd, segment.size_bytes, mmap.MAP_SHARED)
    except OSError as error:
        raise PeerUnreachableError(f"segment {segment.id}: cannot map {link}: {error}") from error
    finally:
        os.close(fd)
    with contextlib.suppress(OSError):  # the pages exist; this only saves later faults
        _populate(mapping, 0, min(segment.size_bytes, _ATTACH_POPULATE_BYTES))
    return AttachedSegment(link, target, mapping)


def _open_checked(segment: Segment, link: str, target: str) -> int:
    found = os.readlink(link)  # noqa: PTH115
    if found != target:
        raise SegmentUnknownError(f"segment {segment.id}: {link} is {found!r}, not {target!r}")
    fd = os.open(link, os.O_RDWR | os.O_CLOEXEC)
    try:
        if os.readlink(f"/proc/self/fd/{fd}") != target:  # noqa: PTH115
            raise SegmentUnknownError(f"segment {segment.id}: {link} became another file while it was opened")
        size_bytes, seals = os.fstat(fd).st_size, fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        if size_bytes != segment.size_bytes or seals & _SEALS != _SEALS:
            raise SegmentUnknownError(
                f"segment {segment.id}: {link} has {size_bytes} bytes and seals {seals:#x}, "
                f"not {segment.size_bytes} and at least {_SEALS:#x}"
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _memfd_name(segment_id: str) -> str:
    return f"kvferry-{segment_id}"


def _check_available(key: str, size_bytes: int) -> None:
    available = available_memory()
    if size_bytes + _SPARE_BYTES > available.size_bytes:
        raise ConfigError(
            f"{key}: {size_bytes} bytes do not fit: {available.size_bytes} bytes are available "
            f"({available.source}) and {_SPARE_BYTES} are kept spare; make {key} smaller",
            param=key,
        )


def _place(mapping: mmap.mmap, pages: Pages, numa_node: int | None) -> None:
    """Say where its pages come from, before there are any."""
    region = np.frombuffer(mapping, np.uint8)
    if numa_node is not None:
        bind_to_node(region.ctypes.data, len(mapping), numa_node)
    if pages is Pages.TRANSPARENT:
        _advise(region.ctypes.data, len(mapping), _MADV_HUGEPAGE)


def _prefault(mapping: mmap.mmap) -> None:
    """Fault in every page, in parallel: zeroing fresh pages is bound by a core, at 1 to 1.5 GB/s."""
    threads = min(_PREFAULT_THREADS, usable_cpus())
    step = -(-len(mapping) // threads)
    step += -step % default_hugepage_bytes()
    with ThreadPoolExecutor(threads, thread_name_prefix="kvferry-prefault") as pool:
        starts = range(0, len(mapping), step)
        list(pool.map(lambda start: _populate(mapping, start, min(step, len(mapping) - start)), starts))


def _populate(mapping: mmap.mmap, start: int, length: int) -> None:
    """madvise through ctypes lets go of the interpreter lock, mmap.madvise does not. Before Linux 5.14: touch."""
    region = np.frombuffer(mapping, np.uint8)
    try:
        _advise(region.ctypes.data + start, length, _MADV_POPULATE_WRITE)
        return
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    pages = region[start : start + length : mmap.PAGESIZE]
    np.bitwise_or(pages, 0, out=pages)  # a write that keeps what is there


def _advise(address: int, length: int, advice: int) -> None:
    if _libc_madvise()(address, length, advice) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


@functools.cache
def _libc_madvise() -> "ctypes._NamedFuncPointer":
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _unmap(view: memoryview, mapping: mmap.mmap) -> None:
    with contextlib.suppress(BufferError):
        view.release()
        mapping.close()
