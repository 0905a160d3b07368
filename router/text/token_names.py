"""How logprobs name tokens: each by the text that it completes and by its own bytes. Pure."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass

from router.text.tokenizer import Tokenizer

MAX_PENDING_BYTES = 64
"""Of tokens that end within a character, one after the other. No vocabulary has so many in a row."""


@dataclass(frozen=True, slots=True)
class NamedToken:
    """A token as logprobs name it. `raw`: its own bytes, which may be a part of a character.

    `text`: what it completes, as vLLM has it. Empty where it ends within a character: the whole of that is in the text
    of the token which ends it. Joined, the texts are what the tokens read, but for bytes that are no characters.
    """

    text: str
    raw: bytes


class TokenNames:
    """Names the tokens of one completion, in their order."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pending = b""

    def __repr__(self) -> str:
        return f"<TokenNames pending={self._pending!r}>"

    def step(self, token_id: int, others: Sequence[int]) -> tuple[NamedToken, list[NamedToken]]:
        """The next token, and `others` that might have come in its place."""
        alternatives = [self._read(other)[0] for other in others]
        token, self._pending = self._read(token_id)
        return token, alternatives

    def _read(self, token_id: int) -> tuple[NamedToken, bytes]:
        """(the token in this place, the bytes without a text that the next one follows)."""
        # Four cases, by the token's own bytes and those before them that have had no text yet:
        #   1. Its own are whole characters: they are its text. What was before them will never be a character.
        #   2. Both together are: so they are its text.
        #   3. Both together end within a character: it has no text, and they are the next token's to follow.
        #   4. They cannot be characters: as 3, of its own bytes alone, or if even those are none it reads U+FFFD, which
        #      is left out at its end.
        raw = self._tokenizer.token_bytes(token_id)
        if not raw:
            return NamedToken("", raw), self._pending
        for tried in (raw, self._pending + raw):
            if (text := _whole(tried)) is not None:
                return NamedToken(text, raw), b""
        for tried in (self._pending + raw, raw):
            if _ends_within_a_character(tried):
                return NamedToken("", raw), tried[-MAX_PENDING_BYTES:]
        text = raw.decode("utf-8", "replace")
        return NamedToken("" if text.endswith("\ufffd") else text, raw), b""


def _whole(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _ends_within_a_character(raw: bytes) -> bool:
    try:
        return codecs.utf_8_decode(raw, "strict", False)[1] < len(raw)
    except UnicodeDecodeError:
        return False
