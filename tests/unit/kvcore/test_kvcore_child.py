import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kvcore.process import child as child_module
from kvcore.process.child import MAX_LINE_BYTES, ChildProcess, kill_all_children

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
        async with asyncio.timeout(60):
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
        await asyncio.wait_for(ended.wait(), 60)
    finally:
        loop.remove_reader(fd)
        os.close(fd)


async def test_a_child_dies_with_a_parent_that_was_killed():
    """The launcher's worst case: kill -9 on it, and neither child nor grandchild may live on."""
    code = f"""
        import asyncio, sys
        from kvcore.process.child import ChildProcess
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
    assert await asyncio.wait_for(parent.wait(), 60) == -signal.SIGKILL
    await gone(grandchild)


TREE = """
    import multiprocessing, os, signal, sys, time

    def inner(link):
        link.send(os.getpid())
        time.sleep(60)

    def core(link):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ours, theirs = multiprocessing.Pipe()
        worker = multiprocessing.get_context("spawn").Process(target=inner, args=(theirs,))
        worker.start()
        link.send([os.getpid(), ours.recv()])
        time.sleep(60)

    if __name__ == "__main__":
        ours, theirs = multiprocessing.Pipe()
        multiprocessing.get_context("spawn").Process(target=core, args=(theirs,)).start()
        print(os.getpid(), *ours.recv(), flush=True)
        time.sleep(60)
"""
"""As vLLM's: a front, a core spawned by it, a worker spawned by the core. Prints the three pids."""

PARENT = """
    import asyncio, os, signal, sys
    from kvcore.process.child import ChildProcess

    async def main():
        command = [sys.executable, sys.argv[1]]
        tree = await ChildProcess.start(command, on_line=lambda line: print(line, flush=True), guard=True)
        print(tree.pid, flush=True)
        if sys.argv[2] == "at once":
            os.kill(os.getpid(), signal.SIGKILL)
        await tree.wait()

    asyncio.run(main())
"""


