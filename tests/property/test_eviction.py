"""Each eviction policy against a slow model of its definition; and what no policy may break: holds, and chains."""

from array import array
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from benchmarks import eviction
from kvcore.eviction.chains import Chains
from kvcore.eviction.evictor import POLICY_NAMES, Evictor, new_policy
from kvcore.eviction.queues import Fifo
from kvcore.eviction.row_chains import FIRST, RowChains
from kvcore.eviction.rows import RowFifo, RowLru

KEYS = 12
WHAT = ["put", "put", "put", "use", "use", "refresh", "remove", "evict", "evict"]
OPS = st.lists(st.tuples(st.sampled_from(WHAT), st.integers(0, KEYS - 1)), max_size=120)


class LruModel:
    """`entries` in the order in which they go."""

    def __init__(self) -> None:
        self.entries: list[int] = []

    def put(self, key: int) -> None:
        self.entries.append(key)

    def use(self, key: int) -> None:
        self.entries.remove(key)
        self.entries.append(key)

    refresh = use

    def remove(self, key: int) -> None:
        self.entries.remove(key)

    def evict(self) -> int:
        return self.entries.pop(0)


class FifoModel(LruModel):
    def use(self, key: int) -> None:
        pass

    refresh = use


class LfuModel(FifoModel):
    """Fewest uses first, among equals who has had so many for longest."""

    def __init__(self) -> None:
        super().__init__()
        self.since: dict[int, tuple[int, int]] = {}
        self.now = 0

    def put(self, key: int) -> None:
        self.now += 1
        self.entries.append(key)
        self.since[key] = (1, self.now)

    def use(self, key: int) -> None:
        self.now += 1
        self.since[key] = (self.since[key][0] + 1, self.now)

    def evict(self) -> int:
        key = min(self.entries, key=self.since.__getitem__)
        self.entries.remove(key)
        return key


class ArcModel:
    """Megiddo and Modha's figure 4 in lists, oldest first; c is what is in the cache when it matters."""

    def __init__(self) -> None:
        self.t1: list[int] = []
        self.t2: list[int] = []
        self.b1: list[int] = []
        self.b2: list[int] = []
        self.p = 0.0

    @property
    def entries(self) -> list[int]:
        return self.t1 + self.t2

    def put(self, key: int) -> None:
        c = len(self.entries) + 1
        if key in self.b1:
            self.p = min(c, self.p + max(len(self.b2) / len(self.b1), 1))
            self.b1.remove(key)
            self.t2.append(key)
        elif key in self.b2:
            self.p = max(0, self.p - max(len(self.b1) / len(self.b2), 1))
            self.b2.remove(key)
            self.t2.append(key)
        else:
            self.t1.append(key)

    def use(self, key: int) -> None:
        self.remove(key)
        self.t2.append(key)

    def refresh(self, key: int) -> None:
        queue = self.t1 if key in self.t1 else self.t2
        queue.remove(key)
        queue.append(key)

    def remove(self, key: int) -> None:
        (self.t1 if key in self.t1 else self.t2).remove(key)

    def evict(self) -> int:
        c = len(self.entries)
        if self.t1 and (len(self.t1) > self.p or not self.t2):
            key = self.t1.pop(0)
            self.b1.append(key)
        else:
            key = self.t2.pop(0)
            self.b2.append(key)
        while self.b1 and len(self.t1) + len(self.b1) > c:
            self.b1.pop(0)
        while self.b2 and len(self.b1) + len(self.b2) > c:
            self.b2.pop(0)
        return key


