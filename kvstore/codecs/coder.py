"""How one chunk is encoded for a tier, encrypted there, and made again what it was. Pure but for nonces; any thread's.

Owns what is known of the KV of this node's engine. What lies encrypted in segments is opened to be encoded, is
encrypted again, and comes back encrypted: no plain byte of it is ever in a segment or a tier.
"""

import importlib
from dataclasses import dataclass
from types import ModuleType

from kvcore.config.tiers import Codec
from kvcore.errors import ConfigError
from kvcore.types import KVSpec
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, Expected, checksum, pack, parse
from kvstore.codecs import int8
from kvstore.codecs.cipher import decrypted, encrypted
from kvstore.codecs.frame import (
    ENCRYPTION_BYTES,
    FRONT_BYTES,
    CodecKind,
    Frame,
    is_whole,
    pack_frame,
    parse_frame,
)
from kvstore.codecs.layout import ITEM_BYTES, KVLayout, UnknownLayoutError, kv_layout
from kvstore.integrity.checks import Integrity
from kvstore.tiers.base import TierChunk, TierOutcome
from kvstore.types import GetOutcome
from transfer.memory.copying import copy

_USUAL_ELEMENT_BYTES = 2


class ChunkCoder:
    """Of the tier of that name. `integrity`: how chunks are sealed anew whose bytes a lossy codec changes, and the
    secrets to encrypt by. Raises ConfigError where what the codec needs is not installed."""

    def __init__(self, tier: str, codec: Codec, integrity: Integrity, *, encrypt: bool) -> None:
        self._tier, self._codec, self._integrity, self._encrypt = tier, codec, integrity, encrypt
        self._lossless = _lossless() if codec == "lossless" else None
        if codec == "lossless" and self._lossless is None:
            raise ConfigError(f"tiers.{tier}.codec: lossless needs blosc2: pip install 'kvferry[codec]'")
        self._element_bytes = _USUAL_ELEMENT_BYTES
        self._layouts: dict[bytes, KVLayout] = {}
        """By fingerprint, where a lossy codec needs it."""

    @property
    def changes(self) -> bool:
        """Whether any chunk is saved otherwise than it lies in a segment."""
        return self._codec != "none" or self._encrypt

    def use(self, spec: KVSpec) -> None:
        """This node's engine makes KV of `spec`. Raises ConfigError where the codec cannot take that."""
        self._element_bytes = ITEM_BYTES.get(spec.dtype, 1)
        if self._codec != "int8":
            return
        subject = f"tiers.{self._tier}.codec: int8 cannot be used here"
        if spec.tp_size > 1:
            raise ConfigError(f"{subject}: with tensor parallelism each rank has KV of its own; set lossless or none")
        try:
            self._layouts[spec.fingerprint] = kv_layout(spec)
        except UnknownLayoutError as error:
            raise ConfigError(f"{subject}: {error}; set lossless or none") from None

    def encoded(self, chunk: TierChunk) -> TierChunk | TierOutcome:
        """As it is to be saved: itself, where it cannot be encoded or does not get smaller. What was to be encrypted
        and is no whole chunk is not saved."""
        header = parse(chunk.header())
        whole = chunk.memory[0].cast("B") if len(chunk.memory) == 1 else memoryview(b"".join(chunk.memory))
        payload = whole[HEADER_BYTES:]
        if header is None or not payload.nbytes or header.payload_length != payload.nbytes:
            return TierOutcome.DAMAGED if self._encrypt else chunk
        if header.encrypted:
            opens = self._codec != "none" and self._integrity.encrypt
            return self._encoded_again(chunk, header, payload) if opens else chunk
        coded = _if_smaller(self._coded(header, payload), chunk, ENCRYPTION_BYTES if self._encrypt else 0)
        if self._encrypt:
            return self._encrypted(chunk, coded or _Coded(header, Frame(CodecKind.NONE, 1, 0), payload))
        if coded is None:
            return chunk
        front = pack(coded.header) + pack_frame(coded.frame)
        return TierChunk(chunk.name, [memoryview(front), memoryview(coded.body)])

    def _encoded_again(self, chunk: TierChunk, header: ChunkHeader, payload: memoryview) -> TierChunk | TierOutcome:
        """One that is encrypted already."""
        plain = memoryview(bytearray(payload.nbytes))
        if not self._integrity.open(header, payload, plain):
            return TierOutcome.DAMAGED
        unsealed = ChunkHeader(
            header.key,
            header.fingerprint,
            header.token_count,
            header.payload_length,
            checksum([plain]),
            header.generation,
            header.owner,
        )
        coded = _if_smaller(self._coded(unsealed, plain, proved=True), chunk, ENCRYPTION_BYTES)
        return chunk if coded is None else self._encrypted(chunk, coded)

    def _encrypted(self, chunk: TierChunk, coded: "_Coded") -> TierChunk:
        value = encrypted(self._integrity, coded.header, coded.frame, memoryview(coded.body))
        return TierChunk(chunk.name, [value])

    def _coded(self, header: ChunkHeader, payload: memoryview, *, proved: bool = False) -> "_Coded | None":
        if self._codec == "none":
            return None
        return self._in_int8(header, payload, proved) if self._codec == "int8" else self._without_loss(header, payload)

    def _without_loss(self, header: ChunkHeader, payload: memoryview) -> "_Coded | None":
        assert self._lossless is not None, "it was looked for when the tier was opened"
        if payload.nbytes > self._lossless.MOST_BYTES:
            return None
        body = self._lossless.encode(payload, self._element_bytes)
        return _Coded(header, Frame(CodecKind.LOSSLESS, self._element_bytes, len(body)), body)

    def _in_int8(self, header: ChunkHeader, payload: memoryview, proved: bool) -> "_Coded | None":
        """With the seal of what it decodes to: so the chunk's own, unless it was, is checked here, by the last who
        can."""
        layout = self._layouts.get(header.fingerprint)
        expected = Expected(header.key, header.fingerprint, header.generation, payload.nbytes)
        if layout is None or payload.nbytes % layout.block_bytes:
            return None
        if not proved and self._integrity.check(pack(header), expected, [payload]) is not GetOutcome.OK:
            return None
        if (coded := int8.encode(payload, layout, header.token_count)) is None:
            return None
        body, decoded = coded
        element_bytes = ITEM_BYTES[layout.dtype]
        sealed = self._integrity.seal(header, [memoryview(decoded)])
        return _Coded(sealed, Frame(CodecKind.INT8, element_bytes, len(body)), body)

    def decoded(self, pair: tuple[TierChunk, TierChunk]) -> TierOutcome:
        """From what was stored into the memory of the one that was asked for."""
        (stored,), chunk = pair[0].memory, pair[1]
        header, frame = parse(stored[:HEADER_BYTES]), parse_frame(stored[HEADER_BYTES:FRONT_BYTES])
        if not is_whole(bytes(stored[:FRONT_BYTES]), stored.nbytes) or header is None:
            return TierOutcome.DAMAGED
        if frame is None or header.payload_length + HEADER_BYTES != chunk.num_bytes:
            return TierOutcome.TOO_LARGE
        encrypts = self._integrity.encrypt
        if encrypts and not frame.encrypted:  # nobody who encrypts has written it
            return TierOutcome.DAMAGED
        in_place = len(chunk.memory) == 1 and not encrypts
        whole = chunk.memory[0].cast("B") if in_place else memoryview(bytearray(chunk.num_bytes))
        body, into = stored[FRONT_BYTES:], whole[HEADER_BYTES:]
        if frame.encrypted:
            opened = self._decrypt(header, frame, body, into)
            if isinstance(opened, TierOutcome):
                return opened
            header, body = opened
        known = frame.kind == CodecKind.NONE or self._decode(frame.kind, header, body, into)
        if known is not True:
            return TierOutcome.MISSING if known is None else TierOutcome.DAMAGED
        if encrypts and checksum([into]) != header.checksum:
            return TierOutcome.DAMAGED
        if encrypts:
            header = self._integrity.encrypted(header, [into], into)
        whole[:HEADER_BYTES] = pack(header) if frame.encrypted else stored[:HEADER_BYTES]
        at = 0
        for view in chunk.memory if not in_place else ():
            copy(view.cast("B"), whole[at : at + view.nbytes])
            at += view.nbytes
        return TierOutcome.OK

    def _decrypt(
        self, header: ChunkHeader, frame: Frame, body: memoryview, into: memoryview
    ) -> tuple[ChunkHeader, memoryview] | TierOutcome:
        """The header with its checksum, and the body as its codec made it; without one that is `into` itself."""
        if self._integrity.secrets is None:
            return TierOutcome.MISSING
        secret, num_bytes = self._integrity.secret_of(frame.key_id), body.nbytes - ENCRYPTION_BYTES
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


def _if_smaller(coded: _Coded | None, chunk: TierChunk, more_bytes: int) -> _Coded | None:
    """`more_bytes`: what is added to the body."""
    if coded is None or FRONT_BYTES + coded.frame.body_bytes + more_bytes >= chunk.num_bytes:
        return None
    return coded


def _lossless() -> ModuleType | None:
    """The codec, if what it needs is installed."""
    try:
        return importlib.import_module("kvstore.codecs.lossless")
    except ModuleNotFoundError:
        return None
