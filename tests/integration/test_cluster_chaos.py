"""Kill anything under load: every request is answered with exactly the right tokens, and nothing leaks."""

import asyncio
import itertools
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from support.cluster import ClusterHandle, cluster
from support.mid_answer import killed_at_work

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from kvcore.process.child import ChildProcess
from kvferry.launch.processes import plan_processes
from nodeapi.sampling import SamplingParams
from router.text.tokenizer import ByteTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

STREAMS = 20
REQUESTS = 100
RESTART_S = 120.0
QUIET_S = 60.0
"""Reservations and read leases last 5 s, room rests 0.5 s, the metadata server's nodes last 2 s: 8 s in all on a
machine that has nothing else to do."""
UNDER_LOAD = ("engine.inter_token_s=0.03", "engine.prefill_tokens_per_s=4000")
SLOW = ("engine.inter_token_s=0.05", "engine.prefill_tokens_per_s=200", "engine.max_batch_tokens=64")
VICTIMS = ("prefill-0", "decode-0", "prefill-1 engine", "decode-1 engine", "metadata-server")
_seeds = itertools.count(100)
"""Each load has prompts of its own: what a cluster has cached already would leave its prefillers idle."""


def make_prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1, 50_000) for _ in range(length)]


def expect(subject: ClusterHandle, prompt: list[int], max_tokens: int, seed: int) -> list[int]:
    engine = subject.config.engine
    assert isinstance(engine, SimEngineConfig)
    sampling = SamplingParams(temperature=1.0, seed=seed, max_tokens=max_tokens, ignore_eos=True)
    return expected_tokens(engine, prompt, sampling)[0]


async def ask(subject: ClusterHandle, prompt: list[int], max_tokens: int, seed: int = 1) -> dict[str, Any]:
    """Stream an answer, hold it against the reference, return its usage with the `id` and what it took."""
    fields = {"max_tokens": max_tokens, "seed": seed, "ignore_eos": True, "return_token_ids": True}
    answer = await subject.stream(prompt, **fields)
    expected = expect(subject, prompt, max_tokens, seed)
    assert answer.token_ids == expected, await subject.explain(answer.id)
    # Bytes at the very end that are no whole character are no text.
    assert answer.text.rstrip("\ufffd") == ByteTokenizer(50_000).decode(expected).rstrip("\ufffd")
    assert answer.finish_reason == "length"
    assert answer.usage["completion_tokens"] == max_tokens
    cached: int = answer.usage["prompt_tokens_details"]["cached_tokens"]
    return {"id": answer.id, "cached": cached}


class Load:
    """STREAMS clients that ask without pause, with shared prefixes, until they are told to stop."""

    def __init__(self, subject: ClusterHandle) -> None:
        self.subject = subject
        self.draw = random.Random(next(_seeds))
        self.prefixes = [make_prompt(self.draw, length) for length in (64, 200, 320, 512, 700, 1000)]
        self.answered = 0
        self.stopping = False

    async def client(self, number: int) -> None:
        while not self.stopping:
            prompt = self.draw.choice(self.prefixes) + make_prompt(self.draw, self.draw.randrange(400))
            await ask(self.subject, prompt, self.draw.randrange(1, 32), seed=self.draw.randrange(1 << 30))
            self.answered += 1

    async def reach(self, answered: int) -> None:
        async def reached() -> bool:
            return self.answered >= answered

        await self.subject.until(reached, 60)


@asynccontextmanager
async def load(subject: ClusterHandle) -> AsyncIterator[Load]:
    """Ends after at least REQUESTS answers, each of which was right."""
    subject_load = Load(subject)
    async with asyncio.TaskGroup() as clients:
        for number in range(STREAMS):
            clients.create_task(subject_load.client(number))
        yield subject_load
        await subject_load.reach(REQUESTS)
        subject_load.stopping = True