class S3FifoModel:
    """The paper's algorithm 1 in lists of [key, frequency], the tail first."""

    def __init__(self) -> None:
        self.s: list[list[int]] = []
        self.m: list[list[int]] = []
        self.g: list[int] = []

    @property
    def entries(self) -> list[int]:
        return [key for key, _ in self.s + self.m]

    def put(self, key: int) -> None:
        if key in self.g:
            self.g.remove(key)
            self.m.append([key, 0])
        else:
            self.s.append([key, 0])

    def use(self, key: int) -> None:
        (entry,) = (entry for entry in self.s + self.m if entry[0] == key)
        entry[1] = min(entry[1] + 1, 3)

    def refresh(self, key: int) -> None:
        pass

    def remove(self, key: int) -> None:
        self.s = [entry for entry in self.s if entry[0] != key]
        self.m = [entry for entry in self.m if entry[0] != key]

    def evict(self) -> int:
        c = len(self.entries)
        while True:
            if self.s and (len(self.s) >= 0.1 * c or not self.m):
                key, freq = self.s.pop(0)
                if freq > 1:
                    self.m.append([key, 0])
                    continue
                self.g.append(key)
                while len(self.g) > 0.9 * c:
                    self.g.pop(0)
                return key
            key, freq = self.m.pop(0)
            if freq == 0:
                return key
            self.m.append([key, freq - 1])


MODELS = {"lru": LruModel, "lfu": LfuModel, "fifo": FifoModel, "arc": ArcModel, "s3fifo": S3FifoModel}


def column(count: int) -> "array[int]":
    return array("i", [0]) * count


def in_rows(kind: type[RowLru]) -> Callable[[int], Any]:
    return lambda count: kind(column(count), column(count))


POLICIES: dict[str, tuple[str, Callable[[int], Any]]] = {
    **{name: (name, lambda _, name=name: new_policy(name)) for name in POLICY_NAMES},
    "lru in rows": ("lru", in_rows(RowLru)),
    "fifo in rows": ("fifo", in_rows(RowFifo)),
}
"""Name -> the name of its definition, and what makes one for so many keys."""


def test_every_policy_has_a_model():
    assert set(MODELS) == set(POLICY_NAMES)


@pytest.mark.parametrize("name", POLICIES)
@given(ops=OPS, peeks=st.booleans())
@settings(max_examples=60)
def test_victims_come_in_the_order_of_the_definition(name, ops, peeks):
    definition, new = POLICIES[name]
    evictor, model = Evictor(new(KEYS), lambda _: False), MODELS[definition]()
    # Looking at the victim is part of no definition. With S3-FIFO it runs the promotions that come before it.
    peeks = peeks and name != "s3fifo"
    for what, key in ops:
        there = key in model.entries
        if what == "put" and not there:
            evictor.add(key)
            model.put(key)
        elif what in {"use", "refresh", "remove"} and there:
            getattr(evictor, what)(key)
            getattr(model, what)(key)
        elif what == "evict":
            assert evictor.evict() == (model.evict() if model.entries else None)
        if peeks:
            victim = evictor.victim()
            assert (victim is None) == (not model.entries)
    while model.entries:
        assert evictor.evict() == model.evict()
    assert evictor.evict() is None


STEPS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, KEYS - 1), min_size=1, max_size=8)), max_size=20)


@given(steps=STEPS)
def test_rows_that_come_or_are_used_together_are_as_those_that_do_one_after_the_other(steps):
    for kind, model in ((RowLru, LruModel()), (RowFifo, FifoModel())):
        policy = in_rows(kind)(KEYS)
        for comes, rows in steps:
            if comes:
                new = [row for row in dict.fromkeys(rows) if row not in model.entries]
                policy.add_all(new)
                model.entries += new
            elif used := [row for row in rows if row in model.entries]:
                policy.use_all(used)
                for row in used:
                    model.use(row)
            assert list(policy) == model.entries


def test_frequency_is_capped_at_three_and_a_scan_does_not_push_out_what_is_used():
    """S3-FIFO and ARC keep ten entries that are used, LRU and FIFO lose them to a scan of a thousand."""
    kept = {}
    for name in POLICY_NAMES:
        evictor = Evictor(new_policy(name), lambda _: False)
        hot, there = list(range(10)), set[int]()

        def put(key: int, evictor=evictor, there=there) -> None:
            if len(there) == 100:
                there.discard(evictor.evict())
            evictor.add(key)
            there.add(key)

        for key in hot + list(range(100, 190)):
            put(key)
        for key in hot * 5:
            evictor.use(key)
        for key in range(1000, 2000):
            put(key)
        kept[name] = len(there & set(hot))
    assert kept == {"lru": 0, "fifo": 0, "lfu": 10, "arc": 10, "s3fifo": 10}


