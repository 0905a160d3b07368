"""How a batch is cut into puts and gets, and small neighbours are put together where each costs a round trip. Pure."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

FRAGMENT_BYTES = 4 << 20
MESSAGE_BYTES = (1 << 20) - 4096
"""Fits a TCP segment (ucx_devices) with its headers, so that a put is one message."""
_SMALL_BYTES = 64 << 10
"""Copying so much costs less than another round trip over TCP."""


@dataclass(frozen=True, slots=True)
class Fragment:
    """A local buffer (flat, not empty) and its distance from the segment's start.

    `parts`: the buffer is one of ours, and these are the caller's that it stands for, in order.
    """

    offset: int
    view: memoryview
    parts: tuple[memoryview, ...] = ()

    @staticmethod
    def of(offset: int, views: Iterable[memoryview]) -> "list[Fragment]":
        """One a view, of a range of the segment that begins at `offset`."""
        fragments = []
        for view in views:
            fragments.append(Fragment(offset, view))
            offset += view.nbytes
        return fragments

    def scatter(self) -> None:
        """After a read: copy to where the bytes belong."""
        at = 0
        for part in self.parts:
            part[:] = self.view[at : at + part.nbytes]
            at += part.nbytes


def cut(fragments: Sequence[Fragment], *, reading: bool, one_at_a_time: bool) -> Iterator[Fragment]:
    """What is to be put or got, covering each fragment once and in order. Gathers lazily, as it is taken."""
    joined = _join(fragments, reading) if one_at_a_time else iter(fragments)
    limit = MESSAGE_BYTES if one_at_a_time and not reading else FRAGMENT_BYTES
    for fragment in joined:
        if fragment.view.nbytes <= limit:
            yield fragment
            continue
        for start in range(0, fragment.view.nbytes, limit):
            yield Fragment(fragment.offset + start, fragment.view[start : start + limit])


def _join(fragments: Sequence[Fragment], reading: bool) -> Iterator[Fragment]:
    run: list[Fragment] = []
    end = size = 0
    for fragment in fragments:
        length = fragment.view.nbytes
        fits = run and fragment.offset == end and length <= _SMALL_BYTES and size + length <= MESSAGE_BYTES
        if run and not fits:
            yield _joined(run, size, reading)
            run, size = [], 0
        run.append(fragment)
        size += length
        end = fragment.offset + length
    if run:
        yield _joined(run, size, reading)


def _joined(run: list[Fragment], size: int, reading: bool) -> Fragment:
    if len(run) == 1:
        return run[0]
    views = tuple(fragment.view for fragment in run)
    if reading:
        return Fragment(run[0].offset, memoryview(bytearray(size)), views)
    return Fragment(run[0].offset, memoryview(b"".join(views)))
