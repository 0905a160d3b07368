"""Scheduler under random arrivals, budgets, aborts, loads and forks: invariants, progress, nothing leaked."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from engines.paged.blocks import BlockManager
from engines.paged.scheduler import Scheduler
from engines.paged.sequence import Status, TokenSequence
from kvcore.chunk_keys import KeyChain, root_key
from kvcore.errors import OverloadedError
from nodeapi.sampling import SamplingParams

BLOCK, PER_CHUNK = 4, 2
CHUNK = BLOCK * PER_CHUNK
ROOT = root_key(bytes(16))


class Driver:
    """A loop without time: every rule that the real one keeps, with a dice for everything else."""

    def __init__(self, seed, num_blocks, budget, max_sequences):
        self.dice = random.Random(seed)
        self.blocks = BlockManager(num_blocks, BLOCK, PER_CHUNK)
        self.scheduler = Scheduler(self.blocks, max_batch_tokens=budget, max_sequences=max_sequences, max_waiting=6)
        self.limit = num_blocks * BLOCK
        self.alive: list[TokenSequence] = []
        self.loads: list[TokenSequence] = []
        self.finished = self.aborted = self.refused = self.arrived = 0

    def arrive(self):
        self.arrived += 1
        length = self.dice.randint(1, self.limit - 1)
        prefill = self.dice.random() < 0.2 and length >= CHUNK
        tokens = [self.dice.randrange(2) if index % CHUNK == 0 else 7 for index in range(length)]
        sequence = TokenSequence(
            request_id=str(self.arrived),
            age=(self.arrived, 0),
            tokens=tokens,
            num_prompt=length,
            chain=KeyChain(ROOT),
            chunk_tokens=CHUNK,
            wants_load=self.dice.random() < 0.4,
        )
        if prefill:
            sequence.tokens = sequence.tokens[: length // CHUNK * CHUNK]
            sequence.num_prompt = len(sequence.tokens)
        else:
            sequence.sampling = SamplingParams(max_tokens=self.dice.randint(1, 12))
            sequence.indices = tuple(range(self.dice.choice([1, 1, 2, 3])))
        try:
            self.scheduler.add(sequence)
            self.alive.append(sequence)
        except OverloadedError:
            self.refused += 1

    def step(self):
        plan = self.scheduler.schedule()
        self.scheduler.check()
        assert sum(item.num_tokens for item in plan.work) <= self.scheduler.max_batch_tokens
        assert len({id(item.sequence) for item in plan.work}) == len(plan.work)
        self.loads += plan.loads
        for sequence in plan.fully_cached:
            self.finish(sequence)
        if self.dice.random() < 0.1:
            self.abort()
        if plan.work and self.dice.random() < 0.03:
            self.scheduler.fail(plan)
            for item in plan.work:
                self.forget(item.sequence)
        else:
            ends = {id(i.sequence): i.sequence.num_computed + i.num_tokens for i in plan.work}
            for sequence in self.scheduler.complete(plan):
                assert sequence.num_computed == ends[id(sequence)]
                if sequence.num_left == 0:
                    self.sample(sequence)
        self.scheduler.check()
        return plan

    def sample(self, sequence):
        if sequence.sampling is None:
            self.finish(sequence)
            return
        forks = self.scheduler.fork(sequence)
        self.alive += [child for child, _ in forks]
        for drawing in [sequence, *(child for child, _ in forks)]:
            drawing.tokens.append(self.dice.randrange(3, 9))
            done = len(drawing.tokens) - drawing.num_prompt
            if done >= drawing.sampling.max_tokens or len(drawing.tokens) >= self.limit:
                self.finish(drawing)

    def end_a_load(self):
        sequence = self.loads.pop(self.dice.randrange(len(self.loads)))
        first = sequence.num_computed // CHUNK
        self.scheduler.load_ended(sequence, self.dice.randint(first, sequence.num_reusable_chunks))
        self.scheduler.check()

    def finish(self, sequence):
        self.finished += 1
        self.scheduler.remove(sequence)
        self.forget(sequence)

    def abort(self):
        if self.alive:
            sequence = self.dice.choice(self.alive)
            self.aborted += 1
            self.scheduler.remove(sequence)
            self.forget(sequence)

    def forget(self, sequence):
        if sequence in self.alive:
            self.alive.remove(sequence)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    num_blocks=st.integers(3, 24),
    budget=st.integers(1, 40),
    max_sequences=st.integers(1, 6),
)
def test_all_finish_and_nothing_leaks(seed, num_blocks, budget, max_sequences):
    driver = Driver(seed, num_blocks, budget, max_sequences)
    for _ in range(60):
        if driver.dice.random() < 0.3:
            driver.arrive()
        driver.step()
        if driver.loads and driver.dice.random() < 0.4:
            driver.end_a_load()
    steps = 0
    while driver.alive or driver.loads:
        plan = driver.step()
        if driver.loads and (not plan.work or driver.dice.random() < 0.2):
            driver.end_a_load()
        steps += 1
        assert steps < 5000, "livelock"
    assert driver.blocks.used_blocks == 0
    assert not (driver.scheduler.waiting or driver.scheduler.running or driver.scheduler.loading)


def test_the_oldest_is_never_preempted():
    blocks = BlockManager(6, BLOCK, PER_CHUNK)
    scheduler = Scheduler(blocks, max_batch_tokens=64, max_sequences=4, max_waiting=4)
    old, young = (
        TokenSequence(
            request_id=str(n),
            age=(n, 0),
            tokens=[n] * 11,
            num_prompt=11,
            chain=KeyChain(ROOT),
            chunk_tokens=CHUNK,
            sampling=SamplingParams(max_tokens=9),
        )
        for n in (1, 2)
    )
    scheduler.add(old)
    scheduler.add(young)
    for _ in range(3):
        for sequence in scheduler.complete(scheduler.schedule()):
            sequence.tokens.append(1)
    assert (old.status, young.status) == (Status.RUNNING, Status.WAITING)
    assert scheduler.preemptions == 1 and not young.block_table


def test_a_slice_ends_at_a_chunk_where_the_budget_allows():
    blocks = BlockManager(100, BLOCK, PER_CHUNK)
    scheduler = Scheduler(blocks, max_batch_tokens=21, max_sequences=4, max_waiting=4)
    sequence = TokenSequence(
        request_id="r",
        age=(1, 0),
        tokens=[1] * 50,
        num_prompt=50,
        chain=KeyChain(ROOT),
        chunk_tokens=CHUNK,
        sampling=SamplingParams(max_tokens=9),
    )
    scheduler.add(sequence)
    ends = []
    for _ in range(3):
        scheduler.complete(scheduler.schedule())
        ends.append(sequence.num_computed)
    assert ends == [16, 32, 50]
