"""A small model of vLLM 0.32's scheduler (`v1/core/sched/scheduler.py`), as far as a KV connector sees it.

Waiting, running and KV-holding queues, a block pool with a prefix cache, chunked prefill, preemption, asynchronous
loads and their failures, steps in flight, drafts, a reset of the prefix cache between steps. The names are vLLM's.
"""

import random
from collections import deque

from support.vllm_scheduler_parts import BlockPool, Request, Step
from support.vllm_worker_model import Memory, WorkerModel

from engines.vllm.connector.orders import LegResult
from engines.vllm.connector.scheduler_half import SchedulerHalf
from engines.vllm.connector.scheduler_requests import RequestView, ScheduledRequest

Work = dict[Request, tuple[int, int, int, list[int]]]
"""(first token, tokens, drafts among them, blocks) of each request in a step."""


class SchedulerModel:
    """One engine: this scheduler, a scheduler half, a worker. `depth`: steps in flight (2: async scheduling)."""

    def __init__(
        self, half: SchedulerHalf, worker: WorkerModel, memory: Memory, dice: random.Random, *, depth: int, budget: int
    ):
        self.half, self.worker, self.memory, self.dice = half, worker, memory, dice
        self.depth, self.budget, self.block_size = depth, budget, memory.block_size
        self.pool = BlockPool(len(memory.slots))
        self.requests: dict[str, Request] = {}
        self.waiting: deque[Request] = deque()
        self.holding: list[Request] = []
        self.running: list[Request] = []
        self.finished_recving: set[str] = set()
        self.failed_recving: set[str] = set()
        self.finished_ids: set[str] = set()
        self.preempted_ids: list[str] = []
        self.in_flight: deque[tuple[Step, dict[Request, list[int]]]] = deque()
        self.unexecuted: deque[Step] = deque()
        self.seq = self.processed = 0
        self.deferred: deque[tuple[int, list[int]]] = deque()
        self.results: dict[str, LegResult] = {}
        self.load_failed: set[str] = set()
        self.num_preempted = self.num_resets = self.weights = 0

    # --- from outside

    def add(self, request: Request) -> None:
        self.requests[request.request_id] = request
        self.waiting.append(request)
        self.half.arrived(
            RequestView(
                request_id=request.request_id,
                token_ids=request.tokens,
                num_prompt_tokens=request.num_prompt,
                params=request.params,
                salt=request.salt.encode(),
                cacheable=request.cacheable,
            )
        )

    def abort(self, request: Request) -> None:
        """finish_requests."""
        delay = False
        for queue in (self.running, self.waiting, self.holding):
            if request in queue:
                queue.remove(request)
        if request.status == "loading":
            delay = request.request_id not in self.finished_recving
            self.finished_recving.discard(request.request_id)
            self.failed_recving.discard(request.request_id)
        self._finish(request, delay)

    def kind(self, request: Request) -> str:
        """What its KV depends on beside its tokens."""
        return f"{request.salt} of weights {self.weights}"

    def reset_prefix_cache(self, *, new_weights: bool) -> None:
        """With reset_running_requests; vLLM refuses while somebody else holds blocks. `new_weights`: the model's were
        changed, and the connector is reset too."""
        if self.holding or any(r.status == "finished" for r in self.requests.values()) or self.deferred:
            return
        if any(request.last_seq > self.processed for request in self.running):
            return  # their blocks could not be freed at once: vLLM would refuse too
        self.num_resets += 1
        while self.running:
            self._preempt(self.running.pop(), drop_stale=True)
        self.pool.reset()
        if new_weights:
            self.weights += 1
            self.half.reset()

    # --- one step

    def schedule(self) -> bool:
        """False when nothing may be put in flight any more."""
        if len(self.in_flight) + len(self.unexecuted) >= self.depth:
            return False
        budget, work = self.budget, Work()
        preempted = self._schedule_running(work, budget)
        budget -= sum(part[1] for part in work.values())
        if not preempted:
            self._schedule_waiting(work, budget)
        scheduled = [
            ScheduledRequest(r.request_id, first, count, table) for r, (first, count, _, table) in work.items()
        ]
        orders = self.half.build(scheduled, self.preempted_ids)
        assert list(orders.preempted) == self.preempted_ids
        self.seq += bool(work)
        for request, (first, count, _, _) in work.items():
            request.num_computed = first + count
            request.num_in_flight += count
            request.last_seq = self.seq
            if request.num_computed >= len(request.tokens) + request.num_placeholders and self.depth > 1:
                request.num_placeholders += 1
        self.unexecuted.append(Step(orders, work, self.finished_ids, self.seq))
        self.finished_ids, self.preempted_ids = set(), []
        return True

    def _schedule_running(self, work: Work, budget: int) -> bool:
        preempted, index = False, 0
        while index < len(self.running) and budget > 0:
            request = self.running[index]
            known = len(request.tokens) + request.num_placeholders
            num_new = min(known - request.num_computed, budget)
            last = request.num_prompt + request.max_tokens
            if num_new <= 0 or (
                request.num_placeholders > 0 and request.num_computed + 2 - request.num_placeholders >= last
            ):
                index += 1
                continue
            drafts = 0
            if self.depth == 1 and request.num_computed + num_new == len(request.tokens):
                drafts = min(self.dice.choice([0, 0, 1, 2]), budget - num_new)
            while not self._grow(request, request.num_computed + num_new + drafts):
                victim = self.running[-1]
                if victim.last_seq > self.processed:
                    return preempted
                self.running.pop()
                self._preempt(victim)
                preempted = True
                if victim is request:
                    return preempted
            work[request] = (request.num_computed, num_new + drafts, drafts, list(request.blocks))
            budget -= num_new + drafts
            index += 1
        return preempted

    def _schedule_waiting(self, work: Work, budget: int) -> None:
        for request in [*self.holding, *self.waiting]:
            if budget <= 0 or len(self.running) >= 4:
                break
            if request.status == "loading":
                if request.request_id not in self.finished_recving:
                    continue
                self._load_arrived(request)
            if request.num_stale and not request.drop_stale:
                continue
            computed, external, local = request.num_computed, 0, []
            if computed == 0:
                local = self._local_hit(request)
                answer = self._ask_half(request, len(local) * self.block_size)
                if answer is None:
                    continue
                external, computed = answer, len(local) * self.block_size + answer
                assert computed <= len(request.tokens), "more than the request has"
            num_new = 0 if external else min(len(request.tokens) - computed, budget)
            if not self._admit(request, local, computed + num_new, external > 0):
                break
            self.half.allocated(request.request_id, list(request.blocks), external)
            self._take_from_queues(request)
            request.num_computed = computed
            if external:
                assert request.request_id not in self.load_failed, "a second load after a failure"
                request.status = "loading"
                self.holding.append(request)
                continue
            request.status = "running"
            self.running.append(request)
            self._cache(request, computed + num_new)
            work[request] = (computed, num_new, 0, list(request.blocks))
            budget -= num_new

    def _ask_half(self, request: Request, num_local: int) -> int | None:
        answer, is_async = self.half.matched(request.request_id, num_local)
        if answer is not None and self.dice.random() < 0.2:
            assert self.half.matched(request.request_id, num_local) == (answer, is_async)
        if request.skip_reading:
            return 0
        if answer is None:
            assert not is_async
            return None
        assert is_async == (answer > 0)
        assert not answer or request.cacheable
        if answer > self.block_size and self.dice.random() < 0.05:  # vLLM may take less than it was offered
            answer = self.dice.randrange(self.block_size, answer, self.block_size)
        return answer

    def _take_from_queues(self, request: Request) -> None:
        (self.holding if request in self.holding else self.waiting).remove(request)

    def _load_arrived(self, request: Request) -> None:
        """_update_waiting_for_remote_kv."""
        self.finished_recving.remove(request.request_id)
        if request.request_id in self.failed_recving:
            self.failed_recving.remove(request.request_id)
            if request.num_computed < len(request.tokens) - 1:  # else all that is left is computed after any load
                self.load_failed.add(request.request_id)
            if request.num_computed:
                self._cache(request, request.num_computed)
            else:
                self._free_blocks(request)
        else:
            self._cache(request, request.num_computed)
        request.num_computed = min(request.num_computed, len(request.tokens) - 1)
        request.status = "waiting"

    # --- the worker, and what it answers

    def execute(self) -> None:
        step = self.unexecuted.popleft()
        self.worker.preempted(step.orders.preempted)
        sampled = {request: self._forward(request, *part) for request, part in step.work.items()}
        self.worker.offer(step.orders)
        self.in_flight.append((step, sampled))

    def _forward(self, request: Request, first: int, count: int, drafts: int, table: list[int]) -> list[int]:
        """The step's KV, from tokens that the blocks themselves must hold. Returns the tokens sampled."""
        kind = self.kind(request)
        slot = self.memory.at(table, first - 1) if first else (kind, ())
        assert slot is not None and slot[0] == kind
        tokens = slot[1]
        assert tokens == tuple(request.tokens[:first])[: len(tokens)] or len(request.tokens) < first
        for position in range(first):
            assert self.memory.at(table, position) == (kind, tokens[: position + 1]), "wrong KV before the step"
        if drafts:
            accepted = self.dice.randint(0, drafts)
        for position in range(first, first + count - drafts):
            token = request.tokens[position] if position < len(request.tokens) else next_token(tokens)
            tokens = (*tokens, token)
            self.memory.put(table, position, (kind, tokens))
        if first + count - drafts < len(request.tokens):
            return []
        sampled, start = [], first + count - drafts
        for n in range(drafts):
            if n < accepted:
                tokens = (*tokens, next_token(tokens))
                sampled.append(tokens[-1])
                self.memory.put(table, start + n, (kind, tokens))
            else:
                self.memory.put(table, start + n, (kind, (*tokens, 99)))
        return [*sampled, next_token(tokens)]

    def update_from_output(self) -> None:
        step, sampled = self.in_flight.popleft()
        sent, received, failed = self.worker.finished(step.finished)
        if step.work:
            self.processed += 1
        while self.deferred and self.deferred[0][0] <= self.processed:
            self.pool.release(self.deferred.popleft()[1])
        self._handle_invalid_blocks(failed)
        for request, (_, count, drafts, _) in step.work.items():
            request.num_in_flight -= count
            stale = request.num_stale > 0
            request.num_stale -= count if stale else 0
            if request.status == "finished" or (stale and request.drop_stale):
                continue
            self._append(request, sampled[request], drafts, stale)
        for name in received:
            request = self.requests[name]
            if request.status == "loading":
                self.finished_recving.add(name)
            else:
                assert request.status == "finished"
                self._forget(request)
        for name in sent:
            assert self.requests[name].status == "finished"
            self._forget(self.requests[name])

    def _append(self, request: Request, tokens: list[int], drafts: int, stale: bool) -> None:
        if tokens and drafts and not stale:
            request.num_computed -= drafts - (len(tokens) - 1)
        if tokens and not stale and request.num_placeholders:
            request.num_placeholders -= 1
        for token in tokens:
            request.tokens.append(token)
            if request.done:
                for queue in (self.running, self.waiting):
                    if request in queue:
                        queue.remove(request)
                self._finish(request, delay=False)
                return
        if not stale:
            self._cache(request, min(request.num_computed, len(request.tokens)))

    def _handle_invalid_blocks(self, failed: set[int]) -> None:
        for request in self.holding:
            if request.status != "loading":
                continue
            num_blocks = -(-request.num_computed // self.block_size)
            for index, block in enumerate(request.blocks[:num_blocks]):
                if block in failed:
                    request.num_computed = index * self.block_size
                    self.failed_recving.add(request.request_id)
                    break
        for request in self.running:
            assert not failed & set(request.blocks), "failed blocks of a request that runs"

    # --- blocks

    def owned(self, request_id: str) -> set[int]:
        request = self.requests[request_id]
        assert request.status in ("loading", "finished")
        return {block for block in request.blocks if self.pool.refs[block] == 1}

    def _local_hit(self, request: Request) -> list[int]:
        blocks: list[int] = []
        for end in range(self.block_size, len(request.tokens), self.block_size):
            block = self.pool.by_prefix.get((request.salt, tuple(request.tokens[:end])))
            if block is None or request.skip_reading:
                break
            blocks.append(block)
        return blocks

    def _admit(self, request: Request, local: list[int], end: int, load: bool) -> bool:
        """allocate_slots: all of the request must fit, and a load leaves the room that others need to go on."""
        lost = sum(self.pool.refs[block] == 0 for block in local)
        have = len(local) + len(request.blocks)
        free = len(self.pool.free) - lost
        reserved = sum(self._num_missing(other) for other in [*self.running, *self.holding]) if load else 0
        need, full = -(-end // self.block_size) - have, -(-len(request.tokens) // self.block_size) - have
        if max(need + reserved, full) > free or self.dice.random() < 0.1:
            return False
        self.pool.touch(local)
        request.blocks += local
        return self._grow(request, end)

    def _num_missing(self, request: Request) -> int:
        return max(0, -(-len(request.tokens) // self.block_size) - len(request.blocks))

    def _grow(self, request: Request, end: int) -> bool:
        need = max(0, -(-end // self.block_size) - len(request.blocks))
        if need > len(self.pool.free):
            return False
        request.blocks += self.pool.allocate(need)
        if request.status != "waiting":
            self._cache(request, min(end, len(request.tokens)))
        return True

    def _cache(self, request: Request, end: int) -> None:
        for index in range(min(end, len(request.tokens)) // self.block_size):
            prefix = (request.salt, tuple(request.tokens[: (index + 1) * self.block_size]))
            self.pool.cache(prefix, request.blocks[index])

    def _free_blocks(self, request: Request) -> None:
        if request.last_seq > self.processed and request.blocks:
            self.deferred.append((self.seq, request.blocks))
        else:
            self.pool.release(request.blocks)
        request.blocks = []

    def _preempt(self, request: Request, *, drop_stale: bool = False) -> None:
        self._free_blocks(request)
        request.status, request.num_computed, request.num_placeholders = "waiting", 0, 0
        request.drop_stale = drop_stale or (request.drop_stale and request.num_stale > 0)
        request.num_stale = request.num_in_flight
        self.waiting.appendleft(request)
        self.preempted_ids.append(request.request_id)
        self.num_preempted += 1

    def _finish(self, request: Request, delay: bool) -> None:
        request.status = "finished"
        computed = request.blocks[: -(-request.num_computed // self.block_size)]
        connector_delay, result = self.half.finished(request.request_id, holds_blocks=bool(computed))
        assert not (delay and connector_delay), "vLLM would free it twice"
        assert result.saving == connector_delay and result.ordered_chunks >= result.stored_chunks
        self.results[request.request_id] = result
        self.finished_ids.add(request.request_id)
        if not (delay or connector_delay):
            self._forget(request)

    def _forget(self, request: Request) -> None:
        self._free_blocks(request)
        del self.requests[request.request_id]


def next_token(tokens: tuple[int, ...]) -> int:
    """What the model says next."""
    return (sum(tokens[-3:]) + len(tokens)) % 3
