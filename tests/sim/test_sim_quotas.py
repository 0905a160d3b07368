"""Tenants' limits over several routers in virtual time, by their gates: together they give no more than one would."""

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.types import Message, Receive, Scope, Send
from support.sim_loop import LoopClock, run_sim

from kvcore.config.security import KeysConfig
from kvcore.errors import RateLimitError
from kvcore.tenants.keys import KeyFile, TenantLimits, new_key
from kvcore.tenants.salts import salts_by
from kvcore.tenants.source import KeySource
from kvcore.trust.secrets import Secrets
from router.tenants.callers import caller_of
from router.tenants.gate import TenantGate
from router.tenants.limits import GateLimits
from router.tenants.shared_use import SharedUse, UseReport
from router.tenants.use_exchange import UseExchange

SECRETS = Secrets((bytes(range(32)),))
KEY, RECORD = new_key("t", admin=False, created="")
SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 40))]


class Routers:
    """So many gates of one tenant's limits that tell each other over a network that takes up to `delay_s`. Requests run
    for `run_s`. `posts` counts what they told; routers in `hung` and `dead` answer nobody."""

    def __init__(self, folder: Path, count: int, limits: TenantLimits, seed: int, delay_s: float = 0.005) -> None:
        file = folder / "keys.json"
        file.write_bytes(msgspec.json.encode(KeyFile(tenants={"t": limits}, keys=[RECORD])))
        keys, clock, bounds = KeySource(KeysConfig(file=str(file))), LoopClock(asyncio.get_running_loop()), GateLimits()
        self._random, self._delay_s, self.run_s = random.Random(seed), delay_s, 0.0
        self.hung, self.dead = set[int](), set[int]()
        self.posts = self.running = self.most_running = 0
        self._shared = [SharedUse(keys, clock, bounds) for _ in range(count)]
        self._bounds = bounds
        self._gates = [
            TenantGate(self._app, keys, salts_by(SECRETS), clock, shared=shared, limits=bounds)
            for shared in self._shared
        ]
        names = [str(number) for number in range(count)]
        self._exchanges = [
            UseExchange(shared, [name for name in names if name != own], bounds)
            for own, shared in zip(names, self._shared, strict=True)
        ]
        self._tasks = [asyncio.create_task(one.run(self._post)) for one in self._exchanges]

    async def __aenter__(self) -> "Routers":
        await asyncio.sleep(1.0)  # they have heard each other
        self.posts = 0
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def ask(self, router: int, tokens: int = 0) -> int:
        """The status of one request of the tenant there."""
        replies: list[Message] = []

        async def receive() -> Message:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Message) -> None:
            replies.append(message)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"authorization", f"Bearer {KEY}".encode())],
            "client": ("10.0.0.9", 1),
            "tokens": tokens,
        }
        await self._gates[router](scope, receive, send)
        status: int = replies[0]["status"]
        return status

    async def ask_at_once(self, routers: Sequence[int], tokens: int = 0) -> Counter[int]:
        return Counter(await asyncio.gather(*(self.ask(router, tokens) for router in routers)))

    async def _app(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            status = 200
            if scope["tokens"]:
                try:
                    await caller_of(scope).take_tokens(scope["tokens"])
                except RateLimitError as error:
                    status = error.http_status
            await asyncio.sleep(self.run_s)
        finally:
            self.running -= 1
        await send({"type": "http.response.start", "status": status, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async def _post(self, url: str, body: bytes) -> bytes:
        number = int(url.partition("/")[0])
        if number in self.dead:
            raise ConnectionRefusedError(url)
        self.posts += 1
        await asyncio.sleep(self._random.uniform(0, self._delay_s))
        if number in self.hung:
            await asyncio.sleep(self._bounds.tell_timeout_s)
            raise TimeoutError
        report = msgspec.msgpack.decode(body, type=UseReport)
        self._shared[number].told(report)
        said = msgspec.msgpack.encode(self._shared[number].report(report.asked))
        await asyncio.sleep(self._random.uniform(0, self._delay_s))
        return said


def sim(main: Any, seed: int) -> None:
    run_sim(main, seed=seed, limit_s=10_000.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_at_once_at_several_routers_a_tenant_gets_what_one_would_give(tmp_path: Path, seed: int):
    count = 2 + seed % 3

    async def main() -> None:
        async with Routers(tmp_path, count, TenantLimits(requests_per_minute=20), seed) as routers:
            statuses = await routers.ask_at_once([number % count for number in range(200)])
            assert 20 <= statuses[200] < 20 + count, "the last one may be given by each"
            assert statuses[200] + statuses[429] == 200
            await asyncio.sleep(60 * count / 20)
            more = await routers.ask_at_once([number % count for number in range(200)])
            assert 1 <= more[200] <= count, "what was too much is made up for"

    sim(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_one_after_the_other_however_fast_is_counted_at_all(tmp_path: Path, seed: int):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(requests_per_minute=20), seed) as routers:
            before = asyncio.get_running_loop().time()
            statuses = Counter([await routers.ask(number % 2) for number in range(60)])
            assert asyncio.get_running_loop().time() - before < 0.2, "less than they need to tell each other unasked"
            assert statuses == {200: 20, 429: 40}

    sim(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_who_uses_one_of_the_routers_has_all_of_its_limit_there(tmp_path: Path, seed: int):
    async def main() -> None:
        limits = TenantLimits(requests_per_minute=20, concurrency=10)
        async with Routers(tmp_path, 3, limits, seed) as routers:
            routers.run_s = 1.0
            assert await routers.ask_at_once([0] * 10) == {200: 10}
            assert await routers.ask_at_once([1] * 15) == {200: 10, 429: 5}

    sim(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_no_more_requests_are_under_way_than_a_tenant_may_have(tmp_path: Path, seed: int):
    count = 2 + seed % 3

    async def main() -> None:
        async with Routers(tmp_path, count, TenantLimits(concurrency=8), seed) as routers:
            routers.run_s = 0.7
            for _ in range(3):
                statuses = await routers.ask_at_once([number % count for number in range(40)])
                assert 8 <= statuses[200] < 8 + count
            assert routers.most_running < 8 + count and routers.running == 0

    sim(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_request_that_has_ended_at_one_router_makes_room_at_the_other_at_once(tmp_path: Path, seed: int):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(concurrency=1), seed) as routers:
            routers.run_s = 0.3  # so that the others hear of it by themselves, too
            for number in range(20):
                assert await routers.ask(number % 2) == 200

    sim(main, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_tokens_are_counted_at_all(tmp_path: Path, seed: int):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(tokens_per_minute=1000), seed) as routers:
            statuses = await routers.ask_at_once([number % 2 for number in range(100)], tokens=100)
            assert 10 <= statuses[200] <= 11

    sim(main, seed)


@pytest.mark.parametrize("lost", ["hung", "dead"])
def test_a_router_that_says_nothing_costs_one_request_a_quarter_of_a_second(tmp_path: Path, lost: str):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(requests_per_minute=20), 1) as routers:
            loop = asyncio.get_running_loop()
            getattr(routers, lost).add(1)
            before, longest = loop.time(), 0.0
            for _ in range(20):
                began = loop.time()
                assert await routers.ask(0) == 200
                longest = max(longest, loop.time() - began)
            assert await routers.ask(0) == 429
            assert longest <= 0.26 and loop.time() - before < 0.3
            getattr(routers, lost).clear()
            await asyncio.sleep(6.0)
            statuses = await routers.ask_at_once([1] * 20)
            assert 1 <= statuses[200] <= 2, "it was told what it has missed; since then one in three seconds is saved"

    sim(main, 1)


@pytest.mark.parametrize(
    ("per_minute", "rate"), [(600, 10), (6_000, 100), pytest.param(60_000, 1_000, marks=pytest.mark.slow)]
)
def test_who_keeps_within_its_limit_costs_few_questions(tmp_path: Path, per_minute: int, rate: int):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(requests_per_minute=per_minute), 1) as routers:
            loop = asyncio.get_running_loop()
            before = loop.time()
            statuses = Counter([await routers.ask(number % 2) for number in range(per_minute * 11 // 10)])
            saved = (loop.time() - before) * rate
            assert per_minute <= statuses[200] <= 1.01 * per_minute + 1 + saved, "from now on it gets what comes in"
            routers.posts = 0
            for number in range(5 * rate):
                await asyncio.sleep(1 / rate)
                await routers.ask(number % 2)
            assert routers.posts < 5 * (8 + 10), "eight a second are what they tell each other unasked"

    sim(main, 1)


def test_who_asks_for_far_too_much_costs_no_more_than_a_question_each_ten_milliseconds(tmp_path: Path):
    async def main() -> None:
        async with Routers(tmp_path, 2, TenantLimits(concurrency=2), 1) as routers:
            routers.run_s = 0.5
            routers.posts = 0

            async def hammer(router: int) -> None:
                for _ in range(200):
                    await routers.ask(router)
                    await asyncio.sleep(0.001)

            loop = asyncio.get_running_loop()
            before = loop.time()
            await asyncio.gather(*(hammer(number % 2) for number in range(20)))
            assert routers.posts < 2 * 100 * (loop.time() - before) and routers.most_running <= 3

    sim(main, 1)