async def kill(subject: ClusterHandle, victim: str) -> None:
    """SIGKILL; returns once it serves again."""
    name, _, engine = victim.partition(" ")
    pid = subject.launcher.pids[name]
    if engine:
        before = (await subject.node_info(name)).engine_restarts
        (child,) = psutil.Process(pid).children()
        child.kill()

        async def is_back() -> bool:
            report = await subject.node_info(name)
            return report.engine_restarts == before + 1 and report.engine is not None

        await subject.until(is_back, RESTART_S)
        assert subject.launcher.pids[name] == pid, "the node outlives its engine"
    else:
        os.kill(pid, signal.SIGKILL)
        await subject.launcher.wait_restarted(name, pid, RESTART_S)


async def busy(subject: ClusterHandle, name: str) -> bool:
    """Whether the node's engine has a request."""
    stats = (await subject.node_info(name)).stats
    return stats is not None and bool(stats.running or stats.waiting or stats.loading)


async def quiet(subject: ClusterHandle) -> bool:
    """Whether nobody holds anything, by everyone's own account, in the API and in the metrics."""
    stats = await subject.stats()
    assert (stats.reservations, stats.read_leases, stats.waiters) == (0, 0, 0), stats
    assert all(s.reserved_bytes == s.retiring_bytes == 0 for s in stats.segments), stats
    assert (await subject.status())["requests"]["in_flight"] == 0
    told = await subject.metrics(subject.metadata_url)
    assert [told[f"kvferry_metadata_{what}"] for what in ("reservations", "read_leases", "waiters")] == [0, 0, 0]
    for name in subject.nodes:
        engine = (await subject.node_info(name)).stats
        assert engine is not None
        gauges = ("running", "waiting", "loading", "used_blocks", "pending_saves")
        assert [getattr(engine, gauge) for gauge in gauges] == [0] * 5, (name, engine)
        told = await subject.metrics(subject.node_url(name))
        assert [told[f'kvferry_engine_state{{field="{gauge}"}}'] for gauge in gauges] == [0] * 5, name
    return True


async def is_quiet_and_whole(subject: ClusterHandle) -> None:
    await subject.until(subject.all_ready, RESTART_S)
    await subject.until(lambda: quiet(subject), QUIET_S)


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def whole(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterHandle]:
    """Two prefillers, two decoders; each test leaves it as whole as it found it."""
    async with cluster(tmp_path_factory.mktemp("whole"), overrides=UNDER_LOAD) as handle:
        yield handle


