"""A tier over another: chunks are encoded or encrypted on their way in, and back. No other tier knows of it.

Owns threads for encoding and decoding, and what is known of the KV of this node's engine. Chunks keep their names: one
that lies there as it is, and one that is encoded, is told by its length, so a tier may hold both.
"""

import asyncio
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import TypeVar

from kvcore.config.tiers import Codec
from kvcore.errors import ConfigError, TransferError
from kvcore.types import KVSpec
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, pack, parse
from kvstore.codecs import int8
from kvstore.codecs.cipher import decrypted, encrypted
from kvstore.codecs.frame import (
    ENCRYPTION_BYTES,
    FRONT_BYTES,
    MORE_BYTES,
    CodecKind,
    Frame,
    is_whole,
    pack_frame,
    parse_frame,
)
from kvstore.codecs.layout import ITEM_BYTES, KVLayout, UnknownLayoutError, kv_layout
from kvstore.integrity.checks import Integrity
from kvstore.tiers.base import ChunkName, Cleared, GenerationList, Tier, TierChunk, TierOutcome, TierStats
from kvstore.types import GetOutcome
from transfer.blocking import BatchDeadline, BlockingPool
from transfer.memory.copying import copy

_USUAL_ELEMENT_BYTES = 2
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
        """`integrity`: how chunks are sealed anew whose bytes a lossy codec changes, and the secrets to `encrypt` by.
        Raises ConfigError where what the codec needs is not installed."""
        self.name, self.shared = tier.name, tier.shared
        self.max_chunk_bytes = tier.max_chunk_bytes - (MORE_BYTES if encrypt else 0)
        self._tier, self._codec, self._integrity, self._encrypt = tier, codec, integrity, encrypt
        self._lossless = _lossless() if codec == "lossless" else None
        if codec == "lossless" and self._lossless is None:
            raise ConfigError(f"tiers.{tier.name}.codec: lossless needs blosc2: pip install 'kvferry[codec]'")
        self._pool = BlockingPool("codec", threads)
        self._element_bytes = _USUAL_ELEMENT_BYTES
        self._layouts: dict[bytes, KVLayout] = {}
        """By fingerprint, where a lossy codec needs it."""

    def __repr__(self) -> str:
        return f"<CodecTier {self._codec}{', encrypted,' if self._encrypt else ''} over {self._tier!r}>"

    def use(self, spec: KVSpec) -> None:
        """This node's engine makes KV of `spec`. Raises ConfigError where the codec cannot take that."""
        self._element_bytes = ITEM_BYTES.get(spec.dtype, 1)
        if self._codec != "int8":
            return
        subject = f"tiers.{self.name}.codec: int8 cannot be used here"
        if spec.tp_size > 1:
            raise ConfigError(f"{subject}: with tensor parallelism each rank has KV of its own; set lossless or none")
        try:
            self._layouts[spec.fingerprint] = kv_layout(spec)
        except UnknownLayoutError as error:
            raise ConfigError(f"{subject}: {error}; set lossless or none") from None

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
        if self._plain:
            return await self._tier.save(chunks, ttl_s=ttl_s, timeout_s=timeout_s)
        deadline, outcomes = BatchDeadline(timeout_s), [TierOutcome.UNAVAILABLE] * len(chunks)
        fitting = [at for at, chunk in enumerate(chunks) if chunk.num_bytes <= self.max_chunk_bytes]
        for at in set(range(len(chunks))) - set(fitting):
            outcomes[at] = TierOutcome.TOO_LARGE
        encoded = await self._in_threads(self._encoded, [chunks[at] for at in fitting], deadline)
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
        decoded = await self._in_threads(self._decoded, [(stored[at], chunks[at]) for at in places], deadline)
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

    @property
    def _plain(self) -> bool:
        """Whether chunks are saved as they are."""
        return self._codec == "none" and not self._encrypt

    def _encoded(self, chunk: TierChunk) -> TierChunk | TierOutcome:
        """As it is to be saved: itself, where it cannot be encoded or does not get smaller. What was to be encrypted
        and is no whole chunk is not saved."""
        header = parse(chunk.header())
        whole = chunk.memory[0].cast("B") if len(chunk.memory) == 1 else memoryview(b"".join(chunk.memory))
        payload = whole[HEADER_BYTES:]
        if header is None or not payload.nbytes or header.payload_length != payload.nbytes:
            return TierOutcome.DAMAGED if self._encrypt else chunk
        coded = self._coded(header, payload)
        more_bytes = ENCRYPTION_BYTES if self._encrypt else 0
        if coded is not None and FRONT_BYTES + coded.frame.body_bytes + more_bytes >= chunk.num_bytes:
            coded = None
        if self._encrypt:
            coded = coded or _Coded(header, Frame(CodecKind.NONE, 1, 0), payload)
            value = encrypted(self._integrity, coded.header, coded.frame, memoryview(coded.body))
            return TierChunk(chunk.name, [value])
        if coded is None:
            return chunk
        front = pack(coded.header) + pack_frame(coded.frame)
        return TierChunk(chunk.name, [memoryview(front), memoryview(coded.body)])

    def _coded(self, header: ChunkHeader, payload: memoryview) -> "_Coded | None":
        if self._codec == "none":
            return None
        return self._in_int8(header, payload) if self._codec == "int8" else self._without_loss(header, payload)

    def _without_loss(self, header: ChunkHeader, payload: memoryview) -> "_Coded | None":
        assert self._lossless is not None, "it was looked for when the tier was opened"
        if payload.nbytes > self._lossless.MOST_BYTES:
            return None
        body = self._lossless.encode(payload, self._element_bytes)
        return _Coded(header, Frame(CodecKind.LOSSLESS, self._element_bytes, len(body)), body)

    def _in_int8(self, header: ChunkHeader, payload: memoryview) -> "_Coded | None":
        """With the seal of what it decodes to: so the chunk's own is checked here, by the last who can."""
        layout = self._layouts.get(header.fingerprint)
        expected = Expected(header.key, header.fingerprint, header.generation, payload.nbytes)
        if layout is None or payload.nbytes % layout.block_bytes:
            return None
        if self._integrity.check(pack(header), expected, [payload]) is not GetOutcome.OK:
            return None
        if (coded := int8.encode(payload, layout, header.token_count)) is None:
            return None
        body, decoded = coded
        element_bytes = ITEM_BYTES[layout.dtype]
        sealed = self._integrity.seal(header, [memoryview(decoded)])
        return _Coded(sealed, Frame(CodecKind.INT8, element_bytes, len(body)), body)

    def _decoded(self, pair: tuple[TierChunk, TierChunk]) -> TierOutcome:
        """From what was stored into the memory of the one that was asked for."""
        (stored,), chunk = pair[0].memory, pair[1]
        header, frame = parse(stored[:HEADER_BYTES]), parse_frame(stored[HEADER_BYTES:FRONT_BYTES])
        if not is_whole(bytes(stored[:FRONT_BYTES]), stored.nbytes) or header is None:
            return TierOutcome.DAMAGED
        if frame is None or header.payload_length + HEADER_BYTES != chunk.num_bytes:
            return TierOutcome.TOO_LARGE
        one_view = len(chunk.memory) == 1
        whole = chunk.memory[0].cast("B") if one_view else memoryview(bytearray(chunk.num_bytes))
        body, into = stored[FRONT_BYTES:], whole[HEADER_BYTES:]
        if frame.encrypted:
            opened = self._decrypt(header, frame, body, into)
            if isinstance(opened, TierOutcome):
                return opened
            header, body = opened
        known = frame.kind == CodecKind.NONE or self._decode(frame.kind, header, body, into)
        if known is not True:
            return TierOutcome.MISSING if known is None else TierOutcome.DAMAGED
        whole[:HEADER_BYTES] = pack(header) if frame.encrypted else stored[:HEADER_BYTES]
        at = 0
        for view in chunk.memory if not one_view else ():
            copy(view.cast("B"), whole[at : at + view.nbytes])
            at += view.nbytes
        return TierOutcome.OK

    def _decrypt(
        self, header: ChunkHeader, frame: Frame, body: memoryview, into: memoryview
    ) -> tuple[ChunkHeader, memoryview] | TierOutcome:
        """The header with its checksum, and the body as its codec made it; without one that is `into` itself."""
        secrets = self._integrity.secrets
        if secrets is None:
            return TierOutcome.MISSING
        secret, num_bytes = secrets.find(frame.key_id), body.nbytes - ENCRYPTION_BYTES
        if secret is None or num_bytes < 0 or (frame.kind == CodecKind.NONE and num_bytes != into.nbytes):
            return TierOutcome.DAMAGED
        plain = into if frame.kind == CodecKind.NONE else memoryview(bytearray(num_bytes))
        opened = decrypted(secret, header, frame, body, plain)
        return TierOutcome.DAMAGED if opened is None else (opened, plain)

    def _decode(self, kind: int, header: ChunkHeader, body: memoryview, into: memoryview) -> bool | None:
        """Whether it could be decoded; None: not here."""
        if kind == CodecKind.LOSSLESS:
            lossless = self._lossless or _lossless()  # loaded by the first chunk of another's
            return None if lossless is None else bool(lossless.decode(body, into))
        layout = self._layouts.get(header.fingerprint)
        return None if kind != CodecKind.INT8 or layout is None else int8.decode(body, layout, into)


@dataclass(frozen=True, slots=True)
class _Coded:
    header: ChunkHeader
    frame: Frame
    body: bytes | memoryview


def _scratch(name: ChunkName, num_bytes: int) -> TierChunk:
    return TierChunk(name, [memoryview(bytearray(num_bytes))])


def _lossless() -> ModuleType | None:
    """The codec, if what it needs is installed."""
    try:
        return importlib.import_module("kvstore.codecs.lossless")
    except ModuleNotFoundError:
        return None