def alive_in_group(group: int) -> list[int]:
    """Processes of a group, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, in_group = stat.read_text().rpartition(")")[2].split()[:3]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(in_group) == group and state not in "ZX":
            found.append(int(stat.parent.name))
    return found


async def group_gone(group: int) -> None:
    async with asyncio.timeout(60):
        while pids := alive_in_group(group):
            for pid in pids:
                await gone(pid)


def guard_of(leader: int) -> int:
    """The one child of `leader` that watches."""
    children = map(int, Path(f"/proc/{leader}/task/{leader}/children").read_text().split())
    (guard,) = (pid for pid in children if b"--watch" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return guard


@pytest.fixture
def tree(tmp_path) -> list[str]:
    file = tmp_path / "tree.py"
    file.write_text(textwrap.dedent(TREE))
    return [sys.executable, str(file)]


async def test_a_guarded_tree_dies_with_a_parent_that_was_killed(tree):
    lines = Lines()
    parent = await ChildProcess.start([*python(PARENT), tree[1], "later"], on_line=lines)
    leader, pids = int((await lines.until(2))[0]), [int(pid) for pid in lines.seen[1].split()]
    assert pids[0] == leader and set(pids) <= set(alive_in_group(leader))
    os.kill(parent.pid, signal.SIGKILL)
    await group_gone(leader)


async def test_a_guarded_tree_dies_with_a_parent_that_was_killed_while_the_tree_was_starting(tree):
    lines = Lines()
    parents = [await ChildProcess.start([*python(PARENT), tree[1], "at once"], on_line=lines) for _ in range(3)]
    for parent in parents:
        assert await asyncio.wait_for(parent.wait(), 60) == -signal.SIGKILL
    for leader in await lines.until(3):
        await group_gone(int(leader))


@pytest.mark.parametrize("victim", ["front", "core and front", "guard"])
async def test_a_guarded_tree_dies_whole_when_one_of_it_is_killed(tree, victim):
    lines = Lines()
    child = await ChildProcess.start(tree, on_line=lines, guard=True)
    front, core, _ = (int(pid) for pid in (await lines.until(1))[0].split())
    victims = {"front": [front], "core and front": [core, front], "guard": [guard_of(front)]}[victim]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
    await group_gone(front)


async def test_a_guard_outlives_a_polite_end_of_the_group_and_goes_with_the_command(tree):
    lines = Lines()
    code = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(5)); " + SLEEPER
    child = await ChildProcess.start(python(code), on_line=lines, guard=True)
    await lines.until(1)
    os.killpg(child.pid, signal.SIGTERM)
    assert await asyncio.wait_for(child.wait(), 60) == 5
    await group_gone(child.pid)


@pytest.mark.parametrize("how", ["killed", "killed with its parent", "in order"])
async def test_a_guarded_tree_leaves_no_shared_memory_whichever_way_it_ends(tmp_path, how):
    code = """
        import multiprocessing, os, sys, time
        from multiprocessing.shared_memory import SharedMemory

        def hold(link):
            link.send(SharedMemory(create=True, size=4096).name)
            time.sleep(60)

        if __name__ == "__main__":
            ours, theirs = multiprocessing.Pipe()
            process = multiprocessing.get_context("spawn").Process(target=hold, args=(theirs,))
            process.start()
            print(os.getpid(), ours.recv(), flush=True)
            time.sleep(60 if sys.argv[1] != "in order" else 0)
            process.kill()
    """
    file = tmp_path / "holder.py"
    file.write_text(textwrap.dedent(code))
    lines = Lines()
    if how == "killed with its parent":
        parent = await ChildProcess.start([*python(PARENT), str(file), "later"], on_line=lines)
        leader, name = (await lines.until(2))[1].split()
        os.kill(parent.pid, signal.SIGKILL)
        await parent.wait()
    else:
        child = await ChildProcess.start([sys.executable, str(file), how], on_line=lines, guard=True)
        leader, name = (await lines.until(1))[0].split()
        if how == "killed":
            child.kill()
        await asyncio.wait_for(child.wait(), 60)
    await group_gone(int(leader))
    assert not (Path("/dev/shm") / name.lstrip("/")).exists()


async def test_a_childs_own_end_is_known_before_its_group_is_gone(tree):
    lines = Lines()
    child = await ChildProcess.start(tree, on_line=lines, guard=True)
    front, core, _ = (int(pid) for pid in (await lines.until(1))[0].split())
    os.kill(guard_of(front), signal.SIGSTOP)  # it does nothing now
    os.kill(front, signal.SIGKILL)
    assert await asyncio.wait_for(child.wait_ended(), 60) == -signal.SIGKILL
    assert core in alive_in_group(front) and not child._reaped.is_set()
    assert repr(child) == f"<ChildProcess {front}, ended with -9, guarded>"
    assert child._guard_timer is not None
    child._guard_timer.cancel()
    child._reap()  # as when the guard's time is up
    assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL
    await group_gone(front)


async def test_a_guard_holds_nothing_of_the_commands():
    ours, theirs = socket.socketpair()
    with ours:
        ours.setblocking(False)
        with theirs:
            code = f"import os; os.close({theirs.fileno()}); " + SLEEPER
            lines = Lines()
            child = await ChildProcess.start(python(code), on_line=lines, pass_fds=[theirs.fileno()], guard=True)
        try:
            await lines.until(1)
            loop = asyncio.get_running_loop()
            assert await asyncio.wait_for(loop.sock_recv(ours, 1), 60) == b""
        finally:
            child.kill()
            await child.wait()


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
    assert await asyncio.wait_for(child.wait(), 60) == 0
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
    assert await asyncio.wait_for(child.wait(), 60) == -signal.SIGKILL


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
    assert await asyncio.wait_for(child.wait(), 60) == 0
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
    assert await asyncio.wait_for(child.wait(), 60) == 3


async def test_a_command_that_does_not_exist_says_so():
    lines = Lines()
    child = await ChildProcess.start(["/no/such/program"], on_line=lines)
    assert await asyncio.wait_for(child.wait(), 60) == 127
    assert lines.seen == ["cannot run /no/such/program: No such file or directory"]


async def test_passed_descriptors_keep_their_numbers():
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            code = f"import socket; s = socket.socket(fileno={theirs.fileno()}); s.sendall(b'hi'); s.close()"
            child = await ChildProcess.start(python(code), pass_fds=[theirs.fileno()])
        assert await asyncio.wait_for(child.wait(), 60) == 0
        assert (ours.recv(10), ours.recv(10)) == (b"hi", b"")


async def test_nothing_is_left_open_after_a_child_has_ended():
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    await (await ChildProcess.start(["true"], guard=True)).wait()
    before = open_files()
    await (await ChildProcess.start(["true"], guard=True)).wait()
    assert open_files() == before and not child_module._running


async def test_kill_all_children_ends_every_child():
    children = [await ChildProcess.start(python(SLEEPER)) for _ in range(2)]
    kill_all_children()
    assert [await asyncio.wait_for(child.wait(), 60) for child in children] == [-signal.SIGKILL] * 2
