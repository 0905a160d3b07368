from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from kvcore.types import ChunkKey
from kvstore.chunk_format import ALIGNMENT, HEADER_BYTES, ChunkHeader, checksum, pack, parse
from kvstore.manifest import scan

PAGES = 12


@st.composite
def segments(draw: st.DrawFn) -> bytearray:
    """Random bytes, whole chunks written over each other in any order of generations, and flipped bits."""
    segment = bytearray(draw(st.binary(min_size=0, max_size=64)).ljust(PAGES * ALIGNMENT, b"\xa5"))
    for generation in draw(st.lists(st.integers(0, 40), max_size=12)):
        page = draw(st.integers(0, PAGES - 1))
        size = draw(st.integers(0, 4 * ALIGNMENT))
        payload = bytes([generation]) * size
        key = ChunkKey(bytes([generation]) * 16)
        raw = pack(ChunkHeader(key, b"f" * 16, 1, size, checksum([memoryview(payload)]), generation)) + payload
        end = min(len(segment), page * ALIGNMENT + len(raw))
        segment[page * ALIGNMENT : end] = raw[: end - page * ALIGNMENT]
    for _ in range(draw(st.integers(0, 3))):
        segment[draw(st.integers(0, PAGES - 1)) * ALIGNMENT + draw(st.integers(0, HEADER_BYTES))] ^= 0x10
    return segment[: len(segment) - draw(st.integers(0, 2 * ALIGNMENT))]


@settings(max_examples=60, deadline=None)
@given(segments())
def test_entries_are_inside_disjoint_newest_first_and_nothing_that_was_left_out_could_be_added(segment: bytearray):
    entries = scan(memoryview(segment))
    assert [entry.generation for entry in entries] == sorted((e.generation for e in entries), reverse=True)
    spans = sorted((entry.offset, entry.offset + entry.length) for entry in entries)
    assert all(start >= 0 and end <= len(segment) for start, end in spans)
    assert all(left[1] <= right[0] for left, right in pairwise(spans))
    listed = {entry.offset: entry for entry in entries}
    for offset in range(0, len(segment), ALIGNMENT):
        header = parse(segment[offset : offset + HEADER_BYTES])
        if header is None:
            assert offset not in listed
            continue
        end = offset + HEADER_BYTES + header.payload_length
        if end <= len(segment) and offset not in listed:
            rivals = [e for e in entries if e.offset < end and offset < e.offset + e.length]
            assert any(rival.generation >= header.generation for rival in rivals)


@settings(max_examples=60, deadline=None)
@given(segments())
def test_with_payloads_checked_every_entry_is_a_whole_chunk(segment: bytearray):
    for entry in scan(memoryview(segment), verify_payload=True):
        header = parse(segment[entry.offset : entry.offset + HEADER_BYTES])
        assert header is not None
        payload = memoryview(segment)[entry.offset + HEADER_BYTES : entry.offset + entry.length]
        assert checksum([payload]) == header.checksum


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=3 * ALIGNMENT))
def test_random_bytes_are_never_chunks(raw: bytes):
    assert scan(memoryview(raw)) == []
