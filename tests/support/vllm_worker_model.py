"""A store, its index and a worker half for the scheduler half's tests.

Instead of KV, a slot of a block holds the salt and all tokens up to its own: KV is equal if these are.
"""

import random
from collections.abc import Callable, Container, Sequence

from engines.vllm.connector.orders import ChunkPlace, LoadOrder, SaveOrder, StepOrders
from kvcore.types import ChunkKey

Slot = tuple[str, tuple[int, ...]] | None


class FakeLookup:
    """Answers from a store's keys after as many questions as it is told to."""

    def __init__(self, stored: Container[ChunkKey] = (), delay: Callable[[], int] = lambda: 0) -> None:
        self.stored = stored
        self.delay = delay
        self.questions: dict[str, tuple[int, list[ChunkKey]]] = {}
        self.waits: list[float] = []
        self.forgotten: list[str] = []

    def ask(self, request_id: str, keys: Sequence[ChunkKey]) -> None:
        self.questions[request_id] = (self.delay(), list(keys))

    def answer(self, request_id: str, *, wait_s: float) -> int | None:
        self.waits.append(wait_s)
        delay, keys = self.questions[request_id]
        if delay > 0:
            self.questions[request_id] = (delay - 1, keys)
            return None
        return next((n for n, key in enumerate(keys) if key not in self.stored), len(keys))

    def forget(self, request_id: str) -> None:
        self.questions.pop(request_id, None)
        self.forgotten.append(request_id)


class Memory:
    """All blocks' slots."""

    def __init__(self, num_blocks: int, block_size: int):
        self.block_size = block_size
        self.slots: list[list[Slot]] = [[None] * block_size for _ in range(num_blocks)]

    def at(self, block_ids: Sequence[int], position: int) -> Slot:
        return self.slots[block_ids[position // self.block_size]][position % self.block_size]

    def put(self, block_ids: Sequence[int], position: int, slot: Slot) -> None:
        self.slots[block_ids[position // self.block_size]][position % self.block_size] = slot

    def read(self, place: ChunkPlace) -> list[Slot]:
        return [self.at(place.block_ids, n) for n in range(place.num_tokens)]


class WorkerModel:
    """Loads and saves at a dice's pace. Raises AssertionError when an order does not say what the blocks hold."""

    def __init__(self, memory: Memory, dice: random.Random, chunk_tokens: int):
        self.memory = memory
        self.dice = dice
        self.chunk_tokens = chunk_tokens
        self.store: dict[ChunkKey, list[Slot]] = {}
        self.coming: list[tuple[ChunkKey, list[Slot]]] = []
        """What a prefiller elsewhere will have put there."""
        self.loads: list[tuple[LoadOrder, int]] = []
        self.saves: dict[str, list[ChunkPlace]] = {}
        """Of requests with saves since their last preemption; empty: all have ended."""
        self.leaving: set[str] = set()
        self.received: set[str] = set()
        self.failed: set[int] = set()
        self.stored_by: list[tuple[str, int, ChunkPlace]] = []
        self.failures = self.loaded = self.saved = 0

    def preempted(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.saves.pop(request_id, None)

    def offer(self, orders: StepOrders) -> None:
        """After the forward pass."""
        self.loads += [(load, 0) for load in orders.loads]
        for load in orders.loads:
            assert load.chunks, "an order without chunks"
            kept = self.memory.block_size * load.keep_blocks
            assert kept < load.chunks[0].num_tokens
            assert all(self.memory.at(load.chunks[0].block_ids, n) is not None for n in range(kept))
        for save in orders.saves:
            self._check_save(save)
            self.saves.setdefault(save.request_id, []).extend(save.chunks)

    def finished(self, request_ids: set[str]) -> tuple[set[str], set[str], set[int]]:
        """(sent, received, blocks whose load failed), each told once."""
        self.leaving |= request_ids & self.saves.keys()
        sent = {request_id for request_id in self.leaving if not self.saves[request_id]}
        for request_id in sent:
            del self.saves[request_id]
        self.leaving -= sent
        told = sent, self.received, self.failed
        self.received, self.failed = set(), set()
        return told

    def go_on(self, owned: Callable[[str], set[int]]) -> None:
        """Some of the work in the background. `owned(request_id)`: the blocks that are its own and nobody else's."""
        if self.coming and self.dice.random() < 0.5:
            key, slots = self.coming.pop(self.dice.randrange(len(self.coming)))
            if self.dice.random() < 0.8:
                self.store[key] = slots
        if self.store and self.dice.random() < 0.05:
            del self.store[self.dice.choice(list(self.store))]
        for request_id in [name for name, places in self.saves.items() if places]:
            if self.dice.random() < 0.5:
                place = self.saves[request_id].pop(0)
                self.saved += 1
                self.store[place.key] = self.memory.read(place)
                assert None not in self.store[place.key]
        if self.loads:
            self._load_one(owned)

    def _load_one(self, owned: Callable[[str], set[int]]) -> None:
        at = self.dice.randrange(len(self.loads))
        load, done = self.loads[at]
        place = load.chunks[done]
        slots = self.store.get(place.key)
        if slots is None and load.wait_until is not None and self.dice.random() < 0.7:
            return
        if slots is None or self.dice.random() < 0.1:
            for index, left in enumerate(load.chunks[done:], start=done):
                self.failed |= set(left.block_ids[0 if index else load.keep_blocks :])
            self.failures += 1
            self._end(at)
            return
        assert len(slots) == place.num_tokens
        keep = load.keep_blocks if done == 0 else 0
        assert set(place.block_ids[keep:]) <= owned(load.request_id), "a load into blocks of others"
        for position in range(keep * self.memory.block_size, place.num_tokens):
            self.memory.put(place.block_ids, position, slots[position])
        self.loaded += 1
        if done + 1 == len(load.chunks):
            self._end(at)
        else:
            self.loads[at] = (load, done + 1)

    def _end(self, at: int) -> None:
        self.received.add(self.loads.pop(at)[0].request_id)

    def _check_save(self, save: SaveOrder) -> None:
        assert save.chunks
        assert bool(save.reserve) == (save.request_id not in self.saves), "reserve is for the first order"
        if save.reserve:
            said = [(place.key, len(place.block_ids)) for place in save.chunks]
            assert list(save.reserve[: len(said)]) == said
        for index, place in enumerate(save.chunks, start=save.first_chunk):
            slots = self.memory.read(place)
            salt, tokens = slots[-1] or ("", ())
            start = index * self.chunk_tokens
            assert len(tokens) == start + place.num_tokens, "the chunk's last slot is of another place"
            assert slots == [(salt, tokens[: start + n + 1]) for n in range(place.num_tokens)], "not these tokens' KV"
            self.stored_by.append((save.request_id, index, place))
