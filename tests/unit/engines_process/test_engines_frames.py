"""Framing: any chopping gives the same frames, and lengths that cannot be are refused early."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeapi.frames import FrameDecoder, FrameError, pack_frame


@given(st.lists(st.binary(min_size=1, max_size=50), max_size=8), st.lists(st.integers(1, 20), max_size=40))
def test_frames_come_out_as_they_went_in_however_they_were_chopped(payloads: list[bytes], cuts: list[int]) -> None:
    data = b"".join(map(pack_frame, payloads))
    decoder = FrameDecoder()
    out: list[bytes] = []
    for cut in cuts:
        out += decoder.feed(data[:cut])
        data = data[cut:]
    out += decoder.feed(data)
    assert out == payloads
    assert decoder.at_boundary


@pytest.mark.parametrize("size", [0, 101, 2**32 - 1])
def test_impossible_length_is_refused_before_its_bytes_come(size: int) -> None:
    with pytest.raises(FrameError):
        FrameDecoder(max_bytes=100).feed(size.to_bytes(4, "little"))


@pytest.mark.parametrize("payload", [b"", b"x" * 101])
def test_what_would_be_refused_is_not_sent(payload: bytes) -> None:
    with pytest.raises(FrameError):
        pack_frame(payload, max_bytes=100)
