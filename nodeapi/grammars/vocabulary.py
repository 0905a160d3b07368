"""The vocabulary that masks are made for: of a model's folder, or the bytes of the simulated engine.

Reading one blocks, up to seconds where it has 150,000 tokens.
"""

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLTokenizer, TokenizerWrapper

from kvcore.errors import ModelLoadError


def folder_vocabulary(folder: Path, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
    """Of `tokenizer.json` in a Hugging Face folder. `vocab_size`: the model's; ids that the tokenizer does not have may
    never come. Raises ModelLoadError."""
    file = folder / "tokenizer.json"
    try:
        text = file.read_text(encoding="utf-8")
        return LLTokenizer(text, n_vocab=vocab_size, eos_token=list(eos_token_ids) or None)
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{file} cannot be read for grammars: {error}") from error


class _Bytes:
    """What llguidance asks of a tokenizer, for one whose tokens are bytes."""

    bos_token_id = None

    def __init__(self, vocab_size: int, eos_token_id: int) -> None:
        self.eos_token_id = eos_token_id
        self.special_token_ids = [eos_token_id]
        self.tokens = [bytes((token,)) if token < 256 else b" <%d>" % token for token in range(vocab_size)]
        self.tokens[eos_token_id] = b"<end>"

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def byte_vocabulary(vocab_size: int, eos_token_id: int) -> LLTokenizer:
    """One token a byte, as `router.text.tokenizer.ByteTokenizer` has it; other ids read ` <id>`."""
    return LLTokenizer(TokenizerWrapper(_Bytes(vocab_size, eos_token_id)), eos_token=[eos_token_id])
