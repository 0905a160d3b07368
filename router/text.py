"""Text to tokens and back: the model folder's tokenizer, chat template, detokenizing by pieces, stop strings.

Owns every conversion between text and token ids in the cluster. `ByteTokenizer` serves where the engine is simulated.
"""

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, TypeVar

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as FastTokenizer

from engines.model_files import TOKENIZER_FILES, find_folder
from kvcore.config import ClusterConfig, SimEngineConfig
from kvcore.errors import InvalidRequestError, ModelLoadError

INLINE_CHARS = 8 << 10
"""Longer texts are encoded beside the event loop (a 100 kB prompt takes about 50 ms)."""
CONTEXT_TOKENS = 6
"""Tokens of the prompt that the first piece is decoded after, so that it keeps its leading space."""
MAX_HELD_TOKENS = 8
"""Longer than any character's bytes: what is still no character then is none."""
MAX_WINDOW_TOKENS = 64
_REPLACEMENT = "\ufffd"
_T = TypeVar("_T")
Runner = Callable[[Callable[[], _T]], Awaitable[_T]]
"""Runs blocking work beside the loop."""


async def run_in_thread(work: Callable[[], _T]) -> _T:
    """The Runner of a real process."""
    return await asyncio.to_thread(work)


class Tokenizer(Protocol):
    """What the router needs of one."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of any text. Blocking."""
        ...

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of any ids, special tokens left out; incomplete characters become U+FFFD."""
        ...

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that asks for the assistant's next message. Raises InvalidRequestError."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte, for the simulated engine, which has no tokenizer. Ids up to 255 are bytes, others read
    ` <id>`; with a vocabulary smaller than 256 bytes are taken modulo its size (deterministic, not reversible)."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer."""
        raw = text.encode("utf-8", "replace")
        return list(raw) if self._vocab_size >= 256 else [byte % self._vocab_size for byte in raw]

    def decode(self, token_ids: Sequence[int]) -> str:
        """See Tokenizer."""
        raw = b"".join(bytes((i,)) if i < 256 else b" <%d>" % i for i in token_ids)
        return raw.decode("utf-8", "replace")

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """See Tokenizer."""
        return "".join(f"<{m['role']}>{m['content']}\n" for m in messages) + "<assistant>"


class FolderTokenizer:
    """`tokenizer.json` and the chat template of a Hugging Face folder. Special tokens in users' text are encoded as the
    tokenizer does; the template's own are what it is for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ModelLoadError(f"{folder} has no tokenizer.json: the router needs one to read prompts")
        try:
            self._tokenizer = FastTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exceptions
            raise ModelLoadError(f"{file} cannot be read: {error}") from error
        self._settings = _read_json(folder / "tokenizer_config.json")
        self._template = self._compile()

    @property
    def vocab_size(self) -> int:
        """Tokens, added ones included."""
        size: int = self._tokenizer.get_vocab_size()
        return size

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` works."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """See Tokenizer."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """See Tokenizer."""
        text: str = self._tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text

    def render_chat(self, messages: Sequence[dict[str, str]]) -> str:
        """See Tokenizer."""
        if self._template is None:
            raise InvalidRequestError("this model has no chat template: use /v1/completions", param="messages")
        try:
            return self._template.render(
                messages=list(messages),
                add_generation_prompt=True,
                tools=None,
                documents=None,
                bos_token=self._special("bos_token"),
                eos_token=self._special("eos_token"),
                pad_token=self._special("pad_token"),
                unk_token=self._special("unk_token"),
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError) as error:
            raise InvalidRequestError(f"the model's chat template refused it: {error}", param="messages") from error

    def _special(self, name: str) -> str:
        value = self._settings.get(name)
        if isinstance(value, dict):
            value = value.get("content")
        return value if isinstance(value, str) else ""

    def _compile(self) -> jinja2.Template | None:
        file = self._folder / "chat_template.jinja"
        source: object = _read_text(file) if file.is_file() else self._settings.get("chat_template")
        if isinstance(source, list):  # several named templates
            named = {item.get("name"): item.get("template") for item in source if isinstance(item, dict)}
            source = named.get("default")
        if not isinstance(source, str):
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        try:
            return environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ModelLoadError(f"the chat template of {self._folder} cannot be read: {error}") from error


def make_tokenizer(config: ClusterConfig) -> Tokenizer:
    """The configured model's. Blocking. Raises ModelLoadError."""
    path = config.model.path
    if isinstance(config.engine, SimEngineConfig) and not Path(path).expanduser().is_dir():
        return ByteTokenizer(config.engine.vocab_size)
    return FolderTokenizer(find_folder(path, TOKENIZER_FILES))


