"""Frames on a byte stream: u32le length, then that many bytes. Pure: no socket, no codec.

Used between a node and its engine's process and for the streams of the control API.
Invariant: a length over the bound, or zero, is refused before anything of that size is held.
"""

HEADER_BYTES = 4
MAX_FRAME_BYTES = 64 << 20


class FrameError(ValueError):
    """An impossible length. The stream is useless from here on: nobody can tell where the next frame begins."""


def pack_frame(payload: bytes, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The frame around `payload`. Raises FrameError where the other side would have to refuse it."""
    if not 0 < len(payload) <= max_bytes:
        raise FrameError(f"a frame carries 1 to {max_bytes} bytes, not {len(payload)}")
    return len(payload).to_bytes(HEADER_BYTES, "little") + payload


class FrameDecoder:
    """Cuts a byte stream into frames, however it was chopped up on the way."""

    def __init__(self, max_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_bytes
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes; returns the payloads that are complete now, in order. Raises FrameError."""
        if not self._buffer and 0 < len(data) - HEADER_BYTES == int.from_bytes(data[:HEADER_BYTES], "little"):
            if len(data) - HEADER_BYTES > self._max_bytes:
                raise FrameError(f"a frame of {len(data)} bytes came; {self._max_bytes} are allowed")
            return [data[HEADER_BYTES:]]  # most come one at a time and whole
        self._buffer += data
        payloads: list[bytes] = []
        start = 0
        while len(self._buffer) - start >= HEADER_BYTES:
            size = int.from_bytes(self._buffer[start : start + HEADER_BYTES], "little")
            if not 0 < size <= self._max_bytes:
                raise FrameError(f"a frame of {size} bytes was announced; 1 to {self._max_bytes} are allowed")
            end = start + HEADER_BYTES + size
            if len(self._buffer) < end:
                break
            payloads.append(bytes(self._buffer[start + HEADER_BYTES : end]))
            start = end
        del self._buffer[:start]
        return payloads

    @property
    def at_boundary(self) -> bool:
        """Whether no frame is half-received, so that the stream may end here."""
        return not self._buffer
