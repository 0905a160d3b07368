"""Tokens of texts that were asked before are found again, within a bound, and nobody else's."""

import sys
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer

from router.tenants.callers import Caller
from router.text.token_cache import TokenCache, TokenCacheLimits
from router.text.tokenizer import FolderTokenizer
from tests.support.small_tokenizers import byte_fallback, byte_level, metaspace, saved, word_piece


class Letters:
    """Encodes each letter as a token, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, texts: Sequence[str]) -> list[list[int]]:
        self.asked.append(list(texts))
        return [list(map(ord, text)) for text in texts]


def tokens(parts: Sequence[str]) -> list[int]:
    return list(map(ord, "".join(parts)))


def test_only_what_is_new_is_encoded_a_few_parts_at_once() -> None:
    encode = Letters()
    cache = TokenCache(encode, TokenCacheLimits(parts_at_once=2))
    assert cache.tokens_of(["a", "b", "c"], "") == tokens("abc")
    assert cache.tokens_of(["a", "d", "b", "c", "e"], "") == tokens("adbce")
    assert encode.asked == [["a", "b"], ["c"], ["d", "e"]]


def test_what_one_has_asked_is_new_to_another() -> None:
    encode = Letters()
    cache = TokenCache(encode)
    for whose in ("one", "other", "one"):
        assert cache.tokens_of(["a"], whose) == tokens("a")
    assert encode.asked == [["a"], ["a"]]


def size_of(whose: str) -> int:
    """Of one letter's entry."""
    cache = TokenCache(Letters())
    cache.tokens_of(["a"], whose)
    return cache.num_bytes


def test_all_that_an_entry_holds_counts_and_a_salt_is_never_long() -> None:
    assert size_of("") > sys.getsizeof("a") + sys.getsizeof(array("I", [1])) + sys.getsizeof(("", "a"))
    assert size_of("x" * 1_000_000) - size_of("") == 1_000_000
    names = [Caller("t").apart(salt) for salt in (None, "one", "x" * 1_000_000, "x" * 999_999, "\ud800")]
    assert len(set(names)) == len(names) and max(map(len, names)) < 100
    assert Caller("t").apart("one") == names[1] != Caller("u").apart("one")


def test_the_bytes_that_are_kept_are_bounded_and_what_was_used_last_stays() -> None:
    encode, size = Letters(), size_of("")
    cache = TokenCache(encode, TokenCacheLimits(max_bytes=2 * size))
    for part in ("a", "b", "a", "c"):
        cache.tokens_of([part], "")
    assert cache.num_bytes == 2 * size
    cache.tokens_of(["a", "c"], "")
    assert encode.asked == [["a"], ["b"], ["c"]]
    cache.tokens_of(["x" * 1000], "")
    assert cache.num_bytes == 0, "what is larger than all is not kept"


def test_a_part_that_comes_twice_is_kept_once() -> None:
    cache = TokenCache(Letters())
    assert cache.tokens_of(["a", "a"], "") == tokens("aa")
    assert cache.num_bytes == size_of("") and "1 parts" in repr(cache)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback, metaspace, word_piece])
def test_the_next_turn_of_a_chat_encodes_what_is_new(kind: Callable[[], Tokenizer], tmp_path: Path) -> None:
    plain, asked = kind(), list[str]()
    tokenizer = FolderTokenizer(saved(plain, tmp_path), TokenCacheLimits(part_chars=40))
    encode = tokenizer._encode_all
    tokenizer._cache = TokenCache(lambda texts: (asked.extend(texts), encode(texts))[1], TokenCacheLimits())
    chat, turn = "", "<s>那里的天气怎么样，the weather there, 那里的天气很好，谢谢。<|end|>"
    for number in range(20):
        chat += f"{turn}{number}"
        asked.clear()
        assert tokenizer.encode(chat) == plain.encode(chat).ids
        assert sum(map(len, asked)) <= 2 * len(turn) + 40, "what is new, and the last part, which has grown"
