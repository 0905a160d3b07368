"""How a chunk lies in a Redis: the names of its parts, what stands in front of the first, and the memory of each.

A chunk's parts are the values `kvf1:{FINGERPRINT-KEY}:N`, of `RedisLimits.part_bytes` each; part 0 begins with a header
that says how long the chunk is.
"""

import struct
from collections.abc import Sequence

from kvstore.tiers.base import ChunkName, TierChunk
from kvstore.tiers.limits import RedisLimits
from kvstore.tiers.resp import RespConnection, command

HEAD = struct.Struct("<8sQ")
MAGIC = b"KVFPART0"


def part_key(name: ChunkName, part: int) -> bytes:
    """The key of one part. What stands in braces decides its slot: all parts of a chunk are in one place."""
    return b"kvf1:{%b-%b}:%d" % (name.fingerprint.hex().encode(), name.key.hex().encode(), part)


def num_parts(num_bytes: int, limits: RedisLimits) -> int:
    """Of a chunk of so many bytes, header included."""
    return max(1, -(-num_bytes // limits.part_bytes))


def views_of(chunk: TierChunk, part: int, limits: RedisLimits) -> list[memoryview]:
    """The memory of one part."""
    start, views = part * limits.part_bytes, list[memoryview]()
    end = start + limits.part_bytes
    for view in chunk.memory:
        if max(0, start) < view.nbytes and end > 0:
            views.append(view.cast("B")[max(0, start) : end])
        start -= view.nbytes
        end -= view.nbytes
    return views


def stored_bytes(head: object) -> int | None:
    """How long the chunk is whose part 0 begins so; None: it is none."""
    if not isinstance(head, bytes) or len(head) != HEAD.size:
        return None
    magic, num_bytes = HEAD.unpack(head)
    return int(num_bytes) if magic == MAGIC else None


def parts_there(connection: RespConnection, names: Sequence[ChunkName], limits: RedisLimits) -> list[list[bytes]]:
    """The keys of each chunk's parts, as its part 0 says: none where that is not there, one where it says nothing."""
    reads = [command(b"GETRANGE", part_key(name, 0), b"0", b"%d" % (HEAD.size - 1)) for name in names]
    connection.send(reads, replies=len(names))
    found = []
    for name, head in [(name, connection.reply()) for name in names]:
        num_bytes = stored_bytes(head)
        parts = 0 if head == b"" else num_parts(min(num_bytes or 0, limits.max_chunk_bytes), limits)
        found.append([part_key(name, part) for part in range(parts)])
    return found
