"""The connector's scheduler half: which chunks are loaded and saved, and when. Pure: no vLLM, no bytes, no clock.

Owns what is known of each live request, and the orders for the worker halves. vLLM's order of calls is `arrived`;
`matched` until there are blocks, then `allocated`; `build` ends each step; `finished` once. What vLLM does not tell
follows from it: `matched` after a load was ordered means that nothing of it came; `matched` of a running request, that
it was preempted between two steps; and how far a load came shows in where its request goes on computing.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from engines.vllm.connector.orders import LegParams, LegResult, LoadOrder, SaveOrder, StepOrders
from engines.vllm.connector.request_chunks import RequestChunks, handed_off_tokens
from kvcore.chunk_keys import usable_chunks
from kvcore.errors import ConfigError
from kvcore.types import ChunkKey


class Lookup(Protocol):
    """The store's index as seen from here. Whatever goes wrong behind it, each question is answered in bounded time."""

    def ask(self, request_id: str, keys: Sequence[ChunkKey]) -> None:
        """Find out how many leading chunks are complete on all ranks; `keys` are rank 0's. Does not block. An answer to
        an earlier question of this request is dropped."""

    def answer(self, request_id: str, *, wait_s: float) -> int | None:
        """So many leading chunks are complete. None: not known yet. May block for `wait_s` seconds; 0: not at all."""

    def forget(self, request_id: str) -> None:
        """Nobody asks for this request's answer any more. Nothing happens if nobody ever did."""


@dataclass(frozen=True, slots=True)
class RequestView:
    """What the half knows of a request of vLLM's."""

    request_id: str
    token_ids: Sequence[int]
    """Prompt and output so far: vLLM's own list, which grows. Tokens that are not sampled yet are not in it."""
    num_prompt_tokens: int
    params: LegParams | None
    salt: bytes
    cacheable: bool
    """False: its KV depends on more than its tokens (LoRA, images, prompt embeddings, ...). Never loaded nor saved."""


@dataclass(frozen=True, slots=True)
class ScheduledRequest:
    """A request's part in the step that is about to run."""

    request_id: str
    num_computed_tokens: int
    """Before the step."""
    num_scheduled_tokens: int
    block_ids: Sequence[int]
    """Its whole block table."""


class _Phase(enum.Enum):
    WAITING = enum.auto()
    LOADING = enum.auto()
    RUNNING = enum.auto()


@dataclass(slots=True)
class _Request:
    """`handoff`: one is open, as no blocks were given yet. `may_load`: not after a load failed."""

    view: RequestView
    chunks: RequestChunks
    may_load: bool
    handoff: bool
    phase: _Phase = _Phase.WAITING
    asked: bool = False
    num_asked: int = 0
    waited: bool = False
    answered: bool = False
    num_local: int = 0
    """As vLLM last said in `matched`, in tokens."""
    load_end: int = 0
    """Tokens that will be good if the load under way succeeds. 0: none is, or its end was seen."""
    num_stored: int = 0
    """Leading chunks that are complete in the store without a save of this request."""
    num_offered: int = 0
    """Leading chunks that are stored or ordered to be saved."""
    tail_offered: bool = False
    saving: bool = False
    """A SaveOrder was given to the worker halves since the last preemption."""
    preempted_early: bool = False
    """`matched` told of a preemption that `build` is still to list."""

    def load_ended(self, num_tokens: int) -> None:
        """So many leading tokens are good now."""
        failed = num_tokens < min(self.load_end, len(self.view.token_ids) - 1)  # the last one is computed in any case
        if failed:
            self.may_load = False
        self.num_stored = self.num_offered = (num_tokens if failed else self.load_end) // self.chunks.chunk_tokens
        self.load_end = 0

    def restart(self) -> None:
        """It lost its blocks. Its chunks may be in the store by now; saves of them may have been cancelled."""
        self.phase = _Phase.WAITING
        self.asked = self.answered = self.waited = False
        self.load_end = self.num_stored = self.num_offered = 0
        self.tail_offered = self.saving = False


