"""Texts that all tenants' prompts may begin with and share the KV of, as the cluster file declares them.

A text counts as a completion's prompt and as a chat's first system message. What a prompt has in common with one of
them, whole chunks of it, is public; what follows is its tenant's. Nothing else is ever shared.
"""

from collections.abc import Sequence
from pathlib import Path

from kvcore.config.schema import ClusterConfig
from kvcore.errors import ConfigError, InvalidRequestError
from router.requests.spec import ChatPrompt
from router.text.tokenizer import Tokenizer


class PublicPrefixes:
    """In tokens. Immutable."""

    def __init__(self, prefixes: Sequence[Sequence[int]] = (), chunk_tokens: int = 1) -> None:
        self._prefixes = [list(prefix) for prefix in prefixes]
        self._chunk_tokens = chunk_tokens

    def __repr__(self) -> str:
        return f"<PublicPrefixes of {', '.join(str(len(one)) for one in self._prefixes) or 'no'} tokens>"

    @classmethod
    def read(cls, config: ClusterConfig, tokenizer: Tokenizer) -> "PublicPrefixes":
        """Blocks. Raises ConfigError for a file that cannot be read, or a text that fills no chunk."""
        declared = config.security.keys.public if config.security.keys is not None else ()
        prefixes = list[list[int]]()
        for number, one in enumerate(declared):
            where = f"security.keys.public[{number}]"
            text = one.text or _content(Path(one.file or ""), where)
            ways = _in_tokens(text, tokenizer)
            if max(map(len, ways)) < config.kv.chunk_tokens:
                raise ConfigError(f"{where}: fills no chunk of {config.kv.chunk_tokens} tokens: nothing can be shared")
            prefixes += ways
        return cls(prefixes, config.kv.chunk_tokens)

    def num_chunks(self, prompt: Sequence[int]) -> int:
        """How many leading chunks of a prompt are public."""
        longest = max((_common(prefix, prompt) for prefix in self._prefixes), default=0)
        return longest // self._chunk_tokens


def _content(file: Path, where: str) -> str:
    try:
        return file.read_text("utf-8")
    except OSError as error:
        raise ConfigError(f"{where}.file: {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError:
        raise ConfigError(f"{where}.file: {file} is no text in UTF-8") from None


def _in_tokens(text: str, tokenizer: Tokenizer) -> list[list[int]]:
    """As a prompt, and as a system message if the model's chats have one."""
    ways = [tokenizer.encode(text)]
    try:
        chat = tokenizer.render_chat(ChatPrompt([{"role": "system", "content": text}], add_generation_prompt=False))
    except InvalidRequestError:
        return ways
    return [*ways, tokenizer.encode(chat, add_special_tokens=False)]


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    most = min(len(one), len(other))
    if one[:most] == other[:most]:
        return most
    return next(at for at in range(most) if one[at] != other[at])
