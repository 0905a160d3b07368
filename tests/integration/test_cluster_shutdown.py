"""`kvferry up` as people run it: Ctrl-C once or twice, killed, a child that cannot start. Nothing is left behind."""

import asyncio
import os
import random
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import aiohttp
import psutil
import pytest
import yaml
from support.cluster import POLL_S, write_config

pytestmark = pytest.mark.slow

READY_S = 60.0
GONE_S = 30.0
"""For processes that were told to go, or killed. They take milliseconds; a busy machine has its pauses."""
AT_ONCE_S = 15.0
"""Long before what a stream or a drain would take."""
SHARED_MEMORY = Path("/dev/shm")
PROMPT = [random.Random(1).randrange(1, 50_000) for _ in range(100)]


@pytest.fixture(autouse=True)
def no_shared_memory_is_left() -> Iterator[None]:
    """However it ended. What a process has that runs is another test's."""
    before = set(SHARED_MEMORY.iterdir())
    yield
    assert not [path for path in set(SHARED_MEMORY.iterdir()) - before if path.exists() and not is_mapped(path)]


def is_mapped(path: Path) -> bool:
    """By any process that we may look at."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with suppress(OSError):
            if str(path) in maps.read_text():
                return True
    return False


class Up:
    """A running `kvferry up`, what it has said, and every process that it has ever had."""

    def __init__(self, process: asyncio.subprocess.Process, config_file: Path) -> None:
        self.process = process
        self.router_url = f"http://127.0.0.1:{yaml.safe_load(config_file.read_text())['router']['port']}"
        self.said = ""
        self.family: list[psutil.Process] = []
        self._changed = asyncio.Event()
        self._reading = asyncio.create_task(self._read())

    async def until_said(self, text: str, timeout_s: float) -> None:
        """Raises AssertionError with all that was said instead."""
        try:
            async with asyncio.timeout(timeout_s):
                while text not in self.said:
                    assert not self._reading.done(), f"it ended and never said {text!r}: {self.said}"
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise AssertionError(f"never said {text!r}: {self.said}") from None

    def know_family(self) -> None:
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    async def ended(self, timeout_s: float) -> int:
        """Its exit code, with all its output read."""
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(self._reading)
            return await self.process.wait()

    async def all_gone(self) -> None:
        """Raises AssertionError for a process of the family that goes on."""
        left = self.family
        try:
            async with asyncio.timeout(GONE_S):
                while left := [process for process in left if _runs(process)]:  # noqa: ASYNC110 - not our children
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"still there: {[' '.join(process.cmdline()) for process in left]}") from None

    async def close(self) -> None:
        """Kill what a failed test leaves."""
        for process in [psutil.Process(self.process.pid)] if self.process.returncode is None else []:
            self.family += process.children(recursive=True)
            process.kill()
        for process in self.family:
            if _runs(process):
                process.kill()
        await self.process.wait()
        await self._reading

    async def _read(self) -> None:
        assert self.process.stdout is not None
        while data := await self.process.stdout.read(65_536):
            self.said += data.decode(errors="replace")
            self._changed.set()
        self._changed.set()


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@asynccontextmanager
async def kvferry_up(
    config_file: Path, overrides: Sequence[str] = (), environment: Mapping[str, str] = {}
) -> AsyncIterator[Up]:
    """Everything has ended afterwards."""
    sets = [word for item in overrides for word in ("--set", item)]
    log_dir = str(config_file.parent / "logs")
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "kvferry", "up", str(config_file), "--log-dir", log_dir, *sets),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
        env=os.environ | environment,
    )
    subject = Up(process, config_file)
    try:
        yield subject
    finally:
        await subject.close()


@asynccontextmanager
async def serving(tmp_path: Path, *overrides: str) -> AsyncIterator[Up]:
    """One prefiller, one decoder, all ready."""
    config_file = write_config(tmp_path, prefillers=1, decoders=1)
    async with kvferry_up(config_file, overrides) as subject:
        await subject.until_said("ready: http", READY_S)
        subject.know_family()
        assert len(subject.family) == 8, "metadata server, router, two nodes, two engines, their guards"
        yield subject


async def stream(url: str, max_tokens: int, begun: asyncio.Event) -> str:
    """The whole stream, as it came."""
    body = {"model": "sim", "prompt": PROMPT, "max_tokens": max_tokens, "ignore_eos": True, "stream": True}
    text = ""
    async with aiohttp.ClientSession() as session, session.post(f"{url}/v1/completions", json=body) as reply:
        assert reply.status == 200
        async for part in reply.content.iter_any():
            text += part.decode()
            begun.set()
    return text


async def test_ctrl_c_lets_a_running_stream_finish_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """After `service.drain_s` too, and though the terminal has closed on all of them."""
    overrides = ("engine.inter_token_s=0.05", "service.drain_s=0.1", "router.drain_s=60")
    async with serving(tmp_path, *overrides) as subject:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(subject.router_url, 160, begun))
        async with asyncio.timeout(READY_S):
            await begun.wait()
        for process in [psutil.Process(subject.process.pid), *subject.family]:
            process.send_signal(signal.SIGHUP)
        subject.process.send_signal(signal.SIGINT)
        await subject.until_said("stopping", AT_ONCE_S)
        assert not running.done(), "the stream was over before there was anything to drain"
        text = await running
        assert text.endswith("data: [DONE]\n\n") and text.count('"finish_reason":"length"') == 1
        assert await subject.ended(READY_S) == 0
        await subject.all_gone()


async def test_a_second_ctrl_c_while_draining_ends_it_at_once(tmp_path: Path) -> None:
    async with serving(tmp_path, "engine.inter_token_s=0.1", "router.drain_s=60") as subject:
        begun = asyncio.Event()
        running = asyncio.create_task(stream(subject.router_url, 500, begun))
        async with asyncio.timeout(READY_S):
            await begun.wait()
        subject.process.send_signal(signal.SIGINT)
        await subject.until_said("stopping", AT_ONCE_S)
        subject.process.send_signal(signal.SIGINT)
        assert await subject.ended(AT_ONCE_S) == 130, "50 s of the stream are left, and 60 s of the drain"
        await subject.all_gone()
        with pytest.raises(aiohttp.ClientError):
            await running


async def test_ctrl_c_before_it_is_ready_ends_it_too(tmp_path: Path) -> None:
    async with kvferry_up(write_config(tmp_path, prefillers=1, decoders=1)) as subject:
        await subject.until_said("logs in", READY_S)
        subject.know_family()
        subject.process.send_signal(signal.SIGINT)
        assert await subject.ended(READY_S) == 0
        await subject.all_gone()


async def test_killed_it_takes_its_whole_family_along(tmp_path: Path) -> None:
    async with serving(tmp_path) as subject:
        subject.process.kill()
        await subject.process.wait()
        await subject.all_gone()


async def test_a_port_in_use_is_named_with_what_to_do(tmp_path: Path) -> None:
    config_file = write_config(tmp_path, prefillers=1, decoders=1)
    port = yaml.safe_load(config_file.read_text())["nodes"]["decode-0"]["port"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", port))
        taken.listen()
        async with kvferry_up(config_file) as subject:
            assert await subject.ended(READY_S) == 2
            assert f"{port}" in subject.said and "decode-0" in subject.said, subject.said
            assert "nodes.decode-0.port" in subject.said, "which setting to change"
            assert "Traceback" not in subject.said


async def test_a_missing_model_is_named_with_what_to_do(tmp_path: Path) -> None:
    config_file = write_config(tmp_path, engine="torch", model=tmp_path / "nowhere", prefillers=1, decoders=1)
    async with kvferry_up(config_file) as subject:
        assert await subject.ended(READY_S) == 2
        assert str(tmp_path / "nowhere") in subject.said and "model" in subject.said, subject.said
        assert "Traceback" not in subject.said


WAITING = """
import os, sys, time

