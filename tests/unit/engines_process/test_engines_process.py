"""EngineProcess against a real child process: death, stalls, garbage, cancellation, back-pressure, errors."""

import asyncio
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
import warnings
from contextlib import aclosing
from pathlib import Path

import pytest
from support import fake_engine
from support.fake_engine import generate_request, hello, prefill_request

from engines.process import messages as m
from engines.process.calls import EngineProcessLimits
from engines.process.channel import FrameChannel
from engines.process.parent import EngineProcess
from engines.process.session import serve
from kvcore.errors import ConfigError, DeadlineExceededError, EngineDiedError, EngineError, OverloadedError
from nodeapi.documents import CompareRequest
from nodeapi.messages import FinishReason, TokenDelta

FAKE = (sys.executable, fake_engine.__file__)
ROGUE = (sys.executable, str(Path(fake_engine.__file__).with_name("rogue_engine.py")))


def fake(model_path: str = "fake", env: dict[str, str] | None = None, **options: EngineProcessLimits) -> EngineProcess:
    return EngineProcess(hello(model_path), command=FAKE, start_s=20.0, on_line=print, env=env, **options)


def rogue(mode: str, **options: EngineProcessLimits) -> EngineProcess:
    return EngineProcess(hello(), command=[*ROGUE, mode], start_s=20.0, on_line=print, **options)


async def collect(engine: EngineProcess, request_id: str = "count", max_tokens: int = 8) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(generate_request(request_id, max_tokens=max_tokens))]


async def until_counted(engine: EngineProcess, name: str, value: int) -> None:
    async with asyncio.timeout(60):
        while (await engine.stats()).counters[name] != value:  # each turn is a round trip
            pass


def open_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_killed_child_ends_all_calls_at_once_after_giving_out_what_had_arrived() -> None:
    async with fake() as engine:
        hanging = asyncio.create_task(engine.prefill(prefill_request("hang")))
        await asyncio.sleep(0)
        seen: list[int] = []
        with pytest.raises(EngineDiedError, match="SIGKILL"):
            async for delta in engine.generate(generate_request("die")):
                seen += delta.token_ids
        killed_at = time.monotonic()
        with pytest.raises(EngineDiedError):
            await hanging
        assert seen == [0, 1, 2]
        assert time.monotonic() - killed_at < 10, "nothing else would end it"
        assert "SIGKILL" in await engine.wait_ended()
        with pytest.raises(EngineDiedError):
            await engine.stats()


