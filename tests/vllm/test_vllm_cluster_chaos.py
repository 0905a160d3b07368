"""A vLLM worker, a node service or the metadata server is killed under load: every request is answered, and rightly."""

import asyncio
import itertools
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psutil
import pytest
from support.cluster import ClusterHandle, Streamed
from support.vllm_questions import BLOCK, Questions, prompt_of
from support.vllm_reference import References

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200), pytest.mark.asyncio(loop_scope="session")]

CLIENTS = 4
NEW_TOKENS = 24
RESTART_S = 400.0
QUIET_S = 60.0
"""Reservations and read leases last 5 s; on a machine that has nothing else to do 8 s are enough."""
PROMPTS = [prompt_of(100 + 91 * i, 300 + i) for i in range(10)]
KNOWN = PROMPTS[6:]
"""Asked before anything is killed."""
FRESH = [prompt_of(900 + 13 * i, 600 + i) for i in range(12)]
"""Asked with another salt each time, for a load on a prefiller: what is in the store leaves it nothing to do."""


@pytest.fixture(scope="module")
def questions(single: References) -> Questions:
    return Questions(single, [*PROMPTS, *FRESH], NEW_TOKENS)


async def num_held(subject: ClusterHandle, node: str) -> int:
    """Chunks in the node's segment."""
    segments = (await subject.stats()).segments
    return sum(one.num_replicas for one in segments if one.segment.node_id == node)


@asynccontextmanager
async def load(subject: ClusterHandle, questions: Questions, *, fresh: bool = False) -> AsyncIterator[None]:
    """CLIENTS that ask without pause while inside, and each at least twice after it; any wrong answer raises."""
    turns, stopping = itertools.count(), asyncio.Event()

    async def client() -> None:
        after = 0
        while after < 2:
            turn = next(turns)
            if fresh:
                await questions.ask(subject, FRESH[turn % len(FRESH)], cache_salt=f"turn {turn}")
            else:
                await questions.ask(subject, PROMPTS[turn % len(PROMPTS)])
            after += stopping.is_set()

    async with asyncio.TaskGroup() as clients:
        for _ in range(CLIENTS):
            clients.create_task(client())
        yield
        stopping.set()


def tree(subject: ClusterHandle, node: str) -> list[psutil.Process]:
    """Every process below a node's service."""
    return psutil.Process(subject.launcher.pids[node]).children(recursive=True)


def worker_of(subject: ClusterHandle, node: str) -> psutil.Process:
    """The process that holds the node's KV: the innermost one, as vLLM nests them."""
    return max(tree(subject, node), key=lambda process: (len(process.parents()), process.memory_info().rss))


async def busy(subject: ClusterHandle, node: str) -> bool:
    stats = (await subject.node_info(node)).stats
    return stats is not None and bool(stats.running or stats.waiting or stats.loading)


async def quiet(subject: ClusterHandle) -> bool:
    stats = await subject.stats()
    assert (stats.reservations, stats.read_leases, stats.waiters) == (0, 0, 0), stats
    for node in subject.nodes:
        engine = (await subject.node_info(node)).stats
        assert engine is not None
        assert [engine.running, engine.waiting, engine.loading, engine.pending_saves] == [0] * 4, (node, engine)
    return True


async def ask_known(subject: ClusterHandle, questions: Questions) -> list[Streamed]:
    """Each twice: each decoder is asked each."""
    return [await questions.ask(subject, prompt) for prompt in KNOWN for _ in range(2)]


@pytest.mark.parametrize("victim", ["prefill-0", "decode-1"])
async def test_a_killed_worker_costs_no_request_and_no_kv(
    subject: ClusterHandle, questions: Questions, victim: str
) -> None:
    await ask_known(subject, questions)
    before = await subject.node_info(victim)
    async with load(subject, questions, fresh=victim == "prefill-0"):
        await subject.until(lambda: busy(subject, victim), 60)
        old = tree(subject, victim)
        held = await num_held(subject, victim)
        worker_of(subject, victim).kill()

    async def is_back() -> bool:
        report = await subject.node_info(victim)
        return report.engine_restarts > before.engine_restarts and report.engine is not None

    await subject.until(is_back, RESTART_S)
    assert not [process for process in old if process.is_running()], "nothing of the engine's old life is left"
    await subject.until(subject.all_ready, RESTART_S)
    after = await subject.node_info(victim)
    assert (after.node.incarnation, after.segments) == (before.node.incarnation, before.segments), (
        "the service lived on"
    )
    assert await num_held(subject, victim) >= held
    for answer in await ask_known(subject, questions):  # of vLLM's own cache the new life has nothing
        usage = answer.usage
        assert usage["prompt_tokens_details"]["cached_tokens"] >= (usage["prompt_tokens"] - 1) // BLOCK * BLOCK
    await subject.until(lambda: quiet(subject), QUIET_S)
    assert (await subject.status())["requests"]["failed"] == 0


@pytest.mark.parametrize("victim", ["decode-0", "metadata-server"])
async def test_a_killed_service_costs_no_request(subject: ClusterHandle, questions: Questions, victim: str) -> None:
    async with load(subject, questions):
        if victim != "metadata-server":
            await subject.until(lambda: busy(subject, victim), 60)
        old = tree(subject, victim)
        pid = subject.launcher.pids[victim]
        os.kill(pid, signal.SIGKILL)
        await subject.launcher.wait_restarted(victim, pid, RESTART_S)
    await subject.until(subject.all_ready, RESTART_S)
    assert not [process for process in old if process.is_running()], "vLLM died with its node"
    await subject.until(lambda: quiet(subject), QUIET_S)
    assert (await subject.status())["requests"]["failed"] == 0


async def test_without_a_decoder_the_prefiller_decodes(subject: ClusterHandle, questions: Questions) -> None:
    """Both are killed while they answer; vLLM takes far longer to be back than anybody waits here."""
    before = (await subject.status())["requests"]
    decoders = {name: subject.launcher.pids[name] for name in ("decode-0", "decode-1")}
    async with load(subject, questions):
        await subject.until(lambda: busy(subject, "decode-0"), 60)
        for pid in decoders.values():
            os.kill(pid, signal.SIGKILL)
        told = await subject.explain((await questions.ask(subject, PROMPTS[0])).id)
        last = told["legs"][-1]
        assert (last["node"], last["kind"], last["in_need"]) == ("prefill-0", "decode", True), told
    for name, pid in decoders.items():
        await subject.launcher.wait_restarted(name, pid, RESTART_S)
    await subject.until(subject.all_ready, RESTART_S)
    await subject.until(lambda: quiet(subject), QUIET_S)
    after = (await subject.status())["requests"]
    assert after["failed"] == before["failed"] and after["in_need"] > before["in_need"] + CLIENTS
