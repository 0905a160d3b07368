"""MACs of one connection's frames, where `transport.integrity` wants them (docs/wire-formats.md, "Frames with MACs").

Each direction has a key that the greeting gave this connection alone, and each thing that passes its number as nonce.
So what was changed, sent again, left out, put in another place or sent back does not fit, and no nonce repeats: a
connection that saw anything wrong is never used again. Pure.
"""

from collections.abc import Sequence
from hmac import compare_digest
from typing import Protocol

from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from kvcore.errors import TransferForgedError
from kvcore.trust.gmac import TAG_BYTES, Gmac

_Bytes = memoryview | bytes | bytearray
_NONCE_BYTES = 12
_AT_ONCE_BYTES = 64 << 10
"""Up to here a tag is made in one call, over a copy: setting a running MAC up takes 5 us, such a call less than 1."""


class RunningMac(Protocol):
    """Of one thing on its way: a frame's head, or what follows it."""

    def show(self, part: _Bytes) -> None:
        """The next bytes."""
        ...

    def tag(self) -> bytes:
        """The last call."""
        ...


class _NoMac:
    def show(self, part: _Bytes) -> None:
        pass

    def tag(self) -> bytes:
        return b""


_NO_MAC = _NoMac()


class _Direction:
    __slots__ = ("_aead", "_key", "number")

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._aead = AESGCM(key) if key else None
        self.number = 0

    def next(self) -> RunningMac:
        return Gmac(self._key, self._nonce()) if self._key else _NO_MAC

    def tag(self, views: Sequence[_Bytes]) -> bytes:
        """Of the next thing, all of it."""
        if self._aead is None:
            return b""
        if sum(map(len, views)) <= _AT_ONCE_BYTES:
            return self._aead.encrypt(self._nonce(), b"", b"".join(views))  # of an empty text: the tag is all
        running = self.next()
        for view in views:
            running.show(view)
        return running.tag()

    def _nonce(self) -> bytes:
        number, self.number = self.number, self.number + 1
        return number.to_bytes(_NONCE_BYTES, "little")


class FrameMacs:
    """What one end of a connection seals and checks. Without keys nothing has a MAC, and a tag is empty."""

    __slots__ = ("_received", "_sent", "tag_bytes")

    def __init__(self, send_key: bytes = b"", receive_key: bytes = b"") -> None:
        self._sent, self._received = _Direction(send_key), _Direction(receive_key)
        self.tag_bytes = TAG_BYTES if send_key else 0

    def __repr__(self) -> str:
        return f"<FrameMacs sent={self._sent.number} received={self._received.number}>" if self else "<FrameMacs none>"

    def __bool__(self) -> bool:
        """Whether there are any."""
        return self.tag_bytes > 0

    def sealing(self) -> RunningMac:
        """Of the next thing that is sent."""
        return self._sent.next()

    def seal(self, views: Sequence[_Bytes]) -> bytes:
        """The tag of the next thing that is sent, all of it."""
        return self._sent.tag(views)

    def checking(self) -> RunningMac:
        """Of the next thing that is received."""
        return self._received.next()

    def check(self, views: Sequence[_Bytes], tag: _Bytes) -> None:
        """Raises TransferForgedError unless `tag` is that of the next thing that was received, all of it."""
        _check(self._received.tag(views), tag)

    @staticmethod
    def check_tag(running: RunningMac, tag: _Bytes) -> None:
        """Raises TransferForgedError unless it is the tag of what was shown."""
        _check(running.tag(), tag)


PLAIN = FrameMacs()
"""Of connections whose frames have none."""


def _check(wanted: bytes, tag: _Bytes) -> None:
    if not compare_digest(wanted, bytes(tag)):
        raise TransferForgedError("a frame is not what its sender sealed, or not the next one")
