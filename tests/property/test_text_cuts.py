"""A text in parts has the tokens of the whole: for each kind of tokenizer that may be cut, wherever it is cut, and for
every other kind as it is."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer

from router.text.cuts import PATTERNS, Cuts, read_tokenizer_file
from router.text.token_cache import TokenCacheLimits
from router.text.tokenizer import FolderTokenizer
from tests.support.small_tokenizers import byte_fallback, metaspace, saved, whole_words, word_piece

EVERYWHERE = TokenCacheLimits(part_chars=1, parts_at_once=3)
BLANK, NEWLINE = "Ġ", "Ċ"
MERGES = [
    *((BLANK, "a"), ("e", "t"), (BLANK + "a", "b"), (BLANK, BLANK), (NEWLINE, NEWLINE), ("1", "2"), ("'", "s")),
    *(("e", BLANK), ("e" + BLANK, "a"), ("b", NEWLINE), ("a", "b"), ("b" + NEWLINE, "e"), (BLANK, "<")),
]
"""Also across blanks: what is not cut into words would have other tokens where it is cut."""
LETTERS = "abetsABZ \n\t\r'12.,-_<>|é\u0301\u00a0\u3000中ひ가😀ſK"
WORDS = [" a", "e a", "b\ne", ".\n中", "1\nb", "'s", "<s>", "<s>b", " <s>", "<s> ", "a<s>", "<|end|>", "  ", "\n\n"]
WORDS += [" \n", "\r\n", "et", "12", "e\u0301", "<tool"]
texts = st.lists(st.one_of(st.sampled_from(WORDS), st.sampled_from(LETTERS)), max_size=40).map("".join)


def bpe(words: pre_tokenizers.PreTokenizer | None, *, dropout: float | None = None) -> FastTokenizer:
    """A byte-level model that finds words so."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(left + right for left, right in MERGES)]
    made = FastTokenizer(models.BPE({piece: at for at, piece in enumerate(pieces)}, MERGES, dropout=dropout))
    if words is not None:
        made.pre_tokenizer = words
    made.add_tokens([AddedToken("<s>", special=True), AddedToken("<|end|>", special=True), AddedToken("<tool")])
    return made


def gpt2() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(pattern: str, *before: pre_tokenizers.PreTokenizer) -> pre_tokenizers.PreTokenizer:
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*before, pre_tokenizers.Split(Regex(pattern), "isolated"), bytes_only])


def composed(made: FastTokenizer) -> FastTokenizer:
    made.normalizer = normalizers.NFC()
    return made


def with_ends(made: FastTokenizer, single: str) -> FastTokenizer:
    ids = [(name, made.token_to_id(name)) for name in ("<s>", "<|end|>")]
    template = processors.TemplateProcessing(single=single, pair="$A $B", special_tokens=ids)
    made.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return made


def added(token: AddedToken) -> FastTokenizer:
    made = bpe(gpt2())
    made.add_tokens([token])
    return made


def cut_short(made: FastTokenizer) -> FastTokenizer:
    made.enable_truncation(5)
    return made


CUT: dict[str, Callable[[], FastTokenizer]] = {
    "gpt2": lambda: bpe(gpt2()),
    "digits": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2()])),
    "ends": lambda: with_ends(bpe(gpt2()), "<s> $A <|end|>"),
    "begin twice": lambda: with_ends(bpe(gpt2()), "<s> <s> $A"),
    **{f"split {at}": lambda pattern=each: composed(bpe(split(pattern))) for at, each in enumerate(sorted(PATTERNS))},  # type: ignore[misc]
}
WHOLE: dict[str, Callable[[], FastTokenizer]] = {
    "no words": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)),
    "nothing": lambda: bpe(None),
    "a blank before": lambda: bpe(pre_tokenizers.ByteLevel(add_prefix_space=True)),
    "another pattern": lambda: bpe(split(r"\w+ \w+|.")),
    "a known one, merged": lambda: bpe(pre_tokenizers.Split(Regex(sorted(PATTERNS)[0]), "merged_with_next")),
    "another step": lambda: bpe(pre_tokenizers.Sequence([pre_tokenizers.Punctuation(), gpt2()])),
    "a token with a blank": lambda: added(AddedToken("e a")),
    "a token that takes blanks": lambda: added(AddedToken("b", lstrip=True)),
    "a token that is a word": lambda: added(AddedToken("b", single_word=True)),
    "byte fallback": byte_fallback,
    "metaspace": metaspace,
    "word piece": word_piece,
    "words": whole_words,
}


