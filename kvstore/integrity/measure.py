"""How fast this machine goes over chunks to prove them, so that the cost can be said. Blocks for milliseconds."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from kvcore.types import ChunkKey
from kvstore.chunk_format import ChunkHeader, checksum
from kvstore.integrity.cipher import Encryption
from kvstore.integrity.mac import mac_of


@dataclass(frozen=True, slots=True)
class ProofRates:
    """Of one thread, bytes a second."""

    mac: float
    checksum: float
    encrypt: float
    """And decrypt."""


def measure_proofs(num_bytes: int = 4 << 20, repeats: int = 5) -> ProofRates:
    """The best of some repeats, over a chunk of `num_bytes`."""
    payload = memoryview(os.urandom(num_bytes))
    into = memoryview(bytearray(num_bytes))
    header = ChunkHeader(ChunkKey(bytes(16)), bytes(16), 1, num_bytes, 0, 0)
    sealed = replace(header, encrypted=True)
    return ProofRates(
        _best(lambda: mac_of(bytes(32), header, [payload]), num_bytes, repeats),
        _best(lambda: checksum([payload]), num_bytes, repeats),
        _best(lambda: Encryption(bytes(32), sealed).take(payload, into), num_bytes, repeats),
    )


def _best(step: Callable[[], object], num_bytes: int, repeats: int) -> float:
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - began)
    return num_bytes / min(seconds)
