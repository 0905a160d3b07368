"""Tokens in logprobs have their own bytes, of which the text can be joined, and the text that they complete."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer

from router.text.token_names import TokenNames
from router.text.tokenizer import ByteTokenizer, FolderTokenizer
from tests.support.small_tokenizers import byte_fallback, byte_level, metaspace, saved, whole_words, word_piece

TEXTS = ["the there the", "the  the", "é the", "the 😀😀 é\n", "  the", "日本 the", "the\tthe.", "the<|end|> the", "."]
KINDS = [byte_level, byte_fallback, metaspace, word_piece, whole_words]
Kind = Callable[[], FastTokenizer]


def names_of(tokenizer: FolderTokenizer | ByteTokenizer, token_ids: list[int]) -> list[tuple[str, bytes]]:
    names = TokenNames(tokenizer)
    return [(token.text, token.raw) for token, _ in (names.step(token_id, ()) for token_id in token_ids)]


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_bytes_join_to_what_the_tokens_read(tmp_path: Path, kind: Kind) -> None:
    tokenizer = FolderTokenizer(saved(kind(), tmp_path))
    word = tokenizer.encode("the")
    before = tokenizer.decode(word)
    for text in TEXTS:
        token_ids = tokenizer.encode(text)
        read = tokenizer.decode(word + token_ids, skip_special_tokens=False).removeprefix(before)
        names = names_of(tokenizer, token_ids)
        assert b"".join(raw for _, raw in names).decode() == read
        assert "".join(name for name, _ in names) == read


def test_a_part_of_a_character_has_its_own_bytes_and_the_last_part_its_text(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(saved(byte_level(), tmp_path))
    face = "😀".encode()
    assert names_of(tokenizer, tokenizer.encode(" 😀the")) == [
        ("", b" " + face[:3]),
        (" 😀", face[3:]),
        ("t", b"t"),
        ("he", b"he"),
    ]


def test_pieces_that_differ_by_a_blank_have_different_names(tmp_path: Path) -> None:
    own = byte_fallback()
    tokenizer = FolderTokenizer(saved(own, tmp_path))
    pieces = ["▁the", "the", "▁", "▁▁", "<0xE2>", "<0x20>", "<|end|>"]
    ids = [own.token_to_id(piece) for piece in pieces]
    token, others = TokenNames(tokenizer).step(ids[0], ids)
    assert (token.text, token.raw) == (" the", b" the")
    assert [other.text for other in others] == [" the", "the", " ", "  ", "", " ", "<|end|>"]
    assert [other.raw for other in others] == [b" the", b"the", b" ", b"  ", b"\xe2", b" ", b"<|end|>"]


def test_parts_of_words_have_no_blank_before_them(tmp_path: Path) -> None:
    own = word_piece()
    tokenizer = FolderTokenizer(saved(own, tmp_path))
    ids = [own.token_to_id(piece) for piece in ("the", "##the", ".")]
    assert [text for text, _ in names_of(tokenizer, ids)] == [" the", "the", "."]


def test_alternatives_are_named_in_the_place_of_the_token(tmp_path: Path) -> None:
    own = byte_fallback()
    names = TokenNames(FolderTokenizer(saved(own, tmp_path)))
    first, middle, last, e = (own.token_to_id(piece) for piece in ("<0xE2>", "<0x82>", "<0xAC>", "e"))
    assert names.step(first, [e])[0].text == ""
    names.step(middle, [])
    token, others = names.step(last, [last, e, middle])
    assert token.text == "€" and [other.text for other in others] == ["€", "e", "\u2082"]


def test_bytes_that_are_no_character_lose_no_text_of_others(tmp_path: Path) -> None:
    own = byte_fallback()
    tokenizer = FolderTokenizer(saved(own, tmp_path))
    pieces = ["<0xFF>", "<0xE2>", "the", "<0x82>", "▁the", "<0xE2>", "<0xC3>", "<0xA9>"]
    ids = [own.token_to_id(piece) for piece in pieces]
    assert [text for text, _ in names_of(tokenizer, ids)] == ["", "", "the", "", " the", "", "", "é"]


def test_added_tokens_of_any_script_are_their_own_text(tmp_path: Path) -> None:
    own = byte_level()
    tokenizer, text = FolderTokenizer(saved(own, tmp_path)), "<｜tool▁end｜>"
    assert names_of(tokenizer, [own.token_to_id(text)]) == [(text, text.encode())]


def test_an_id_that_the_tokenizer_lacks_tears_no_character_apart(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(saved(byte_level(), tmp_path))
    first, *rest = tokenizer.encode("é")
    assert [text for text, _ in names_of(tokenizer, [first, 100_000, *rest])] == ["", "", "é"]


def test_ids_that_the_tokenizer_lacks_have_no_bytes(tmp_path: Path) -> None:
    tokenizer = FolderTokenizer(saved(byte_level(), tmp_path))
    assert names_of(tokenizer, [100_000, 2**31]) == [("", b""), ("", b"")]


def test_the_simulated_engines_tokens_are_bytes() -> None:
    assert names_of(ByteTokenizer(512), [*"é".encode(), 300]) == [("", b"\xc3"), ("é", b"\xa9"), (" <300>", b" <300>")]
