"""A tier over another: chunks are encoded or encrypted on their way in, and back. No other tier knows of it.

Owns threads for encoding and decoding. Chunks keep their names: one that lies there as it is, and one that is encoded,
is told by its length, so a tier may hold both.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TypeVar

from kvcore.config.tiers import Codec
from kvcore.errors import TransferError
from kvcore.types import KVSpec
from kvstore.codecs.coder import ChunkCoder
from kvstore.codecs.frame import MORE_BYTES
from kvstore.integrity.checks import Integrity
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, Tier, TierChunk, TierOutcome, TierStats
from transfer.blocking import BatchDeadline, BlockingPool

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class CodecTier:
    """See `Tier`; whose closing it takes over. With the codec `none` it saves chunks as they are, and reads all."""

    def __init__(
        self,
        tier: Tier,
        codec: Codec = "none",
        integrity: Integrity = Integrity(),
        *,
        encrypt: bool = False,
        threads: int = 2,
    ) -> None:
        """`integrity`, and what raises ConfigError: as of `ChunkCoder`. `encrypt`: what is not encrypted before."""
        encrypt = encrypt and not integrity.encrypt
        self.name, self.shared = tier.name, tier.shared
        self.max_chunk_bytes = tier.max_chunk_bytes - (MORE_BYTES if encrypt else 0)
        self._tier, self._codec, self._encrypt = tier, codec, encrypt
        self._coder = ChunkCoder(tier.name, codec, integrity, encrypt=encrypt)
        self._pool = BlockingPool("codec", threads)

    def __repr__(self) -> str:
        return f"<CodecTier {self._codec}{', encrypted,' if self._encrypt else ''} over {self._tier!r}>"

    def use(self, spec: KVSpec) -> None:
        """This node's engine makes KV of `spec`. Raises ConfigError where the codec cannot take that."""
        self._coder.use(spec)

    # --- chunks ---

    async def find(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[bool]:
        """See `Tier`."""
        return await self._tier.find(names, timeout_s=timeout_s)

    async def sizes(self, names: Sequence[ChunkName], *, timeout_s: float) -> list[int | TierOutcome]:
        """See `Tier`: as they lie there."""
        return await self._tier.sizes(names, timeout_s=timeout_s)

    async def save(
        self, chunks: Sequence[TierChunk], *, ttl_s: float | None = None, timeout_s: float
    ) -> list[TierOutcome]:
        """See `Tier`. What does not get smaller is saved as it is, or encrypted."""
        if not self._coder.changes:
            return await self._tier.save(chunks, ttl_s=ttl_s, timeout_s=timeout_s)
        deadline, outcomes = BatchDeadline(timeout_s), [TierOutcome.UNAVAILABLE] * len(chunks)
        fitting = [at for at, chunk in enumerate(chunks) if chunk.num_bytes <= self.max_chunk_bytes]
        for at in set(range(len(chunks))) - set(fitting):
            outcomes[at] = TierOutcome.TOO_LARGE
        encoded = await self._in_threads(self._coder.encoded, [chunks[at] for at in fitting], deadline)
        ready = dict[int, TierChunk]()
        for at, one in zip(fitting, encoded, strict=True):
            if isinstance(one, TierOutcome):
                outcomes[at] = one
            elif one is not None:
                ready[at] = one
        try:
            saved = await self._tier.save(list(ready.values()), ttl_s=ttl_s, timeout_s=deadline.remaining())
        except TransferError:
            return outcomes
        for at, outcome in zip(ready, saved, strict=True):
            outcomes[at] = outcome
        return outcomes

    async def load(self, chunks: Sequence[TierChunk], *, timeout_s: float) -> list[TierOutcome]:
        """See `Tier`."""
        deadline = BatchDeadline(timeout_s)
        if self._codec != "none":
            return await self._load_any(chunks, deadline)
        stored = [_scratch(chunk.name, chunk.num_bytes + MORE_BYTES) for chunk in chunks] if self._encrypt else chunks
        outcomes = await self._tier.load(stored, timeout_s=timeout_s)
        if self._encrypt:
            came = [at for at, outcome in enumerate(outcomes) if outcome is TierOutcome.OK]
            await self._decode_into(outcomes, came, {at: stored[at] for at in came}, chunks, deadline)
        others = [at for at, outcome in enumerate(outcomes) if outcome is TierOutcome.TOO_LARGE]
        for at, outcome in zip(others, await self._load_any([chunks[at] for at in others], deadline), strict=True):
            outcomes[at] = outcome
        return outcomes

    async def _load_any(self, chunks: Sequence[TierChunk], deadline: BatchDeadline) -> list[TierOutcome]:
        """Chunks that may lie there encoded: each is read as long as it is there, never more than was asked for."""
        outcomes = [TierOutcome.UNAVAILABLE] * len(chunks)
        if not chunks:
            return outcomes
        stored = dict[int, TierChunk]()
        try:
            sizes = await self._tier.sizes([chunk.name for chunk in chunks], timeout_s=deadline.remaining())
            for at, (chunk, size) in enumerate(zip(chunks, sizes, strict=True)):
                if isinstance(size, TierOutcome) or size > chunk.num_bytes + MORE_BYTES:
                    outcomes[at] = size if isinstance(size, TierOutcome) else TierOutcome.TOO_LARGE
                elif size == chunk.num_bytes:
                    stored[at] = chunk
                else:
                    stored[at] = _scratch(chunk.name, size)
            came = await self._tier.load(list(stored.values()), timeout_s=deadline.remaining())
        except TransferError:
            return outcomes
        encoded = list[int]()
        for at, outcome in zip(stored, came, strict=True):
            outcomes[at] = outcome
            if stored[at] is chunks[at]:
                continue
            if outcome is TierOutcome.OK:
                encoded.append(at)
            elif outcome is TierOutcome.TOO_LARGE:  # another one was put there meanwhile
                outcomes[at] = TierOutcome.MISSING
        await self._decode_into(outcomes, encoded, stored, chunks, deadline)
        return outcomes

    async def _decode_into(
        self,
        outcomes: list[TierOutcome],
        places: Sequence[int],
        stored: Mapping[int, TierChunk],
        chunks: Sequence[TierChunk],
        deadline: BatchDeadline,
    ) -> None:
        decoded = await self._in_threads(self._coder.decoded, [(stored[at], chunks[at]) for at in places], deadline)
        for at, done in zip(places, decoded, strict=True):
            outcomes[at] = done or TierOutcome.UNAVAILABLE

    # --- what has no bytes in it ---

    async def remove(self, names: Sequence[ChunkName], *, timeout_s: float) -> None:
        """See `Tier`."""
        await self._tier.remove(names, timeout_s=timeout_s)

    async def expire(self, names: Sequence[ChunkName], ttl_s: float | None, *, timeout_s: float) -> int:
        """See `Tier`."""
        return await self._tier.expire(names, ttl_s, timeout_s=timeout_s)

    async def generations(self, *, timeout_s: float) -> GenerationList | None:
        """See `Tier`."""
        return await self._tier.generations(timeout_s=timeout_s)

    async def mark(self, fingerprint: bytes, owner: str, note: str, *, ttl_s: float, timeout_s: float) -> None:
        """See `Tier`."""
        await self._tier.mark(fingerprint, owner, note, ttl_s=ttl_s, timeout_s=timeout_s)

    async def clear(
        self, fingerprints: Sequence[bytes], *, own: Collection[str] | None = None, timeout_s: float
    ) -> Cleared:
        """See `Tier`."""
        return await self._tier.clear(fingerprints, own=own, timeout_s=timeout_s)

    def stats(self) -> TierStats:
        """See `Tier`."""
        return self._tier.stats()

    async def aclose(self) -> None:
        """See `Tier`."""
        await self._pool.aclose()
        await self._tier.aclose()

    # --- in threads ---

    async def _in_threads(
        self, job: Callable[[_Item], _Result], items: Sequence[_Item], deadline: BatchDeadline
    ) -> list[_Result | None]:
        """None for what was not done in time. When this returns or raises no job runs any longer."""

        async def one(item: _Item) -> _Result | None:
            try:
                return await self._pool.run(partial(job, item), lambda: None, deadline)
            except TransferError:
                return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(item)) for item in items]
        return [task.result() for task in tasks]


def _scratch(name: ChunkName, num_bytes: int) -> TierChunk:
    return TierChunk(name, [memoryview(bytearray(num_bytes))])
