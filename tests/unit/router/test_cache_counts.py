"""What the router counts of prompts: windows, sources of cached tokens, and which beginnings it knows."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from support.router_fakes import spec

from nodeapi.messages import Moved, Promoted
from router.cache.prefixes import EARLY, STEP, Hashes, KnownHashes, PrefixHasher, packed
from router.cache.report import CacheCounts
from router.cache.sources import cached_by_source
from router.cache.window import RollingCounts
from router.requests.records import LegRecord

SPEC = spec(chunk_tokens=256, chunk_bytes=1 << 20)
CHUNK_ON_THE_WIRE = (1 << 20) + 128


def answered(prompt_tokens: int, **others: int) -> CacheCounts:
    return CacheCounts(requests=1, prompt_tokens=prompt_tokens, **others)


def test_a_window_forgets_what_is_older_than_its_span() -> None:
    minute = RollingCounts(60.0, 12)
    minute.add(answered(100, cached_tokens=50), 1000.0)
    minute.add(answered(300, cached_tokens=300), 1030.0)
    assert (minute.total(1030.0).prompt_tokens, minute.total(1030.0).hit_rate) == (400, 0.875)
    assert minute.total(1054.9).requests == 2
    assert minute.total(1060.0).prompt_tokens == 300, "the first one's step has left"
    empty = minute.total(1090.0)
    assert (empty.requests, empty.hit_rate) == (0, None)


@given(st.lists(st.tuples(st.floats(0, 40), st.integers(1, 1000)), max_size=30))
def test_a_window_holds_all_of_its_span_and_nothing_older(comes: list[tuple[float, int]]) -> None:
    rolling, now = RollingCounts(60.0, 12), 1000.0
    told: list[tuple[float, int]] = []
    for pause, tokens in comes:
        now += pause
        told.append((now, tokens))
        rolling.add(answered(tokens), now)
        total = rolling.total(now).prompt_tokens
        assert sum(n for at, n in told if at > now - 55.0) <= total <= sum(n for at, n in told if at > now - 60.0)


def prefill(cached: int, chunks: int = 0, promoted: tuple[Promoted, ...] = (), **others: str) -> LegRecord:
    moved = [Moved(transport="shm", direction="get", num_bytes=chunks * CHUNK_ON_THE_WIRE, seconds=0.1)]
    moved.append(Moved(transport="shm", direction="put", num_bytes=9 * CHUNK_ON_THE_WIRE, seconds=0.1))
    return LegRecord(
        id="p1", node="p", kind="prefill", cached_tokens=cached, moved=moved, promoted=list(promoted), **others
    )


def decode(cached: int, chunks: int = 0, promoted: tuple[Promoted, ...] = ()) -> LegRecord:
    leg = prefill(cached, chunks, promoted)
    leg.id, leg.kind = "d1", "decode"
    return leg


def from_disk(chunks: int) -> Promoted:
    return Promoted(tier="disk", num_chunks=chunks)


@pytest.mark.parametrize(
    ("legs", "cached", "sources", "unused"),
    [
        ([prefill(0), decode(1023)], 0, {}, 0),
        ([prefill(512), decode(1023, 4)], 512, {"engine": 512}, 0),
        ([prefill(512, 2), decode(1023, 4)], 512, {"memory": 512}, 0),
        ([prefill(576, 1), decode(1023, 4)], 576, {"memory": 256, "engine": 320}, 0),
        ([prefill(768, 3, (from_disk(2),)), decode(1023, 4)], 768, {"memory": 256, "disk": 512}, 0),
        ([prefill(256, 0, (from_disk(2),)), decode(1023, 4)], 256, {"engine": 256}, 512),
        ([prefill(1024, 0, (from_disk(4),)), decode(1023, 4)], 1023, {"disk": 1023}, 1),
        ([prefill(1023, 0, (from_disk(3),)), decode(1023, 4)], 1023, {"memory": 255, "disk": 768}, 0),
        ([decode(300, 1, (Promoted(tier="redis", num_chunks=1),))], 300, {"redis": 256, "engine": 44}, 0),
        ([prefill(512, 2, error="engine_error: died"), prefill(512, 0), decode(1023, 4)], 512, {"engine": 512}, 0),
        ([], 0, {}, 0),
    ],
)
def test_cached_tokens_are_told_apart_by_where_they_were(
    legs: list[LegRecord], cached: int, sources: dict[str, int], unused: int
) -> None:
    """Of two legs the one with fewer cached tokens tells; one that failed tells nothing but what it promoted."""
    found = cached_by_source(legs, cached, SPEC)
    assert found == (sources, unused)
    assert sum(found[0].values()) == cached


PROMPTS = st.lists(st.lists(st.integers(0, 2), max_size=160), max_size=8)


@given(PROMPTS, st.integers(0, 3))
def test_the_longest_known_beginning_is_found(prompts: list[list[int]], seed: int) -> None:
    """To the token among the first ones, behind them to 16 tokens: as looking through all prompts finds it."""
    hasher, known = PrefixHasher(seed), KnownHashes(1 << 20)
    every = np.unique(np.concatenate([np.empty(0, np.uint64), *(all_of(hasher, prompt) for prompt in prompts)]))
    assume(len(np.unique(every % (1 << 20))) == len(every))  # no two want one place
    for number, prompt in enumerate(prompts):
        shared = max((common(prompt, before) for before in prompts[:number]), default=0)
        expected = shared if shared < EARLY else max(shared // STEP * STEP, EARLY)
        prefixes = hasher.prefixes(packed(prompt), b"root")
        assert known.known_tokens(prefixes) == expected
        known.add(prefixes.hashes)


def all_of(hasher: PrefixHasher, prompt: list[int]) -> Hashes:
    return hasher.prefixes(packed(prompt), b"root").hashes


def common(one: list[int], other: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def test_other_roots_know_nothing_of_each_other() -> None:
    hasher, known = PrefixHasher(), KnownHashes(1 << 12)
    prompt = list(range(100))
    known.add(hasher.prefixes(packed(prompt), b"one").hashes)
    assert known.known_tokens(hasher.prefixes(packed(prompt), b"one")) == 96
    assert known.known_tokens(hasher.prefixes(packed(prompt), b"other")) == 0


def test_newer_beginnings_take_the_places_of_older_ones() -> None:
    hasher, known = PrefixHasher(), KnownHashes(1 << 12)
    prompts = np.random.default_rng(1).integers(0, 1 << 32, (500, 200)).tolist()
    for prompt in prompts:
        known.add(hasher.prefixes(packed(prompt), b"").hashes)
    found = [known.known_tokens(hasher.prefixes(packed(prompt), b"")) for prompt in prompts]
    assert (found[-1], found[0]) == (192, 0)
    assert sum(found[-50:]) > 10 * sum(found[:50])
