"""From the files that a command was given to bodies of requests: a text is a prompt, JSON a body, JSONL one a line."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from kvcore.errors import ConfigError

Body = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class GivenPrompt:
    """A request's body, and where it came from: `FILE`, or `FILE:LINE`."""

    source: str
    body: Body


def read_prompts(files: Sequence[str], model: str = "") -> list[GivenPrompt]:
    """Of all files in order; `-` is stdin. `model`: of those that name none.

    Raises ConfigError that names the file, and the line.
    """
    given = [prompt for file in files for prompt in _of_file(file)]
    return [GivenPrompt(one.source, {"model": model, **one.body}) for one in given] if model else given


def _of_file(file: str) -> list[GivenPrompt]:
    try:
        raw = sys.stdin.buffer.read() if file == "-" else Path(file).expanduser().read_bytes()
        text = raw.decode()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise ConfigError(f"{file}: is empty: give a text (a prompt), a JSON body of a request, or a line each (JSONL)")
    name = "stdin" if file == "-" else file
    suffix = Path(file).suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        return _lines(name, text)
    if suffix == ".json":
        return [GivenPrompt(name, _body(name, text))]
    if not text.lstrip().startswith("{"):
        return [GivenPrompt(name, {"prompt": text})]
    if _decoded(text) is not None:
        return [GivenPrompt(name, _body(name, text))]
    lines = [line for line in text.splitlines() if line.strip()]
    if all(_decoded(line) is not None for line in lines):
        return _lines(name, text)
    return [GivenPrompt(name, {"prompt": text})]  # a text that begins with a brace


def _lines(name: str, text: str) -> list[GivenPrompt]:
    numbered = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip()]
    return [GivenPrompt(f"{name}:{number}", _body(f"{name}:{number}", line)) for number, line in numbered]


def _body(source: str, text: str) -> Body:
    """A body, or that in a line of OpenAI's batch format. What is in it is the router's to check."""
    found = _decoded(text)
    if found is None:
        raise ConfigError(f"{source}: is no JSON object: give the body of a chat or completion request")
    inner = found.get("body")
    if isinstance(inner, dict) and "messages" not in found and "prompt" not in found:
        return {str(key): value for key, value in inner.items()}
    return found


def _decoded(text: str) -> dict[str, object] | None:
    try:
        return msgspec.json.decode(text, type=dict[str, object])
    except (msgspec.DecodeError, RecursionError):
        return None
