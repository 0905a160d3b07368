"""Text round trips in pieces, and stop strings wherever the pieces are cut."""

from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers

from router.text.detokenizer import Detokenizer, StopChecker
from router.text.token_names import TokenNames
from router.text.tokenizer import ByteTokenizer, FolderTokenizer, Tokenizer


def byte_level(tmp: str) -> FastTokenizer:
    """A BPE without merges, as GPT-2's: one token a byte, written in its printable alphabet."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = FastTokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback(tmp: str) -> FastTokenizer:
    """As Llama's: a few pieces with a leading space mark, all else as <0xNN>."""
    vocab = {f"<0x{i:02X}>": i for i in range(256)} | {"<unk>": 256, "▁": 257, "a": 258, "▁a": 259, "b": 260, "▁b": 261}
    tokenizer = FastTokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a"), ("▁", "b")], unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=["bytes", "byte_level", "byte_fallback"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer(512)
    folder = tmp_path_factory.mktemp("model")
    globals()[request.param]("").save(str(folder / "tokenizer.json"))
    return FolderTokenizer(folder)


texts = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="▁\ufffd"), max_size=30)


@settings(max_examples=150, deadline=None)
@given(prompt=texts, text=texts, cuts=st.lists(st.integers(1, 4), max_size=40))
def test_pieces_together_are_the_text_and_none_ends_inside_a_character(
    tokenizer: Tokenizer, prompt: str, text: str, cuts: list[int]
) -> None:
    prompt_ids = tokenizer.encode(prompt)
    ids = tokenizer.encode(prompt + text)[len(prompt_ids) :]
    if tokenizer.encode(prompt + text)[: len(prompt_ids)] != prompt_ids:
        return  # the border merged: there is no continuation with these tokens
    detokenizer = Detokenizer(tokenizer, prompt_ids)
    pieces: list[str] = []
    while ids:
        step = cuts.pop() if cuts else 1
        pieces.append(detokenizer.feed(ids[:step]))
        ids = ids[step:]
    assert not any("\ufffd" in piece for piece in pieces)
    # Llama's decoder eats one space at the very beginning, which the prompt, where there is one, protects.
    assert "".join(pieces) in ({text} if prompt else {text, text.removeprefix(" ")})


@settings(max_examples=100, deadline=None)
@given(prompt=texts, text=texts)
def test_names_of_tokens_together_are_the_text_and_so_are_their_bytes(
    tokenizer: Tokenizer, prompt: str, text: str
) -> None:
    ids = tokenizer.encode(f"b{prompt}b")  # no blank at the beginning that a decoder leaves out
    before, names = len(ids), TokenNames(tokenizer)
    if tokenizer.encode(f"b{prompt}b{text}")[:before] != ids:
        return
    named = [names.step(token_id, ())[0] for token_id in tokenizer.encode(f"b{prompt}b{text}")[before:]]
    assert "".join(token.text for token in named) == text
    assert b"".join(token.raw for token in named) == text.encode()


broken = st.sampled_from([0x41, 0x80, 0x82, 0x9F, 0xAC, 0xC2, 0xE2, 0xF0, 0xFF])
"""Bytes of which some make characters of two to four bytes, and most nothing."""


@settings(max_examples=150, deadline=None)
@given(ids=st.lists(broken | st.integers(0, 255), max_size=40))
@example(ids=[0x80] * 7 + [0xC2, 0x80])
@example(ids=[0x80] * 5 + [0xF0, 0x9F, 0x92, 0xA9])
def test_any_ids_give_some_text_and_an_incomplete_character_only_at_the_end(
    tokenizer: Tokenizer, ids: list[int]
) -> None:
    detokenizer = Detokenizer(tokenizer, [])
    pieces = [detokenizer.feed([token_id]) for token_id in ids]
    if isinstance(tokenizer, ByteTokenizer):
        text, whole = "".join(pieces), tokenizer.decode(ids)
        assert whole.startswith(text) and set(whole[len(text) :]) <= {"\ufffd"}


def test_ids_beyond_bytes_have_a_text() -> None:
    assert ByteTokenizer(50_000).decode([72, 49_999, 105]) == "H <49999>i"


@given(
    text=st.text("abc", max_size=20),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=4),
    shown=st.booleans(),
    data=st.data(),
)
def test_stops_are_found_wherever_the_text_is_cut(
    text: str, stops: list[str], shown: bool, data: st.DataObject
) -> None:
    def run(pieces: list[str]) -> tuple[str, bool]:
        checker, out = StopChecker(stops, shown), ""
        for piece in pieces:
            more, hit = checker.feed(piece)
            out += more
            if hit:
                return out, True
            held = text[len(out) : sum(map(len, pieces[: pieces.index(piece) + 1]))] if len(pieces) == 1 else ""
            assert not held or any(stop.startswith(held) for stop in stops), "holds back only beginnings of stops"
        return out + checker.flush(), False

    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    borders = [0, *cuts, len(text)]
    pieces = [text[a:b] for a, b in pairwise(borders)]
    whole = run([text])
    assert run(pieces) == whole == run(list(text))
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    assert whole == ((text[: min(ends)[0 if shown else 1]], True) if ends else (text, False))
