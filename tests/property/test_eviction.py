"""Each eviction policy against a slow model of its definition; and what no policy may break: holds, and chains."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from benchmarks import eviction
from kvcore.eviction.chains import Chains
from kvcore.eviction.evictor import POLICY_NAMES, Evictor, new_policy
from kvcore.eviction.queues import Fifo

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


def test_every_policy_has_a_model():
    assert set(MODELS) == set(POLICY_NAMES)


@pytest.mark.parametrize("name", POLICY_NAMES)
@given(ops=OPS, peeks=st.booleans())
@settings(max_examples=60)
def test_victims_come_in_the_order_of_the_definition(name, ops, peeks):
    chains: Chains[int] = Chains()
    evictor, model = Evictor(new_policy(name), chains, lambda _: False), MODELS[name]()
    # Looking at the victim is part of no definition. With S3-FIFO it runs the promotions that come before it.
    peeks = peeks and name != "s3fifo"
    for what, key in ops:
        there = key in model.entries
        if what == "put" and not there:
            chains.came(key)
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


def test_frequency_is_capped_at_three_and_a_scan_does_not_push_out_what_is_used():
    """S3-FIFO and ARC keep ten entries that are used, LRU and FIFO lose them to a scan of a thousand."""
    kept = {}
    for name in POLICY_NAMES:
        chains: Chains[int] = Chains()
        evictor = Evictor(new_policy(name), chains, lambda _: False)
        hot, there = list(range(10)), set[int]()

        def put(key: int, evictor=evictor, chains=chains, there=there) -> None:
            if len(there) == 100:
                there.discard(evictor.evict())
            chains.came(key)
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


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_a_prefix_outlives_what_continues_it_though_it_is_older_and_used_less(name):
    chains: Chains[int] = Chains()
    here, there = (Evictor(new_policy(name), chains, lambda _: False) for _ in range(2))
    for key in range(6):  # one after the other, as a prompt grows; the last two lie elsewhere
        chains.came(key, key - 1 if key else None)
        (here if key < 4 else there).add(key)
        for _ in range(key):
            (here if key < 4 else there).use(key)
    assert here.evict() is None, "all of them are continued"
    assert [there.evict(), there.evict(), there.evict()] == [5, 4, None]
    assert [here.evict() for _ in range(5)] == [3, 2, 1, 0, None]


class ChainMachine(RuleBasedStateMachine):
    """Prompts that share beginnings in two segments: keys are tuples of tokens, so a key's true parent is known."""

    policy = "lru"

    def __init__(self) -> None:
        super().__init__()
        self.chains: Chains[tuple[int, ...]] = Chains(max_expected=1000)
        self.held: list[Counter[tuple[int, ...]]] = [Counter(), Counter()]
        self.there: list[set[tuple[int, ...]]] = [set(), set()]
        self.segments = [
            Evictor(new_policy(self.policy), self.chains, lambda key, at=at: self.held[at][key] > 0) for at in (0, 1)
        ]

    prompts = st.lists(st.integers(0, 1), min_size=1, max_size=6).map(
        lambda tokens: [tuple(tokens[: at + 1]) for at in range(len(tokens))]
    )
    segment = st.integers(0, 1)

    @rule(prompt=prompts, at=segment, start=st.integers(0, 5))
    def store(self, prompt, at, start):
        """What is missing of the prompt comes to one segment, whatever lies in the other one."""
        new = [key for key in prompt[start:] if key not in self.there[at]]
        for key in new:
            self.chains.came(key, key[:-1] or None)
        for key in reversed(new):
            self.segments[at].add(key)
            self.there[at].add(key)
        assert all(self.chains._parents[key] == (key[:-1] or None) for key in new)

    @rule(prompt=prompts, at=segment)
    def adopt(self, prompt, at):
        """A chunk of which nothing but its key is known."""
        if prompt[-1] not in self.there[at]:
            self.chains.came(prompt[-1])
            self.segments[at].add(prompt[-1])
            self.there[at].add(prompt[-1])

    @rule(prompt=prompts)
    def match(self, prompt):
        found = next((n for n, key in enumerate(prompt) if not self.where(key)), len(prompt))
        self.chains.link(prompt[: found + 1])
        assert all(self.chains._parents[key] == (key[:-1] or None) for key in prompt[:found])
        for key in reversed(prompt[:found]):
            for at in self.where(key):
                self.segments[at].use(key)

    @rule(prompt=prompts, at=segment)
    def lease(self, prompt, at):
        for key in prompt:
            if key in self.there[at]:
                self.held[at][key] += 1

    @rule(at=segment)
    def release(self, at):
        for key in sorted(self.held[at].elements(), reverse=True):
            self.held[at][key] -= 1
            if not self.held[at][key]:
                del self.held[at][key]
                self.segments[at].refresh(key)

    @rule(prompt=prompts, at=segment)
    def quarantine(self, prompt, at):
        if prompt[-1] in self.there[at]:
            del self.held[at][prompt[-1]]
            self.there[at].discard(prompt[-1])
            self.segments[at].remove(prompt[-1])

    @rule(at=segment, count=st.integers(1, 4))
    def evict(self, at, count):
        for _ in range(count):
            allowed = self.may_go(at)
            key = self.segments[at].evict()
            if key is None:
                assert not allowed
                return
            assert key in allowed, f"{key} is held, or goes before what continues it"
            self.there[at].discard(key)

    def where(self, key):
        return [at for at in (0, 1) if key in self.there[at]]

    def may_go(self, at):
        """What is not held, and either lies in the other segment too or has no continuation that is known as such."""
        continued = set(self.chains._parents.values())
        copied = self.there[0] & self.there[1]
        return {key for key in self.there[at] - self.held[at].keys() if key not in continued or key in copied}

    @invariant()
    def chains_are_chains(self):
        self.chains.check()
        assert set(self.chains._parents) == self.there[0] | self.there[1]

    @invariant()
    def the_victim_stays_the_victim(self):
        for segment in self.segments:
            assert segment.victim() == segment.victim()

    def teardown(self):
        """Without holds all can go: nothing is kept for ever."""
        for at in (0, 1):
            self.release(at)
        while any(self.there):
            gone = [segment.evict() for segment in self.segments]
            assert any(key is not None for key in gone), "what is left cannot go"
            for at, key in enumerate(gone):
                self.there[at].discard(key)
        assert self.chains._children == {} and self.chains._copies == {} and self.chains._waiting == {}


