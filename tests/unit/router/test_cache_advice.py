"""Why the hit rate is low, and what would help, on traffic of which the answer is known."""

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import pytest
from support.router_fakes import Rig, make_rig, two_and_two

from kvcore.config.schema import RouterConfig
from nodeapi.sampling import SamplingParams
from router.cache.advice import CacheRoom, advise
from router.cache.diagnosis import MissReason, diagnose
from router.cache.divergence import RepeatedText, where_most_leave
from router.cache.limits import WatchLimits
from router.cache.prefixes import EARLY, STEP, PrefixHasher, packed
from router.cache.report import CacheCounts, CacheStats, RoomPoint
from router.cache.trace import PromptTrace, TraceView
from router.requests.records import LegRecord, RequestRecord, RouteRecord
from router.requests.spec import RequestSpec

DICE: list[np.random.Generator] = []


@pytest.fixture(autouse=True)
def _same_texts_each_time() -> None:
    DICE[:] = [np.random.default_rng(11)]


def text(tokens: int) -> list[int]:
    return [int(token) for token in DICE[0].integers(1, 400, tokens)]


# --- divergence ---


def test_text_behind_another_beginning_is_told_from_text_that_is_new() -> None:
    seen = RepeatedText(1 << 16)
    body = text(2000)
    first = seen.look(packed(body), 0, 2000)
    assert (first.repeated_tokens, first.left_at) == (0, None)
    dated = [7, 7, 7, *body]
    again = seen.look(packed(dated), 0, len(dated))
    assert again.repeated_tokens >= 1900 and again.left_at == 0
    other = seen.look(packed(text(2000)), 0, 2000)
    assert other.repeated_tokens <= 20 and other.left_at is None
    half_way = seen.look(packed([*body[:500], 9, *body[500:]]), 500, 2001)
    assert half_way.repeated_tokens >= 1400 and half_way.left_at == 256, "a power of two below"
    whole = seen.look(packed(body), 2000, 2000)
    assert (whole.repeated_tokens, whole.left_at) == (0, None)


def test_where_half_of_the_prompts_leave_is_a_power_of_two_and_the_commonest_token_is_exact() -> None:
    assert where_most_leave({}) == (0.0, 0, 0)
    assert where_most_leave({23: 6, 512: 4}) == (0.6, 32, 23)
    assert where_most_leave({0: 1}) == (1.0, 1, 0)
    assert where_most_leave({256: 5, 1024: 5}) == (0.5, 512, 256)


# --- diagnosis ---


def low(**tokens: int) -> CacheStats:
    """An hour of 1000 requests and 100,000 prompt tokens of which 30,000 were cached."""
    hour = CacheCounts(requests=1000, prompt_tokens=100_000, cached_tokens=30_000, **tokens).rated()
    rates: list[tuple[float | None, float]] = [(0.5, 0.2), (1, 0.3), (2, 0.62), (4, 0.66), (None, 0.7)]
    rooms = [RoomPoint(times=n, num_bytes=n and int(n * (1 << 30)), hit_rate=rate) for n, rate in rates]
    return CacheStats(hour=hour, warn_below=0.7, chunk_tokens=256, room_bytes=1 << 30, rooms=rooms)


def why(stats: CacheStats) -> tuple[MissReason, str]:
    found = diagnose(stats)
    assert found is not None
    return found.reason, found.sentence


def test_too_little_room_says_what_twice_as_much_would_have_hit() -> None:
    reason, sentence = why(low(gone_tokens=40_000, new_tokens=30_000))
    assert reason is MissReason.TOO_LITTLE_ROOM
    for part in ("40% were in earlier prompts", "With 1.0 GiB of room", "twice as much 62%"):
        assert part in sentence


def test_what_had_room_and_was_not_there_is_not_blamed_on_the_room() -> None:
    stats = low(gone_tokens=40_000, new_tokens=30_000)
    stats.rooms = [RoomPoint(times=n, num_bytes=1, hit_rate=0.7) for n in (1, 2, 4)]
    reason, sentence = why(stats)
    assert reason is MissReason.NOT_KEPT and "more room would not have helped" in sentence
    stats.rooms = []
    assert "more room" not in why(stats)[1], "nobody knows"