async def test_child_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        textwrap.dedent(
            """
            import asyncio, sys
            sys.path.insert(0, sys.argv[1])
            from support.fake_engine import hello, __file__ as fake
            from engines.process.parent import EngineProcess

            async def main():
                async with EngineProcess(hello(), command=[sys.executable, fake], start_s=20.0) as engine:
                    print(engine.pid, flush=True)
                    await asyncio.Event().wait()

            asyncio.run(main())
            """
        )
    )
    tests = str(Path(fake_engine.__file__).parents[1])
    parent = await asyncio.create_subprocess_exec(sys.executable, script, tests, stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pidfd = os.pidfd_open(int(await asyncio.wait_for(parent.stdout.readline(), 60)))
    gone = asyncio.Event()
    asyncio.get_running_loop().add_reader(pidfd, gone.set)
    parent.kill()
    await parent.wait()
    await asyncio.wait_for(gone.wait(), 60)
    asyncio.get_running_loop().remove_reader(pidfd)
    os.close(pidfd)


async def test_a_comparison_goes_to_the_child_and_back() -> None:
    wanted = CompareRequest(request_id="c", prompt_token_ids=[1], deadline_s=5.0)
    async with fake() as engine:
        reply = await engine.compare(wanted)
        assert (reply.request_id, reply.kl, reply.agreement) == ("c", [0.5], 1.0)


async def test_config_error_of_the_child_surfaces_as_it_is() -> None:
    with pytest.raises(ConfigError, match=r"^model.path: missing: there is no such folder$"):
        async with fake("missing"):
            pass


async def test_chunks_beyond_the_context_of_the_model_are_refused_when_it_is_loaded() -> None:
    with pytest.raises(ConfigError, match=r"kv.chunk_tokens: 16 is over the context of 15 tokens that the model has"):
        async with fake("short"):
            pass


async def test_child_that_exits_before_it_is_ready_is_reported_with_its_status() -> None:
    before = open_fds()
    patient = EngineProcessLimits(exit_status_s=20.0)  # an interpreter may take long to end on a busy machine
    with pytest.raises(EngineDiedError, match="exited with status 3 before it was ready"):
        async with fake("crash", limits=patient):
            pass
    assert open_fds() == before


async def test_child_of_another_version_is_refused() -> None:
    with pytest.raises(EngineDiedError, match="version"):
        async with rogue("version"):
            pass


@pytest.mark.parametrize("mode", ["garbage", "huge", "flood", "close"])
async def test_child_that_breaks_the_protocol_is_killed(mode: str) -> None:
    async with rogue(mode) as engine:
        with pytest.raises(EngineDiedError):
            async for _ in engine.generate(generate_request()):
                await asyncio.wait_for(engine.wait_ended(), 60)


async def test_child_that_does_not_answer_pings_is_killed() -> None:
    async with rogue("silent", limits=EngineProcessLimits(stall_s=0.2)) as engine:
        with pytest.raises(EngineDiedError, match="did not answer"):
            await engine.prefill(prefill_request())


async def test_stopped_child_is_killed_on_leaving() -> None:
    async with fake(limits=EngineProcessLimits(stop_s=0.1)) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
    with pytest.raises(ProcessLookupError):
        os.kill(engine.pid, 0)


async def test_calls_are_answered_side_by_side() -> None:
    before = open_fds()
    async with fake() as engine:
        streams = await asyncio.gather(*(collect(engine, f"slow:{i}") for i in range(8)))
        assert all([t for d in deltas for t in d.token_ids] == list(range(8)) for deltas in streams)
        assert streams[0][0].info is not None
        assert streams[0][-1].finish_reason is FinishReason.LENGTH
        assert (await engine.prefill(prefill_request())).stored_chunks == 2
        await engine.end_handoff("x")
        sample = await engine.sample()
        assert sample.stats.counters["handoffs"] == 1
        assert (sample.store, sample.transports) == ({"reads_ok": 7}, {"d0.1": "shm"})
        assert engine.info == fake_engine.INFO
    assert open_fds() == before


async def test_the_engines_environment_and_its_own_metrics_cross_the_link_when_they_are_asked_for() -> None:
    async with fake(env={"FAKE_ENGINE_EXPOSITION": "fake_total 1\n"}) as engine:
        assert (await engine.sample()).exposition == b""
        assert (await engine.sample(exposition=True)).exposition == b"fake_total 1\n"
    assert "FAKE_ENGINE_EXPOSITION" not in os.environ


@pytest.mark.parametrize(
    ("request_id", "kind"),
    [("fail:overloaded", OverloadedError), ("bug", EngineError), ("fail:unheard_of", EngineError)],
)
async def test_errors_cross_the_link_by_their_code(request_id: str, kind: type[Exception]) -> None:
    async with fake() as engine:
        with pytest.raises(kind):
            await engine.prefill(prefill_request(request_id))
        with pytest.raises(kind):
            await collect(engine, request_id)
        assert len(await collect(engine)) == 8


async def test_closing_a_stream_cancels_it_in_the_child() -> None:
    async with fake() as engine:
        async with aclosing(engine.generate(generate_request("slow", max_tokens=100_000))) as deltas:
            async for _ in deltas:
                break
        await until_counted(engine, "aborted", 1)
        assert (await engine.stats()).running == 0


async def test_cancelled_prefill_is_cancelled_in_the_child() -> None:
    async with fake() as engine:
        task = asyncio.create_task(engine.prefill(prefill_request("hang")))
        while (await engine.stats()).running == 0:
            pass
        task.cancel()
        await until_counted(engine, "aborted", 1)


async def test_deadline_is_kept_even_if_the_engine_forgets_it() -> None:
    async with fake(limits=EngineProcessLimits(late_s=0.0)) as engine:
        async with asyncio.timeout(60):
            while not (await engine.stats()).counters["aborted"]:  # a call that ends before it has begun is no abort
                with pytest.raises(DeadlineExceededError):
                    await engine.prefill(prefill_request("hang", deadline_s=0.05))


async def test_slow_reader_holds_back_its_own_stream_only() -> None:
    async with fake() as engine:
        slow = engine.generate(generate_request("count", max_tokens=1000))
        tokens = list((await anext(slow)).token_ids)
        assert len(await collect(engine, "other", max_tokens=600)) == 600
        held = (await engine.stats()).counters["deltas_out"] - 600
        assert held <= 257
        tokens += [token async for delta in slow for token in delta.token_ids]
        assert tokens == list(range(1000))


async def test_leaving_with_calls_under_way_ends_them() -> None:
    async with fake() as engine:
        task = asyncio.create_task(engine.prefill(prefill_request("hang")))
        while (await engine.stats()).running == 0:
            pass
    with pytest.raises(EngineDiedError):
        await task


async def test_request_too_large_for_the_link_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with fake() as engine:
        monkeypatch.setattr("engines.process.channel.pack_frame.__defaults__", (1000,))
        with pytest.raises(EngineError, match="too large"):
            await engine.prefill(prefill_request(num_tokens=5000))
        assert (await engine.prefill(prefill_request(num_tokens=40))).stored_chunks == 2


async def test_a_call_that_is_cancelled_in_the_same_breath_is_answered_and_nothing_of_it_stays() -> None:
    ours, theirs = socket.socketpair()
    child = asyncio.create_task(serve(theirs, fake_engine.open_fake))
    channel = await FrameChannel.over(ours)
    channel.send(m.encode(hello()))
    assert isinstance(m.decode_from_child((await channel.receive())[0]), m.Ready)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        channel.send(m.encode(m.PrefillCall(id=1, request=prefill_request("hang"))))
        channel.send(m.encode(m.Cancel(id=1)))
        async with asyncio.timeout(60):
            assert [m.decode_from_child(payload) for payload in await channel.receive()] == [m.Done(id=1)]
        gc.collect()
    assert not [warning for warning in caught if "never awaited" in str(warning.message)]
    await channel.aclose()
    assert await asyncio.wait_for(child, 60) == 0
