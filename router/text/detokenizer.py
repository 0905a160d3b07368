"""Tokens to text as they come, and the stop strings in it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first piece is decoded after, so that it keeps its leading space."""


MAX_HELD_TOKENS = 8
"""Longer than any character's bytes: what is still no character then is none."""


MAX_WINDOW_TOKENS = 64


_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one completion, piece by piece. A piece never ends inside a character; the pieces together are the text
    of all tokens, as it reads after the prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._context(prompt_token_ids)
        self._sent = tokenizer.decode(self._window) if self._window else ""
        self._clean = len(self._window)
        """Tokens of the window whose text is out completely."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what is not yet a whole character is held back."""
        return "".join([self._one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What is still held, at the end: an incomplete character reads U+FFFD."""
        if len(self._window) == self._clean:
            return ""
        text = self._tokenizer.decode(self._window)
        piece = text[len(self._sent) :] if text.startswith(self._sent) else ""
        self._sent, self._clean = text, len(self._window)
        return piece

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last few tokens, from a character's beginning to a character's end; else none."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):  # a character has at most four bytes
            window = list(prompt_token_ids[-count:])
            if _REPLACEMENT not in self._tokenizer.decode(window):
                return window
        return []

    def _one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            if len(self._window) - self._clean < MAX_HELD_TOKENS:
                return ""
            done, text, held = self._split(text)
            piece = self._piece(done, text)
            self._window, self._sent, self._clean = held, "", 0
            return piece
        piece = self._piece(self._window, text)
        if piece or len(self._window) > MAX_WINDOW_TOKENS:
            # The window starts again at the piece just sent: it is the context of the next, and stays short.
            self._window = self._window[self._clean :]
            text = self._tokenizer.decode(self._window) if self._window else ""
        self._sent, self._clean = text, len(self._window)
        return piece

    def _piece(self, token_ids: list[int], text: str) -> str:
        """What these tokens of the window, whose text this is, add to what was sent."""
        if text.startswith(self._sent):
            return text[len(self._sent) :]
        # Invalid bytes changed how earlier ones read: the new tokens speak for themselves.
        return self._tokenizer.decode(token_ids[self._clean :])

    def _split(self, text: str) -> tuple[list[int], str, list[int]]:
        """Of a window with invalid bytes, whose text this is: what is done, its text, and the last tokens, which may
        begin a character."""
        for count in (3, 2, 1):  # bytes of a character that lacks one
            done, held = self._window[:-count], self._window[-count:]
            done_text = self._tokenizer.decode(done)
            if done_text + self._tokenizer.decode(held) == text:
                return done, done_text, held
        return self._window, text, []


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings in text that comes in pieces, the same wherever it is cut: the match that is complete first
    wins, of several the longest. Holds back only what may be the beginning of a stop string."""

    stops: Sequence[str]
    _held: str = ""
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops), default=0)

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that is out now, whether a stop string was found; it and what follows are never out)."""
        if not self.stops:
            return piece, False
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)
