"""Messages of the API between router and nodes: what a leg is asked, what it answers, what a node says of itself.

Invariant, so that router and nodes of different versions work together (docs/wire-formats.md): requests refuse fields
that they do not know, replies ignore them; a field that is added later has a default.
"""

from enum import StrEnum

import msgspec

from kvcore.types import KVSpec, NodeInfo, Segment, TokenId
from nodeapi.adapters import ServedAdapter
from nodeapi.documents import UNKNOWN, Documents
from nodeapi.prompt_logprobs import PromptLogprobs
from nodeapi.sampling import SamplingParams

PROTOCOL, OLDEST_PROTOCOL = 3, 1
"""The newest and the oldest version that this program speaks. The newest grows when a request gets a field, or when a
field of any message gets another meaning (docs/wire-formats.md, "Versions" of the nodes' API)."""
PROMOTE_OWNER = 2
"""Since which a promotion says whose chunks they are."""


class _StrictMessage(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """A request. A node refuses one with a field it does not know: it could not do what that field asks. A field that
    asks for nothing is not sent, so that older nodes take the others."""


class _TolerantMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A reply. A reader ignores the fields it does not know."""


class PrefillRequest(_StrictMessage, frozen=True, kw_only=True):
    """Compute the KV of the prompt's full chunks that are nowhere yet and store them."""

    request_id: str
    prompt_token_ids: list[int]
    cache_salt: bytes = b""
    prefer_segment: str | None = None
    """Where the decoder would like the chunks."""
    deadline_s: float
    """Seconds left, at the moment of sending."""
    documents: Documents | None = None
    """With documents, only they and the full chunks of their header are computed and stored, each document by itself.
    Since `nodeapi.documents.DOCUMENTS`."""


class Timings(_TolerantMessage, frozen=True, kw_only=True):
    """Where a leg's time went, seconds. `queue` until first scheduled, `wait` for another node's chunks, or for its
    documents, which are computed apart. A prefill's documents count as computing."""

    queue_s: float = 0.0
    wait_s: float = 0.0
    load_s: float = 0.0
    compute_s: float = 0.0
    save_s: float = 0.0
    total_s: float = 0.0


class Moved(_TolerantMessage, frozen=True, kw_only=True):
    """Payload and header bytes that crossed one transport in one direction, and the time the calls took."""

    transport: str
    direction: str
    """`put` or `get`."""
    num_bytes: int
    seconds: float
    machine: str = ""
    """Out of whose memory they were read, by its host id. Empty: not said."""
    late_bytes: int = 0
    """That had not crossed when their time was up, and were given up; that time is part of `seconds`."""


class Promoted(_TolerantMessage, frozen=True, kw_only=True):
    """Chunks that were brought from a tier into a segment before a leg began."""

    tier: str
    node: str = ""
    """Whose tier and segment, where it is not the leg's node."""
    num_chunks: int = 0
    num_bytes: int = 0
    seconds: float = 0.0


class TierUse(StrEnum):
    """What was done with chunks that a tier has."""

    LOAD = "load"
    COMPUTE = "compute"
    """Computing them was expected to be faster."""
    TRY = "try"
    """Computing them was expected to be faster, and they were loaded to see whether that still holds."""


class TierChoice(_TolerantMessage, frozen=True, kw_only=True):
    """Whether chunks that a tier has were loaded or computed. Seconds as they were expected; None: not known."""

    tier: str
    node: str = ""
    """As in Promoted."""
    use: str
    """A TierUse; newer nodes may have others."""
    num_chunks: int = 0
    load_s: float | None = None
    compute_s: float | None = None


class PromoteRequest(_StrictMessage, frozen=True, kw_only=True):
    """Bring these chunks, in their prompt's order, from the node's own tiers into its segment."""

    fingerprint: bytes
    keys: list[bytes]
    deadline_s: float
    owner: bytes | msgspec.UnsetType = msgspec.UNSET
    """Whose quota they count for (`kvcore.chunk_keys.owner_of`). Since PROMOTE_OWNER; absent: nobody's."""


class PromoteReply(_TolerantMessage, frozen=True, kw_only=True):
    """What was brought; what is not named here was not there, or late."""

    promoted: list[Promoted] = []
    choices: list[TierChoice] = []


class PrefillResult(_TolerantMessage, frozen=True, kw_only=True):
    """What the prefill leg did. `stored_chunks`: that many leading chunks were complete in the store when it ended."""

    request_id: str
    cached_tokens: int
    """Prompt tokens it did not have to compute."""
    computed_tokens: int
    stored_chunks: int
    moved: list[Moved] = []
    promoted: list[Promoted] = []
    tier_choices: list[TierChoice] = []
    timings: Timings = Timings()
    handoff_params: bytes = b""
    """JSON object that a decode leg must carry to get this KV from the prefiller itself. Empty: it is in the store."""
    no_room: bool = False
    """It ended before it computed, as the store had no room for any of the chunks."""


class Handoff(_StrictMessage, frozen=True, kw_only=True):
    """A prefiller is computing the first `num_chunks` chunks now: wait for them up to `wait_s`, then do without."""

    num_chunks: int
    wait_s: float


class GenerateRequest(_StrictMessage, frozen=True, kw_only=True):
    """Continue `prompt_token_ids + output_token_ids`. A fresh request has no output tokens; a continued one has those
    that were already sent to the client (n must be 1 then) and the engine goes on after them."""

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    sampling: SamplingParams
    cache_salt: bytes = b""
    handoff: Handoff | None = None
    handoff_params: bytes = b""
    """JSON object, for engines that fetch KV from each other (vLLM's `kv_transfer_params`); ours meet in the store."""
    deadline_s: float
    documents: Documents | None = None
    """With documents and a handoff, all of them are waited for. Since `nodeapi.documents.DOCUMENTS`."""
    reuse: bool = True
    """False: compute all of it, load and keep nothing. Since `nodeapi.documents.DOCUMENTS`."""


class TokenLogprob(_TolerantMessage, frozen=True, kw_only=True):
    """Natural logarithm of the probability of one emitted token, and the likeliest alternatives as (id, logprob)."""

    logprob: float
    top: list[tuple[TokenId, float]] = []


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class LegInfo(_TolerantMessage, frozen=True, kw_only=True):
    """What the decode leg did before its first token; comes once, with the first delta (of vLLM servers the last)."""

    cached_tokens: int
    """Prompt tokens that this leg did not compute and that are what it would have computed."""
    computed_tokens: int
    approximate_tokens: int = 0
    """Prompt tokens of documents that were computed elsewhere, behind the header alone, and turned to where they are.
    With `cached_tokens` and `computed_tokens` all of the prompt, unless a preemption had some computed again."""
    prepared_tokens: int = 0
    """Tokens that this leg computed beside the prompt, for documents that were nowhere yet."""
    moved: list[Moved] = []
    promoted: list[Promoted] = []
    tier_choices: list[TierChoice] = []
    timings: Timings = Timings()
    fingerprint: bytes = b""
    """Of the KVSpec of the engine that runs the leg. Empty: not said; NodeReport has it."""


class TokenDelta(_TolerantMessage, frozen=True, kw_only=True, tag="delta"):
    """New tokens of completion `index`. `finish_reason` is set in the last delta of each index, which may be empty."""

    index: int = 0
    token_ids: list[TokenId] = []
    logprobs: list[TokenLogprob] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: TokenId | None = None
    """The stop or end-of-sequence token that ended it (also the last of `token_ids`)."""
    info: LegInfo | None = None
    prompt_logprobs: PromptLogprobs | None = None
    """Of the next tokens of the prompt, of all completions, in their order."""


class StreamError(_TolerantMessage, frozen=True, kw_only=True, tag="error"):
    """Ends a stream of deltas. `code` names a class of kvcore.errors."""

    code: str
    message: str
    retryable: bool


StreamFrame = TokenDelta | StreamError
"""On the wire: u32le length, then msgpack. A stream that ends without a finish reason for each index died."""


class EngineInfo(_TolerantMessage, frozen=True, kw_only=True):
    """What never changes while an engine lives."""

    kind: str
    kv_spec: KVSpec
    max_context: int
    vocab_size: int
    eos_token_ids: list[int]
    block_size: int
    num_blocks: int
    max_sequences: int = 0
    """That it decodes at a time. 0: not said."""
    lacks: list[str] = []
    """Fields of SamplingParams that it cannot obey: no request that has one is sent to it."""
    refuses_documents: str = UNKNOWN
    """Why it takes no request with documents; empty: it does."""
    adapters: list[ServedAdapter] = []
    """No request whose salt names another one is sent to it."""
    kv_peer: dict[str, str] = {}
    """What an engine that fetches KV from this one by itself must know of it, by vLLM's names. Empty: nothing."""


class EngineStats(_TolerantMessage, frozen=True, kw_only=True):
    """A sample of the engine's state. At rest every gauge but `cached_blocks` is 0."""

    running: int = 0
    waiting: int = 0
    loading: int = 0
    used_blocks: int = 0
    """Referenced by a request or a save under way."""
    cached_blocks: int = 0
    """Free for reuse, still holding a known prefix."""
    total_blocks: int = 0
    pending_saves: int = 0
    counters: dict[str, int] = {}
    """Totals: prefill_tokens, decode_tokens, cached_tokens, approximate_tokens, preemptions, aborted, chunks_stored,
    chunks_loaded, chunk_miss_<reason>, ..."""


class Greeting(_TolerantMessage, frozen=True, kw_only=True):
    """The one part of a NodeReport that every version can read: decode it first, then the rest."""

    protocol: int = 1
    """The newest version that the node speaks. Nodes that are older than this field speak 1."""
    oldest_protocol: int = 1
    """The oldest one."""


class TierReport(_TolerantMessage, frozen=True, kw_only=True):
    """A tier as one node sees it. None: it cannot know."""

    name: str
    shared: bool
    num_chunks: int | None = None
    used_bytes: int | None = None
    capacity_bytes: int | None = None
    evicted: int = 0
    problem: str = ""
    """What is wrong with it now; empty: nothing."""
    counts: dict[str, int] = {}
    """Chunks since start: saved, there, dropped, gone, failed, promoted, damaged, forged, unproven, missing, computed,
    no_room."""
    load_rate: float | None = None
    """Bytes a second, as a running estimate."""
    save_rate: float | None = None


class NodeReport(Greeting, frozen=True, kw_only=True):
    """Answer of `GET /v1/info` on a node's control API. `engine` and `stats` are None for a node without an engine, and
    while the engine is starting or restarting."""

    node: NodeInfo
    engine: EngineInfo | None = None
    stats: EngineStats | None = None
    segments: list[Segment] = []
    transports: dict[str, str] = {}
    """Segment id of a peer -> the transport that was last used to reach it."""
    draining: bool = False
    engine_restarts: int = 0
    refused: str = ""
    """Why the metadata server does not take the node in: nothing that it computes can be stored. Empty: it does, or has
    not been reached."""
    tiers: list[TierReport] = []
    version: str = ""
    """Of the weights that the engine has or is being started with (`model.version`)."""
    release: str = ""
    """Of kvferry, as it is installed there. Empty: not known."""
    left_to_move: int | None = None
    """Chunks that lie nowhere else, of a node that is drained to be emptied. None: it is not, or has not looked yet."""
    settings: str = ""
    """`kvcore.config.live.settings.settings_name` of what the process goes by. Empty: not known."""


class ProbeRequest(_StrictMessage, frozen=True, kw_only=True):
    """Body of `POST /v1/probe`: the node to measure the way to, and the time there is (60 s at most)."""

    peer: str
    timeout_s: float


class ProbeReport(_TolerantMessage, frozen=True, kw_only=True):
    """Answer of `POST /v1/probe`. Rates are bytes/s of batches of `num_bytes`, `latency_s` the median of gets of 4 KiB.

    `copy_rate`: of a copy in this node's own memory. `link_rate`: what `devices` should give together; None where the
    kernel states none.
    """

    node: str
    peer: str
    asked: str
    """`transport.kind`."""
    transport: str
    shown: str
    """The transport with its devices and build, as far as it says (`ucx:rc_mlx5/mlx5_0@1.13.1`)."""
    devices: list[str]
    link_rate: float | None
    latency_s: float
    put_rate: float
    get_rate: float
    copy_rate: float
    num_bytes: int
    seconds: float
