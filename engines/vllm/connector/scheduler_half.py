"""The connector's scheduler half: which chunks are loaded and saved, and when. Pure: no vLLM, no bytes.

Owns what is known of each live request, and the orders for the worker halves. vLLM's order of calls is `arrived`;
`matched` until there are blocks, then `allocated`; `build` ends each step; `finished` once. vLLM does not say how loads
end, nor that a request was preempted between two steps: both are inferred from these calls (`scheduler_requests`).
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import LegResult, LoadOrder, SaveOrder, StepOrders
from engines.vllm.connector.request_chunks import RequestChunks, handed_off_tokens
from engines.vllm.connector.scheduler_requests import (
    LiveRequest,
    LoadPhase,
    RequestView,
    ScheduledRequest,
    SchedulerCall,
    SharedLoads,
)
from kvcore.chunk_keys import KeyChain, owner_of, usable_chunks
from kvcore.clock import Clock
from kvcore.errors import ConfigError
from kvcore.types import ChunkKey


class Lookup(Protocol):
    """The store's index as seen from here. Each lookup has an answer in bounded time, whatever fails behind it."""

    def ask(self, request_id: str, keys: Sequence[ChunkKey]) -> None:
        """Look up how many leading chunks are complete on all ranks; `keys` are rank 0's. Does not block. The answer to
        an earlier lookup of this request is dropped."""

    def answer(self, request_id: str, *, wait_s: float) -> int | None:
        """How many leading chunks are complete; None while that is not known. Blocks for at most `wait_s` seconds."""

    def forget(self, request_id: str) -> None:
        """The request has ended: drop its answer, if it has one."""