def test_chunks_that_are_too_long_say_what_half_of_it_would_have_hit() -> None:
    stats = low(last_chunk_tokens=25_000, gone_tokens=10_000, new_tokens=35_000)
    stats.half_chunk_hit_rate = 0.55
    reason, sentence = why(stats)
    assert reason is MissReason.CHUNKS_TOO_LONG
    assert "whole chunk of 256 tokens; chunks of 128 would have hit 55% in all" in sentence


def test_prompts_that_differ_early_say_at_which_token() -> None:
    stats = low(new_tokens=70_000, repeated_tokens=50_000)
    stats.hour.left_at = {23: 500, 30: 110, 512: 90}
    reason, sentence = why(stats)
    assert reason is MissReason.PROMPTS_DIFFER_EARLY
    assert "61% of the prompts differ from every earlier one within their first 32 tokens" in sentence
    assert "most often at token 24" in sentence


def test_prompts_that_have_nothing_in_common_are_told_so() -> None:
    reason, sentence = why(low(new_tokens=70_000, repeated_tokens=2_000))
    assert (reason, "68% were in no earlier prompt" in sentence) == (MissReason.NOTHING_REPEATS, True)


def test_a_good_hour_and_a_young_one_are_not_warned_of() -> None:
    assert diagnose(low(gone_tokens=40_000), WatchLimits(min_requests=1001)) is None
    good = low(gone_tokens=30_000)
    good.hour.cached_tokens = 70_000
    good.hour.rated()
    assert diagnose(good) is None
    off = low(gone_tokens=40_000)
    off.warn_below = 0.0
    assert diagnose(off) is None
    assert diagnose(CacheStats(warn_below=0.7)) is None


# --- advice ---

ROOM = CacheRoom(chunk_tokens=256, chunk_bytes=256 << 10, block_tokens=64, memory_bytes=64 << 20)


def view(prompts: Sequence[list[int]]) -> TraceView:
    hasher, trace = PrefixHasher(), PromptTrace(3600.0, 1 << 24)
    for prompt in prompts:
        trace.add(hasher.prefixes(packed(prompt), b"").steps, len(prompt), 0.0)
    return trace.view(0.0)


def test_the_best_chunk_length_divides_what_prompts_share() -> None:
    """320 shared tokens hold five chunks of 64, two of 128, one of 256, none of 512."""
    shared = text(320)
    told = advise(view([[*shared, *text(100)] for _ in range(200)]), ROOM, longest=512, max_samples=1 << 20)
    assert told.best_chunk_tokens == 64
    rates = {option.chunk_tokens: option.hit_rate for option in told.lengths}
    per_prompt = {64: 320, 128: 256, 256: 256, 512: 0}
    assert rates == pytest.approx({length: 199 * hit / (200 * 420) for length, hit in per_prompt.items()})
    assert told.hit_rate == rates[256]
    assert told.advice[0].startswith("kv.chunk_tokens: 64 would have hit 75.8%")


def test_the_longest_chunk_that_is_as_good_is_the_best() -> None:
    shared = text(1024)
    told = advise(view([[*shared, *text(10)] for _ in range(50)]), ROOM, longest=1024, max_samples=1 << 20)
    assert told.best_chunk_tokens == 1024


def test_a_loop_over_documents_needs_room_for_all_of_them_and_less_room_is_in_vain() -> None:
    documents = [[*text(1024), 1] for _ in range(50)]
    told = advise(view(documents * 4), ROOM, longest=256, max_samples=1 << 20)
    assert told.best_chunk_tokens == 256
    whole = 50 * 4 * ROOM.bytes_a_chunk(256)
    assert told.memory_bytes == told.enough_bytes == whole
    assert told.memory_hit_rate == told.enough_hit_rate == pytest.approx(3 / 4 * 1024 / 1025)
    small = {point.times: point.hit_rate for point in told.sizes}
    assert whole > ROOM.num_bytes / 2 and small[0.5] == 0.0 and small[1] == told.enough_hit_rate


def test_few_hot_documents_bend_the_curve_where_they_fit() -> None:
    """Five documents of four chunks come nine times of ten, two hundred others the tenth time, in a loop."""
    hot, cold = [[*text(1024), 1] for _ in range(5)], [[*text(1024), 1] for _ in range(200)]
    order = [doc for n in range(600) for doc in [*(hot[(n * 9 + k) % 5] for k in range(9)), cold[n % 200]]]
    told = advise(view(order), ROOM, longest=256, max_samples=1 << 20)
    each = ROOM.bytes_a_chunk(256)
    assert 5 * 4 <= told.memory_bytes / each <= 8 * 4
    assert told.enough_bytes == pytest.approx(205 * 4 * each, rel=0.02)
    assert told.memory_hit_rate > 0.88 and told.enough_hit_rate > 0.95


