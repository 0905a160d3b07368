"""The supervisor over real child processes: crash, restart, giving up."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable

import pytest
from support import fake_engine
from support.fake_engine import generate_request, hello, prefill_request
from support.transitions import in_prose, in_table

from engines.process.calls import EngineProcessLimits
from engines.process.parent import EngineProcess
from kvcore.clock import SystemClock
from kvcore.config.schema import NodeConfig, TransportConfig
from kvcore.errors import ConfigError, EngineDiedError, NodeUnavailableError
from kvcore.types import Role
from kvnode.limits import NodeLimits
from kvnode.segment_owner import SegmentOwner
from kvnode.supervisor import TRANSITIONS, EngineState, EngineSupervisor

QUICK = NodeLimits(engine_first_backoff_s=0.02)
PATIENT = EngineProcessLimits(exit_status_s=20.0)
"""A process may take longer to end than its link, on a busy machine."""


def supervisor(
    *model_paths: str,
    on_end: Callable[[], Awaitable[None]] | None = None,
    on_hung: Callable[[], Awaitable[None]] | None = None,
    limits: EngineProcessLimits = PATIENT,
) -> tuple[EngineSupervisor, asyncio.Queue[EngineProcess]]:
    """Each life of the engine takes the next path; the last one stays."""
    paths = list(model_paths)
    ready: asyncio.Queue[EngineProcess] = asyncio.Queue()

    def make() -> EngineProcess:
        path = paths.pop(0) if len(paths) > 1 else paths[0]
        command = (sys.executable, fake_engine.__file__)
        return EngineProcess(hello(path), command=command, start_s=20.0, on_line=print, limits=limits)

    found = EngineSupervisor(
        make, SystemClock(), on_ready=ready.put_nowait, on_end=on_end, on_hung=on_hung, limits=QUICK
    )
    return found, ready


async def test_killed_engine_is_started_again_and_the_segment_keeps_its_bytes() -> None:
    node = NodeConfig(role=Role.PREFILLER, port=0, segment=1 << 20)  # type: ignore[arg-type]
    async with SegmentOwner("p0", 1, node, TransportConfig(kind="shm")) as owner:
        assert owner._memory is not None
        owner._memory.view[:5] = b"bytes"
        subject, ready = supervisor("fake")
        task = asyncio.create_task(subject.run())
        first = await asyncio.wait_for(ready.get(), 60)
        await subject.wait_ready()
        hanging = asyncio.create_task(subject.engine().prefill(prefill_request("hang")))
        await subject.engine().stats()
        os.kill(first.pid, signal.SIGKILL)
        with pytest.raises(EngineDiedError):
            await hanging
        assert not subject.ready  # from the moment on that its calls fail: nobody is told of it as of a live one
        with pytest.raises(NodeUnavailableError):
            subject.engine()
        second = await asyncio.wait_for(ready.get(), 60)
        assert second.pid != first.pid
        assert subject.restarts == 1
        assert len([delta async for delta in subject.engine().generate(generate_request())]) == 8
        assert owner._memory.view[:5] == b"bytes"
        task.cancel()
        await asyncio.wait({task})
        assert not subject.ready
        with pytest.raises(ProcessLookupError):
            os.kill(second.pid, 0)


async def test_what_a_dead_engine_held_is_given_back_before_the_next_one_is_started() -> None:
    lives: list[str] = []

    async def give_back() -> None:
        await asyncio.sleep(0)
        lives.append(f"given back, ready: {subject.ready}")

    subject, ready = supervisor("fake", on_end=give_back)
    task = asyncio.create_task(subject.run())
    first = await asyncio.wait_for(ready.get(), 60)
    assert lives == []
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.wait_for(ready.get(), 60)
    assert lives == ["given back, ready: False"]
    task.cancel()
    await asyncio.wait({task})


async def test_an_engine_that_hangs_is_told_of_long_before_it_is_killed_and_may_go_on() -> None:
    hung = asyncio.Event()

    async def give_back() -> None:
        hung.set()

    often = EngineProcessLimits(stall_s=60.0, pings=600)
    subject, ready = supervisor("fake", on_hung=give_back, limits=often)
    task = asyncio.create_task(subject.run())
    engine = await asyncio.wait_for(ready.get(), 60)
    for _ in range(2):
        os.kill(engine.pid, signal.SIGSTOP)
        hung.clear()
        await asyncio.wait_for(hung.wait(), 60)
        os.kill(engine.pid, signal.SIGCONT)
        assert len([delta async for delta in subject.engine().generate(generate_request())]) == 8
    assert subject.restarts == 0 and subject.engine() is engine
    task.cancel()
    await asyncio.wait({task})


async def test_an_engine_is_replaced_by_the_one_that_is_made_next_and_is_no_restart() -> None:
    lives: list[bool] = []

    async def give_back() -> None:
        lives.append(subject.ready)

    subject, ready = supervisor("fake", on_end=give_back)
    task = asyncio.create_task(subject.run())
    first = await asyncio.wait_for(ready.get(), 60)
    await subject.wait_ready()
    hanging = asyncio.create_task(subject.engine().prefill(prefill_request("hang")))
    await subject.engine().stats()
    one, other = await asyncio.wait_for(asyncio.gather(subject.replace(), subject.replace()), 60)
    assert one is other is subject.engine() and one.pid != first.pid
    with pytest.raises(EngineDiedError):
        await hanging
    assert subject.restarts == 0 and lives == [False], "what the old one held was given back"
    with pytest.raises(ProcessLookupError):
        os.kill(first.pid, 0)
    replacing = asyncio.create_task(subject.replace())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(NodeUnavailableError, match="stopping"):
        await asyncio.wait_for(replacing, 60)
    await asyncio.wait({task})


async def test_a_replacement_that_does_not_become_ready_is_told_and_tried_again() -> None:
    subject, ready = supervisor("fake", "missing", "fake")
    with pytest.raises(NodeUnavailableError):
        await subject.replace()
    task = asyncio.create_task(subject.run())
    await asyncio.wait_for(ready.get(), 60)
    with pytest.raises(ConfigError, match="no such folder"):
        await asyncio.wait_for(subject.replace(), 60)
    with pytest.raises(NodeUnavailableError):
        subject.engine()
    await asyncio.wait_for(ready.get(), 60)
    assert subject.ready
    task.cancel()
    await asyncio.wait({task})


async def test_while_there_is_no_engine_it_is_said_at_once() -> None:
    subject, _ = supervisor("fake")
    with pytest.raises(NodeUnavailableError):
        subject.engine()


async def test_config_error_at_the_first_start_ends_it_with_the_reason() -> None:
    subject, _ = supervisor("missing")
    with pytest.raises(ConfigError, match="no such folder"):
        await asyncio.wait_for(subject.run(), 60)


async def test_an_engine_that_does_not_fit_the_node_ends_it_with_the_reason() -> None:
    def refuse(_: EngineProcess) -> None:
        raise ConfigError("its KV cannot be kept here")

    def make() -> EngineProcess:
        command = (sys.executable, fake_engine.__file__)
        return EngineProcess(hello("fake"), command=command, start_s=20.0, on_line=print, limits=PATIENT)

    subject = EngineSupervisor(make, SystemClock(), on_ready=refuse, limits=QUICK)
    with pytest.raises(ConfigError, match="cannot be kept here"):
        await asyncio.wait_for(subject.run(), 60)
    assert not subject.ready


async def test_engine_that_never_becomes_ready_is_given_up() -> None:
    subject, _ = supervisor("crash")
    with pytest.raises(EngineDiedError, match="status 3"):
        await asyncio.wait_for(subject.run(), 60)


async def test_failure_at_a_restart_is_tried_again() -> None:
    subject, ready = supervisor("fake", "missing", "crash", "fake")
    task = asyncio.create_task(subject.run())
    first = await asyncio.wait_for(ready.get(), 60)
    os.kill(first.pid, signal.SIGKILL)
    await asyncio.wait_for(ready.get(), 60)
    assert subject.ready
    task.cancel()
    await asyncio.wait({task})


async def test_what_a_node_is_made_of_says_what_it_is_and_holds() -> None:
    subject, ready = supervisor("fake")
    assert repr(subject) == "<EngineSupervisor starting, 0 restarts>"
    task = asyncio.create_task(subject.run())
    first = await asyncio.wait_for(ready.get(), 60)
    assert repr(subject) == f"<EngineSupervisor ready with pid {first.pid}, 0 restarts>"
    task.cancel()
    await asyncio.wait({task})
    assert repr(subject) == "<EngineSupervisor stopped, 0 restarts>"
    node = NodeConfig(role=Role.STORE, port=0, segment=1 << 20)  # type: ignore[arg-type]
    owner = SegmentOwner("s0", 1, node, TransportConfig(kind="shm"))
    assert repr(owner) == "<SegmentOwner s0.1, not entered>"
    async with owner:
        assert repr(owner) == "<SegmentOwner s0.1, 1048576 bytes, served by shm, 0 host restarts>"


def test_the_prose_of_the_engines_states_is_the_table_that_is_asserted_on() -> None:
    assert set(TRANSITIONS) == set(EngineState)
    assert in_prose(EngineState) == in_table(TRANSITIONS)