def machine(name: str) -> type:
    kind = type(f"Chains_{name}", (ChainMachine,), {"policy": name})
    kind.TestCase.settings = settings(max_examples=20, stateful_step_count=40, deadline=None)
    return kind.TestCase


TestLruChains, TestLfuChains, TestFifoChains, TestArcChains, TestS3FifoChains = map(machine, POLICY_NAMES)


def test_lies_about_the_order_make_no_ring():
    """Whoever asks may name keys in any order: all of them can still go."""
    chains: Chains[int] = Chains()
    evictor = Evictor(Fifo(), chains, lambda _: False)
    for key in range(6):
        chains.came(key)
        evictor.add(key)
    for said in ([0, 1, 2], [2, 1, 0], [2, 0], [3, 4, 5, 3], [5, 5], [0, 3, 1]):
        chains.link(said)
        chains.check()
    assert sorted(evictor.evict() or 0 for _ in range(6)) == list(range(6))


def test_links_to_what_is_still_to_come_are_bounded():
    chains: Chains[int] = Chains(max_expected=2)
    chains.link([1, 2, 3, 4])
    for key in (1, 2, 3, 4):
        chains.came(key)
    assert [chains.is_prefix(key) for key in (1, 2, 3)] == [True, True, False]


class CountedFifo(Fifo[int]):
    taken = 0

    def take(self):
        self.taken += 1
        return super().take()


def test_a_long_prompt_costs_two_looks_a_chunk_though_its_prefix_is_due_first():
    policy, chains = CountedFifo(), Chains[int]()
    evictor = Evictor(policy, chains, lambda _: False)
    for key in range(5000):
        chains.came(key, key - 1 if key else None)
        evictor.add(key)
    assert [evictor.evict() for _ in range(5000)] == list(reversed(range(5000)))
    assert policy.taken <= 2 * 5000


def test_no_policy_finds_more_than_the_optimum_and_that_no_more_than_unlimited_memory_does():
    found = dict(eviction.rates(eviction.made_up(60)))
    best, unlimited = found.pop(eviction.OPTIMUM), found.pop(eviction.UNLIMITED)
    assert set(found) == set(POLICY_NAMES) and 0 < best[-1] < unlimited[0]
    for rates in found.values():
        assert all(rate <= most <= unlimited[0] for rate, most in zip(rates, best, strict=True))
