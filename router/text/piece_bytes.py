"""The bytes that each token of a vocabulary adds to a text. No I/O.

Owns how the pieces of vocabularies are read: byte-level ones, those with `▁` for a blank and `<0xE2>` for a byte, words
and parts of words.
"""

import json
import re
from collections.abc import Iterator

from tokenizers import Tokenizer as FastTokenizer

_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


class PieceBytes:
    """The bytes of each token of one tokenizer, as it reads behind another one. Those of all tokens of a text, joined,
    are the text."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer
        kinds = set(_kinds(json.loads(tokenizer.decoder.__getstate__()))) if tokenizer.decoder is not None else set()
        self._is_byte_level, self._has_byte_pieces = "ByteLevel" in kinds, "ByteFallback" in kinds
        self.added = {token_id: token.content for token_id, token in tokenizer.get_added_tokens_decoder().items()}
        """Tokens that the vocabulary was given by hand: their ids and texts."""
        self._before, self._text_before = self._find_neighbour()
        self._known: dict[int, bytes] = {}

    def __repr__(self) -> str:
        return f"<PieceBytes byte_level={self._is_byte_level} byte_pieces={self._has_byte_pieces}>"

    def of(self, token_id: int) -> bytes:
        """Empty for an id that the tokenizer does not have."""
        known = self._known.get(token_id)
        if known is None:
            piece = self._tokenizer.id_to_token(token_id)
            if piece is None:
                return b""  # and nothing is kept, as there is no end to such ids
            known = self._known[token_id] = self._bytes_of(token_id, piece)
        return known

    def _bytes_of(self, token_id: int, piece: str) -> bytes:
        if self._is_byte_level:
            own = [_BYTE_OF_CHAR.get(char) for char in piece]
            return piece.encode() if None in own or token_id in self.added else bytes(b for b in own if b is not None)
        if self._has_byte_pieces and (byte := _BYTE_PIECE.fullmatch(piece)):
            return bytes.fromhex(byte[1])
        # What the decoder makes of it can depend on its place: at the beginning of a text many leave a blank out.
        text = self._decode([*self._before, token_id])
        if not text.startswith(self._text_before):
            return self._decode([token_id]).encode()
        return text[len(self._text_before) :].encode()

    def _find_neighbour(self) -> tuple[list[int], str]:
        """A plain word's token, and its text; none where the vocabulary has no such one."""
        for token_id in range(self._tokenizer.get_vocab_size()):
            piece = self._tokenizer.id_to_token(token_id)
            if piece is not None and piece.isascii() and piece.isalnum() and token_id not in self.added:
                return [token_id], self._decode([token_id])
        return [], ""

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=False)
        return text


def _kinds(decoder: object) -> Iterator[str]:
    """The types of a decoder and of those that it is made of."""
    if isinstance(decoder, dict):
        if isinstance(kind := decoder.get("type"), str):
            yield kind
        for part in decoder.get("decoders") or ():
            yield from _kinds(part)


def _chars_of_bytes() -> Iterator[tuple[str, int]]:
    """GPT-2's table, which every byte-level vocabulary has: printable bytes are themselves, others come from U+0100."""
    plain = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    yield from ((chr(byte), byte) for byte in plain)
    yield from ((chr(0x100 + number), byte) for number, byte in enumerate(sorted(set(range(256)) - plain)))


_BYTE_OF_CHAR = dict(_chars_of_bytes())
