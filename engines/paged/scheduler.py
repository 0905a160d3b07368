"""Which sequences compute which tokens in the next step, and who gives way when blocks run out. Pure.

Decodes first, then prompts, oldest first. A prompt gets all its blocks when it is admitted, so only decodes can run
out; then the youngest holder gives its blocks up and is computed again later. The oldest never does: all move on.
What one prompt computes or loads no other does: it waits, without place and blocks, and takes the chunks that are full.
"""

from bisect import insort

from engines.paged.blocks import BlockManager
from engines.paged.documents import reuse_documents
from engines.paged.plan import Plan, Work
from engines.paged.sequence import Status, TokenSequence
from kvcore.errors import OverloadedError
from kvcore.types import ChunkKey


class Scheduler:
    """Queues of sequences over one BlockManager. `schedule` opens a step, `complete` (or `fail`) closes it; between
    them sequences may be added and removed."""

    def __init__(self, blocks: BlockManager, *, max_batch_tokens: int, max_sequences: int, max_waiting: int) -> None:
        assert max_batch_tokens > 0 and max_sequences > 0
        self.blocks = blocks
        self.max_batch_tokens = max_batch_tokens
        self.max_sequences = max_sequences
        self.max_waiting = max_waiting
        self.waiting: list[TokenSequence] = []
        self.running: list[TokenSequence] = []
        self.loading: list[TokenSequence] = []
        self.preemptions = 0

    def __repr__(self) -> str:
        return (
            f"<Scheduler {len(self.running)} running, {len(self.waiting)} waiting, {len(self.loading)} loading, "
            f"{self.preemptions} preemptions, {self.blocks!r}>"
        )

    def add(self, sequence: TokenSequence) -> None:
        """Queue a new sequence. Raises OverloadedError when `max_waiting` are queued."""
        if len(self.waiting) >= self.max_waiting:
            raise OverloadedError(f"{len(self.waiting)} requests are waiting for the engine already; retry later")
        _insert(self.waiting, sequence)

    def schedule(self) -> Plan:
        """Plan the next step and take the blocks for it. Must not be called while a step is under way."""
        # 1. Decodes (one token left), oldest first, while the budget of tokens lasts. Each needs a block for its token:
        #    a. it has one, or one could be made free by preempting younger sequences: it is in the step;
        #    b. it was the youngest holder of blocks itself: it was preempted and waits;
        #    c. loads and saves hold all other blocks: it keeps its own and sits this step out (out_of_blocks).
        #    One that got its block may still be preempted for an older one behind it, so its status is looked at again.
        # 2. Waiting sequences are admitted: they load, run, or turn out to be in the cache.
        # 3. Prompts, oldest first, share what is left of the budget. A prompt got all its blocks when it was admitted.
        plan = Plan()
        scheduled: list[TokenSequence] = []
        budget = self.max_batch_tokens
        for sequence in list(self.running):
            if budget and sequence.status is Status.RUNNING and sequence.num_left == 1 and not sequence.paused:
                if self._ensure_block(sequence):
                    scheduled.append(sequence)
                    budget -= 1
                elif sequence.status is Status.RUNNING:
                    plan.out_of_blocks = True
        decoding = [sequence for sequence in scheduled if sequence.status is Status.RUNNING]
        plan.work = [Work(sequence, sequence.num_computed, 1) for sequence in decoding]
        self._admit(plan)
        for sequence in self.running:
            if sequence in scheduled or sequence.paused or not sequence.num_left or not self._has_blocks(sequence):
                continue
            if not budget:
                break
            if sequence.documents_due:
                sequence.documents_due = False
                reuse_documents(sequence, self.blocks, plan)
            for start, stop in sequence.runs:
                count = self._slice_tokens(sequence, start, stop, budget)
                plan.work.append(Work(sequence, start, count))
                budget -= count
                if start + count < stop or not budget:
                    break
        for item in plan.work:
            item.sequence.busy = True
        return plan

    def complete(self, plan: Plan) -> list[TokenSequence]:
        """Close a step that succeeded: count its tokens, seal full chunks, give back the blocks of those removed
        meanwhile. Returns the sequences still alive, in the order of `plan.work`."""
        alive: list[TokenSequence] = []
        for item in plan.work:
            sequence, before = item.sequence, item.sequence.num_computed
            if item.start == before:  # else it was removed meanwhile, and freed with a run before
                sequence.num_computed = end = before + item.num_tokens
                if before < sequence.num_prompt:
                    sequence.num_prompt_computed += min(end, sequence.num_prompt) - before
                if sequence.holes:
                    sequence.pass_holes()
            if sequence.passed_from is not None:  # the step has moved rows there
                before, sequence.passed_from = min(before, sequence.passed_from), None
            if (first := before // sequence.chunk_tokens) != sequence.num_computed // sequence.chunk_tokens:
                self.seal(sequence, first)
            if self.clear_busy(sequence) and not (alive and alive[-1] is sequence):
                alive.append(sequence)
        self.blocks.release(plan.sources)
        return alive

    def fail(self, plan: Plan) -> None:
        """Close a step that failed: what it wrote is nobody's, and its sequences are removed."""
        for item in plan.work:
            self.clear_busy(item.sequence)
            self.remove(item.sequence)
        self.blocks.release(plan.sources)

    def loaded(self, sequence: TokenSequence, num_chunks: int) -> None:
        """The first `num_chunks` chunks of its blocks hold KV now, while its load goes on."""
        if sequence.status is Status.LOADING:
            first = sequence.num_computed // sequence.chunk_tokens
            sequence.num_computed = num_chunks * sequence.chunk_tokens
            self.seal(sequence, first)

    def load_ended(self, sequence: TokenSequence, num_chunks: int) -> bool:
        """As `loaded`, and no more will be. False: it was removed meanwhile."""
        self.loaded(sequence, num_chunks)
        if sequence.status is Status.LOADING:
            self.loading.remove(sequence)
            self._enqueue(sequence)
        return self.clear_busy(sequence)

    def seal(self, sequence: TokenSequence, first_chunk: int) -> None:
        """Make the full chunks from `first_chunk` on findable."""
        per_chunk = self.blocks.blocks_per_chunk
        for chunk in range(first_chunk, min(sequence.num_computed, sequence.keyed_tokens) // sequence.chunk_tokens):
            blocks = sequence.block_table[chunk * per_chunk : (chunk + 1) * per_chunk]
            self.blocks.seal(sequence.key(chunk), blocks)

    def fork(self, sequence: TokenSequence) -> list[tuple[TokenSequence, tuple[int, int] | None]]:
        """Split a sequence that stands for several completions. Full blocks are shared. Returns the new sequences with
        the (source, target) of the partial block to copy at once, if any. Without room, one queues to compute again."""
        indices, sequence.indices = sequence.indices[1:], sequence.indices[:1]
        full, partial = divmod(sequence.num_computed, self.blocks.block_size)
        forks: list[tuple[TokenSequence, tuple[int, int] | None]] = []
        for index in indices:
            child, copy = sequence.fork(index), None
            forks.append((child, copy))
            if len(self.running) >= self.max_sequences or not self.blocks.can_allocate(1 if partial else 0):
                _insert(self.waiting, child)
                continue
            self.blocks.retain(sequence.block_table[:full])
            child.block_table = sequence.block_table[:full]
            child.num_computed = sequence.num_computed
            if partial:
                child.block_table += self.blocks.allocate(1)
                forks[-1] = (child, (sequence.block_table[full], child.block_table[full]))
            self._start_running(child)
        return forks

    def remove(self, sequence: TokenSequence) -> None:
        """Remove it from its queue and free its blocks: now, or when the step or load that writes them has ended.
        Nothing happens to one that is finished already."""
        if sequence.status is Status.FINISHED:
            return
        queue = {Status.WAITING: self.waiting, Status.RUNNING: self.running, Status.LOADING: self.loading}
        queue[sequence.status].remove(sequence)
        sequence.set_status(Status.FINISHED)
        if not sequence.busy:
            self._free(sequence)

    def clear_busy(self, sequence: TokenSequence) -> bool:
        """The step or load that wrote its blocks has ended. False: it was removed meanwhile, and is now freed."""
        sequence.busy = False
        if sequence.status is Status.FINISHED:
            self._free(sequence)
        return sequence.status is not Status.FINISHED

    def check(self) -> None:
        """Assert every invariant (tests, simulation)."""
        self.blocks.check()
        for queue, status in (
            (self.waiting, Status.WAITING),
            (self.running, Status.RUNNING),
            (self.loading, Status.LOADING),
        ):
            assert all(sequence.status is status for sequence in queue)
            assert len({id(sequence) for sequence in queue}) == len(queue)
        assert len(self.running) <= self.max_sequences and len(self.loading) <= self.max_sequences
        for sequence in [*self.waiting, *self.running, *self.loading]:
            assert len(sequence.block_table) * self.blocks.block_size >= sequence.num_computed

    def _admit(self, plan: Plan) -> None:
        """Move waiting sequences on, oldest first, until one has no place or no blocks: nobody overtakes it. Those that
        follow another one are left where they are."""
        computing = {key for sequence in self.running if (key := _chunk_in_hand(sequence)) is not None}
        loading = {(s.awaits_handoff, key) for s in self.loading if (key := self._next_missing(s)) is not None}
        for sequence in list(self.waiting):
            # 1. A running prompt computes the chunk that it needs next, or another one that would wait for it in the
            #    same way is loading it: it waits until that is found here, or the other one has ended.
            # 2. It wants to load, and the cache here lacks chunks that the store may have: it loads, with a place in
            #    `loading`, and comes back to `waiting` afterwards.
            # 3. It wanted to load, and found all its chunks here: it needs a place in `running` instead. Is there none,
            #    it stays the first in the queue, and keeps what it found.
            # 4. It runs. Each time it begins, `num_cached` falls to what was found this time.
            # It is left where it is while its documents are being got.
            if sequence.held:
                continue
            queue = self.loading if sequence.wants_load else self.running
            if len(queue) >= self.max_sequences:
                return
            if computing or (loading and sequence.wants_load):
                missing = self._next_missing(sequence)
                if missing in computing or (sequence.wants_load and (sequence.awaits_handoff, missing) in loading):
                    continue
            if not self._reuse_and_allocate(sequence):
                return
            if sequence.wants_load and sequence.num_computed < sequence.num_reusable_chunks * sequence.chunk_tokens:
                self.waiting.remove(sequence)
                sequence.wants_load, sequence.busy = False, True
                sequence.set_status(Status.LOADING)
                _insert(self.loading, sequence)
                plan.loads.append(sequence)
                loading.add((sequence.awaits_handoff, sequence.key(sequence.num_computed // sequence.chunk_tokens)))
                continue
            if len(self.running) >= self.max_sequences:
                sequence.wants_load = False
                return
            self.waiting.remove(sequence)
            cached = min(sequence.num_computed, sequence.num_prompt)
            sequence.num_cached = cached if sequence.num_cached is None else min(sequence.num_cached, cached)
            sequence.documents_due = bool(sequence.documents)
            self._start_running(sequence)
            if sequence.num_left == 0:
                plan.fully_cached.append(sequence)
            elif (key := _chunk_in_hand(sequence)) is not None:
                computing.add(key)

    def _next_missing(self, sequence: TokenSequence) -> ChunkKey | None:
        """The first reusable chunk that it neither has nor would find here."""
        chunk, limit = sequence.num_computed // sequence.chunk_tokens, sequence.num_reusable_chunks
        while chunk < limit and self.blocks.holds(sequence.key(chunk)):
            chunk += 1
        return sequence.key(chunk) if chunk < limit else None

    def _reuse_and_allocate(self, sequence: TokenSequence) -> bool:
        """Reuse what is found, allocate the rest for all its tokens. False: not enough blocks, it holds none now."""
        per_chunk, size = self.blocks.blocks_per_chunk, self.blocks.block_size
        # Reuse: leading chunks, as far as they are found one after another behind those that it has (a load may have
        # brought some). A found chunk takes the place of the blocks that it holds for it, if it holds any.
        limit = sequence.num_reusable_chunks
        found = sequence.num_computed // sequence.chunk_tokens
        while found < limit and (blocks := self.blocks.reuse_chunk(sequence.key(found))):
            start = found * per_chunk
            self.blocks.release(sequence.block_table[start : start + per_chunk])
            sequence.block_table[start : start + per_chunk] = blocks
            found += 1
        sequence.num_computed = max(sequence.num_computed, found * per_chunk * size)
        # Allocate the rest:
        # 1. there are enough blocks, by eviction too: done;
        # 2. other waiting sequences hold blocks (they have loaded): the youngest gives its own up;
        # 3. nobody who waits holds any: it gives up what it has, or it could block older ones for ever.
        missing = self.blocks.blocks_for(len(sequence.tokens)) - len(sequence.block_table)
        while not self.blocks.can_allocate(missing):
            younger = [other for other in self.waiting if other.block_table and other is not sequence]
            if not younger:
                self._free(sequence)
                return False
            self._preempt(younger[-1])
        sequence.block_table += self.blocks.allocate(max(0, missing))
        return True

    def _has_blocks(self, sequence: TokenSequence) -> bool:
        """Whether its blocks hold all its tokens."""
        return len(sequence.block_table) * self.blocks.block_size >= len(sequence.tokens)

    def _ensure_block(self, sequence: TokenSequence) -> bool:
        """A block for its next token, by preemption of younger ones if need be. False: it was preempted itself, or all
        other blocks are held by loads and saves and it keeps its own."""
        if self._has_blocks(sequence):
            return True
        while not self.blocks.can_allocate(1):
            holders = [other for other in [*self.waiting, *self.running] if other.block_table and other is not sequence]
            if not holders:
                return False
            victim = max([*holders, sequence], key=_age)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.block_table += self.blocks.allocate(1)
        return True

    def _preempt(self, sequence: TokenSequence) -> None:
        """Free its blocks. It computes its tokens again later, or loads them, or finds them in the cache."""
        self.preemptions += 1
        self._free(sequence)
        if sequence.status is Status.RUNNING:
            self.running.remove(sequence)
            self._enqueue(sequence)

    def _slice_tokens(self, sequence: TokenSequence, start: int, stop: int, budget: int) -> int:
        """All of a run, or what the budget allows, then up to a chunk's end: equal chunk grids give equal bits."""
        if stop - start <= budget:
            return stop - start
        end = start + budget
        aligned = end - end % sequence.chunk_tokens
        return (aligned if aligned > start else end) - start

    def _enqueue(self, sequence: TokenSequence) -> None:
        sequence.set_status(Status.WAITING)
        _insert(self.waiting, sequence)

    def _start_running(self, sequence: TokenSequence) -> None:
        sequence.set_status(Status.RUNNING)
        _insert(self.running, sequence)

    def _free(self, sequence: TokenSequence) -> None:
        blocks, sequence.block_table, sequence.num_computed = sequence.block_table, [], 0
        sequence.holes.clear()
        self.blocks.release(blocks)


def _chunk_in_hand(sequence: TokenSequence) -> ChunkKey | None:
    """The full chunk of a prompt that its next step works on. None of one that has computed its prompt, or is paused:
    nobody can rely on it."""
    chunk = sequence.num_computed // sequence.chunk_tokens
    end = (chunk + 1) * sequence.chunk_tokens
    full = end <= sequence.num_prompt and end <= sequence.keyed_tokens
    return sequence.key(chunk) if full and not sequence.paused else None


def _age(sequence: TokenSequence) -> tuple[int, int]:
    return sequence.age


def _insert(queue: list[TokenSequence], sequence: TokenSequence) -> None:
    """Queues are ordered by age, oldest first."""
    insort(queue, sequence, key=_age)