class Chained:
    """One segment's entries and who continues whom, as their owner keeps the two together."""

    def __init__(self, new: Callable[[int], Any], count: int) -> None:
        self.parents, self.children, self.held = array("i", [FIRST]) * count, column(count), Counter[int]()
        self.chains = RowChains(self.parents, self.children)
        self.there: set[int] = set()
        self.policy = new(count)
        self.evictor = Evictor(self.policy, lambda row: self.held[row] > 0 or self.children[row] > 0)

    def come(self, rows: list[int], parents: list[int]) -> None:
        for row, parent in zip(rows, parents, strict=True):
            self.join(row, parent)
        for row in reversed(rows):
            self.evictor.add(row)
        self.there |= set(rows)

    def join(self, row: int, parent: int) -> None:
        if parent != FIRST:
            self.chains.join(row, parent)

    def check(self) -> None:
        self.chains.check(self.there)

    def leave(self, row: int) -> None:
        self.evictor.remove(row)
        self.left(row)

    def evict(self) -> int | None:
        row = self.evictor.evict()
        if row is not None:
            self.left(row)
        return row

    def left(self, row: int) -> None:
        self.there.discard(row)
        if (parent := self.chains.left(row)) != FIRST:
            self.evictor.let_go(parent)


class ChainedKeys(Chained):
    """The same with chains by keys, as a slab has them."""

    def __init__(self, new: Callable[[int], Any], count: int) -> None:
        super().__init__(new, count)
        self.keys: Chains[int] = Chains()
        self.evictor = Evictor(self.policy, lambda row: self.held[row] > 0 or self.keys.is_prefix(row))

    def come(self, rows: list[int], parents: list[int]) -> None:
        for row, parent in zip(rows, parents, strict=True):
            self.join(row, parent)
            self.keys.came(row)
        for row in reversed(rows):
            self.evictor.add(row)
        self.there |= set(rows)

    def join(self, row: int, parent: int) -> None:
        if parent != FIRST:
            self.keys.link([parent, row])
            super().join(row, parent)

    def left(self, row: int) -> None:
        self.there.discard(row)
        self.chains.left(row)
        if (parent := self.keys.left(row)) is not None:
            self.evictor.let_go(parent)

    def check(self) -> None:
        super().check()
        self.keys.check()
        assert {row: parent for row, parent in self.keys._parents.items() if parent is not None} == {
            row: self.parents[row] for row in self.there if self.parents[row] != FIRST
        }


@pytest.mark.parametrize("name", POLICIES)
def test_a_prefix_outlives_what_continues_it_though_it_is_older_and_used_less(name):
    segment = Chained(POLICIES[name][1], 6)
    for key in range(6):  # one after the other, as a prompt grows
        segment.come([key], [key - 1])
        for _ in range(key):
            segment.evictor.use(key)
    assert [segment.evict() for _ in range(7)] == [5, 4, 3, 2, 1, 0, None]


PROMPTS = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(
    lambda tokens: [row_of(tokens[: at + 1]) for at in range(len(tokens))]
)
"""Prompts that share beginnings, as rows: a row's true parent is known."""


def row_of(tokens: list[int]) -> int:
    return (1 << len(tokens)) - 2 + int("".join(map(str, tokens)), 2)


def true_parent(row: int) -> int:
    return (row + 2) // 2 - 2 if row > 1 else FIRST


