"""Tokens to text as they come, and the stop strings in it. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from router.requests.spec import TextOptions
from router.text.tokenizer import Tokenizer

CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first piece is decoded after, so that it keeps its leading space."""
MAX_HELD_TOKENS = 8
"""Longer than any character's bytes: what is no character by then will never be one."""
MAX_WINDOW_TOKENS = 64
"""Tokens without any text (special ones) may make the window grow; then it starts again."""
_REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of one completion, piece by piece. A piece never ends inside a character; the pieces together are the text
    of all tokens, as it reads after the prompt.

    A token has no text of its own: how it reads depends on those before it (a leading space, the first bytes of a
    character). So the last few tokens are kept as a window, and a token's piece is what the window's text gains by it.
    """

    def __init__(
        self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int], options: TextOptions = TextOptions()
    ) -> None:
        self._tokenizer = tokenizer
        self._skips_special = options.skip_special_tokens
        self._joins_added = not options.skip_special_tokens and not options.spaces_between_special_tokens
        self._last_was_added = False
        self._window, self._sent_text = self._context(prompt_token_ids)
        """The last tokens, and the text of them that has been given out."""
        self._num_sent = len(self._window)
        """Tokens of the window whose text has been given out completely; those after them are held back."""

    def __repr__(self) -> str:
        return f"<Detokenizer window={len(self._window)} held={len(self._window) - self._num_sent} tokens>"

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what is not yet a whole character is held back, for ever if none comes
        of it."""
        feed_one = self._feed_joined if self._joins_added else self._feed_one
        if len(token_ids) == 1:
            return feed_one(token_ids[0])
        return "".join([feed_one(token_id) for token_id in token_ids])

    def _context(self, prompt_token_ids: Sequence[int]) -> tuple[list[int], str]:
        """The prompt's last few tokens, from a character's beginning to a character's end, and their text; else
        none."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):  # a character has at most four bytes
            window = list(prompt_token_ids[-count:])
            if _REPLACEMENT not in (text := self._decode(window)):
                return window, text
        return [], ""

    def _decode(self, token_ids: Sequence[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=self._skips_special)

    def _feed_joined(self, token_id: int) -> str:
        """As `_feed_one`, but of two special tokens in a row the second one has no blank before it."""
        piece, text = self._feed_one(token_id), self._tokenizer.added_text(token_id)
        joins, self._last_was_added = self._last_was_added and text is not None, text is not None
        return text if joins and text is not None else piece

    def _feed_one(self, token_id: int) -> str:
        # Four cases, by how the window reads with the new token:
        #   1. It ends in U+FFFD, and few tokens are held: the token may have begun a character. Hold it back.
        #   2. It ends in U+FFFD, and many are held: these bytes are no character and never will be. Give them out as
        #      they read, but for the last ones that may begin a character after all; those are the new window.
        #   3. It has gained text: give it out. The window starts again at the tokens of this piece, which are the
        #      context of the next one, and so stays short.
        #   4. It has gained none (a special token): keep the token as context, until the window is too long.
        window = self._window
        window.append(token_id)
        text = self._tokenizer.decode(window, skip_special_tokens=self._skips_special)
        if text.endswith(_REPLACEMENT):
            if len(window) - self._num_sent < MAX_HELD_TOKENS:
                return ""
            done, text, begun = self._split(text)
            piece = self._gain(done, text)
            self._window, self._sent_text, self._num_sent = begun, "", 0
            return piece
        piece = self._gain(window, text)
        if piece or len(window) > MAX_WINDOW_TOKENS:
            self._window = window = window[self._num_sent :]
            text = self._tokenizer.decode(window, skip_special_tokens=self._skips_special) if window else ""
        self._sent_text, self._num_sent = text, len(window)
        return piece

    def _gain(self, token_ids: list[int], text: str) -> str:
        """What these tokens of the window, whose text this is, add to what has been given out."""
        if text.startswith(self._sent_text):
            return text[len(self._sent_text) :]
        # Invalid bytes changed how earlier ones read, and those are out: the new tokens are decoded by themselves.
        return self._decode(token_ids[self._num_sent :])

    def _split(self, text: str) -> tuple[list[int], str, list[int]]:
        """Of a window with invalid bytes, whose text this is: (the tokens that are complete, their text, the last
        tokens, which may begin a character)."""
        for count in (3, 2, 1):  # bytes of a character that lacks one
            done, begun = self._window[:-count], self._window[-count:]
            done_text = self._decode(done)
            if done_text + self._decode(begun) == text:
                return done, done_text, begun
        return self._window, text, []


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings in text that comes in pieces, the same wherever it is cut: the match that is complete first
    wins, of several the longest. Holds back only what may be the beginning of a stop string."""

    stops: Sequence[str]
    shows_stop: bool = False
    found: str | None = None
    """The stop string that was found."""
    _held: str = ""
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops)) if self.stops else 0

    def feed(self, piece: str, *, may_stop: bool = True) -> tuple[str, bool]:
        """(the text to give out now, whether a stop string was found). The stop string is given out only if
        `shows_stop`, and what follows it never. Without `may_stop` none is found that ends in this piece; it is text as
        any other."""
        # Four cases, by what has been held back and the new piece together:
        #   1. There are no stop strings: everything passes.
        #   2. One or more are complete. The one that ends first counts, as it would have been found first had the text
        #      come character by character; of several that end there the one that begins first, as it is the longest.
        #   3. A stop string may begin at the end of the text: its longest such end is held back, the rest passes. No
        #      end as long as the longest stop string need be tried: it would be complete.
        #   4. None may: everything passes.
        if not self.stops:
            return piece, False
        text, before = self._held + piece, len(self._held)
        ends = [(stop, text.find(stop, max(0, before - len(stop) + 1))) for stop in self.stops if may_stop]
        if matches := [(at + len(stop), at) for stop, at in ends if at >= 0]:
            self._held = ""
            ends_at, begins_at = min(matches)
            self.found = text[begins_at:ends_at]
            return text[: ends_at if self.shows_stop else begins_at], True
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)
