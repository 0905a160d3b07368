"""Small tokenizers of each kind that models have, made on the spot: every byte, a few words, the special tokens."""

from pathlib import Path

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

_BEGIN, _END = AddedToken("<s>", special=True), AddedToken("<|end|>", special=True)


def byte_level() -> FastTokenizer:
    """As GPT-2, Llama 3 and Qwen have: a character is its UTF-8 bytes, each written as a printable one; ` the`, and a
    blank with an emoji's first three bytes are one token each."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("Ġ", "t"), ("Ġt", "he"), ("ð", "Ł"), ("ðŁ", "ĺ"), ("Ġ", "ðŁĺ")]
    pieces = ["<unk>", *alphabet, *(left + right for left, right in merges)]
    tokenizer = FastTokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens([_BEGIN, _END, AddedToken("<｜tool▁end｜>")])
    return tokenizer


def byte_fallback() -> FastTokenizer:
    """As Llama 2, Mistral and Gemma have: `▁` for a blank, `<0xE2>` for the bytes of what has no piece."""
    words = ["▁", "t", "h", "e", "r", "▁the", "the", "▁▁"]
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    merges = [("▁", "▁"), ("t", "h"), ("th", "e"), ("▁", "the")]
    pieces += [piece for piece in ("th",) if piece not in pieces]
    model = models.BPE(
        {piece: number for number, piece in enumerate(pieces)},
        merges,
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = FastTokenizer(model)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_tokens([_BEGIN, _END])
    return tokenizer


def metaspace() -> FastTokenizer:
    """As T5 and XLM-R have: a unigram model whose pieces have `▁` for a blank."""
    pieces = [("<unk>", 0.0), ("▁", -3.0), ("▁the", -1.0), ("the", -2.0), ("re", -2.0), ("é", -3.0), ("t", -4.0)]
    tokenizer = FastTokenizer(models.Unigram(pieces, 0, False))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_tokens([_BEGIN, _END])
    return tokenizer


def word_piece() -> FastTokenizer:
    """As BERT has: words, and `##re` for a part that does not begin one."""
    pieces = ["[UNK]", "the", "there", "##the", "##re", "t", "é", "."]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    tokenizer = FastTokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_tokens([_BEGIN, _END])
    return tokenizer


def whole_words() -> FastTokenizer:
    """No decoder at all: tokens are joined by blanks."""
    pieces = ["[UNK]", "the", "there", "é"]
    tokenizer = FastTokenizer(models.WordLevel({piece: number for number, piece in enumerate(pieces)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_tokens([_BEGIN, _END])
    return tokenizer


def saved(tokenizer: FastTokenizer, folder: Path) -> Path:
    """`folder`, with the tokenizer in it."""
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
