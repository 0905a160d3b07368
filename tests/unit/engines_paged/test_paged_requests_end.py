"""Aborts, deadlines, failing steps, slow readers, shutdown: at every stage all is given back."""

import asyncio

import msgspec
import pytest
from support.engine_fakes import (
    CHUNK,
    CONFIG,
    Cluster,
    FailingRunner,
    completions,
    deltas,
    idle,
    lone_engine,
    prefill_request,
    prompt_of,
    request,
    settle,
)
from support.sim_loop import LoopClock, run_sim

from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.paged.runner import StepOutput
from engines.sim.reference import expected_tokens
from engines.sim.runner import SimRunner
from kvcore.errors import (
    CancelledByPeerError,
    DeadlineExceededError,
    EngineError,
    NodeUnavailableError,
    OverloadedError,
)
from nodeapi.messages import FinishReason, Handoff

STAGES = ["waiting", "loading", "running", "decoding"]


async def reach(engine, stage):
    async def reached():
        stats = await engine.stats()
        if stage == "decoding":
            return stats.counters.get("decode_tokens", 0) > 100
        return getattr(stats, stage) > 0

    await settle(reached)


def stage_setup(stage):
    """Config and request that dwell in `stage`."""
    config = msgspec.structs.replace(CONFIG, max_sequences=1) if stage == "waiting" else CONFIG
    handoff = Handoff(num_chunks=3, wait_s=50.0) if stage == "loading" else None
    return config, request("r", prompt_of(100), max_tokens=500, handoff=handoff)


async def with_engine(stage, act):
    config, wanted = stage_setup(stage)
    cluster = Cluster(config)
    async with cluster.engine("d") as engine:
        blocker = None
        if stage == "waiting":
            blocker = asyncio.create_task(completions(engine, request("b", prompt_of(40, 1), max_tokens=400)))
            await reach(engine, "running")
        await act(engine, wanted)
        if blocker is not None:
            await engine.abort("b")
            await blocker
        await idle(engine)
    await cluster.aclose()


@pytest.mark.parametrize("stage", STAGES)
def test_abort_ends_the_stream_and_frees_all(stage):
    async def act(engine, wanted):
        task = asyncio.create_task(deltas(engine, wanted))
        await reach(engine, stage)
        await engine.abort("r")
        assert (await task)[-1].finish_reason is FinishReason.ABORT

    run_sim(lambda: with_engine(stage, act), limit_s=40)


@pytest.mark.parametrize("stage", STAGES)
def test_cancelling_the_reader_frees_all(stage):
    async def act(engine, wanted):
        task = asyncio.create_task(deltas(engine, wanted))
        await reach(engine, stage)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run_sim(lambda: with_engine(stage, act), limit_s=40)


@pytest.mark.parametrize("stage", STAGES)
def test_a_deadline_ends_the_request_and_frees_all(stage):
    async def act(engine, wanted):
        with pytest.raises(DeadlineExceededError):
            await deltas(engine, msgspec.structs.replace(wanted, deadline_s=2.0))

    run_sim(lambda: with_engine(stage, act), limit_s=40)


@pytest.mark.parametrize("how", ["abort", "cancel", "deadline"])
def test_a_prefill_that_ends_while_saving_gives_all_back(how):
    async def main():
        cluster = Cluster()
        async with cluster.engine("p") as engine:
            cluster.wires["p"].before["commit"] = asyncio.Event()
            deadline_s = 1.0 if how == "deadline" else 100.0
            task = asyncio.create_task(engine.prefill(prefill_request("r", prompt_of(100), deadline_s)))
            await cluster.wires["p"].arrived["commit"].wait()
            if how == "abort":
                await engine.abort("r")
            elif how == "cancel":
                task.cancel()
            errors = {
                "abort": CancelledByPeerError,
                "cancel": asyncio.CancelledError,
                "deadline": DeadlineExceededError,
            }
            with pytest.raises(errors[how]):
                await task
            cluster.wires["p"].before.clear()
            await idle(engine)
        await cluster.aclose()

    run_sim(main, limit_s=60)


def test_a_failing_step_fails_its_requests_alone_and_the_loop_lives():
    async def main():
        clock = LoopClock(asyncio.get_running_loop())
        runner = FailingRunner(CONFIG, "m", CHUNK)
        options = EngineOptions(max_batch_tokens=100, max_sequences=4, max_waiting=8)
        async with EngineLoop(runner, None, options, clock) as engine:
            runner.failures = 1
            with pytest.raises(EngineError, match="broke"):
                await deltas(engine, request("r", prompt_of(50)))
            runner.failures = 1
            with pytest.raises(EngineError, match="broke"):
                await engine.prefill(prefill_request("p", prompt_of(50)))
            wanted = request("s", prompt_of(50))
            assert await completions(engine, wanted) == expected_tokens(CONFIG, prompt_of(50), wanted.sampling)
            await idle(engine)

    run_sim(main)


def test_a_failing_step_leaves_alone_who_took_the_id_meanwhile():
    async def main():
        runner = FailingRunner(CONFIG, "m", CHUNK)
        options = EngineOptions(max_batch_tokens=100, max_sequences=4, max_waiting=8)
        async with EngineLoop(runner, None, options, LoopClock(asyncio.get_running_loop())) as engine:
            runner.failures = 1
            older = asyncio.create_task(deltas(engine, request("r", prompt_of(50))))
            await reach(engine, "running")
            newer = request("r", prompt_of(21))
            assert await completions(engine, newer) == expected_tokens(CONFIG, prompt_of(21), newer.sampling)
            with pytest.raises(CancelledByPeerError):
                await older
            await idle(engine)

    run_sim(main)


