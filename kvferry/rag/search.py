"""Which passages have to do with a question: BM25 over their words, by the library bm25s."""

from collections.abc import Sequence
from typing import Any

from kvcore.errors import ConfigError
from kvferry.rag.passages import Passage


class PassageSearch:
    """An index of passages, in memory."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        """Raises ConfigError where the library is not installed."""
        try:
            import bm25s
        except ImportError as error:
            raise ConfigError(
                "passages are found by bm25s, which is not installed: pip install 'kvferry[rag]'"
            ) from error
        self._bm25s: Any = bm25s
        self._passages = list(passages)
        self._index = bm25s.BM25()
        self._index.index(self._words([f"{one.title}\n{one.text}" for one in passages]), show_progress=False)

    def find(self, question: str, most: int) -> list[Passage]:
        """The `most` best ones at most, the best first; none where no word of the question is in any."""
        most = min(most, len(self._passages))
        found, scores = self._index.retrieve(self._words([question]), k=most, show_progress=False)
        return [self._passages[at] for at, score in zip(found[0], scores[0], strict=True) if score > 0]

    def _words(self, texts: list[str]) -> Any:
        return self._bm25s.tokenize(texts, stopwords="en", show_progress=False)