@pytest.mark.asyncio(loop_scope="class")
class TestKilledUnderLoad:
    """SIGKILL to one process of a cluster, or one after the other, while STREAMS clients ask."""

    @pytest.mark.parametrize("victim", VICTIMS)
    async def test_one(self, whole: ClusterHandle, victim: str) -> None:
        before = (await whole.status())["requests"]
        async with load(whole) as clients:
            await clients.reach(REQUESTS // 4)
            for _ in range(10):  # it may have nothing to do when the signal comes
                await kill(whole, victim)
                if victim == "metadata-server" or (await whole.status())["requests"]["retried"] > before["retried"]:
                    break
        await is_quiet_and_whole(whole)
        after = (await whole.status())["requests"]
        assert [after[how] - before[how] for how in ("failed", "cancelled")] == [0, 0]
        assert after["ok"] - before["ok"] == after["total"] - before["total"] == clients.answered
        if victim != "metadata-server":
            assert after["retried"] > before["retried"], "nobody was on the victim: the test shows nothing"
        assert (await whole.status())["hit_rate"] > 0.2

    async def test_all_in_turn(self, whole: ClusterHandle) -> None:
        before = (await whole.status())["requests"]
        async with load(whole) as clients:
            for victim in VICTIMS:
                await clients.reach(clients.answered + 10)
                await kill(whole, victim)
        await is_quiet_and_whole(whole)
        after = (await whole.status())["requests"]
        assert after["ok"] - before["ok"] == after["total"] - before["total"] == clients.answered
        prompt = make_prompt(random.Random(2), 300)
        assert (await ask(whole, prompt, 8))["cached"] == 0
        assert (await ask(whole, prompt, 8))["cached"] == 256, "the cache is as good as new"


async def test_a_stream_goes_on_elsewhere_when_its_decoder_dies_in_mid_answer(tmp_path: Path) -> None:
    prompt = make_prompt(random.Random(3), 200)
    async with cluster(tmp_path, overrides=("engine.inter_token_s=0.05",)) as subject:
        pids = dict(subject.launcher.pids)
        found = await killed_at_work(subject, lambda: ask(subject, prompt, 60))
        record, told = found.before, found.after
        assert [leg["kind"] for leg in told["legs"]].count("decode") == 2
        assert told["retries"] == 1 and told["legs"][-1]["node"] != record["route"]["decoder"]
        assert told["legs"][-1]["cached_tokens"] == 0 or told["legs"][-1]["moved"], "its KV went with its segment"
        victim = record["route"]["decoder"]
        await subject.launcher.wait_restarted(victim, pids[victim], RESTART_S)
        await is_quiet_and_whole(subject)


async def test_without_the_metadata_server_requests_are_served_without_cache(tmp_path: Path) -> None:
    prompt = make_prompt(random.Random(4), 300)
    needed = ("router.decoder_prefill=needed",)  # whatever is faster on this machine
    async with cluster(tmp_path, without=("metadata-server",), overrides=needed) as subject:
        assert (await ask(subject, prompt, 8))["cached"] == 0
        config_file = tmp_path / "cluster.yaml"
        plan = next(plan for plan in plan_processes(subject.config, config_file) if plan.name == "metadata-server")
        server = await ChildProcess.start(plan.command, on_line=print)
        try:

            async def joined() -> bool:
                return len((await subject.stats()).nodes) == 4 and (await subject.status())["metadata_connected"]

            await subject.until(joined, RESTART_S)
            prompt = make_prompt(random.Random(5), 300)
            assert (await ask(subject, prompt, 8))["cached"] == 0
            assert (await ask(subject, prompt, 8))["cached"] == 256
        finally:
            server.kill()
            await server.wait()
        async with asyncio.timeout(50):  # a dead server costs nobody its deadline of 2 s
            for number in range(1, 41):
                await ask(subject, [*prompt, number], 8)

        async def nothing_used() -> bool:
            reports = [await subject.node_info(name) for name in subject.nodes]
            return all(report.stats is not None and report.stats.used_blocks == 0 for report in reports)

        await subject.until(nothing_used, QUIET_S)
        assert (await subject.status())["requests"]["failed"] == 0


async def test_a_metadata_server_that_hangs_holds_nobody_up(tmp_path: Path) -> None:
    draw = random.Random(6)
    async with cluster(tmp_path, overrides=("metadata_server.timeout_s=0.5",)) as subject:
        pid = subject.launcher.pids["metadata-server"]
        os.kill(pid, signal.SIGSTOP)
        try:
            async with asyncio.timeout(60):
                for _ in range(2):
                    await asyncio.gather(*(ask(subject, make_prompt(draw, 200), 8) for _ in range(STREAMS)))
        finally:
            os.kill(pid, signal.SIGCONT)
        await is_quiet_and_whole(subject)


async def test_a_node_that_hangs_holds_its_requests_up_for_a_bounded_time(tmp_path: Path) -> None:
    """Stopped, not killed: no connection breaks. Four rounds of probes are two seconds here."""
    draw = random.Random(10)
    patient = ("router.stall_first_s=60", "router.stall_gap_s=60")
    overrides = (*SLOW, *patient, "router.connect_timeout_s=0.4", "router.probe_interval_s=0.1")
    async with cluster(tmp_path, overrides=overrides) as subject:
        for role, length, max_tokens in (("prefiller", 600, 8), ("decoder", 70, 80)):
            prompt = make_prompt(draw, length)
            task = asyncio.create_task(ask(subject, prompt, max_tokens))

            async def routed() -> dict[str, Any]:
                records = (await subject._json(f"{subject.url}/v1/requests"))["requests"]
                route: dict[str, Any] = records[0]["route"] if records else {}
                return route if route and await busy(subject, route[role]) else {}  # noqa: B023 - of this round

            node = psutil.Process(subject.launcher.pids[(await subject.until(routed, 60))[role]])
            host = [node, *node.children()]
            for process in host:
                process.suspend()
            try:
                async with asyncio.timeout(30):
                    told = await subject.explain((await task)["id"])
            finally:
                for process in host:
                    process.resume()
            assert told["retried_legs"] == [["prefill" if role == "prefiller" else "decode", "node_unavailable"]]
            await is_quiet_and_whole(subject)


async def test_without_prefillers_the_decoders_do_it_all(tmp_path: Path) -> None:
    prompt = make_prompt(random.Random(7), 300)
    async with cluster(tmp_path, without=("prefill-0", "prefill-1")) as subject:
        told = await subject.explain((await ask(subject, prompt, 8))["id"])
        assert told["route"]["prefiller"] is None
        assert [leg["kind"] for leg in told["legs"]] == ["decode"]
        await is_quiet_and_whole(subject)


async def test_what_a_killed_engine_had_reserved_is_free_at_once(tmp_path: Path) -> None:
    """Long before its time runs out, though the node goes on and the metadata server hears it."""
    overrides = (*SLOW, "store.reserve_ttl_s=600", "store.read_lease_s=600")
    async with cluster(tmp_path, overrides=overrides, prefillers=1, decoders=1) as subject:
        prompt = make_prompt(random.Random(9), 700)
        task = asyncio.create_task(ask(subject, prompt, 4))

        async def reserved() -> bool:
            return (await subject.stats()).reservations == 10

        async def given_back() -> bool:
            return (await subject.stats()).counters.get("writers_released") == 1

        await subject.until(reserved, 60)
        (engine,) = psutil.Process(subject.launcher.pids["prefill-0"]).children()
        engine.kill()
        await subject.until(given_back, 60)
        told = await subject.explain((await task)["id"])
        assert next(leg["error"] for leg in told["legs"] if leg["kind"] == "prefill").startswith("engine_died")
        await is_quiet_and_whole(subject)  # of the ten that would have lasted ten minutes none is left


@pytest_asyncio.fixture(scope="class", loop_scope="class")
async def slow(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[ClusterHandle]:
    async with cluster(tmp_path_factory.mktemp("slow"), overrides=SLOW, prefillers=1, decoders=1) as handle:
        yield handle


@pytest.mark.asyncio(loop_scope="class")
class TestClientLeaves:
    """The engines drop the request promptly: it would go on for half a minute and more."""

    @pytest.mark.parametrize(
        ("when", "length", "max_tokens", "victim"),
        [
            ("in mid-stream", 70, 2000, "decode-0"),
            ("during prefill", 7000, 8, "prefill-0"),
            ("while the decoder waits", 7000, 8, "decode-0"),
        ],
    )
    async def test_frees_the_engines(
        self, slow: ClusterHandle, when: str, length: int, max_tokens: int, victim: str
    ) -> None:
        cancelled = (await slow.status())["requests"]["cancelled"]
        body = {"model": "sim", "prompt": make_prompt(random.Random(when), length), "max_tokens": max_tokens}
        events = slow.events("/v1/completions", {**body, "ignore_eos": True})
        first = asyncio.create_task(anext(events))
        await slow.until(lambda: busy(slow, victim), 60)
        if when == "in mid-stream":
            await first
            await events.aclose()
        else:
            first.cancel()
            await asyncio.wait({first})
        await slow.until(lambda: quiet(slow), 20)
        assert (await slow.status())["requests"]["cancelled"] == cancelled + 1
