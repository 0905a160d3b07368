"""Processes that are stopped under load, not killed: no connection breaks, and no answer waits for them to go on."""

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import pytest_asyncio
from support.cluster import ClusterHandle, cluster
from support.process_tree import freeze

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = pytest.mark.slow

STREAMS, TOKENS = 8, 60
USUAL = ("router.stall_first_s=5", "router.stall_gap_s=2", "engine.inter_token_s=0.05", "router.decoder_prefill=needed")
"""The last: prefillers prefill, also where a decoder would be faster on this machine."""
WELL_BEFORE_S = 12.0
"""The limits are 5 and 2 s. After 15 s a node kills an engine that is stopped, and its streams go on anyway."""
BACK_S = 30.0


@pytest_asyncio.fixture
async def subject(tmp_path: Path) -> AsyncIterator[ClusterHandle]:
    async with cluster(tmp_path, overrides=USUAL) as handle:
        yield handle


@asynccontextmanager
async def stopped(pid: int) -> AsyncIterator[None]:
    freeze(pid)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def engine_of(subject: ClusterHandle, name: str) -> int:
    (child,) = psutil.Process(subject.launcher.pids[name]).children()
    return child.pid


class Stream:
    """One client. `silence_s`: the longest between its sending, its tokens and its end."""

    def __init__(self, subject: ClusterHandle, number: int) -> None:
        self.subject = subject
        self.prompt = [random.Random(number).randrange(1, 50_000) for _ in range(400)]
        self.tokens: list[int] = []
        self.silence_s = 0.0
        self.id = ""

    async def run(self) -> None:
        fields: dict[str, Any] = {"max_tokens": TOKENS, "seed": 1, "ignore_eos": True, "return_token_ids": True}
        body = {"model": self.subject.config.model.name, "prompt": self.prompt, **fields}
        now = asyncio.get_running_loop().time
        heard = now()
        async for event in self.subject.events("/v1/completions", body):
            assert "error" not in event, event
            self.silence_s, heard = max(self.silence_s, now() - heard), now()
            self.id = event["id"]
            for choice in event["choices"]:
                self.tokens += choice.get("token_ids") or []
        engine = self.subject.config.engine
        assert isinstance(engine, SimEngineConfig)
        sampling = SamplingParams(temperature=1.0, seed=1, max_tokens=TOKENS, ignore_eos=True)
        assert self.tokens == expected_tokens(engine, self.prompt, sampling)[0], await self.subject.explain(self.id)


@pytest.mark.parametrize("what", ["decode-0", "decode-0 engine", "prefill-0 engine"])
async def test_streams_go_on_while_a_process_is_stopped(subject: ClusterHandle, what: str) -> None:
    name, _, engine = what.partition(" ")
    pid = engine_of(subject, name) if engine else subject.launcher.pids[name]
    streams = [Stream(subject, number) for number in range(STREAMS)]
    before, after = streams[: STREAMS // 2], streams[STREAMS // 2 :]

    async def under_way() -> bool:
        return all(len(stream.tokens) > 2 for stream in before)

    async with asyncio.TaskGroup() as clients:
        for stream in before:
            clients.create_task(stream.run())
        await subject.until(under_way, 60)
        async with stopped(pid):
            async with asyncio.TaskGroup() as others:
                for stream in after:
                    others.create_task(stream.run())
            status = {node["id"]: node["reason"] for node in (await subject.status())["nodes"]}
    assert max(stream.silence_s for stream in streams) < WELL_BEFORE_S, [stream.silence_s for stream in streams]
    assert status[name] is not None, "it is seen that the node does not work"
    records = [await subject.explain(stream.id) for stream in streams]
    failed = {leg["node"] for record in records for leg in record["legs"] if leg["error"]}
    assert name in failed, "on a busy machine others may be late, too"

    async def is_back() -> bool:
        return {node["id"]: node["healthy"] for node in (await subject.status())["nodes"]}[name]

    await subject.until(is_back, BACK_S)


async def test_a_metadata_server_that_is_stopped_holds_nobody_and_nothing_stays_reserved(tmp_path: Path) -> None:
    """Reservations and read leases would last for minutes, were they not given back."""
    lasting = ("store.reserve_ttl_s=300", "store.read_lease_s=300")
    async with cluster(tmp_path, overrides=(*USUAL, *lasting)) as subject:
        before = [Stream(subject, number) for number in range(STREAMS)]
        async with asyncio.TaskGroup() as clients:
            for stream in before:
                clients.create_task(stream.run())
        during = [Stream(subject, STREAMS + number) for number in range(STREAMS)]
        async with stopped(subject.launcher.pids["metadata-server"]), asyncio.TaskGroup() as clients:
            for stream in during:
                clients.create_task(stream.run())
        assert max(stream.silence_s for stream in during) < WELL_BEFORE_S, [stream.silence_s for stream in during]

        async def nothing_held() -> bool:
            stats = await subject.stats()
            return (stats.reservations, stats.read_leases, stats.waiters) == (0, 0, 0)

        await subject.until(nothing_held, BACK_S)
