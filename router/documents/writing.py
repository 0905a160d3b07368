"""From a prompt that names documents to its text, with marks where they begin and end. Pure.

Three ways name them, and all end up as marks within texts, so that the chat template puts them where it wants:

1. `documents`. A template that writes them out has them; else they come before the text of the last user's message,
   or before a completion's prompt, each with an empty line behind it.
2. Parts of a message that are marked as documents.
3. The separator, if one is configured: what stands between two of them in one text.

Blanks around a document are no part of it: templates trim texts, and its tokens shall be the same wherever it stands.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import msgspec

from kvcore.errors import InvalidRequestError
from router.documents.named import DocumentKind
from router.requests.spec import ChatPrompt, Prompt, TextPrompt, TokenPrompt

_BEGIN, _END, _HEAD = "\U0010fff0", "\U0010fff1", "\U0010fff2"
"""Characters that Unicode gives to nobody. Where they are in a client's text nothing can be told apart, and all of it
is computed: `cut` does not give the text back that was rendered without marks."""
_MARKS = re.compile(f"([{_BEGIN}{_END}{_HEAD}])")
_BEHIND = "\n\n"
"""Every document that no template writes."""


def kind_of(prompt: Prompt, separator: str | None) -> DocumentKind | None:
    """How the prompt names documents, the first way that it uses; None: it names none."""
    if isinstance(prompt, TokenPrompt):
        return None
    if isinstance(prompt, TextPrompt):
        if prompt.documents:
            return "field"
        return "separator" if separator and prompt.text.count(separator) > 1 else None
    if names_texts(prompt):
        return "field"
    if any(part.get("document") for message in prompt.messages for part in _parts(message)):
        return "part"
    if separator and any(text.count(separator) > 1 for message in prompt.messages for text in _texts(message)):
        return "separator"
    return None


def names_texts(prompt: ChatPrompt) -> bool:
    """Whether `documents` have texts: without, they are the template's matter alone."""
    return any(map(_text_of, prompt.documents or ()))


@dataclass(frozen=True, slots=True)
class DocumentWriter:
    """Writes texts, with marks or without, so that both ways write the same."""

    separator: str | None
    marks: bool

    def written(self, prompt: TextPrompt | ChatPrompt, *, by_template: bool) -> TextPrompt | ChatPrompt:
        """The prompt, which names no documents any more. `by_template`: it writes `documents` out. Raises
        InvalidRequestError where there is no place for them."""
        if isinstance(prompt, TextPrompt):
            return msgspec.structs.replace(
                prompt, text=self._before(prompt.documents) + self._split(prompt.text), documents=()
            )
        messages = [self._message(message) for message in prompt.messages]
        given, before = prompt.documents, ""
        if given and by_template:
            given = [{**one, "text": self._document(text)} if (text := _text_of(one)) else one for one in given]
        elif given:
            before, given = self._before(document_texts(given)), None
        users = [at for at, message in enumerate(messages) if message["role"] == "user"]
        if before and not users:
            raise InvalidRequestError(
                "documents: the model's chat template writes none, so they come before the text of the last message of "
                "the user's, and there is none",
                param="documents",
            )
        if before:
            messages[users[-1]] = _with_first(messages[users[-1]], lambda text: before + text)
        if users:
            messages[users[0]] = _with_first(messages[users[0]], self._head)
        return msgspec.structs.replace(prompt, messages=messages, documents=given)

    def _message(self, message: Mapping[str, object]) -> Mapping[str, object]:
        content = message.get("content")
        if isinstance(content, str):
            return {**message, "content": self._split(content)} if self.separator else message
        return {**message, "content": list(map(self._part, _parts(message)))} if content else message

    def _part(self, part: Mapping[str, object]) -> Mapping[str, object]:
        text = str(part["text"])
        if part.get("document"):
            return {"type": "text", "text": self._document(text)}
        return {**part, "text": self._split(text)}

    def _before(self, documents: Sequence[str]) -> str:
        return "".join(self._document(text) + _BEHIND for text in documents)

    def _split(self, text: str) -> str:
        if not self.separator or text.count(self.separator) < 2:
            return text
        first, *between, last = text.split(self.separator)
        return self.separator.join([first, *map(self._document, between), last])

    def _document(self, text: str) -> str:
        within = text.strip()
        if not (self.marks and within):
            return text
        at = text.index(within)
        return f"{text[:at]}{_BEGIN}{within}{_END}{text[at + len(within) :]}"

    def _head(self, text: str) -> str:
        at = len(text) - len(text.lstrip())
        return f"{text[:at]}{_HEAD}{text[at:]}" if self.marks else text


@dataclass(frozen=True, slots=True)
class CutText:
    """A text in pieces, each to be made tokens by itself. `documents`: the places of those that are one; `header`: of
    the first piece behind what documents are computed behind."""

    pieces: list[str]
    documents: list[int]
    header: int

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


def cut(marked: str) -> CutText:
    """A rendered text at its marks. Those that come in another order than they were written in are left in it."""
    pieces, documents, header, inside = [""], list[int](), -1, False
    for at, found in enumerate(_MARKS.split(marked)):
        if not at % 2:
            pieces[-1] += found
        elif found == _HEAD:
            if header < 0 and not documents:
                pieces.append("")
                header = len(pieces) - 1
        elif inside is (found == _END):
            inside = not inside
            pieces.append("")
            documents += [len(pieces) - 1] if inside else []
        else:
            pieces[-1] += found
    return CutText(pieces, documents, documents[0] if header < 0 and documents else max(header, 0))


def document_texts(documents: Sequence[str | Mapping[str, object]]) -> list[str]:
    """That go into a prompt by themselves, as no template writes them: with the title of each, if it has one, as its
    first line. Raises InvalidRequestError."""
    texts = list[str]()
    for at, document in enumerate(documents):
        given: Mapping[str, object] = {"text": document} if isinstance(document, str) else document
        text, title = _text_of(given), given.get("title")
        if not text:
            raise InvalidRequestError(
                f"documents[{at}].text is missing: no template writes documents here, so it goes into the prompt",
                param="documents",
            )
        texts.append(f"{title}\n{text}" if isinstance(title, str) and title else text)
    return texts


def is_written_by(render: Callable[[ChatPrompt], str], prompt: ChatPrompt) -> bool:
    """Whether the model's chat template writes the prompt's `documents` out."""
    marked = [{**one, "text": _BEGIN + _text_of(one) + _END} for one in prompt.documents or ()]
    return _BEGIN in render(msgspec.structs.replace(prompt, documents=marked))


def _parts(message: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    content = message.get("content")
    return iter(content if isinstance(content, list) else ())


def _texts(message: Mapping[str, object]) -> Iterator[str]:
    content = message.get("content")
    if isinstance(content, str):
        yield content
    yield from (str(part["text"]) for part in _parts(message))


def _text_of(document: Mapping[str, object]) -> str:
    text = document.get("text")
    return text if isinstance(text, str) else ""


def _with_first(message: Mapping[str, object], change: Callable[[str], str]) -> Mapping[str, object]:
    """The message with its first text changed."""
    content = message.get("content")
    if not isinstance(content, list) or not content:
        return {**message, "content": change(content if isinstance(content, str) else "")}
    first, *others = content
    return {**message, "content": [{**first, "text": change(first["text"])}, *others]}
