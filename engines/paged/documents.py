"""Documents of a prompt: where each stands, under which keys its KV lies, and how that gets into a sequence's blocks.

Pure. A document's KV was computed behind the prompt's header alone. Rows of it are copied to where the document stands,
K turned by the distance; its first tokens, and all that is no document, are computed as ever. So a sequence has holes:
ranges of tokens whose KV is there already, ahead of what it has computed.
"""

from collections.abc import Sequence

from engines.paged.blocks import BlockManager
from engines.paged.plan import Plan
from engines.paged.runner import RowMove
from engines.paged.sequence import PlacedDocument, TokenSequence
from kvcore.documents.keys import keys_of_documents
from nodeapi.documents import Documents


def place_documents(
    documents: Documents, token_ids: Sequence[int], *, fingerprint: bytes, salt: bytes, chunk_tokens: int
) -> tuple[PlacedDocument, ...]:
    """Those documents of the prompt of which there is something to reuse."""
    header, spans = documents.header, documents.spans
    placed: list[PlacedDocument] = []
    named = keys_of_documents(fingerprint, salt, token_ids, header, spans, chunk_tokens=chunk_tokens)
    for (start, stop), keys in zip(spans, named, strict=True):
        renewed = 0 if start == header else documents.k
        if start + renewed < stop:
            placed.append(PlacedDocument(start, stop, header, renewed, tuple(keys)))
    return tuple(placed)


def reuse_documents(sequence: TokenSequence, blocks: BlockManager, plan: Plan) -> None:
    """Take what is found of a sequence's documents, and plan the moves. It has blocks for all its tokens, and KV in
    whole chunks of its prefix alone. The prompt's last token stays to be computed, for its logits, also when it is
    computed again behind output.

    What is not taken the first time never is: it may come into blocks later, when the request was told what of its
    prompt is approximate, and a preempted sequence is computed again."""
    size, chunk_tokens = blocks.block_size, blocks.chunk_tokens
    limit = sequence.num_prompt - 1
    exact = approximate = 0
    taken: list[PlacedDocument] = []
    for document in sequence.documents:
        begin, end = max(document.start + document.renewed, sequence.num_computed), min(document.stop, limit)
        if begin >= end or not all(blocks.holds(key) for key in document.keys):
            continue
        taken.append(document)
        for first, key in zip(range(document.start, document.stop, chunk_tokens), document.keys, strict=True):
            low, high = max(begin, first), min(end, first + chunk_tokens)
            if low < high:
                source = blocks.reuse_chunk(key)
                assert source is not None
                plan.sources += source
                at = document.computed_at + low - document.start
                plan.moves.append(RowMove(source, low - first, at, sequence.block_table, low, low, high - low))
        sequence.holes.append((begin, end))
        plan.fresh += (sequence.block_table[edge // size] for edge in (begin, end) if edge % size)
        if document.exact:
            exact += end - begin
        else:
            approximate += end - begin
            sequence.limit_prefix(document.start)
    sequence.documents = tuple(taken)
    sequence.num_cached = (sequence.num_cached or 0) + exact
    sequence.num_approximate = approximate
    sequence.pass_holes()
