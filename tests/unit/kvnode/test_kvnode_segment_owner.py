"""What a node says of its segment."""

from kvcore.chunk_keys import KEY_BYTES
from kvcore.config.schema import NodeConfig, TransportConfig
from kvcore.types import ChunkKey, Role
from kvnode.segment_owner import SegmentOwner
from kvstore.chunk_format import ALIGNMENT, ChunkHeader, pack


def header(generation: int) -> bytes:
    key = ChunkKey(generation.to_bytes(KEY_BYTES, "little"))
    return pack(ChunkHeader(key, b"f" * 16, token_count=1, payload_length=64, checksum=0, generation=generation))


async def test_all_that_lies_in_the_segment_is_listed_the_newest_first() -> None:
    node = NodeConfig(role=Role.STORE, port=0, segment=1 << 20)  # type: ignore[arg-type]
    async with SegmentOwner("s0", 1, node, TransportConfig(kind="shm")) as owner:
        for place, generation in enumerate((4, 1, 5, 2, 3)):
            raw = header(generation)
            owner.view[place * ALIGNMENT : place * ALIGNMENT + len(raw)] = raw
        (manifest,) = await owner.manifests()
    assert [entry.generation for entry in manifest.entries] == [5, 4, 3, 2, 1]