while "decode-0" in sys.orig_argv and not os.path.exists(os.environ["TAKEN"]):
    time.sleep(0.01)
"""
"""Is run by each process before all else."""


async def test_a_child_that_cannot_start_ends_the_others_and_is_named(tmp_path: Path) -> None:
    """Its port is free when the machine is looked over and gone when it starts."""
    (tmp_path / "sitecustomize.py").write_text(WAITING)
    python_path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    environment = {"PYTHONPATH": python_path, "TAKEN": str(tmp_path / "taken")}
    config_file = write_config(tmp_path, prefillers=1, decoders=1)
    port = yaml.safe_load(config_file.read_text())["nodes"]["decode-0"]["port"]
    with socket.socket() as taken:
        async with kvferry_up(config_file, environment=environment) as subject:
            await subject.until_said("logs in", READY_S)
            taken.bind(("127.0.0.1", port))
            taken.listen()
            (tmp_path / "taken").touch()
            subject.know_family()
            assert await subject.ended(READY_S) == 2
            assert "decode-0 ended with exit code 2 before it was ready" in subject.said, subject.said
            assert f"127.0.0.1:{port}" in subject.said and "another port" in subject.said, subject.said
            assert str(tmp_path / "logs" / "decode-0.log") in subject.said
            assert "Traceback" not in subject.said
            await subject.all_gone()
