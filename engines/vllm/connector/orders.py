"""The scheduler half's orders to the worker halves, step by step, and the parameters and results of a request.

Values only; no vLLM, no torch. Chunk keys are those of rank 0 (`kvcore.chunk_keys.rank_key` gives the other ranks').
"""

from dataclasses import dataclass, field

import msgspec

from kvcore.types import ChunkKey, OwnerTag

PARAMS_NAME = "kvferry"
"""Our entry in vLLM's `kv_transfer_params`, in requests and in results."""


class LegParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`kv_transfer_params["kvferry"]` of a request. For a request without it, chunks are looked up, loaded and saved as
    well, but nothing is reported over the bus."""

    leg: str
    """The name under which the worker halves report to the engine's front (`engines.vllm.bus`)."""
    salt: str = ""
    """Of the tenant, in the chunk keys. Hex."""
    prefer_segment: str | None = None
    handoff_chunks: int | None = None
    """A prefiller is computing that many leading chunks now (0: only the tail); they are loaded as they come. None:
    no prefiller is, and the chunks are looked up."""
    wait_until: float = 0.0
    """`time.monotonic()` of this machine at which the wait for those ends."""
    tail: bool = False
    """The prompt's rest behind its usable chunks, too short for a chunk, is one more chunk under its own key: a prefill
    leg saves it, a decode leg with a handoff expects it, so that the decoder computes one token only."""

    emitted: int = 0
    """So many tokens at the prompt's end are the answer's: a grammar is behind them."""
    after: tuple[tuple[int, ...], ...] = ()
    """The tokens that end what is free before a grammar, and below what begins it: `nodeapi.grammars.grammar`."""
    opening: tuple[int, ...] = ()


class LegResult(msgspec.Struct, frozen=True, kw_only=True):
    """`kv_transfer_params["kvferry"]` of a finished request: what the scheduler half knew."""

    saving: bool
    """Saves were ordered: each rank's worker half will report `SaveEnded`."""
    stored_chunks: int
    """Leading chunks that were known to be complete in the store without a save of this request."""
    ordered_chunks: int = 0
    """Leading full chunks that were known complete or ordered to be saved."""


@dataclass(frozen=True, slots=True)
class ChunkPlace:
    """One chunk in the engine's blocks. A tail has fewer tokens than a full chunk, and may have fewer blocks."""

    key: ChunkKey
    num_tokens: int
    block_ids: tuple[int, ...]
    """The blocks that hold its tokens, in order; the last one may be partly filled, in a tail."""


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """Load these consecutive chunks into these blocks, asynchronously; stop at the first that is not good.

    The order ends with a report of the request as received, whatever came of it; the blocks of what did not come are
    reported as failed, no later than that.
    """

    request_id: str
    """vLLM's."""
    leg: str | None
    first_chunk: int
    """Index of `chunks[0]` in the prompt."""
    chunks: tuple[ChunkPlace, ...]
    keep_blocks: int = 0
    """So many leading blocks of `chunks[0]` hold their KV already and may be shared with other requests. They are not
    written: their part of the payload goes to scratch memory."""
    wait_until: float | None = None
    """Chunks that are not in the store yet are waited for until then (`time.monotonic()`). None: not at all."""
    owner: OwnerTag | None = None
    """Whose chunks they are."""


@dataclass(frozen=True, slots=True)
class SaveOrder:
    """These chunks are full once this step's forward pass has run: save what the store does not have.

    Their blocks stay as they are until the request was reported as sent, or preempted.
    """

    request_id: str
    leg: str | None
    first_chunk: int
    """Index of `chunks[0]`; all before it are complete in the store or were ordered before."""
    chunks: tuple[ChunkPlace, ...]
    prefer_segment: str | None = None
    owner: OwnerTag | None = None
    """Whose chunks they are."""
    reserve: tuple[tuple[ChunkKey, int], ...] = ()
    """In a request's first order: (key, number of blocks) of all chunks of its prompt still to be saved, `chunks`
    included, in order, so that room for them is asked for at once."""
    public: tuple[ChunkKey, ...] = ()
    """Beside `reserve`: those that are nobody's own."""


@dataclass(frozen=True, slots=True)
class StepOrders:
    """Of one step, carried out in this order: `preempted` before anything overwrites blocks, `loads`, and `saves` once
    the forward pass was started.

    `preempted`: these requests' blocks are about to be given to others. Their jobs end now.
    """

    loads: tuple[LoadOrder, ...] = ()
    saves: tuple[SaveOrder, ...] = ()
    preempted: tuple[str, ...] = field(default=())
    idle: bool = False
    """Nothing is computed in this step. vLLM makes it to learn whether loads and saves have ended."""