class NoNumbers(SimRunner):
    """Has no numbers for one prompt."""

    async def execute(self, slices):
        output = await super().execute(slices)
        cursed = [item.sample is not None and item.sample.prompt[0] == 77 for item in slices]
        return StepOutput([[] if bad else samples for bad, samples in zip(cursed, output.samples, strict=True)])


@pytest.mark.parametrize("n", [1, 3])
def test_a_request_that_the_model_has_no_numbers_for_fails_alone(n):
    async def main():
        options = EngineOptions(max_batch_tokens=100, max_sequences=4, max_waiting=8)
        runner = NoNumbers(CONFIG, "m", CHUNK)
        async with EngineLoop(runner, None, options, LoopClock(asyncio.get_running_loop())) as engine:
            wanted = request("r", prompt_of(50))
            right = asyncio.create_task(completions(engine, wanted))
            await reach(engine, "running")
            with pytest.raises(EngineError, match="not numbers"):
                await deltas(engine, request("cursed", [77, *prompt_of(20, 1)], n=n))
            assert await right == expected_tokens(CONFIG, prompt_of(50), wanted.sampling)
            await idle(engine)

    run_sim(main)


def test_a_full_queue_refuses():
    async def main():
        config = msgspec.structs.replace(CONFIG, max_sequences=1, max_waiting=2)
        async with lone_engine(config) as engine:
            tasks = [asyncio.create_task(completions(engine, request(f"r{n}", prompt_of(20)))) for n in range(6)]
            done = await asyncio.gather(*tasks, return_exceptions=True)
            assert sum(isinstance(result, OverloadedError) for result in done) == 4
            await idle(engine)

    run_sim(main)


def test_a_slow_reader_pauses_its_own_request_only():
    async def main():
        options = EngineOptions(max_batch_tokens=2048, max_sequences=64, max_waiting=512, max_unread=64)
        runner = SimRunner(CONFIG, "m", CHUNK)
        async with EngineLoop(runner, None, options, LoopClock(asyncio.get_running_loop())) as engine:
            wanted = request("slow", prompt_of(20), max_tokens=600)
            stream = engine.generate(wanted)
            tokens = [*(await anext(stream)).token_ids]
            other = request("other", prompt_of(20, 1), max_tokens=900)
            assert await completions(engine, other) == expected_tokens(CONFIG, prompt_of(20, 1), other.sampling)
            assert (await engine.stats()).counters["decode_tokens"] <= 900 + options.max_unread + 2
            tokens += [token async for delta in stream for token in delta.token_ids]
            assert [tokens] == expected_tokens(CONFIG, prompt_of(20), wanted.sampling)
            await idle(engine)

    run_sim(main)


def test_leaving_the_engine_aborts_what_runs_and_then_refuses():
    async def main():
        engine = lone_engine()
        async with engine:
            task = asyncio.create_task(deltas(engine, request("r", prompt_of(20), max_tokens=500, n=2)))
            prefill = asyncio.create_task(engine.prefill(prefill_request("p", prompt_of(900))))
            await reach(engine, "running")
        ended = await task
        assert [delta.finish_reason for delta in ended].count(FinishReason.ABORT) == 2
        with pytest.raises(CancelledByPeerError):
            await prefill
        with pytest.raises(NodeUnavailableError):
            await deltas(engine, request("s", prompt_of(20)))

    run_sim(main)


def test_the_same_id_again_takes_the_older_ones_place():
    async def main():
        async with lone_engine() as engine:
            older = asyncio.create_task(deltas(engine, request("r", prompt_of(20), max_tokens=500)))
            await reach(engine, "running")
            newer = request("r", prompt_of(21))
            assert await completions(engine, newer) == expected_tokens(CONFIG, prompt_of(21), newer.sampling)
            with pytest.raises(CancelledByPeerError):
                await older
            await idle(engine)

    run_sim(main)


def test_blocks_that_a_save_gives_back_wake_the_one_that_needs_them():
    """The younger gave way, but a save that does not get on holds its blocks; nothing else happens meanwhile."""

    async def main():
        gate = asyncio.Event()

        async def hang(direction, op):
            await gate.wait()

        config = msgspec.structs.replace(CONFIG, num_blocks=12)
        cluster = Cluster(config, fault=hang)
        async with cluster.engine("d") as engine:
            older, younger = request("a", prompt_of(20), max_tokens=60), request("b", prompt_of(70, 1))
            running = [asyncio.create_task(completions(engine, wanted)) for wanted in (older, younger)]

            async def out_of_blocks():
                stats = await engine.stats()
                return bool(stats.counters["preemptions"]) and stats.pending_saves == 2

            await settle(out_of_blocks)
            await asyncio.sleep(2.0)
            assert not any(task.done() for task in running)
            gate.set()
            for wanted, task in zip((older, younger), running, strict=True):
                assert await task == expected_tokens(config, wanted.prompt_token_ids, wanted.sampling)
            await idle(engine)
        await cluster.aclose()

    run_sim(main, limit_s=60)
