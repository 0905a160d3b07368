"""Documents and questions as people have them: files in a folder, and lines in a file."""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kvcore.errors import ConfigError

_WORD = re.compile(r"\w+")


class GivenDocument(NamedTuple):
    """`name`: its file, as seen from the folder."""

    name: str
    text: str


def read_documents(folder: Path) -> list[GivenDocument]:
    """Of all files in it and in its folders, by name; hidden ones and those without text are passed over. Raises
    ConfigError that names the file."""
    folder = folder.expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder: give the one that holds your documents, a file each")
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    shown = [file for file in files if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    read = [GivenDocument(str(file.relative_to(folder)), read_text(file)) for file in shown]
    documents = [one for one in read if one.text]
    if not documents:
        raise ConfigError(f"{folder}: has no file with text in it: put your documents there, a file each")
    return documents


def read_questions(file: Path) -> list[str]:
    """Its lines. Raises ConfigError."""
    questions = [line.strip() for line in read_text(file.expanduser()).splitlines() if line.strip()]
    if not questions:
        raise ConfigError(f"{file}: has no question: write one a line")
    return questions


def read_text(file: Path) -> str:
    """Without blanks around it. Raises ConfigError."""
    try:
        return file.expanduser().read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ConfigError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: is no UTF-8 text ({error.reason} at byte {error.start})") from error


class NearestDocuments:
    """Which documents share most words with a question; rare words count more."""

    def __init__(self, documents: Sequence[GivenDocument]) -> None:
        self._documents = documents
        self._words = [frozenset(_words(one.text)) for one in documents]
        seen = Counter(word for words in self._words for word in words)
        self._weights = {word: math.log(1 + len(documents) / count) for word, count in seen.items()}

    def of(self, question: str, count: int) -> list[GivenDocument]:
        """The nearest last, as it is next to the question. Fewer where there are no more."""
        asked = set(_words(question))
        scores = [sum(self._weights[word] for word in words & asked) for words in self._words]
        best = sorted(range(len(scores)), key=lambda at: (-scores[at], at))[:count]
        return [self._documents[at] for at in reversed(best)]


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())
