from kvcore.types import ChunkKey
from kvstore.chunk_format import ALIGNMENT, HEADER_BYTES, ChunkHeader, checksum, pack
from kvstore.manifest import scan

FINGERPRINT = b"f" * 16


def put(segment: bytearray, page: int, generation: int, size: int = 100, fingerprint: bytes = FINGERPRINT) -> None:
    payload = bytes([generation % 256]) * size
    key = ChunkKey(generation.to_bytes(16, "little"))
    header = pack(ChunkHeader(key, fingerprint, 1, size, checksum([memoryview(payload)]), generation))
    segment[page * ALIGNMENT : page * ALIGNMENT + HEADER_BYTES + size] = header + payload


def found(segment: bytes | bytearray, **options) -> list[tuple[int, int]]:
    return [(entry.offset // ALIGNMENT, entry.generation) for entry in scan(memoryview(segment), **options)]


def test_newest_generation_comes_first_and_hides_the_older_chunks_it_overlaps():
    segment = bytearray(8 * ALIGNMENT)
    put(segment, 0, 1, size=3 * ALIGNMENT)
    put(segment, 5, 2)
    put(segment, 2, 3)
    assert found(segment) == [(2, 3), (5, 2)]


def test_an_older_chunk_inside_a_newer_ones_range_is_hidden():
    segment = bytearray(8 * ALIGNMENT)
    put(segment, 0, 9, size=3 * ALIGNMENT)
    put(segment, 1, 5)  # its header now stands in the newer chunk's payload
    assert found(segment) == [(0, 9)]


def test_a_damaged_payload_gives_way_to_an_older_whole_chunk_only_when_payloads_are_checked():
    segment = bytearray(8 * ALIGNMENT)
    put(segment, 0, 9, size=3 * ALIGNMENT)
    put(segment, 1, 5)
    assert found(segment, verify_payload=True) == [(1, 5)]


def test_a_chunk_that_runs_over_the_segments_end_is_not_listed():
    whole = bytearray(3 * ALIGNMENT)
    put(whole, 1, 7, size=2 * ALIGNMENT - HEADER_BYTES)
    assert found(whole) == [(1, 7)]
    assert found(whole[:-1]) == []


def test_only_the_wanted_fingerprint_is_listed_but_others_still_hide_what_they_overwrote():
    segment = bytearray(8 * ALIGNMENT)
    put(segment, 0, 1, size=3 * ALIGNMENT)
    put(segment, 2, 3, fingerprint=b"o" * 16)
    put(segment, 6, 2)
    assert found(segment, fingerprint=FINGERPRINT) == [(6, 2)]


def test_headers_off_the_alignment_are_not_seen():
    segment = bytearray(4 * ALIGNMENT)
    put(segment, 1, 4)
    assert found(bytes(8) + segment[:-8]) == []


def test_entries_carry_key_and_whole_length():
    segment = bytearray(2 * ALIGNMENT)
    put(segment, 1, 300, size=50)
    (entry,) = scan(memoryview(segment))
    assert (entry.key, entry.length) == ((300).to_bytes(16, "little"), HEADER_BYTES + 50)


def test_segments_without_room_for_a_header_hold_nothing():
    assert scan(memoryview(b"")) == []
    assert scan(memoryview(b"KVFCHUNK")) == []
    assert scan(memoryview(bytes(ALIGNMENT + 8))) == []


def test_more_chunks_than_one_vectorised_step_looks_at():
    segment = bytearray(9 * ALIGNMENT)
    for page in (0, 1, 2, 5, 8):
        put(segment, page, page + 1)
    assert sorted(found(segment, step_bytes=2 * ALIGNMENT)) == [(0, 1), (1, 2), (2, 3), (5, 6), (8, 9)]
