"""Lossless: the bytes of each number apart (shuffle), then zstd. Needs blosc2: `pip install 'kvferry[codec]'`.

Real KV in bfloat16 comes to 0.69 of its size: its high bytes to 0.38, its low bytes not at all. No lossless codec gets
below that; levels above 1 and channel-major orders gain nothing.
"""

import blosc2
import numpy as np

_HEADER_BYTES = 32
_FILTERS = slice(16, 31)
"""In blosc2's chunk header: which filters and codec it was written with."""
_OURS = bytes([1, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0])
MOST_BYTES = (1 << 31) - (1 << 16)
"""That blosc2 takes at once."""


def encode(payload: memoryview, element_bytes: int) -> bytes:
    """`payload` holds numbers of `element_bytes` each. On a thread: 0.6 GB/s."""
    return bytes(
        blosc2.compress2(
            np.frombuffer(payload, np.uint8),
            codec=blosc2.Codec.ZSTD,
            filters=[blosc2.Filter.SHUFFLE],
            clevel=1,
            typesize=element_bytes,
            nthreads=1,
        )
    )


def decode(body: memoryview, into: memoryview) -> bool:
    """Fill `into`, and nothing else, whatever `body` claims. False: it is no body of so many bytes. 2 GB/s."""
    if len(body) < _HEADER_BYTES or bytes(body[_FILTERS]) != _OURS:
        return False
    try:
        num_bytes, num_encoded, _ = blosc2.get_cbuffer_sizes(body)
        if (num_bytes, num_encoded) != (into.nbytes, body.nbytes):
            return False
        blosc2.decompress2(body, dst=np.frombuffer(into, np.uint8), nthreads=1)
    except (ValueError, RuntimeError):
        return False
    return True