class SchedulerHalf:
    """See the module. Not thread-safe: vLLM's scheduler has one thread. Everything held is of live requests."""

    def __init__(
        self,
        *,
        root_of: Callable[[bytes], ChunkKey],
        chunk_tokens: int,
        block_size: int,
        save_output: bool,
        lookup: Lookup,
        first_wait_s: float = 0.002,
    ) -> None:
        """`root_of`: a tenant's salt -> the root of its keys. `first_wait_s`: the whole engine waits that long for an
        answer, once a request at most, and once a step.

        Raises ConfigError when a chunk is not a whole number of blocks.
        """
        if block_size < 1 or chunk_tokens < 1 or chunk_tokens % block_size:
            raise ConfigError(
                f"kv.chunk_tokens: {chunk_tokens} is not a multiple of vLLM's block size, {block_size}. Correct it, "
                "or set engine.args.block-size to one of its divisors"
            )
        self._root_of = root_of
        self._chunk_tokens = chunk_tokens
        self._block_size = block_size
        self._save_output = save_output
        self._lookup = lookup
        self._first_wait_s = first_wait_s
        self._may_wait = True
        self._requests: dict[str, _Request] = {}
        self._loads: list[LoadOrder] = []

    def arrived(self, view: RequestView) -> None:
        """A new request: looks its chunks up at once, unless a prefiller is at them."""
        assert view.request_id not in self._requests, f"request {view.request_id} arrived twice"
        chunks = RequestChunks(
            self._root_of(view.salt), view.token_ids, chunk_tokens=self._chunk_tokens, block_size=self._block_size
        )
        handoff = view.cacheable and view.params is not None and view.params.handoff_chunks is not None
        request = _Request(view, chunks, may_load=view.cacheable, handoff=handoff)
        self._requests[view.request_id] = request
        if request.may_load and not handoff:
            self._ask(request)

    def matched(self, request_id: str, num_local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the local prefix hit can be loaded, and whether asynchronously. (None, False): ask
        again in a later step. Answers stay the same until blocks are given."""
        request = self._requests[request_id]
        if request.phase is _Phase.LOADING:
            request.load_ended(0)
            request.phase = _Phase.WAITING
        elif request.phase is _Phase.RUNNING:
            request.restart()
            request.preempted_early = True
        request.num_local = num_local_tokens
        end = self._num_loadable(request) if request.may_load else 0
        if end is None:
            return None, False
        if min(end, len(request.view.token_ids) - 1) <= num_local_tokens:  # the last one is computed in any case
            return 0, False
        return end - num_local_tokens, True

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The request has blocks. `num_external_tokens` > 0: these are to be loaded, behind what `matched` was last
        told is local; the LoadOrder goes out with the next `build`, whatever becomes of the request until then, as vLLM
        keeps the blocks until that load is reported. 0: the request is computed from where it stands."""
        request = self._requests[request_id]
        handoff, request.handoff = request.handoff, False
        if not num_external_tokens:
            request.phase = _Phase.RUNNING
            return
        request.phase = _Phase.LOADING
        request.load_end = request.num_local + num_external_tokens
        first, params = request.num_local // self._chunk_tokens, request.view.params
        self._loads.append(
            LoadOrder(
                request_id=request_id,
                leg=params.leg if params is not None else None,
                first_chunk=first,
                chunks=request.chunks.places(first, request.load_end, block_ids),
                keep_blocks=(request.num_local - first * self._chunk_tokens) // self._block_size,
                wait_until=params.wait_until if handoff and params is not None else None,
            )
        )

    def build(self, scheduled: Sequence[ScheduledRequest], preempted: Sequence[str]) -> StepOrders:
        """The orders of the step that is about to run. A request may be in both: it was preempted between two steps."""
        self._may_wait = True
        for request_id in preempted:
            request = self._requests.get(request_id)
            if request is None:
                continue
            if not request.preempted_early:
                request.restart()
            request.preempted_early = False
        saves = [order for part in scheduled if (order := self._save(part)) is not None]
        loads, self._loads = self._loads, []
        return StepOrders(tuple(loads), tuple(saves), tuple(preempted), idle=not scheduled)

    def finished(self, request_id: str, *, holds_blocks: bool = True) -> tuple[bool, LegResult]:
        """The request has ended, in whatever state: forget it. True: its blocks stay until it is reported as sent.

        `holds_blocks`: False when vLLM names no blocks of it, so that nothing is to be kept. That alone tells of a
        request that was preempted and aborted between two steps; the worker halves cancel its saves without a report.

        Never True while a load is under way: vLLM keeps the blocks itself until that load is reported, and a report as
        sent would free the request twice. There is no such state: saves begin when the load has ended, and the
        preemption that comes before another load cancels them.
        """
        request = self._requests.pop(request_id)
        self._lookup.forget(request_id)
        assert not (request.saving and request.phase is _Phase.LOADING)
        saving = request.saving and holds_blocks
        return saving, LegResult(saving=saving, stored_chunks=request.num_stored, ordered_chunks=request.num_offered)

    # --- loads -------------------------------------------------------------------------------------------------

    def _ask(self, request: _Request) -> None:
        request.asked = True
        request.num_asked = usable_chunks(len(request.view.token_ids), self._chunk_tokens)
        request.answered = not request.num_asked
        if request.num_asked:
            self._lookup.ask(request.view.request_id, request.chunks.keys(request.num_asked))

    def _num_loadable(self, request: _Request) -> int | None:
        """Leading tokens whose KV the store has, or will have. None: not known yet."""
        if request.handoff:
            assert request.view.params is not None
            return handed_off_tokens(request.view.params, request.view.num_prompt_tokens, self._chunk_tokens)
        if not request.asked:
            self._ask(request)
        if not request.answered:
            wait_s = 0.0
            if self._may_wait and not request.waited:
                self._may_wait, request.waited, wait_s = False, True, self._first_wait_s
            answer = self._lookup.answer(request.view.request_id, wait_s=wait_s)
            if answer is None:
                return None
            request.answered = True
            request.num_stored = request.num_offered = min(answer, request.num_asked)
        return request.num_stored * self._chunk_tokens

    # --- saves -------------------------------------------------------------------------------------------------

    def _save(self, part: ScheduledRequest) -> SaveOrder | None:
        """What is full after this step and was not offered yet."""
        request = self._requests[part.request_id]
        if request.load_end:
            request.load_ended(part.num_computed_tokens)
        view, params = request.view, request.view.params
        if not view.cacheable:
            return None
        # Drafts that may be rejected and tokens that are not sampled yet count as scheduled, but are not in token_ids.
        end = min(part.num_computed_tokens + part.num_scheduled_tokens, len(view.token_ids))
        tail = self._saves_tail(request) and end >= view.num_prompt_tokens
        if tail or not self._save_output:
            end = min(end, view.num_prompt_tokens)
        if not tail:
            end -= end % self._chunk_tokens
        first = request.num_offered
        if end <= first * self._chunk_tokens:
            return None
        reserve = () if request.saving else self._reserve(request, first, end)
        request.num_offered, request.saving = end // self._chunk_tokens, True
        request.tail_offered |= tail
        return SaveOrder(
            request_id=part.request_id,
            leg=params.leg if params is not None else None,
            first_chunk=first,
            chunks=request.chunks.places(first, end, part.block_ids),
            prefer_segment=params.prefer_segment if params is not None else None,
            reserve=reserve,
        )

    def _saves_tail(self, request: _Request) -> bool:
        """The prompt ends within a chunk, and a prefill leg is to save what is there of it."""
        params = request.view.params
        full, rest = divmod(request.view.num_prompt_tokens, self._chunk_tokens)
        wanted = params is not None and params.tail and params.handoff_chunks is None
        return wanted and rest > 0 and request.num_offered <= full and not request.tail_offered

    def _reserve(self, request: _Request, first: int, end: int) -> tuple[tuple[ChunkKey, int], ...]:
        prompt = request.view.num_prompt_tokens
        if not self._saves_tail(request):
            prompt -= prompt % self._chunk_tokens
        end = max(end, prompt)
        return tuple(
            (request.chunks.key(index, end), request.chunks.num_blocks(index, end))
            for index in range(first, -(-end // self._chunk_tokens))
        )