class SchedulerHalf:
    """See the module. Not thread-safe: vLLM's scheduler has one thread. Everything held is of live requests."""

    def __init__(
        self,
        *,
        chain_of: Callable[[bytes], KeyChain],
        chunk_tokens: int,
        block_size: int,
        save_output: bool,
        lookup: Lookup,
        clock: Clock,
        share_loads: bool = True,
        limits: ConnectorLimits = ConnectorLimits(),
    ) -> None:
        """`chain_of`: a tenant's salt -> how its keys follow. `share_loads`: what one request has loaded, others find
        in vLLM's prefix cache.

        Raises ConfigError when a chunk is not a whole number of blocks.
        """
        if block_size < 1 or chunk_tokens < 1 or chunk_tokens % block_size:
            raise ConfigError(
                f"kv.chunk_tokens: {chunk_tokens} is not a multiple of vLLM's block size, {block_size}. Correct it, "
                "or set engine.args.block-size to one of its divisors"
            )
        self._chain_of = chain_of
        self._chunk_tokens = chunk_tokens
        self._block_size = block_size
        self._save_output = save_output
        self._lookup = lookup
        self._limits = limits
        self._share_loads = share_loads
        self._loaders = SharedLoads(limits, clock)
        self._may_wait = True
        """No lookup was waited for in this step yet."""
        self._requests: dict[str, LiveRequest] = {}
        self._loads: list[LoadOrder] = []

    def __repr__(self) -> str:
        phases = ", ".join(
            f"{sum(request.phase is phase for request in self._requests.values())} {phase.value.lower()}"
            for phase in LoadPhase
        )
        return f"<SchedulerHalf {phases}>"

    def arrived(self, view: RequestView) -> None:
        """A new request: looks its chunks up at once, unless a prefiller is at them."""
        assert view.request_id not in self._requests, f"request {view.request_id} arrived twice"
        chunks = self._chunks_of(view)
        may_load = view.cacheable and not view.wants_logits
        handoff = may_load and view.params is not None and view.params.handoff_chunks is not None
        request = LiveRequest(view, chunks, may_load=may_load, handoff=handoff)
        self._requests[view.request_id] = request
        if request.may_load and not handoff:
            self._ask(request)

    def matched(self, request_id: str, num_local_tokens: int) -> tuple[int | None, bool]:
        """How many tokens behind the local prefix hit can be loaded, and whether asynchronously. (None, False): ask
        again in a later step. Answers stay the same until blocks are given."""
        request = self._requests[request_id]
        # vLLM calls this for a request that has computed nothing and holds no blocks. How it came to that:
        # 1. It has not had blocks so far, or `build` has listed its preemption: it is WAITING, and all is known.
        # 2. It was LOADING. The load has ended, and not one token of it came; else vLLM would go on behind them.
        # 3. It was RUNNING. It was preempted between two steps (a reset of the prefix cache), and the next `build` will
        #    list that. By then the request may be loading again, which must not be undone: it is noted here.
        self._loaders.end(request)
        if request.phase is LoadPhase.LOADING:
            request.load_ended(0)
            self._renew(request)
        elif request.phase is LoadPhase.RUNNING:
            self._lose_blocks(request)
            request.preempted_early = True
        request.enter(SchedulerCall.MATCHED)
        request.num_local = num_local_tokens
        # The answers, in tokens of the prompt:
        # 1. Nothing may be loaded: the request is not cacheable, or a load of it has failed.
        # 2. The lookup has no answer yet. vLLM leaves the request in its queue and asks again.
        # 3. There is nothing behind the local hit but perhaps the last token, which is computed in any case.
        # 4. Another request is loading what this one lacks, and it waits for that.
        # 5. What is behind the local hit is loaded, asynchronously. A prefiller's chunks may not be there yet.
        end = self._num_loadable(request) if request.may_load else 0
        if end is None:
            return None, False
        if min(end, len(request.view.token_ids) - 1) <= num_local_tokens:
            return 0, False
        if self._share_loads and self._loaders.must_wait(
            request, *(request.chunks.key(at // self._chunk_tokens, end) for at in (num_local_tokens, end - 1))
        ):
            return None, False
        return end - num_local_tokens, True

    def allocated(self, request_id: str, block_ids: Sequence[int], num_external_tokens: int) -> None:
        """The request has blocks.

        1. `num_external_tokens` is 0: the request is computed, behind what is local or loaded already.
        2. It is more: so many tokens are loaded, behind the local ones of the last `matched`. The LoadOrder goes out
           with the next `build` even if the request ends before, as vLLM keeps the blocks until the load is reported.
        """
        request = self._requests[request_id]
        handoff, request.handoff = request.handoff, False
        self._loaders.end(request)
        if not num_external_tokens:
            request.enter(SchedulerCall.ALLOCATED_TO_COMPUTE)
            return
        request.enter(SchedulerCall.ALLOCATED_TO_LOAD)
        request.load_end = request.num_local + num_external_tokens
        first, params = request.num_local // self._chunk_tokens, request.view.params
        chunks = request.chunks.places(first, request.load_end, block_ids)
        self._loaders.begin(request, [place.key for place in chunks], waits=handoff)
        self._loads.append(
            LoadOrder(
                request_id=request_id,
                leg=params.leg if params is not None else None,
                first_chunk=first,
                chunks=chunks,
                keep_blocks=(request.num_local - first * self._chunk_tokens) // self._block_size,
                wait_until=params.wait_until if handoff and params is not None else None,
                owner=owner_of(request.view.salt),
            )
        )

    def build(self, scheduled: Sequence[ScheduledRequest], preempted: Sequence[str]) -> StepOrders:
        """The orders of the step that is about to run. A request may be in both: it was preempted between two steps."""
        self._may_wait = True
        # A request that is listed as preempted:
        # 1. It has finished since, and is known no more. The worker halves still have to end its jobs.
        # 2. `matched` has seen the preemption, and the request has gone on from there.
        # 3. It loses its blocks now.
        for request_id in preempted:
            request = self._requests.get(request_id)
            if request is None:
                continue
            if not request.preempted_early:
                request.enter(SchedulerCall.PREEMPTED)
                self._lose_blocks(request)
            request.preempted_early = False
        saves = [order for part in scheduled if (order := self._save(part)) is not None]
        loads, self._loads = self._loads, []
        return StepOrders(tuple(loads), tuple(saves), tuple(preempted), idle=not scheduled)

    def finished(self, request_id: str, *, holds_blocks: bool = True) -> tuple[bool, LegResult]:
        """The request has ended: forget it. True: vLLM keeps its blocks until it is reported as sent.

        1. No save was ordered since its last preemption. Nothing reads the blocks: False.
        2. Saves were ordered, and it holds its blocks. The worker halves report it once the saves have ended: True.
        3. Saves were ordered, but vLLM names no blocks of it (`holds_blocks` is False). It was preempted and aborted
           between two steps, which nothing else shows. The worker halves cancel its saves and report nothing: False.
        4. A load is under way. vLLM keeps the blocks by itself until that load is reported, and a report as sent would
           free the request a second time. Case 2 never meets this: saves begin when the load has ended, and the
           preemption that comes before another load cancels them. So: False.
        """
        request = self._requests.pop(request_id)
        self._lookup.forget(request_id)
        self._loaders.give_up(request, self._requests.values())
        assert not (request.saving and request.phase is LoadPhase.LOADING)
        saving = request.saving and holds_blocks
        return saving, LegResult(saving=saving, stored_chunks=request.num_stored, ordered_chunks=request.num_offered)

    def reset(self) -> None:
        """`chain_of` gives other roots from now on: what was stored before is not loaded any more. A live request:

        1. It has no blocks. It is looked up anew, under the new root; no prefiller's chunks are waited for.
        2. It holds KV of before, or loads it. It goes on with that, as it does when vLLM's own cache is reset, but
           saves nothing more, under either root, until it has lost its blocks. Saves that were ordered go on.
        """
        for request in self._requests.values():
            request.outdated = True
            if request.phase is LoadPhase.WAITING:
                request.handoff = False
                self._lose_blocks(request)

    def _lose_blocks(self, request: LiveRequest) -> None:
        self._loaders.give_up(request, self._requests.values())
        request.lose_blocks()
        self._renew(request)

    def _renew(self, request: LiveRequest) -> None:
        """It holds no KV: a reset that came before is over for it."""
        if request.outdated:
            request.outdated = request.asked = request.answered = request.waited = False
            request.num_stored = request.num_offered = 0
            request.chunks = self._chunks_of(request.view)

    def _chunks_of(self, view: RequestView) -> RequestChunks:
        return RequestChunks(
            self._chain_of(view.salt), view.token_ids, chunk_tokens=self._chunk_tokens, block_size=self._block_size
        )

    # --- loads -------------------------------------------------------------------------------------------------

    def _ask(self, request: LiveRequest) -> None:
        request.asked = True
        request.num_asked = usable_chunks(len(request.view.token_ids), self._chunk_tokens)
        request.answered = not request.num_asked
        if request.num_asked:
            self._lookup.ask(request.view.request_id, request.chunks.keys(request.num_asked))

    def _num_loadable(self, request: LiveRequest) -> int | None:
        """Leading tokens whose KV the store has, or will have. None: not known yet.

        1. A prefiller is computing them: as many as its handoff says. The store is not asked.
        2. The lookup was answered: as many as it found. That stays so until the request is preempted.
        3. The lookup is under way: it is waited for `limits.first_wait_s` if neither this request nor this step has
           waited yet, otherwise not at all.
        """
        if request.handoff:
            assert request.view.params is not None
            return handed_off_tokens(request.view.params, request.view.num_prompt_tokens, self._chunk_tokens)
        if not request.asked:
            self._ask(request)
        if not request.answered:
            wait_s = 0.0
            if self._may_wait and not request.waited:
                self._may_wait, request.waited, wait_s = False, True, self._limits.first_wait_s
            answer = self._lookup.answer(request.view.request_id, wait_s=wait_s)
            if answer is None:
                return None
            request.answered = True
            request.num_stored = request.num_offered = min(answer, request.num_asked)
        return request.num_stored * self._chunk_tokens

    # --- saves -------------------------------------------------------------------------------------------------

    def _save(self, part: ScheduledRequest) -> SaveOrder | None:
        """What is full after this step and was not offered yet.

        1. It ends at the last full chunk of what is computed by then and known: drafts that may be rejected, and tokens
           that are not sampled yet, count as scheduled but are not in `token_ids`.
        2. A prefill leg's last step: it ends with the prompt, whose rest is one more, short chunk.
        3. Generated tokens are not to be saved: it ends with the prompt's last full chunk.
        """
        request = self._requests[part.request_id]
        if request.load_end:
            request.load_ended(part.num_computed_tokens)
        view, params = request.view, request.view.params
        if not view.cacheable or request.outdated:
            return None
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
            owner=owner_of(view.salt),
            reserve=reserve,
            public=request.chunks.public_keys(view.num_prompt_tokens) if reserve else (),
        )

    def _saves_tail(self, request: LiveRequest) -> bool:
        """The prompt ends within a chunk, and a prefill leg is to save what is there of it."""
        params = request.view.params
        full, rest = divmod(request.view.num_prompt_tokens, self._chunk_tokens)
        wanted = params is not None and params.tail and params.handoff_chunks is None
        return wanted and rest > 0 and request.num_offered <= full and not request.tail_offered

    def _reserve(self, request: LiveRequest, first: int, end: int) -> tuple[tuple[ChunkKey, int], ...]:
        """As SaveOrder.reserve, for a first order of chunks from `first` up to token `end`."""
        prompt = request.view.num_prompt_tokens
        if not self._saves_tail(request):
            prompt -= prompt % self._chunk_tokens
        end = max(end, prompt)
        return tuple(
            (request.chunks.key(index, end), request.chunks.num_blocks(index, end))
            for index in range(first, -(-end // self._chunk_tokens))
        )