async def encode(
    tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, run: "Runner[list[int]]", chars: int = 0
) -> list[int]:
    """Encode without holding up the loop: long texts, and those of many with `chars` together, go through `run`."""
    if max(len(text), chars) <= INLINE_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await run(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))


class Detokenizer:
    """Text of one completion, piece by piece. A piece never ends inside a character; the pieces together are the text
    of all tokens, as it reads after the prompt."""

    def __init__(self, tokenizer: Tokenizer, prompt_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window = self._context(prompt_token_ids)
        self._sent = tokenizer.decode(self._window) if self._window else ""
        self._clean = len(self._window)
        """Tokens of the window whose text is out completely."""

    def feed(self, token_ids: Sequence[int]) -> str:
        """The text that these tokens complete; what is not yet a whole character is held back."""
        return "".join([self._one(token_id) for token_id in token_ids])

    def flush(self) -> str:
        """What is still held, at the end: an incomplete character reads U+FFFD."""
        if len(self._window) == self._clean:
            return ""
        text = self._tokenizer.decode(self._window)
        piece = text[len(self._sent) :] if text.startswith(self._sent) else ""
        self._sent, self._clean = text, len(self._window)
        return piece

    def _context(self, prompt_token_ids: Sequence[int]) -> list[int]:
        """The prompt's last few tokens, from a character's beginning to a character's end; else none."""
        for count in range(CONTEXT_TOKENS, CONTEXT_TOKENS + 4):  # a character has at most four bytes
            window = list(prompt_token_ids[-count:])
            if _REPLACEMENT not in self._tokenizer.decode(window):
                return window
        return []

    def _one(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        if text.endswith(_REPLACEMENT):
            if len(self._window) - self._clean < MAX_HELD_TOKENS:
                return ""
            done, text, held = self._split(text)
            piece = self._piece(done, text)
            self._window, self._sent, self._clean = held, "", 0
            return piece
        piece = self._piece(self._window, text)
        if piece or len(self._window) > MAX_WINDOW_TOKENS:
            # The window starts again at the piece just sent: it is the context of the next, and stays short.
            self._window = self._window[self._clean :]
            text = self._tokenizer.decode(self._window) if self._window else ""
        self._sent, self._clean = text, len(self._window)
        return piece

    def _piece(self, token_ids: list[int], text: str) -> str:
        """What these tokens of the window, whose text this is, add to what was sent."""
        if text.startswith(self._sent):
            return text[len(self._sent) :]
        # Invalid bytes changed how earlier ones read: the new tokens speak for themselves.
        return self._tokenizer.decode(token_ids[self._clean :])

    def _split(self, text: str) -> tuple[list[int], str, list[int]]:
        """Of a window with invalid bytes, whose text this is: what is done, its text, and the last tokens, which may
        begin a character."""
        for count in (3, 2, 1):  # bytes of a character that lacks one
            done, held = self._window[:-count], self._window[-count:]
            done_text = self._tokenizer.decode(done)
            if done_text + self._tokenizer.decode(held) == text:
                return done, done_text, held
        return self._window, text, []


@dataclass(slots=True)
class StopChecker:
    """Finds stop strings in text that comes in pieces, the same wherever it is cut: the match that is complete first
    wins, of several the longest. Holds back only what may be the beginning of a stop string."""

    stops: Sequence[str]
    _held: str = ""
    _longest: int = field(init=False)

    def __post_init__(self) -> None:
        self._longest = max(map(len, self.stops), default=0)

    def feed(self, piece: str) -> tuple[str, bool]:
        """(text that is out now, whether a stop string was found; it and what follows are never out)."""
        if not self.stops:
            return piece, False
        text = self._held + piece
        matches = [(at + len(stop), at) for stop in self.stops if (at := text.find(stop)) >= 0]
        if matches:
            self._held = ""
            return text[: min(matches)[1]], True
        keep = next((n for n in range(min(self._longest - 1, len(text)), 0, -1) if self._may_begin(text[-n:])), 0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """What was held back, at the end."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self.stops)


def finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI says -9999 for impossible."""
    return logprob if math.isfinite(logprob) else -9999.0


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


def _tojson(value: object, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