class ChainMachine(RuleBasedStateMachine):
    name, kind = "lru", Chained

    def __init__(self) -> None:
        super().__init__()
        self.segment = self.kind(POLICIES[self.name][1], 126)

    @property
    def there(self) -> set[int]:
        return self.segment.there

    @rule(prompt=PROMPTS, start=st.integers(0, 5))
    def store(self, prompt, start):
        """What is missing of the prompt comes."""
        new = [row for row in prompt[start:] if row not in self.there]
        self.segment.come(new, [p if (p := true_parent(row)) in self.there | set(new) else FIRST for row in new])

    @rule(prompt=PROMPTS)
    def adopt(self, prompt):
        """A chunk of which nothing but its key is known."""
        if prompt[-1] not in self.there:
            self.segment.come(prompt[-1:], [FIRST])

    @rule(prompt=PROMPTS)
    def match(self, prompt):
        found = next((n for n, row in enumerate(prompt) if row not in self.there), len(prompt))
        for row in reversed(prompt[1:found]):
            if self.segment.parents[row] == FIRST:
                self.segment.join(row, true_parent(row))
        assert all(self.segment.parents[row] == true_parent(row) for row in prompt[:found])
        for row in reversed(prompt[:found]):
            self.segment.evictor.use(row)

    @rule(prompt=PROMPTS)
    def lease(self, prompt):
        self.segment.held.update(row for row in prompt if row in self.there)

    @rule()
    def release(self):
        for row in sorted(self.segment.held, reverse=True):
            del self.segment.held[row]
            self.segment.evictor.refresh(row)

    @rule(prompt=PROMPTS)
    def quarantine(self, prompt):
        """What nothing continues is gone at once."""
        row = prompt[-1]
        if row in self.there and not self.segment.children[row]:
            del self.segment.held[row]
            self.segment.leave(row)

    @rule(count=st.integers(1, 4))
    def evict(self, count):
        for _ in range(count):
            continued = {self.segment.parents[row] for row in self.there}
            allowed = self.there - continued - {row for row, holds in self.segment.held.items() if holds}
            row = self.segment.evict()
            if row is None:
                assert not allowed
                return
            assert row in allowed, f"{row} is held, or goes before what continues it"

    @invariant()
    def chains_are_chains(self):
        self.segment.check()

    @invariant()
    def the_victim_stays_the_victim(self):
        assert self.segment.evictor.victim() == self.segment.evictor.victim()

    def teardown(self):
        """Without holds all can go: nothing is kept for ever."""
        self.release()
        while self.there:
            assert self.segment.evict() is not None, "what is left cannot go"
        assert not any(self.segment.children) and set(self.segment.parents) == {FIRST}


def machine(name: str, chained: type[Chained] = Chained) -> type:
    kind = type(f"Chains_{name}", (ChainMachine,), {"name": name, "kind": chained})
    kind.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
    return kind.TestCase


TestLruChains, TestLfuChains, TestFifoChains, TestArcChains, TestS3FifoChains = map(machine, POLICY_NAMES)
TestRowLruChains, TestKeyChains = machine("lru in rows"), machine("lfu", ChainedKeys)


def test_links_to_what_is_still_to_come_are_bounded():
    chains: Chains[int] = Chains(max_expected=2)
    chains.link([1, 2, 3, 4])
    for key in (1, 2, 3, 4):
        chains.came(key)
    assert [chains.is_prefix(key) for key in (1, 2, 3)] == [True, True, False]


@pytest.mark.parametrize("kind", [Chained, ChainedKeys])
def test_lies_about_the_order_make_no_ring(kind):
    """Whoever asks may name keys in any order: all of them can still go."""
    segment = kind(lambda _: Fifo(), 6)
    segment.come(list(range(6)), [FIRST] * 6)
    for said in ([0, 1, 2], [2, 1, 0], [2, 0], [3, 4, 5, 3], [5, 5], [0, 3, 1]):
        for parent, row in pairwise(said):
            if segment.parents[row] == FIRST:
                segment.join(row, parent)
        segment.check()
    assert sorted(segment.evict() or 0 for _ in range(6)) == list(range(6))


class CountedFifo(Fifo[int]):
    taken = 0

    def take(self):
        self.taken += 1
        return super().take()


def test_a_long_prompt_costs_two_looks_a_chunk_though_its_prefix_is_due_first():
    segment = Chained(lambda _: CountedFifo(), 5000)
    for key in range(5000):
        segment.come([key], [key - 1])
    assert [segment.evict() for _ in range(5000)] == list(reversed(range(5000)))
    assert segment.policy.taken <= 2 * 5000


def test_no_policy_finds_more_than_the_optimum_and_that_no_more_than_unlimited_memory_does():
    found = dict(eviction.rates(eviction.made_up(60)))
    best, unlimited = found.pop(eviction.OPTIMUM), found.pop(eviction.UNLIMITED)
    assert set(found) == set(POLICY_NAMES) and 0 < best[-1] < unlimited[0]
    for rates in found.values():
        assert all(rate <= most <= unlimited[0] for rate, most in zip(rates, best, strict=True))