@pytest.mark.parametrize("kind", CUT)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="e a b\ne a's et<s> b <|end|>e a")
def test_the_tokens_of_parts_are_those_of_the_whole(kind: str, text: str, tmp_path: Path) -> None:
    plain = CUT[kind]()
    tokenizer = FolderTokenizer(saved(plain, tmp_path), EVERYWHERE)
    assert read_tokenizer_file((tmp_path / "tokenizer.json").read_bytes()).may_be_cut
    for special in (True, False):
        expected = plain.encode(text, add_special_tokens=special).ids
        for _ in range(2):  # made, and found
            assert tokenizer.encode(text, add_special_tokens=special) == expected


@pytest.mark.parametrize("kind", WHOLE)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="e a b\ne a's et<s> b <|end|>e a")
def test_every_other_kind_is_cut_before_marks_alone(kind: str, text: str, tmp_path: Path) -> None:
    plain = WHOLE[kind]()
    tokenizer = FolderTokenizer(saved(plain, tmp_path), EVERYWHERE)
    assert not read_tokenizer_file((tmp_path / "tokenizer.json").read_bytes()).may_be_cut
    for special in (True, False, True):
        assert tokenizer.encode(text, add_special_tokens=special) == plain.encode(text, add_special_tokens=special).ids


@pytest.mark.parametrize(
    "changed",
    [
        lambda: cut_short(bpe(gpt2())),
        lambda: with_ends(bpe(gpt2()), "$A <s> $A"),
        lambda: bpe(gpt2(), dropout=0.5),
    ],
)
def test_what_changes_a_text_as_a_whole_is_not_put_together(
    changed: Callable[[], FastTokenizer], tmp_path: Path
) -> None:
    file = read_tokenizer_file((saved(changed(), tmp_path) / "tokenizer.json").read_bytes())
    assert not file.may_be_cut or file.around is None


def with_more(*tokens: AddedToken) -> FastTokenizer:
    made = metaspace()
    made.add_tokens(list(tokens))
    return made


UNMARKED: dict[str, Callable[[], FastTokenizer]] = {
    "one that ends as it begins": lambda: with_more(AddedToken("a<", special=True)),
    "one with it inside": lambda: with_more(AddedToken("a<s>e", special=True)),
    "a longer one that takes blanks": lambda: with_more(AddedToken("<s>b", lstrip=True, special=True)),
    "a longer one that is a word": lambda: with_more(AddedToken("<s>b", single_word=True, special=True)),
}


@pytest.mark.parametrize("kind", UNMARKED)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=texts)
@example(text="e a<s>e b <s>b a<s>b")
def test_a_token_that_others_touch_is_no_mark(kind: str, text: str, tmp_path: Path) -> None:
    plain = UNMARKED[kind]()
    tokenizer = FolderTokenizer(saved(plain, tmp_path), EVERYWHERE)
    assert "<s>" not in read_tokenizer_file((tmp_path / "tokenizer.json").read_bytes()).marks
    assert tokenizer.encode(text) == plain.encode(text).ids


@pytest.mark.parametrize("kind", ["gpt2", "metaspace"])
@settings(max_examples=30)
@given(text=texts, more=texts, least=st.integers(0, 5))
def test_what_texts_begin_with_has_the_same_parts(kind: str, text: str, more: str, least: int) -> None:
    cuts = Cuts(read_tokenizer_file({**CUT, **WHOLE}[kind]().to_str().encode()))
    parts = cuts.parts_of(text, least)
    assert "".join(parts) == text and all(len(part) >= least for part in parts[:-1])
    again = cuts.parts_of(text + more, least)
    assert again[: len(parts) - 1] == parts[:-1]


def test_the_turns_of_a_chat_are_parts_whatever_the_tokenizer(tmp_path: Path) -> None:
    for kind in (byte_fallback, metaspace, word_piece):
        cuts = Cuts(read_tokenizer_file(kind().to_str().encode()))
        assert cuts.parts_of("<s>中中<|end|>中<s>e a", 1) == ["<s>中中", "<|end|>中", "<s>e a"]


def test_thousands_of_marks_are_looked_for_at_once() -> None:
    made = metaspace()
    made.add_tokens([AddedToken(f"<unused{number}>", special=True) for number in range(3000)])
    file = read_tokenizer_file(made.to_str().encode())
    assert len(file.marks) == 3002
    parts = Cuts(file).parts_of("<unused" * 20_000 + "<unused2999>a<unused77>", 1)
    assert parts[1:] == ["<unused2999>a", "<unused77>"]
