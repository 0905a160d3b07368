"""Real node processes with sim engines and a real metadata server: hand-off, death, restart, a clean end."""

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from support.process_tree import children
from support.processes import Cluster, cluster
from support.transports import transport_config
from support.ucx import needs_ucx

from engines.sim.reference import expected_tokens
from kvcore.config.file import load_config
from kvcore.config.schema import SimEngineConfig
from nodeapi.messages import GenerateRequest, Handoff, PrefillRequest, StreamError, TokenDelta
from nodeapi.sampling import SamplingParams

pytestmark = pytest.mark.slow
PROMPT = [7 + (3 * i) % 40_000 for i in range(64 * 3 + 7)]
SAMPLING = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True)


def engine_config(subject: Cluster) -> SimEngineConfig:
    engine = load_config(subject.file).engine
    assert isinstance(engine, SimEngineConfig)
    return engine


def prefill_request(request_id: str = "r1", prefer_segment: str | None = None) -> PrefillRequest:
    return PrefillRequest(
        request_id=request_id, prompt_token_ids=PROMPT, prefer_segment=prefer_segment, deadline_s=20.0
    )


def generate_request(request_id: str = "r1", wait_s: float = 0.0, max_tokens: int = 20) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=PROMPT,
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True),
        handoff=Handoff(num_chunks=3, wait_s=wait_s) if wait_s else None,
        deadline_s=20.0,
    )


async def generated(subject: Cluster, name: str, request: GenerateRequest) -> tuple[list[int], int]:
    """Tokens and cached tokens."""
    tokens, cached = [], 0
    async for frame in subject.generate(name, request):
        assert isinstance(frame, TokenDelta), frame
        tokens += frame.token_ids
        cached = frame.info.cached_tokens if frame.info is not None else cached
    return tokens, cached


def runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while not await holds():  # noqa: ASYNC110 - another process holds it
            await asyncio.sleep(0.02)


async def gone(pid: int) -> None:
    async def ended() -> bool:
        return not runs(pid)

    await until(ended)


async def test_a_node_is_ready_when_a_metadata_server_knows_it(tmp_path: Path) -> None:
    """Else the first prompts after `ready` would be computed, and stored nowhere."""
    async with cluster(tmp_path) as subject:
        await subject.start("d0", "s0")

        async def health(name: str) -> tuple[int, str]:
            async with subject.session.get(subject.url(name) + "/health") as reply:
                return reply.status, await reply.text()

        for name in ("d0", "s0"):
            status, why = await health(name)
            assert status == 503 and "the metadata server does not know the node yet" in why
        await subject.start("metadata")
        for name in ("d0", "s0"):

            async def is_ready(name: str = name) -> bool:
                return (await health(name))[0] == 200

            await until(is_ready)
            assert name in {node.id for node in (await subject.stats()).nodes if node.fingerprint or name == "s0"}


@pytest.mark.parametrize("transport", ["shm", "tcp"])
async def test_what_one_node_prefilled_another_generates_from(tmp_path: Path, transport: str) -> None:
    async with cluster(tmp_path, transport=transport) as subject:
        await subject.start("metadata", "p0", "d0", "s0")
        await subject.joined("p0", "d0", "s0")
        decoder = (await subject.report("d0")).segments[0].id
        result, (tokens, cached) = await asyncio.gather(
            subject.prefill("p0", prefill_request(prefer_segment=decoder)),
            generated(subject, "d0", generate_request(wait_s=10.0)),
        )
        assert result.stored_chunks == 3
        assert [tokens] == expected_tokens(engine_config(subject), PROMPT, SAMPLING)
        assert cached == 192
        assert (await subject.report("p0")).transports == {decoder: transport}
        used = {segment.segment.id: segment.num_replicas for segment in (await subject.stats()).segments}
        assert used[decoder] >= 3


async def test_killed_node_takes_its_replicas_and_its_engine_with_it(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "p0")
        await subject.joined("p0")
        await subject.prefill("p0", prefill_request())
        assert (await subject.stats()).objects == 3
        (engine,) = children(subject.children["p0"].pid)
        os.kill(subject.children["p0"].pid, signal.SIGKILL)
        await gone(engine)
        await subject.joined()
        stats = await subject.stats()
        assert (stats.objects, stats.reservations, stats.segments) == (0, 0, [])


