"""Where the documents of a prompt lie, and what of them is left to be computed. Pure."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvcore.types import ChunkKey
from nodeapi.documents import Documents
from router.routing.index import PrefixHits

KeptDocumentKeys = dict[tuple[bytes, int], list[list[ChunkKey]]]
"""Keys of one prompt's documents, by fingerprint and size of chunks: to hash long texts takes milliseconds."""


@dataclass(frozen=True, slots=True)
class DocumentHits:
    """For one kind of KV, in tokens, of documents behind what is found by the prompt's prefix, which goes first.

    `header`: of the full chunks that they are computed behind. `reusable`: that a node need not compute where they
    stand. `in_reach`: those of them whose documents lie somewhere, all of it; `by_node`: in the memory of each node."""

    header: int = 0
    reusable: int = 0
    in_reach: int = 0
    by_node: Mapping[str, float] = field(default_factory=dict)

    def left(self, cached_tokens: int) -> int:
        """That a prefiller would compute, of header and documents; so many of the prefix are cached."""
        return max(0, self.header - cached_tokens) + self.reusable - self.in_reach

    def elsewhere(self, node_id: str) -> float:
        """In reach, and not in this node's memory."""
        return self.in_reach - self.by_node.get(node_id, 0.0)


NO_DOCUMENTS = DocumentHits()


def document_hits(
    told: Documents,
    keys: Sequence[Sequence[ChunkKey]],
    find: Callable[[Sequence[ChunkKey]], PrefixHits],
    *,
    cached_tokens: int,
    chunk_tokens: int,
) -> DocumentHits:
    """`keys`: of each document. `find`: where they are, in memory and in tiers. `cached_tokens`: of the prefix."""
    reusable = in_reach = 0
    by_node: dict[str, float] = {}
    for (start, stop), names in zip(told.spans, keys, strict=True):
        begin = max(start + (told.k if start > told.header else 0), cached_tokens)
        if begin >= stop:
            continue
        reusable += stop - begin
        found = find(names)
        if found.longest + found.in_tiers < len(names):
            continue
        in_reach += stop - begin
        for node, chunks in found.by_node.items():
            by_node[node] = by_node.get(node, 0.0) + (stop - begin) * chunks / len(names)
    return DocumentHits(told.header // chunk_tokens * chunk_tokens, reusable, in_reach, by_node)
