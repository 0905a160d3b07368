"""How a batch is cut into puts and gets, and small neighbours are put together where each costs a round trip. Pure."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

PIECE_BYTES = 4 << 20
MESSAGE_BYTES = (1 << 20) - 4096
"""Fits a TCP segment (ucx_devices) with its headers, so that a put is one message."""
_SMALL_BYTES = 64 << 10
"""Copying so much costs less than another round trip over TCP."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A local buffer (flat, not empty) and its distance from the segment's start.

    `parts`: the buffer is one of ours, and these are the caller's that it stands for, in order.
    """

    offset: int
    view: memoryview
    parts: tuple[memoryview, ...] = ()

    def scatter(self) -> None:
        """After a read: copy to where the bytes belong."""
        at = 0
        for part in self.parts:
            part[:] = self.view[at : at + part.nbytes]
            at += part.nbytes


def cut(pieces: Sequence[Piece], *, reading: bool, one_at_a_time: bool) -> Iterator[Piece]:
    """What is to be put or got, covering each piece once and in order. Gathers lazily, as it is taken."""
    joined = _join(pieces, reading) if one_at_a_time else iter(pieces)
    limit = MESSAGE_BYTES if one_at_a_time and not reading else PIECE_BYTES
    for piece in joined:
        if piece.view.nbytes <= limit:
            yield piece
            continue
        for start in range(0, piece.view.nbytes, limit):
            yield Piece(piece.offset + start, piece.view[start : start + limit])


def _join(pieces: Sequence[Piece], reading: bool) -> Iterator[Piece]:
    run: list[Piece] = []
    end = size = 0
    for piece in pieces:
        length = piece.view.nbytes
        fits = run and piece.offset == end and length <= _SMALL_BYTES and size + length <= MESSAGE_BYTES
        if run and not fits:
            yield _joined(run, size, reading)
            run, size = [], 0
        run.append(piece)
        size += length
        end = piece.offset + length
    if run:
        yield _joined(run, size, reading)


def _joined(run: list[Piece], size: int, reading: bool) -> Piece:
    if len(run) == 1:
        return run[0]
    views = tuple(piece.view for piece in run)
    if reading:
        return Piece(run[0].offset, memoryview(bytearray(size)), views)
    return Piece(run[0].offset, memoryview(b"".join(views)))