async def test_killed_engine_comes_back_and_finds_the_kv_in_the_segment(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "d0")
        await subject.joined("d0")
        await subject.prefill("d0", prefill_request())
        (engine,) = children(subject.children["d0"].pid)
        stream = subject.generate("d0", generate_request("long", max_tokens=5000))
        assert isinstance(await anext(stream), TokenDelta)
        os.kill(engine, signal.SIGKILL)
        rest = [frame async for frame in stream]
        assert isinstance(rest[-1], StreamError)
        assert (rest[-1].code, rest[-1].retryable) == ("engine_died", True)

        async def serves() -> bool:
            report = await subject.report("d0")
            return report.engine_restarts == 1 and report.engine is not None

        await until(serves)
        tokens, cached = await generated(subject, "d0", generate_request("again"))
        assert [tokens] == expected_tokens(engine_config(subject), PROMPT, SAMPLING)
        assert cached == 192


@needs_ucx[0]
@needs_ucx[1]
async def test_a_node_whose_serving_process_was_killed_is_read_again_under_its_new_address(tmp_path: Path) -> None:
    async with cluster(tmp_path, transport=msgspec.to_builtins(transport_config("ucx"))) as subject:
        await subject.start("metadata", "p0", "d0", "s0")
        await subject.joined("p0", "d0", "s0")
        store = (await subject.report("s0")).segments[0]
        await subject.prefill("p0", prefill_request(prefer_segment=store.id))
        (serving,) = children(subject.children["s0"].pid)
        os.kill(serving, signal.SIGKILL)

        async def announced() -> bool:
            known = {one.segment.id: one.segment for one in (await subject.stats()).segments}
            return known[store.id].addresses != store.addresses

        await until(announced)
        tokens, cached = await generated(subject, "d0", generate_request())
        assert [tokens] == expected_tokens(engine_config(subject), PROMPT, SAMPLING)
        assert cached == 192
        assert subject.children["s0"].returncode is None
        async with subject.session.get(subject.url("s0") + "/metrics") as response:
            assert "kvferry_node_host_restarts_total 1.0" in await response.text()


async def test_new_metadata_server_learns_from_the_nodes_what_they_hold(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "p0")
        await subject.joined("p0")
        await subject.prefill("p0", prefill_request())
        subject.children["metadata"].kill()
        await subject.children["metadata"].wait()
        assert [(await generated(subject, "p0", generate_request()))[0]] == expected_tokens(
            engine_config(subject), PROMPT, SAMPLING
        )
        await subject.start("metadata")
        await subject.joined("p0")

        async def told() -> bool:
            return (await subject.stats()).objects >= 3

        await until(told)


async def test_sigterm_drains_leaves_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "p0")
        await subject.joined("p0")
        child = subject.children["p0"]
        (engine,) = children(child.pid)
        stream = subject.generate("p0", generate_request("long", max_tokens=300))
        tokens = (await anext(stream)).token_ids  # type: ignore[union-attr]
        os.kill(child.pid, signal.SIGTERM)
        async for frame in stream:
            assert isinstance(frame, TokenDelta), frame
            tokens += frame.token_ids
        assert len(tokens) == 300
        assert await asyncio.wait_for(child.wait(), 60) == 0
        await gone(engine)
        stats = await subject.stats()
        assert (stats.nodes, stats.reservations, stats.read_leases) == ([], 0, 0)
        assert stats.counters["nodes_left"] == 1


async def test_every_process_dumps_its_tasks_on_sigusr1_and_serves_on(tmp_path: Path) -> None:
    async with cluster(tmp_path) as subject:
        await subject.start("metadata", "d0")
        await subject.joined("d0")
        node = subject.children["d0"].pid
        (engine,) = children(node)
        for pid in (node, engine, subject.children["metadata"].pid):
            os.kill(pid, signal.SIGUSR1)

        async def dumped() -> bool:
            lines = [*subject.lines["d0"], *subject.lines["metadata"]]
            return sum(" dump_end" in line for line in lines) == 3

        await until(dumped)
        log = "\n".join(subject.lines["d0"])
        for line in ("dump_task name=membership ", "<Membership decoder d0.", "<EngineSupervisor ready with pid "):
            assert line in log
        assert "<SegmentOwner d0." in log and " d0.engine kvcore.dump dump_task " in log
        assert "<MetadataCore 0 waiters" in "\n".join(subject.lines["metadata"])
        tokens, _ = await generated(subject, "d0", generate_request())
        assert [tokens] == expected_tokens(engine_config(subject), PROMPT, SAMPLING)
