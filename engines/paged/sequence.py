"""One sequence of tokens on its way through the engine. State only; `Scheduler` changes it.

Invariants: `num_computed <= len(tokens)`; the block table covers at least `num_computed` tokens; the status changes
along `TRANSITIONS` only.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from kvcore.chunk_keys import KeyChain, usable_chunks
from kvcore.types import ChunkKey, OwnerTag
from nodeapi.grammars.matcher import GrammarMatcher
from nodeapi.sampling import SamplingParams


class Status(Enum):
    """Where a sequence is. It begins WAITING.

    WAITING -> RUNNING: it has blocks for all its tokens and a place among those that run
    WAITING -> LOADING: the store may have chunks of it, and they are being read into its blocks
    LOADING -> WAITING: the load has ended, whatever it brought
    RUNNING -> WAITING: it was preempted: its blocks were given to an older sequence
    WAITING -> FINISHED: it was removed before it ran
    LOADING -> FINISHED: it was removed while chunks were loaded; its blocks are freed when the load has ended
    RUNNING -> FINISHED: its last token is there, or it was removed; if in a step, its blocks are freed after that
    """

    WAITING = auto()
    LOADING = auto()
    RUNNING = auto()
    FINISHED = auto()


TRANSITIONS: dict[Status, frozenset[Status]] = {
    Status.WAITING: frozenset({Status.RUNNING, Status.LOADING, Status.FINISHED}),
    Status.LOADING: frozenset({Status.WAITING, Status.FINISHED}),
    Status.RUNNING: frozenset({Status.WAITING, Status.FINISHED}),
    Status.FINISHED: frozenset(),
}
"""What may follow a status; the reasons are in `Status`."""


@dataclass(frozen=True, slots=True)
class PlacedDocument:
    """Tokens `[start, stop)` of a prompt, whose KV, computed at the positions from `computed_at` on, lies under `keys`.
    The first `renewed` tokens are computed anew."""

    start: int
    stop: int
    computed_at: int
    renewed: int
    keys: tuple[ChunkKey, ...]

    @property
    def exact(self) -> bool:
        """Whether it stands right behind the header: its KV is what would be computed."""
        return self.start == self.computed_at


@dataclass(eq=False, slots=True)
class TokenSequence:
    """Prompt and output of one completion. `sampling` None: only the KV is wanted. Compared by identity."""

    request_id: str
    age: tuple[int, int]
    """(arrival, index): the smaller, the older; the oldest is never preempted."""
    tokens: list[int]
    num_prompt: int
    chain: KeyChain
    chunk_tokens: int
    adapter: str = ""
    """The identity of the adapter that `chain` is of; empty: of the model alone."""
    owner: OwnerTag | None = None
    """Whose chunks they are."""
    sampling: SamplingParams | None = None
    matcher: GrammarMatcher | None = None
    """Of the grammar that its output must follow; None: it is free."""
    indices: tuple[int, ...] = (0,)
    """Which completions it stands for: several until it forks after the prompt."""
    wants_load: bool = False
    """Ask the store for chunks before running."""
    awaits_handoff: bool = False
    """Another node is said to compute its chunks, and it may wait for them as long as that takes."""
    status: Status = Status.WAITING
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_cached: int | None = None
    """Leading prompt tokens that were never computed for it; None before it ran."""
    num_prompt_computed: int = 0
    """Prompt tokens computed for it, again after a preemption included."""
    num_scored: int = 0
    """Leading prompt tokens whose successor's logprob was told, where those of the prompt are wanted."""
    num_submitted: int = 0
    """Leading chunks that were given to the save job, or came from the store."""
    documents: tuple[PlacedDocument, ...] = ()
    """That are reused if they are found in blocks."""
    held: bool = False
    """Its documents are being got: it may not be admitted."""
    documents_due: bool = False
    """It has blocks, and its documents are to be put into them before it computes."""
    holes: list[tuple[int, int]] = field(default_factory=list)
    """Ranges of tokens, ahead of `num_computed`, whose KV its blocks have already."""
    passed_from: int | None = None
    """Where the holes began that it has passed and whose chunks are still to be made findable; None: there are none."""
    num_approximate: int = 0
    """Tokens of documents that were not computed for it, and are not what would have been computed."""
    prefix_limit: int | None = None
    """So many leading tokens are what their prefix makes them: what lies behind has no key. None: all."""
    forced: Sequence[int] = ()
    """Output tokens that are taken in the place of those that are drawn."""
    whole: bool = False
    """Whole distributions are wanted with its tokens."""
    busy: bool = False
    """A step or a load is writing into its blocks: they are given back when that has ended."""
    paused: bool = False
    """Its reader is slow: leave it out of steps."""
    _keys: list[ChunkKey] = field(default_factory=list)

    def __repr__(self) -> str:
        marks = " busy" * self.busy + " paused" * self.paused
        return (
            f"<TokenSequence {self.request_id}/{self.indices[0]} {self.status.name}{marks}, "
            f"{self.num_computed}/{len(self.tokens)} tokens computed, {len(self.block_table)} blocks>"
        )

    def set_status(self, status: Status) -> None:
        """Move on to `status`, which `TRANSITIONS` must allow."""
        assert status in TRANSITIONS[self.status], f"{self!r} cannot become {status.name}"
        self.status = status

    @property
    def output(self) -> list[int]:
        """Tokens after the prompt."""
        return self.tokens[self.num_prompt :]

    @property
    def num_left(self) -> int:
        """Known tokens whose KV is still to be computed."""
        left = len(self.tokens) - self.num_computed
        return left - sum(end - start for start, end in self.holes) if self.holes else left

    @property
    def keyed_tokens(self) -> int:
        """Leading tokens that have keys, those that are not computed yet included."""
        num_tokens, limit = len(self.tokens), self.prefix_limit
        return num_tokens if limit is None or limit > num_tokens else limit

    @property
    def scores_left(self) -> bool:
        """Whether logprobs of the prompt's tokens are wanted that were not told yet."""
        wanted = self.sampling is not None and self.sampling.prompt_logprobs is not None
        return wanted and self.num_scored < self.num_prompt - 1

    @property
    def num_reusable_chunks(self) -> int:
        """How many leading chunks need not be computed: one token always is, for its logits, if any are wanted, and
        each whose logits are; KV has none."""
        usable = usable_chunks(len(self.tokens) + (self.sampling is None), self.chunk_tokens)
        if self.scores_left:
            return min(usable, self.num_scored // self.chunk_tokens)
        return usable if self.prefix_limit is None else min(usable, self.prefix_limit // self.chunk_tokens)

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The ranges of tokens that are still to be computed, in order."""
        starts = [self.num_computed, *(end for _, end in self.holes)]
        stops = [*(start for start, _ in self.holes), len(self.tokens)]
        return [(start, stop) for start, stop in zip(starts, stops, strict=True) if start < stop]

    def limit_prefix(self, num_tokens: int) -> None:
        """What lies behind `num_tokens` has no key from now on."""
        self.prefix_limit = num_tokens if self.prefix_limit is None else min(self.prefix_limit, num_tokens)

    def keeps_rest(self, end: int, block_size: int) -> bool:
        """Whether rows of the block with position `end` are in a hole behind it."""
        return any(start >= end and start // block_size == end // block_size for start, _ in self.holes)

    def next_token(self, drawn: int) -> int:
        """The token that follows, given what was drawn."""
        at = len(self.tokens) - self.num_prompt
        return self.forced[at] if at < len(self.forced) else drawn

    def pass_holes(self) -> None:
        """Go on behind the holes that are reached."""
        while self.holes and self.holes[0][0] == self.num_computed:
            self.passed_from = self.num_computed if self.passed_from is None else self.passed_from
            self.num_computed = self.holes.pop(0)[1]

    def keys(self, num_chunks: int) -> Sequence[ChunkKey]:
        """Keys of the first `num_chunks` full chunks, hashed once each."""
        if num_chunks > len(self._keys):
            self.chain.extend(self._keys, self.tokens, num_chunks, self.chunk_tokens)
        return self._keys[:num_chunks]

    @property
    def public_keys(self) -> frozenset[ChunkKey]:
        """Of its full chunks that are nobody's own."""
        return frozenset(self.keys(min(self.chain.public_chunks, len(self.tokens) // self.chunk_tokens)))

    def key(self, chunk: int) -> ChunkKey:
        """Key of full chunk `chunk`."""
        if chunk >= len(self._keys):
            self.keys(chunk + 1)
        return self._keys[chunk]

    def fork(self, index: int) -> "TokenSequence":
        """A younger sequence with the same tokens and no blocks, standing for completion `index` alone."""
        return TokenSequence(
            request_id=self.request_id,
            age=(self.age[0], index),
            tokens=list(self.tokens),
            num_prompt=self.num_prompt,
            chain=self.chain,
            adapter=self.adapter,
            chunk_tokens=self.chunk_tokens,
            owner=self.owner,
            sampling=self.sampling,
            matcher=self.matcher.fork() if self.matcher is not None else None,
            indices=(index,),
            num_cached=self.num_cached,
            num_scored=self.num_scored,
            num_submitted=self.num_submitted,
            documents=self.documents,
            num_approximate=self.num_approximate,
            prefix_limit=self.prefix_limit,
            _keys=list(self._keys),
        )
