"""One chunk of which the wire formats' vectors are, and the secrets under which they are."""

from kvcore.types import ChunkKey, OwnerTag
from kvstore.chunk_format import ChunkHeader, Expected

SECRET, NEW_SECRET, OTHER_SECRET = (bytes(range(start, start + 32)) for start in (0, 32, 64))
NONCE = bytes(range(0x50, 0x5C))
PAYLOAD = bytes(range(256))
VIEWS = [memoryview(PAYLOAD)[:100], memoryview(PAYLOAD)[100:]]
HEADER = ChunkHeader(
    key=ChunkKey(bytes(range(16))),
    fingerprint=bytes(range(16, 32)),
    token_count=4,
    payload_length=256,
    checksum=0,
    generation=0x0123456789ABCDEF,
    owner=OwnerTag(bytes(range(0xA0, 0xA8))),
)
EXPECTED = Expected(HEADER.key, HEADER.fingerprint, HEADER.generation, 256, HEADER.owner)