def test_more_than_is_replayed_at_once_is_sampled_and_says_so() -> None:
    shared = text(320)
    told = advise(view([[*shared, *text(100)] for _ in range(300)]), ROOM, longest=256, max_samples=1000)
    assert told.sample_rate < 1 and told.prompts == 300


def test_without_prompts_there_is_no_advice() -> None:
    assert advise(view([]), ROOM, longest=256, max_samples=1000).advice == ["nothing to go by yet"]


# --- the whole way ---


def serve(rig: Rig, prompts: Sequence[list[int]], cached: int = 0) -> None:
    for prompt in prompts:
        record = RequestRecord(
            id="r",
            state="ok",
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            route=RouteRecord(prefiller=None, decoder="d0", reason="short"),
            legs=[LegRecord(id="d1", node="d0", kind="decode", cached_tokens=cached)],
        )
        rig.log.close(record, RequestSpec("r", prompt, SamplingParams(max_tokens=1)), [])


async def get(rig: Rig, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return await client.get(path)


async def test_a_low_hit_rate_is_warned_of_once_and_again_when_the_reason_changes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = await make_rig(watch_limits=WatchLimits(min_requests=20, tokens_per_s=1e9))
    with caplog.at_level(logging.WARNING, logger="router"):
        documents = [text(300) for _ in range(10)]
        serve(rig, documents)
        await rig.cache.refresh()
        assert caplog.records == [] and (await get(rig, "/v1/cluster")).json()["problems"] == [], "too few to tell"
        for day in range(5):
            serve(rig, [[400 + day, 2, *document] for document in documents])
            await rig.cache.refresh()
        stats = (await get(rig, "/v1/cache/stats")).json()
        assert (stats["reason"], stats["warn_below"]) == ("prompts_differ_early", 0.7)
        assert (
            "83% of the prompts differ from every earlier one within their first 4 tokens, most often at token 3"
            in stats["problem"]
        )
        serve(rig, documents * 20)
        await rig.cache.refresh()
    reasons = [record.message.split("reason=")[1].split()[0] for record in caplog.records]
    assert reasons == ["prompts_differ_early", "not_kept"]
    (problem,) = (await get(rig, "/v1/cluster")).json()["problems"]
    assert problem.startswith("the hit rate of the last hour is 0% of the prompt tokens, below 70%: ")


async def test_advice_is_asked_of_the_router() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.spec = {"chunk_tokens": 64, "chunk_bytes": 64 << 10}
    rig = await make_rig(nodes, watch_limits=WatchLimits(tokens_per_s=1e9))
    shared = text(100)
    serve(rig, [[*shared, *text(50)] for _ in range(20)])
    told = (await get(rig, "/v1/cache/advise")).json()
    assert (told["chunk_tokens"], told["best_chunk_tokens"], told["prompts"]) == (64, 32, 20)
    assert [option["chunk_tokens"] for option in told["lengths"]][:4] == [16, 32, 64, 128]
    assert told["room_bytes"] == int(4 * (1 << 20) * 0.9)
    assert told["advice"]


def test_the_page_names_every_count_and_reason_and_the_limits_as_they_are() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs/hit-rate.md").read_text()
    named = set(re.findall(r"`([a-z_]+)`", page))
    counts = set(CacheCounts.__struct_fields__) - {"requests"}
    assert counts | {reason.value for reason in MissReason} <= named
    assert {"rooms", "lengths", "sizes", "best_chunk_tokens", "memory_bytes", "enough_bytes", "advice"} <= named
    limits, config = WatchLimits(), RouterConfig().cache
    for said in (
        f"more than {limits.tokens_per_s:,.0f} prompt tokens a second",
        f"up to {limits.known_prefixes * STEP >> 20} million tokens",
        f"first {EARLY} tokens and then at every {STEP}th",
        f"`router.cache.warn_below` ({config.warn_below:g};",
        f"fewer than {limits.min_requests} answered",
        f"{limits.min_share:.0%} of the prompt tokens".replace("%", " %"),
        f"in {limits.trace_bytes >> 20} MiB",
    ):
        assert said in page, said
