"""A folder that other users can read is a cluster's tier: it finds all there after a restart, and they find no KV."""

from pathlib import Path

import pytest
from support.attacks import secret_override
from support.restarts import finds_all_after_a_restart

from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.codecs.frame import CodecKind, is_whole, parse_frame

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


async def test_a_cluster_that_was_stopped_finds_all_it_computed_and_nobody_else_can_read_it(tmp_path: Path) -> None:
    place = tmp_path / "objects"
    tier = f"tiers.object={{url: 'file://{place}', encrypt: true}}"
    await finds_all_after_a_restart(tmp_path, "object", [tier, secret_override(tmp_path)])
    values = [file.read_bytes() for file in place.rglob("*") if file.is_file() and file.stat().st_size > HEADER_BYTES]
    assert values
    for value in values:
        header, frame = parse(value), parse_frame(value[HEADER_BYTES:])
        assert header is not None and header.checksum == 0 and any(header.mac)
        assert is_whole(value, len(value)) and frame is not None and frame.encrypted and frame.kind == CodecKind.NONE
