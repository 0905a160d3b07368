"""What the chunks of a node's engine are called and how large they are, in its segment and in tiers. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from kvcore.chunk_keys import rank_key
from kvcore.types import ChunkKey, KVSpec
from kvstore.chunk_format import HEADER_BYTES
from kvstore.tiers.base import ChunkName


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """Of the KV of this node's engine. A tensor parallel one has a part of each chunk a rank, stored as a chunk of its
    own, under a key and a fingerprint of its own."""

    fingerprint: bytes
    """Of the only rank, or the first: its chain of keys is the prompt's."""
    chunk_bytes: int
    """Payload of one rank's part of a full chunk."""
    chunk_tokens: int
    other_ranks: tuple[bytes, ...] = ()
    """The fingerprints of the others, in their order."""

    @classmethod
    def of(cls, spec: KVSpec) -> "ChunkShape":
        """`spec`: of any of its ranks."""
        ranks = [msgspec.structs.replace(spec, tp_rank=rank).fingerprint for rank in range(spec.tp_size)]
        return cls(ranks[0], spec.chunk_bytes, spec.chunk_tokens, tuple(ranks[1:]))

    @property
    def num_ranks(self) -> int:
        """Parts of one chunk."""
        return 1 + len(self.other_ranks)

    @property
    def fingerprints(self) -> tuple[bytes, ...]:
        """Of all ranks."""
        return (self.fingerprint, *self.other_ranks)

    @property
    def num_bytes(self) -> int:
        """Of one part, header included."""
        return HEADER_BYTES + self.chunk_bytes

    def names(self, keys: Sequence[ChunkKey]) -> list[ChunkName]:
        """All parts of a prompt's chunks, in order: a chunk is there when the last of its parts is."""
        ranks = list(enumerate(self.fingerprints))
        return [ChunkName(fingerprint, rank_key(key, rank)) for key in keys for rank, fingerprint in ranks]
