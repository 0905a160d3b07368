"""From prompts to their text and their tokens. One that names documents is made tokens piece by piece.

Invariant: its text is what the same prompt has without marks, and its tokens do not depend on whether documents are
reused: each document is made tokens by itself, so that they are the same wherever it stands.
"""

from kvcore.errors import InvalidRequestError
from nodeapi.documents import MAX_DOCUMENTS
from router.documents.named import DocumentKind, NamedDocuments, PromptTokens
from router.documents.writing import CutText, DocumentWriter, cut, is_written_by, kind_of, names_texts
from router.requests.spec import ChatPrompt, Prompt, TextPrompt, TokenPrompt
from router.text.tokenizer import Tokenizer

_UNSEEN = "the chat template changes the documents' texts, or the messages have characters that mark documents here"
_ANY_TEXT = "a"


class PromptReader:
    """Of one router. Blocking: rendering and encoding take milliseconds for long texts."""

    def __init__(self, tokenizer: Tokenizer, separator: str | None = None) -> None:
        """`separator`: `kv.blend.separator`."""
        self._tokenizer, self._separator = tokenizer, separator

    def __repr__(self) -> str:
        return f"<PromptReader {self._tokenizer!r} separator={self._separator!r}>"

    def text(self, prompt: TextPrompt | ChatPrompt) -> str:
        """What the prompt's tokens are of, without special tokens that the tokenizer adds. Raises
        InvalidRequestError."""
        if kind_of(prompt, self._separator) is None:
            return self._render(prompt)
        return self._both(prompt)[0]

    def tokens(self, prompt: Prompt, whose: str) -> PromptTokens:
        """`whose`: as for `Tokenizer.encode`. Raises InvalidRequestError."""
        if isinstance(prompt, TokenPrompt):
            return PromptTokens(prompt.token_ids)
        kind = kind_of(prompt, self._separator)
        if kind is None:
            text = self._render(prompt)
            return PromptTokens(self._encode(text, prompt, whose))
        text, parted = self._both(prompt)
        if parted.text != text or not parted.documents:
            return PromptTokens(self._encode(text, prompt, whose), NamedDocuments(kind, why=_UNSEEN))
        if (count := len(parted.documents)) > MAX_DOCUMENTS:
            field = "documents" if kind == "field" else "messages" if isinstance(prompt, ChatPrompt) else "prompt"
            text = f"{field}: there are {count} documents, and a prompt may have {MAX_DOCUMENTS}"
            raise InvalidRequestError(text, param=field)
        return self._joined(parted, kind, prompt, whose)

    def _both(self, prompt: TextPrompt | ChatPrompt) -> tuple[str, CutText]:
        """The text as it is, and cut by the marks of another rendering."""
        by_template = isinstance(prompt, ChatPrompt) and (
            not names_texts(prompt) or is_written_by(self._tokenizer.render_chat, prompt)
        )
        marked = self._write(prompt, marks=True, by_template=by_template)
        return self._write(prompt, marks=False, by_template=by_template), cut(marked)

    def _write(self, prompt: TextPrompt | ChatPrompt, *, marks: bool, by_template: bool) -> str:
        return self._render(DocumentWriter(self._separator, marks).written(prompt, by_template=by_template))

    def _joined(self, parted: CutText, kind: DocumentKind, prompt: TextPrompt | ChatPrompt, whose: str) -> PromptTokens:
        before, after = self._special_tokens() if prompt.add_special_tokens else ([], [])
        tokens, header, spans, documents = list(before), len(before), list[tuple[int, int]](), set(parted.documents)
        for at, piece in enumerate(parted.pieces):
            if at == parted.header:
                header = len(tokens)
            start = len(tokens)
            tokens += self._tokenizer.encode(piece, add_special_tokens=False, whose=whose) if piece else []
            if at in documents and start < len(tokens):
                spans.append((start, len(tokens)))
        return PromptTokens(tokens + after, NamedDocuments(kind, header, spans))

    def _special_tokens(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts before and behind every text."""
        alone = self._tokenizer.encode(_ANY_TEXT, add_special_tokens=False)
        whole, size = self._tokenizer.encode(_ANY_TEXT), len(alone)
        at = next((at for at in range(len(whole)) if whole[at : at + size] == alone), 0)
        return whole[:at], whole[at + size :]

    def _render(self, prompt: TextPrompt | ChatPrompt) -> str:
        return self._tokenizer.render_chat(prompt) if isinstance(prompt, ChatPrompt) else prompt.text

    def _encode(self, text: str, prompt: TextPrompt | ChatPrompt, whose: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=prompt.add_special_tokens, whose=whose)
