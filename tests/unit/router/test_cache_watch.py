"""The router counts in tokens what the cache gave to each answered request, and why it gave no more."""

from typing import Any

import httpx
from support.router_fakes import CHUNK_TOKENS, Rig, make_rig, two_and_two

from kvcore.clock import ManualClock
from kvcore.errors import EngineError
from nodeapi.sampling import SamplingParams
from router.cache.limits import WatchLimits
from router.cache.report import CacheCounts
from router.cache.watch import CacheWatch
from router.requests.records import LegRecord, RequestLog, RequestRecord, RouteRecord
from router.requests.spec import RequestSpec

LONG = [number * 7 % 500 for number in range(200)]


async def get(rig: Rig, path: str) -> httpx.Response:
    transport = httpx.ASGITransport(app=rig.app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://router") as client:
        return await client.get(path)


async def ask(rig: Rig, prompt: list[int], name: str = "r", max_tokens: int = 4) -> None:
    run = rig.dispatcher.open(RequestSpec(name, prompt, SamplingParams(max_tokens=max_tokens)))
    async with run:
        assert [emit async for emit in run]


async def test_every_prompt_token_is_cached_or_has_a_reason() -> None:
    rig = await make_rig()
    await ask(rig, LONG)
    for node in rig.nodes.nodes:
        node.cached_tokens = 3 * CHUNK_TOKENS
    await ask(rig, LONG)
    stats = (await get(rig, "/v1/cache/stats")).json()
    first = {"requests": 1, "prompt_tokens": 200, "new_tokens": 200}
    known = 12 * CHUNK_TOKENS  # the 13th chunk ends behind the prompt
    second = {"cached_tokens": 48, "gone_tokens": known - 48, "new_tokens": 200 - known}
    total = {key: first.get(key, 0) + second.get(key, 0) for key in first | second} | {"requests": 2}
    total["prompt_tokens"] = 400
    for span in ("minute", "hour", "start"):
        told = stats[span]
        assert {key: told[key] for key in total} == total
        assert told["hit_rate"] == 48 / 400
        assert told["by_source"] == {"engine": 48}
    metrics = (await get(rig, "/metrics")).text
    assert 'kvferry_cache_tokens_total{source="engine"} 48.0' in metrics
    assert f'kvferry_cache_missed_tokens_total{{why="gone"}} {known - 48}.0' in metrics
    await rig.dispatcher.aclose()


async def test_a_request_that_was_tried_again_counts_once_and_one_that_failed_apart() -> None:
    nodes = two_and_two()
    rig = await make_rig(nodes, attempts=2)
    nodes["d0"].die_after = nodes["d1"].die_after = 2
    nodes["p0"].prefill_error = EngineError("broken")
    await ask(rig, LONG, max_tokens=3)
    counts = CacheCounts(**(await get(rig, "/v1/cache/stats")).json()["start"])
    assert (counts.requests, counts.unanswered, counts.prompt_tokens) == (1, 0, 200)
    nodes["d0"].generate_error = nodes["d1"].generate_error = EngineError("broken")
    for node in ("p0", "p1"):
        nodes[node].generate_error = EngineError("broken")
    try:
        await ask(rig, LONG, "s")
        raise AssertionError("no node could answer")
    except EngineError:
        pass
    counts = CacheCounts(**(await get(rig, "/v1/cache/stats")).json()["start"])
    assert (counts.requests, counts.unanswered, counts.prompt_tokens) == (1, 1, 200)
    await rig.dispatcher.aclose()


class Watched:
    """A watch that is told of requests by hand, on a clock of its own."""

    def __init__(self, rig: Rig, **limits: Any) -> None:
        self.clock, self.log = ManualClock(), RequestLog()
        self.watch = CacheWatch(rig.cluster, self.log, self.clock, limits=WatchLimits(**limits))

    def tell(self, prompt: list[int], cached: int = 0, output: tuple[int, ...] = (), salt: bytes = b"") -> CacheCounts:
        """What the one request adds."""
        before = CacheCounts()
        before.add(self.watch.start)
        leg = LegRecord(id="d1", node="d0", kind="decode", cached_tokens=cached)
        record = RequestRecord(
            id="r",
            state="ok",
            prompt_tokens=len(prompt),
            cached_tokens=cached,
            route=RouteRecord(prefiller=None, decoder="d0", reason="short"),
            legs=[leg],
        )
        self.log.close(record, RequestSpec("r", prompt, SamplingParams(max_tokens=1), cache_salt=salt), output)
        after = self.watch.start
        return CacheCounts(
            prompt_tokens=after.prompt_tokens - before.prompt_tokens,
            cached_tokens=after.cached_tokens - before.cached_tokens,
            **{f"{why}_tokens": num - before.missed[why] for why, num in after.missed.items()},
        )


def missed(**tokens: int) -> dict[str, int]:
    return {"last_chunk": 0, "gone": 0, "new": 0, "unknown": 0} | tokens


async def test_what_is_lost_to_the_last_chunk_is_what_was_known_behind_the_last_whole_one() -> None:
    nodes = two_and_two()
    for node in nodes.nodes:
        node.spec = {"chunk_tokens": 64}
    watched = Watched(await make_rig(nodes))
    assert watched.tell(LONG).missed == missed(new=200)
    # 192 are known and make three chunks; then 112, which make one; then the whole prompt but the token to be computed
    assert watched.tell(LONG, cached=192).missed == missed(new=8)
    assert watched.tell(LONG[:120] + [1] * 80, cached=64).missed == missed(last_chunk=48, new=88)
    assert watched.tell(LONG[:64], cached=0).missed == missed(last_chunk=63, new=1)
    # an engine's own cache goes on where chunks end
    assert watched.tell(LONG[:120] + [2] * 80, cached=96).missed == missed(last_chunk=16, new=88)
    assert watched.tell(LONG[:120] + [3] * 80, cached=0).missed == missed(last_chunk=48, gone=64, new=88)


async def test_the_next_turn_knows_the_answer_of_the_one_before_and_another_salt_nothing() -> None:
    watched = Watched(await make_rig())
    answer = tuple(range(300, 340))
    watched.tell(LONG, output=answer)
    turn = [*LONG, *answer, *[9] * 20]
    assert watched.tell(turn, cached=240).missed == missed(new=20)
    watched.clock.advance(10.0)
    assert watched.tell(turn, salt=b"other").missed["new"] == len(turn)


async def test_what_an_index_that_is_not_whole_did_not_find_is_unknown_and_not_gone() -> None:
    watched = Watched(await make_rig())
    watched.tell(LONG)
    watched.watch.rebuilding = True
    assert watched.tell(LONG, cached=48).missed == missed(unknown=192 - 48, new=8)
    watched.watch.rebuilding = False
    assert watched.tell(LONG, cached=48).missed == missed(gone=192 - 48, new=8)


async def test_prompts_beyond_the_budget_wait_and_those_beyond_that_are_counted_without_reasons() -> None:
    watched = Watched(await make_rig(), tokens_per_s=2000.0, waiting_tokens=400)
    assert watched.tell(LONG).prompt_tokens == 200, "any length, as there was some budget left"
    assert watched.tell(LONG, cached=50).prompt_tokens == watched.tell(LONG).prompt_tokens == 0, "they wait"
    assert watched.tell(LONG, cached=50).missed == missed(unknown=150), "no room to wait"
    watched.watch.catch_up()
    assert watched.watch.start.requests == 2, "no time has passed"
    watched.clock.advance(0.1)  # back to nothing owed, and a little
    watched.watch.catch_up()
    assert watched.watch.start.requests == 3 and watched.watch.start.gone_tokens == 192 - 50
    watched.clock.advance(10.0)
    watched.watch.catch_up()
    watched.watch.catch_up()
    counts = watched.watch.start
    assert (counts.requests, counts.prompt_tokens, counts.gone_tokens) == (4, 800, 142 + 192)
    watched.clock.advance(10.0)
    assert watched.tell(LONG).missed["gone"] == 192, "at once again"
