"""Text to tokens and back: the tokenizer of the model's folder.

Owns every conversion between text and token ids in the cluster. `ByteTokenizer` serves where the engine is simulated.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from pathlib import Path
from typing import Protocol, TypeVar

from llguidance import LLTokenizer
from tokenizers import Tokenizer as FastTokenizer

from kvcore.config.schema import ClusterConfig, SimEngineConfig
from kvcore.errors import ModelLoadError
from kvcore.model_folder import TOKENIZER_FILES, file_digest, find_folder
from nodeapi.grammars.vocabulary import byte_vocabulary, folder_vocabulary
from router.requests.spec import ChatPrompt
from router.text.chat_template import ChatTemplates, no_chat
from router.text.cuts import Cuts, read_tokenizer_file
from router.text.message_content import join_parts
from router.text.piece_bytes import PieceBytes
from router.text.template_files import template_sources
from router.text.token_cache import TokenCache, TokenCacheLimits

LONG_TOKENS = 4096
_KEPT_TEXTS = 1 << 14
"""Of tokens by themselves: all but the rare ones of a vocabulary."""
_T = TypeVar("_T")


class Runner(Protocol):
    """Runs blocking work beside the loop."""

    def __call__(self, work: Callable[[], _T], /) -> Awaitable[_T]:
        """Its result, or what it raises."""
        ...


class TextThreads:
    """The Runner of a real process: so many threads for long texts, and a queue. Close it in the end."""

    def __init__(self, most: int) -> None:
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="text")

    def __repr__(self) -> str:
        return f"<TextThreads queued={self._pool._work_queue.qsize()}>"

    async def run(self, work: Callable[[], _T]) -> _T:
        """Its result, or what it raises. Cancelled while it is queued, it never runs."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    def close(self) -> None:
        """Work that is queued never runs; what runs is not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class Tokenizer(Protocol):
    """What the router needs of one."""

    @property
    def digest(self) -> str:
        """Hex SHA-256 of the file that it was made of, as a KVSpec has it; empty: it needs none."""
        ...

    @property
    def chat_source(self) -> str:
        """The text of the model's chat templates; empty: there is none."""
        ...

    @property
    def num_ids(self) -> int:
        """All ids that it gives are below this."""
        ...

    def encode(self, text: str, *, add_special_tokens: bool = True, whose: str = "") -> list[int]:
        """Token ids of any text. Blocking. `whose`: what others have asked must not make it faster."""
        ...

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of any ids, without that of special tokens unless it is wanted; incomplete characters become U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """What this token adds to a text, also where that is a part of a character; nothing for an unknown id."""
        ...

    def piece(self, token_id: int) -> str:
        """The token as its vocabulary writes it; empty for an unknown id."""
        ...

    def added_text(self, token_id: int) -> str | None:
        """The text of a token that was added to the vocabulary by hand, as special ones are; None for any other."""
        ...

    def vocabulary(self) -> LLTokenizer:
        """For grammars. Blocking."""
        ...

    def render_chat(self, chat: ChatPrompt) -> str:
        """The prompt that asks for the assistant's next message. Raises InvalidRequestError."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte, for the simulated engine, which has no tokenizer. Ids up to 255 are bytes, others read
    ` <id>`; with a vocabulary smaller than 256 bytes are taken modulo its size (deterministic, not reversible)."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self.digest = self.chat_source = ""
        self.num_ids = min(256, vocab_size)

    def __repr__(self) -> str:
        return f"<ByteTokenizer vocab_size={self._vocab_size}>"

    def encode(self, text: str, *, add_special_tokens: bool = True, whose: str = "") -> list[int]:
        """See Tokenizer."""
        raw = text.encode("utf-8", "replace")
        return list(raw) if self._vocab_size >= 256 else [byte % self._vocab_size for byte in raw]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer. There are no special tokens."""
        try:
            raw = bytes(token_ids)
        except ValueError:  # some are no bytes
            raw = b"".join(map(self.token_bytes, token_ids))
        return raw.decode("utf-8", "replace")

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return bytes((token_id,)) if token_id < 256 else b" <%d>" % token_id

    def piece(self, token_id: int) -> str:
        """See Tokenizer."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def added_text(self, token_id: int) -> str | None:
        """See Tokenizer. None is."""
        return None

    def vocabulary(self) -> LLTokenizer:
        """See Tokenizer."""
        return byte_vocabulary(self._vocab_size, 0)

    def render_chat(self, chat: ChatPrompt) -> str:
        """See Tokenizer."""
        text = "".join(f"<{m['role']}>{join_parts(m['content'])}\n" for m in chat.messages)
        if chat.continue_final_message:
            return text.removesuffix("\n")
        return text + "<assistant>" if chat.add_generation_prompt else text


class FolderTokenizer:
    """`tokenizer.json` and the chat template of a Hugging Face folder. Special tokens in users' text are encoded as the
    tokenizer does; the template's own are what it is for."""

    def __init__(self, folder: Path, limits: TokenCacheLimits = TokenCacheLimits()) -> None:
        self._folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelLoadError(f"{folder} has no tokenizer.json: the router needs one to read prompts")
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
        self.digest = file_digest(file)
        self.num_ids = max(self._tokenizer.get_vocab().values(), default=-1) + 1
        self._file = read_tokenizer_file(file.read_bytes())
        self._cuts = Cuts(self._file)
        self._limits, self._cache = limits, TokenCache(self._encode_all, limits)
        self._pieces = PieceBytes(self._tokenizer)
        self._alone = lru_cache(_KEPT_TEXTS)(partial(_text_of, self._tokenizer))
        """The text of one token, and whether without that of special ones."""
        settings = _read_json(folder / "tokenizer_config.json")
        self._templates = _read_templates(folder, settings)

    def __repr__(self) -> str:
        return f"<FolderTokenizer {self._folder} vocab_size={self.vocab_size}, {self.chat_problem or 'chat template'}>"

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    @property
    def chat_problem(self) -> str | None:
        """Why the folder's chat template cannot be used; None: it can. Prompts are served all the same."""
        return self._templates if isinstance(self._templates, str) else self._templates.problem

    @property
    def chat_source(self) -> str:
        """See Tokenizer."""
        return "" if isinstance(self._templates, str) else self._templates.source

    def encode(self, text: str, *, add_special_tokens: bool = True, whose: str = "") -> list[int]:
        """See Tokenizer."""
        if len(text) < self._limits.part_chars:  # as long as it takes to look for it
            return self._encode_all([text], add_special_tokens)[0]
        around = self._file.around if add_special_tokens else ([], [])
        if around is None:
            return self._encode_all([text], add_special_tokens)[0]
        parts = self._cuts.parts_of(text, self._limits.part_chars)
        return [*around[0], *self._cache.tokens_of(parts, whose), *around[1]]

    def _encode_all(self, texts: Sequence[str], add_special_tokens: bool = False) -> list[list[int]]:
        # As a batch: for one all versions of the library let go of the interpreter's lock. Nobody asks for offsets.
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [one.ids for one in encoded]

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """See Tokenizer."""
        text: str
        if len(token_ids) == 1:  # as every other call is where an answer is read token by token
            return self._alone(token_ids[0], skip_special_tokens)
        if len(token_ids) <= LONG_TOKENS:
            text = self._tokenizer.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        else:  # for a batch the library lets go of the interpreter's lock, which costs short texts more than they take
            (text,) = self._tokenizer.decode_batch([list(token_ids)], skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """See Tokenizer."""
        return self._pieces.of(token_id)

    def piece(self, token_id: int) -> str:
        """See Tokenizer."""
        piece: str | None = self._tokenizer.id_to_token(token_id)
        return piece or ""

    def added_text(self, token_id: int) -> str | None:
        """See Tokenizer."""
        return self._pieces.added.get(token_id)

    def vocabulary(self) -> LLTokenizer:
        """See Tokenizer."""
        return folder_vocabulary(self._folder, self.num_ids, ())

    def render_chat(self, chat: ChatPrompt) -> str:
        """See Tokenizer."""
        if isinstance(self._templates, str):
            raise no_chat(self._templates)
        return self._templates.render(chat)


def _text_of(tokenizer: FastTokenizer, token_id: int, skip_special_tokens: bool) -> str:
    text: str = tokenizer.decode([token_id], skip_special_tokens=skip_special_tokens)
    return text


def make_tokenizer(config: ClusterConfig) -> Tokenizer:
    """The configured model's. Blocking. Raises ModelLoadError."""
    path = config.model.path
    if isinstance(config.engine, SimEngineConfig) and not Path(path).expanduser().is_dir():
        return ByteTokenizer(config.engine.vocab_size)
    return FolderTokenizer(find_folder(path, TOKENIZER_FILES))


def _read_templates(folder: Path, settings: dict[str, object]) -> ChatTemplates | str:
    """Or why there are none that can be read: it costs chats alone."""
    try:
        sources = template_sources(folder, settings)
    except ValueError as error:  # of which a damaged encoding is one
        return f"the chat template cannot be read ({error})"
    return ChatTemplates(sources, {**_read_json(folder / "special_tokens_map.json"), **settings})


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}") from error


def _read_json(file: Path) -> dict[str, object]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(_read_text(file))
    except ValueError as error:
        raise ModelLoadError(f"{file} is not JSON: {error}") from error
    return value if isinstance(value, dict) else {}
