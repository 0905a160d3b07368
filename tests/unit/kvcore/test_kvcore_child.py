import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvcore import child as child_module
from kvcore.child import MAX_LINE_BYTES, ChildProcess, kill_all_children

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"


def python(code: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(code)]


class Lines:
    def __init__(self) -> None:
        self.seen: list[str] = []
        self._changed = asyncio.Event()

    def __call__(self, line: str) -> None:
        self.seen.append(line)
        self._changed.set()

    async def until(self, count: int) -> list[str]:
        async with asyncio.timeout(10):
            while len(self.seen) < count:
                self._changed.clear()
                await self._changed.wait()
        return self.seen


async def gone(pid: int) -> None:
    """Until no process `pid` runs (a zombie that its reaper has not yet collected counts as gone)."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ended.set)
    try:
        await asyncio.wait_for(ended.wait(), 10)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def test_a_child_dies_with_a_parent_that_was_killed():
    """The launcher's worst case: kill -9 on it, and neither child nor grandchild may live on."""
    code = f"""
        import asyncio, sys
        from kvcore.child import ChildProcess
        async def main():
            inner = await ChildProcess.start([sys.executable, "-c", {SLEEPER!r}], on_line=lambda line: None)
            print(inner.pid, flush=True)
            await inner.wait()
        asyncio.run(main())
    """
    lines = Lines()
    parent = await ChildProcess.start(python(code), on_line=lines)
    grandchild = int((await lines.until(1))[0])
    os.kill(parent.pid, signal.SIGKILL)
    assert await asyncio.wait_for(parent.wait(), 10) == -signal.SIGKILL
    await gone(grandchild)


def test_a_child_whose_parent_is_gone_already_does_not_start():
    run = subprocess.run(
        [sys.executable, "-I", "-S", child_module.child_exec.__file__, "1", "echo", "started"],
        capture_output=True,
        timeout=10,
    )
    assert (run.returncode, run.stdout) == (1, b"")


async def test_terminate_kills_the_group_when_the_deadline_passes():
    code = """
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(helper.pid, flush=True)
        time.sleep(60)
    """
    lines = Lines()
    child = await ChildProcess.start(python(code), on_line=lines)
    helper = int((await lines.until(1))[0])
    assert await child.terminate(0.05) == -signal.SIGKILL
    await gone(helper)


async def test_a_child_that_ends_leaves_nothing_of_its_group_behind():
    code = """
        import subprocess, sys
        print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
    """
    lines = Lines()
    child = await ChildProcess.start(python(code), on_line=lines)
    assert await asyncio.wait_for(child.wait(), 10) == 0
    await gone(int(lines.seen[0]))


async def test_cancelling_terminate_kills_the_child():
    lines = Lines()
    child = await ChildProcess.start(
        python("import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + SLEEPER), on_line=lines
    )
    await lines.until(1)
    task = asyncio.create_task(child.terminate(60))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.wait_for(child.wait(), 10) == -signal.SIGKILL


async def test_terminate_is_gentle_first_and_harmless_afterwards():
    lines = Lines()
    code = """
        import signal, sys, time
        signal.signal(signal.SIGTERM, lambda *_: (print("bye", flush=True), sys.exit(7)))
        print("up", flush=True)
        time.sleep(60)
    """
    child = await ChildProcess.start(python(code), on_line=lines)
    await lines.until(1)
    assert child.returncode is None
    assert await child.terminate(10) == 7
    assert lines.seen == ["up", "bye"]
    child.kill()
    assert (await child.terminate(1), child.returncode) == (7, 7)


async def test_all_output_arrives_in_order_and_long_lines_are_cut():
    code = f"""
        import sys
        sys.stdout.write("x" * {MAX_LINE_BYTES * 3 + 5} + "\\n"); sys.stdout.flush()
        sys.stderr.write("err\\xff\\n"); sys.stderr.flush()
        for i in range(5000): print(i)
        sys.stdout.write("no newline")
    """
    lines = Lines()
    child = await ChildProcess.start(python(code), on_line=lines)
    assert await asyncio.wait_for(child.wait(), 10) == 0
    head = [line for line in lines.seen if line.startswith("x")]
    assert "".join(head) == "x" * (MAX_LINE_BYTES * 3 + 5) and max(map(len, lines.seen)) <= MAX_LINE_BYTES
    rest = lines.seen[len(head) :]
    assert rest == ["errÿ", *map(str, range(5000)), "no newline"]


async def test_a_reader_of_lines_that_fails_does_not_hide_that_the_child_has_ended():
    """On `on_line` that raises in spite of its contract nobody may wait for ever, least of all who stops the child."""

    def full(line: str) -> None:
        raise OSError(28, "No space left on device")

    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda loop, context: None)
    child = await ChildProcess.start(python("import sys; print('last words'); sys.exit(3)"), on_line=full)
    assert child._output is not None
    loop.remove_reader(child._output)  # as if it ended before its output was read
    assert await asyncio.wait_for(child.wait(), 10) == 3


async def test_a_command_that_does_not_exist_says_so():
    lines = Lines()
    child = await ChildProcess.start(["/no/such/program"], on_line=lines)
    assert await asyncio.wait_for(child.wait(), 10) == 127
    assert lines.seen == ["cannot run /no/such/program: No such file or directory"]


async def test_passed_descriptors_keep_their_numbers():
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            code = f"import socket; s = socket.socket(fileno={theirs.fileno()}); s.sendall(b'hi'); s.close()"
            child = await ChildProcess.start(python(code), pass_fds=[theirs.fileno()])
        assert await asyncio.wait_for(child.wait(), 10) == 0
        assert (ours.recv(10), ours.recv(10)) == (b"hi", b"")


async def test_nothing_is_left_open_after_a_child_has_ended():
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await (await ChildProcess.start(["true"])).wait()
    before = open_files()
    await (await ChildProcess.start(["true"])).wait()
    assert open_files() == before and not child_module._running


async def test_kill_all_children_ends_every_child():
    children = [await ChildProcess.start(python(SLEEPER)) for _ in range(2)]
    kill_all_children()
    assert [await asyncio.wait_for(child.wait(), 10) for child in children] == [-signal.SIGKILL] * 2
