"""Copies within memory: small ones, large ones, and streams that shall not pass through the cache.

A copy of more than the cache holds reads each line of its target before it overwrites it, unless it is written with
non-temporal stores: a third less to move. The C library's memcpy would choose them itself, above three quarters of
what it takes for the cache's size; on AMD's processors that is often ten times too much, so we ask for them by name,
of libpmem (PMDK), where it is installed.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

LIBRARY = "libpmem.so.1"
PACKAGE = "libpmem1"
"""Debian's and Ubuntu's; Fedora calls it libpmem."""
_NON_TEMPORAL = 1 << 1  # PMEM_F_MEM_NONTEMPORAL of libpmem.h; without NODRAIN it ends with a store fence
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE_BYTES = 32 << 20
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}

Copy = Callable[[memoryview, memoryview], None]
"""Overwrites its first argument, flat bytes, with its second, of the same length."""


def copy_holding_lock(target: memoryview, source: memoryview) -> None:
    """For a small copy on the loop: getting the interpreter's lock back can take longer than the copy."""
    target[:] = source


def copy(target: memoryview, source: memoryview) -> None:
    """numpy lets go of the interpreter's lock, memoryview does not."""
    np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8))


def streaming_copy() -> Copy | None:
    """A copy past the cache, into memory that nobody reads soon; None where there is no libpmem. Lets go of the lock;
    what it wrote is visible to other processors when it returns."""
    return _stream if _libpmem() is not None else None


@functools.cache
def streams_above_bytes(caches: Path = _CACHES) -> int:
    """Copies of more in all do not stay in the last cache: source and target are half of it each."""
    sizes = []
    for path in caches.glob("index*/size"):
        try:
            text = path.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]])
        except (OSError, ValueError, KeyError, IndexError):
            continue
    return max(sizes, default=_USUAL_CACHE_BYTES) // 2


def _stream(target: memoryview, source: memoryview) -> None:
    library = _libpmem()
    assert library is not None, "streaming_copy says whether there is one"
    to, of = np.frombuffer(target, np.uint8), np.frombuffer(source, np.uint8)
    assert to.nbytes == of.nbytes, "lengths differ"
    library.pmem_memcpy(to.ctypes.data, of.ctypes.data, of.nbytes, _NON_TEMPORAL)


@functools.cache
def _libpmem() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(LIBRARY)
        library.pmem_memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint]
        library.pmem_memcpy.restype = ctypes.c_void_p
    except (OSError, AttributeError):
        return None
    return library
