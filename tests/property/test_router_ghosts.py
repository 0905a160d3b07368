"""The curve of hit rates is what caches of each size would have hit, found by simulating them."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.cache.ghosts import count_below, hit_curve
from router.cache.prefixes import STEP, PrefixHasher, packed
from router.cache.trace import PromptTrace

LENGTHS = st.sampled_from([STEP, 2 * STEP, 3 * STEP])


class LruCache:
    """Chunks by their whole prefix. A prompt is looked up, then used from its last chunk to its first."""

    def __init__(self, num_chunks: int, chunk_tokens: int) -> None:
        self._room, self._length = num_chunks, chunk_tokens
        self._chunks: OrderedDict[tuple[int, ...], None] = OrderedDict()

    def serve(self, prompt: list[int], answer: list[int]) -> int:
        """How many tokens of the prompt it has: whole chunks from the start, and one token is left."""
        hits = 0
        while (hits + 1) * self._length < len(prompt) and tuple(prompt[: (hits + 1) * self._length]) in self._chunks:
            hits += 1
        whole = [*prompt, *answer]
        for end in range(len(whole) // self._length * self._length, 0, -self._length):
            self._chunks[tuple(whole[:end])] = None
            self._chunks.move_to_end(tuple(whole[:end]))
        while len(self._chunks) > self._room:
            self._chunks.popitem(last=False)
        return hits * self._length


@st.composite
def conversations(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Prompts that share beginnings: each goes on from a place in one before it, or starts anew."""
    served: list[tuple[list[int], list[int]]] = []
    for _ in range(draw(st.integers(1, 12))):
        before = [*served[draw(st.integers(0, len(served) - 1))][0]] if served else []
        before += served[-1][1] if draw(st.booleans()) and served else []
        kept = before[: draw(st.integers(0, len(before) // 8)) * 8]
        number = draw(st.integers(0, 3))
        rest = draw(st.integers(0 if kept else 1, 12)) * 8
        served.append(([*kept, *[number] * rest], [9] * draw(st.sampled_from([0, 5, 2 * STEP]))))
    return served


def traced(served: list[tuple[list[int], list[int]]], max_bytes: int = 1 << 20) -> PromptTrace:
    hasher, trace = PrefixHasher(), PromptTrace(3600.0, max_bytes)
    for prompt, answer in served:
        trace.add(hasher.prefixes(packed([*prompt, *answer]), b"").steps, len(prompt), 0.0)
    return trace


@given(conversations(), LENGTHS, st.integers(1, 40))
def test_the_curve_is_what_a_cache_of_each_size_would_have_hit(
    served: list[tuple[list[int], list[int]]], chunk_tokens: int, num_chunks: int
) -> None:
    curve = hit_curve(traced(served).view(0.0).uses(chunk_tokens, 1 << 20))
    total = sum(len(prompt) for prompt, _ in served)
    for room in (num_chunks, 1 << 20):
        cache = LruCache(room, chunk_tokens)
        hits = sum(cache.serve(prompt, answer) for prompt, answer in served)
        assert curve.hit_rate(room) == pytest.approx(hits / total)
    assert curve.hit_rate(None) == curve.hit_rate(1 << 20)


NUMBERS = st.lists(st.integers(0, 9), max_size=20)
QUERIES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 12)), max_size=9)


@given(NUMBERS, QUERIES)
def test_values_below_a_bound_are_counted_as_one_by_one(values: list[int], asked: list[tuple[int, int]]) -> None:
    ends = np.array([min(end, len(values)) for end, _ in asked], dtype=np.int64)
    bounds = np.array([bound for _, bound in asked], dtype=np.int64)
    found = count_below(np.array(values, dtype=np.int64), ends, bounds)
    assert found.tolist() == [
        sum(v < bound for v in values[:end]) for end, bound in zip(ends.tolist(), bounds.tolist(), strict=True)
    ]


def popular(seed: int, prompts: int) -> list[tuple[list[int], list[int]]]:
    """Beginnings that are the more popular the lower their number, each with an end of its own."""
    dice = np.random.default_rng(seed)
    return [
        ([int(min(dice.zipf(1.2), 300))] * int(dice.integers(100, 600)) + dice.integers(0, 9999, 64).tolist(), [])
        for _ in range(prompts)
    ]


def test_a_trace_over_its_bound_is_sampled_and_its_curve_is_close_to_the_whole_ones() -> None:
    served = popular(5, 1500)
    whole, sampled = traced(served, 1 << 24), traced(served, 1 << 16)
    assert sampled.num_bytes <= 1 << 16 < whole.num_bytes
    exact, close = (hit_curve(trace.view(0.0).uses(STEP, 1 << 20)) for trace in (whole, sampled))
    assert sampled.view(0.0).uses(STEP, 1 << 20).rate <= 0.25
    for room in (100, 1000, 5000, None):
        assert close.hit_rate(room) == pytest.approx(exact.hit_rate(room), abs=0.05)


def test_a_trace_forgets_what_is_older_than_an_hour_and_keeps_its_bound() -> None:
    hasher, trace = PrefixHasher(), PromptTrace(3600.0, 1 << 16)
    for minute in range(0, 600):
        for number in range(20):
            trace.add(hasher.prefixes(packed([minute, number] * 50), b"").steps, 100, 60.0 * minute)
        assert trace.num_bytes <= (1 << 16) * 5 // 4
    lengths = trace.view(60.0 * 599).uses(STEP, 1 << 20).lengths
    assert 60 * 20 <= len(lengths) <= 62 * 20
    assert trace.view(60.0 * 700).uses(STEP, 1 << 20).lengths.tolist() == []
