"""What the legs of one request are told of its documents.

Both legs are told or neither: a prefill leg that knows of documents computes them by themselves and nothing behind
them, so a decode leg that waits for it must know of them too; and what a prefill leg computes that does not know of
them is a prefix. Where a leg is told nothing, documents are computed as all other text is.
"""

from collections.abc import Callable
from typing import NamedTuple

from nodeapi.documents import Documents
from router.documents.named import NamedDocuments


class ToldDocuments(NamedTuple):
    """What one leg is told. `why`: it is told nothing of documents that there are; None: it is, or there are none."""

    documents: Documents | None = None
    why: str | None = None


class LegDocuments:
    """Of one request. `named`: in its prompt; None: none are. `why_refused(node)`: why this node takes none; empty: it
    does."""

    def __init__(self, named: NamedDocuments | None, why_refused: Callable[[str], str]) -> None:
        self._told = named.told if named is not None else None
        self._why_refused = why_refused
        self._prefill = ToldDocuments()

    def __repr__(self) -> str:
        return f"<LegDocuments {self._told}>"

    def of_prefill(self, node: str, decoder: str) -> ToldDocuments:
        """Of the prefill leg that begins on `node`, for which `decoder` waits."""
        self._prefill = told = self._of(node, decoder)
        return told

    def of_decode(self, node: str, *, waits: bool) -> ToldDocuments:
        """Of a decode leg. `waits`: for the prefill leg that began last."""
        return self._prefill if waits and self._prefill.documents is None else self._of(node)

    def computed_by_decoder(self, prompt_tokens: int) -> int:
        """Of a prompt of so many, though all is handed over that can be: what is neither header nor document."""
        if (told := self._told) is None:
            return 0
        return prompt_tokens - told.header - sum(stop - start for start, stop in told.spans)

    def num_chunks(self, prefiller: str, decoder: str, chunk_tokens: int) -> int | None:
        """That a prefill leg hands over which is told of documents: the full ones of their header, and their own. None:
        it is told of none."""
        told = self._of(decoder, prefiller).documents
        if told is None:
            return None
        reused = [(start, stop) for start, stop in told.spans if start + (told.k if start > told.header else 0) < stop]
        return told.header // chunk_tokens + sum(-(-(stop - start) // chunk_tokens) for start, stop in reused)

    def _of(self, *nodes: str) -> ToldDocuments:
        if self._told is None:
            return ToldDocuments()
        why = next((f"node {node}: {why}" for node in nodes if (why := self._why_refused(node))), None)
        return ToldDocuments(self._told) if why is None else ToldDocuments(why=why)
