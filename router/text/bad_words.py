"""Words that an answer must not have, as sequences of tokens.

As vLLM makes them (`SamplingParams.update_from_tokenizer`): each word at the beginning of a text and after a blank.
"""

from collections.abc import Sequence

from kvcore.errors import InvalidRequestError
from router.text.tokenizer import Tokenizer


def bad_word_tokens(words: Sequence[str], tokenizer: Tokenizer, most: int) -> list[list[int]]:
    """At most `most` sequences. Blocking. Raises InvalidRequestError for a word that has no tokens."""
    found: list[list[int]] = []
    for word in dict.fromkeys(words):
        bare = tokenizer.encode(word.lstrip(), add_special_tokens=False)
        if not word or not bare:
            raise InvalidRequestError("bad_words has a word without tokens", param="bad_words")
        found.append(bare)
        blank = tokenizer.encode(f" {word.lstrip()}", add_special_tokens=False)
        if blank and blank[0] != bare[0] and len(blank) == len(bare):
            found.append(blank)
        if len(found) > most:
            raise InvalidRequestError(f"bad_words has more than {most} words, as tokens", param="bad_words")
    return found
