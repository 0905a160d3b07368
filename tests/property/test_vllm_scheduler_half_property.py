"""The scheduler half under a model of vLLM's scheduler: random arrivals, hits, failures, preemptions, aborts."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st
from support.machines import more_examples
from support.vllm_scheduler_model import SchedulerModel, next_token
from support.vllm_scheduler_parts import Request
from support.vllm_worker_model import FakeLookup, Memory, WorkerModel

from engines.vllm.connector.orders import LegParams
from engines.vllm.connector.scheduler_half import SchedulerHalf
from kvcore.chunk_keys import KeyChain, chunk_keys, next_key, root_key, usable_chunks
from kvcore.clock import ManualClock

BLOCK = 4


class Driver:
    """Rolls the dice for everything that the model leaves open."""

    def __init__(self, seed, *, num_blocks, per_chunk, budget, depth, save_output):
        self.dice = random.Random(seed)
        self.chunk = BLOCK * per_chunk
        self.limit = (num_blocks - 1) * BLOCK
        memory = Memory(num_blocks, BLOCK)
        self.worker = WorkerModel(memory, self.dice, self.chunk)
        self.lookup = FakeLookup(self.worker.store, lambda: self.dice.choice([0, 0, 1, 3]))
        self.half = SchedulerHalf(
            chain_of=lambda salt: KeyChain(self.root_of(salt)),
            chunk_tokens=self.chunk,
            block_size=BLOCK,
            save_output=save_output,
            lookup=self.lookup,
            clock=ManualClock(),
        )
        self.model = SchedulerModel(self.half, self.worker, memory, self.dice, depth=depth, budget=budget)
        self.texts = [[self.dice.randrange(3) for _ in range(self.limit)] for _ in range(2)]
        self.params: dict[str, Request] = {}
        self.arrived = 0

    def root_of(self, salt):
        return root_key(self.model.weights.to_bytes(16, "big"), salt)

    def arrive(self):
        self.arrived += 1
        length = self.dice.randint(1, self.limit - 6)
        shared = self.dice.randint(0, length)
        rest = [self.dice.randrange(3) for _ in range(length - shared)]
        tokens = self.dice.choice(self.texts)[:shared] + rest
        name = str(self.arrived)
        plain = self.dice.random() < 0.9
        salt = self.dice.choice(["", "tenant"]) if plain else f"adapter{self.dice.randrange(2)}"
        request = Request(name, tokens, length, self.dice.randint(1, 6), salt, cacheable=plain)
        request.skip_reading = self.dice.random() < 0.05
        kind = self.dice.choice(["none", "prefill", "decode", "decode", "leg"])
        if kind == "prefill":
            request.params = LegParams(leg=name, tail=True)
        elif kind == "leg":
            request.params = LegParams(leg=name)
        elif kind == "decode":
            usable = usable_chunks(length, self.chunk)
            chunks = self.dice.choice([usable, usable, self.dice.randint(0, usable)])
            tail = self.dice.random() < 0.7
            request.params = LegParams(leg=name, handoff_chunks=chunks, tail=tail, wait_until=1.0)
            self._prefill_elsewhere(request, chunks, tail and chunks == usable)
        self.params[name] = request
        self.model.add(request)

    def _prefill_elsewhere(self, request, chunks, tail):
        root, tokens = self.root_of(request.salt.encode()), tuple(request.tokens)
        keys = chunk_keys(root, tokens, self.chunk)[:chunks]
        end = len(tokens) if tail else chunks * self.chunk
        if tail:
            keys.append(next_key(keys[-1] if keys else root, tokens[chunks * self.chunk :]))
        for index, key in enumerate(keys):
            span = range(index * self.chunk, min(end, (index + 1) * self.chunk))
            self.worker.coming.append((key, [(self.model.kind(request), tokens[: n + 1]) for n in span]))

    def turn(self, *, arrivals=True):
        roll = self.dice.random()
        model = self.model
        if arrivals and roll < 0.15:
            self.arrive()
        elif arrivals and roll < 0.2:
            alive = [request for request in model.requests.values() if request.status != "finished"]
            if alive:
                model.abort(self.dice.choice(alive))
        elif arrivals and roll < 0.23:
            model.reset_prefix_cache(new_weights=self.dice.random() < 0.5)
            lost = [request for request in model.waiting if request.request_id in model.preempted_ids]
            if lost and self.dice.random() < 0.3:
                model.abort(self.dice.choice(lost))
        elif roll < 0.55:
            model.schedule()
        elif roll < 0.7 and model.unexecuted:
            model.execute()
        elif roll < 0.85 and model.in_flight:
            model.update_from_output()
        else:
            self.worker.go_on(model.owned)

    def check_saves(self):
        """Each order's keys are those of its chunks."""
        while self.worker.stored_by:
            name, index, place = self.worker.stored_by.pop()
            request = self.params[name]
            end = index * self.chunk + place.num_tokens
            tokens = tuple(request.tokens[:end])
            while len(tokens) < end:
                tokens = (*tokens, next_token(tokens))
            root = self.root_of(request.salt.encode())
            keys = chunk_keys(root, tokens, self.chunk)
            if place.num_tokens < self.chunk:
                assert request.params.tail and end == request.num_prompt
                keys.append(next_key(keys[-1] if keys else root, tokens[index * self.chunk :]))
            assert place.key == keys[index] and len(keys) == index + 1
            assert self.half._save_output or end <= request.num_prompt
            assert request.cacheable


DRIVERS = given(
    seed=st.integers(0, 1 << 40),
    num_blocks=st.integers(6, 24),
    per_chunk=st.integers(1, 3),
    budget=st.integers(3, 40),
    depth=st.integers(1, 2),
    save_output=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@DRIVERS
def test_blocks_hold_what_orders_say_and_all_ends(*, seed, num_blocks, per_chunk, budget, depth, save_output):
    driver = Driver(
        seed, num_blocks=num_blocks, per_chunk=per_chunk, budget=budget, depth=depth, save_output=save_output
    )
    for _ in range(250):
        driver.turn()
        driver.check_saves()
    for _ in range(40_000):
        if not driver.model.requests and not driver.model.unexecuted and not driver.model.in_flight:
            break
        driver.turn(arrivals=False)
        driver.check_saves()
    model, worker = driver.model, driver.worker
    assert not model.requests, "livelock"
    assert len(model.results) == driver.arrived
    assert not (driver.half._requests or driver.half._loads or driver.lookup.questions)
    assert not (worker.loads or worker.saves or worker.leaving or worker.received)
    while model.deferred:
        model.pool.release(model.deferred.popleft()[1])
    assert model.pool.refs == [1] + [0] * (num_blocks - 1)


test_more_of_them = more_examples(test_blocks_hold_what_orders_say_and_all_ends, DRIVERS, max_examples=150)
