"""Passages of the texts of a folder: what is looked for, and what is named as documents in a request. No model here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcore.errors import ConfigError

ENDINGS = (".md", ".rst", ".txt")
"""Of files that are read."""
_MOST_FILES = 10_000


@dataclass(frozen=True, slots=True)
class Passage:
    """Consecutive paragraphs of one file. `title`: the file in the folder, and which of its passages it is."""

    title: str
    text: str


def read_folder(folder: Path, *, most_chars: int = 1500) -> list[Passage]:
    """The passages of all texts below `folder`, in the files' order. Raises ConfigError where there are none."""
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder")
    files = sorted(file for file in folder.rglob("*") if file.suffix in ENDINGS and file.is_file())
    if len(files) > _MOST_FILES:
        raise ConfigError(
            f"{folder}: {len(files)} texts are too many for a demo; name a folder of {_MOST_FILES} at most"
        )
    passages = [
        Passage(f"{file.relative_to(folder)} {number}", text)
        for file in files
        for number, text in enumerate(cut(_text_of(file), most_chars), 1)
    ]
    if not passages:
        raise ConfigError(f"{folder}: there is no text in it: files that end with {', '.join(ENDINGS)} are read")
    return passages


def cut(text: str, most_chars: int) -> Iterator[str]:
    """Pieces of whole paragraphs, as long as they fit in `most_chars`; of a longer paragraph pieces of whole lines."""
    paragraphs = [part.strip() for part in text.split("\n\n") if part.strip()]
    for piece in _packed(paragraphs, "\n\n", most_chars):
        yield from [piece] if len(piece) <= most_chars else _packed(piece.split("\n"), "\n", most_chars)


def _packed(parts: Sequence[str], between: str, most_chars: int) -> Iterator[str]:
    """Consecutive parts together, as long as they fit."""
    piece = ""
    for part in parts:
        if piece and len(piece) + len(between) + len(part) > most_chars:
            yield piece
            piece = ""
        piece += between + part if piece else part
    if piece:
        yield piece


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: it cannot be read as UTF-8 text: {error}") from error
