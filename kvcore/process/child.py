"""A child process that cannot outlive us, with its output as lines.

Each child has its own session (a terminal's Ctrl-C reaches us alone, who then stop the children in order) and is
killed by the kernel when the thread that started it ends (`kvcore.process.child_exec`): start children on the main
thread. What the child leaves in its process group is killed when the child ends. A child that has children of its own
is started with `guard=True`: then the whole group dies with us too, whichever single process of it all is killed, and a
child counts as ended when all of its group has.
"""

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Self

from kvcore.process import child_exec

MAX_LINE_BYTES = 16_384
_READ_BYTES = 65_536
_LAST_READS = 32  # far more than a pipe holds

_running: dict[int, "ChildProcess"] = {}  # as the kernel's own list of our children: one a process, by pid


def kill_all_children() -> None:
    """SIGKILL the group of every running child of this process. For a second SIGTERM; does not wait."""
    for child in list(_running.values()):
        child.kill()


class ChildProcess:
    """One run of a command. Made by `start`; owns a pidfd, a pipe and the guard's link until the child has ended."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        output: int,
        on_line: Callable[[str], None] | None,
        guard: socket.socket | None,
        guard_s: float,
    ) -> None:
        self._process = process
        self._guard = guard
        self._guard_s = guard_s
        self._loop = asyncio.get_running_loop()
        self._returncode: int | None = None
        self._ended = asyncio.Event()
        self._reaped = asyncio.Event()
        self._guard_timer: asyncio.TimerHandle | None = None
        self._output: int | None = output
        self._partial_line = b""
        self._on_line = on_line
        self._pidfd = os.pidfd_open(process.pid)
        os.set_blocking(output, False)
        _running[process.pid] = self
        self._loop.add_reader(output, self._read_output)
        self._loop.add_reader(self._pidfd, self._child_ended)
        if guard is not None:
            self._loop.add_reader(guard, self._guard_ended)

    @classmethod
    async def start(
        cls,
        command: Sequence[str],
        *,
        on_line: Callable[[str], None] | None = None,
        pass_fds: Sequence[int] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        guard: bool = False,
        guard_s: float = 12.0,
    ) -> Self:
        """Start `command`. `on_line` gets each line of stdout and stderr, in order, without its newline; it must not
        raise or block. `pass_fds` keep their numbers in the child; the caller closes its own copies afterwards.
        `guard`: one more, tiny process in the child's group, which kills it all when we are gone. It gives up after 10
        s; one that has not ended its group within `guard_s` is of no more use.

        A command that cannot be run ends with 127 and says so in its output.
        """
        trampoline = [sys.executable, "-I", "-S", str(Path(child_exec.__file__)), str(os.getpid())]
        link, guards_side = socket.socketpair() if guard else (None, None)
        if guards_side is not None:
            trampoline += ["--guard", str(guards_side.fileno())]
            pass_fds = [*pass_fds, guards_side.fileno()]
        output, child_side = os.pipe()
        try:
            process = subprocess.Popen(  # noqa: ASYNC220 - a few ms; asyncio's own watchers differ by version and loop
                [*trampoline, *command],
                stdin=subprocess.DEVNULL,
                stdout=child_side,
                stderr=child_side,
                pass_fds=tuple(pass_fds),
                cwd=cwd,
                env=env,
                start_new_session=True,
            )
        except BaseException:
            os.close(output)
            raise
        finally:
            os.close(child_side)
            if guards_side is not None:
                guards_side.close()
        try:
            return cls(process, output, on_line, link, guard_s)
        except BaseException:
            process.kill()
            process.wait()
            raise

    def __repr__(self) -> str:
        state = "running" if self._returncode is None else f"ended with {self._returncode}"
        return f"<ChildProcess {self.pid}, {state}{', guarded' if self._guard is not None else ''}>"

    @property
    def pid(self) -> int:
        """The process id of the command itself (the trampoline became it)."""
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Its exit code; None while it runs, the negative signal number if a signal ended it."""
        return self._returncode

    async def wait(self) -> int:
        """The return code, once the child has ended, its group with it, and its output has been passed on. Cancelling
        changes nothing."""
        await self._reaped.wait()
        assert self._returncode is not None
        return self._returncode

    async def wait_ended(self) -> int:
        """The return code, as soon as the child itself has ended: what it started and what it said may follow."""
        await self._ended.wait()
        assert self._returncode is not None
        return self._returncode

    async def terminate(self, deadline_s: float) -> int:
        """SIGTERM; after `deadline_s`, or on cancellation, SIGKILL to the whole group. Returns the return code."""
        if not self._ended.is_set():
            signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)
        try:
            async with asyncio.timeout(deadline_s):
                return await self.wait()
        except TimeoutError:
            self.kill()
            return await self.wait()
        except asyncio.CancelledError:
            self.kill()
            raise

    def kill(self) -> None:
        """SIGKILL the whole process group. Nothing happens if the child has ended."""
        if self._ended.is_set():
            return
        if self._guard is None:
            self._kill_group()
        else:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)  # the guard sees to the rest

    def _kill_group(self) -> None:
        # Only while our child is running or a zombie: after that its number may belong to somebody else.
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            os.kill(self._process.pid, signal.SIGKILL)  # caught before its setsid

    def _child_ended(self) -> None:
        """The child itself has ended. It stays a zombie until its group is gone, so that its pid stays its own.

        1. Without a guard: what is left of the group is killed and all is over.
        2. With one: the guard, which watches the child too, ends the group; `_guard_ended` follows. If it has not after
           `guard_s`, it is stuck or stopped: the group is killed without it.
        """
        self._loop.remove_reader(self._pidfd)
        status = os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
        assert status is not None
        self._returncode = status.si_status if status.si_code == os.CLD_EXITED else -status.si_status
        self._ended.set()
        if self._guard is None:
            self._reap()
        else:
            self._guard_timer = self._loop.call_later(self._guard_s, self._reap)

    def _guard_ended(self) -> None:
        """The guard's end of the link is closed: the guard has ended.

        1. The child runs: somebody killed the guard alone. Nobody would end the group after our death any more, so the
           group is killed now; `_child_ended` follows and finds no guard.
        2. The child has ended: the guard has ended all of the group, itself last. All is over.
        """
        assert self._guard is not None
        self._loop.remove_reader(self._guard)
        self._guard.close()
        self._guard = None
        if self._guard_timer is None:
            self._kill_group()
        else:
            self._guard_timer.cancel()
            self._reap()

    def _read_output(self) -> bool:
        """Pass on the output that is there; False where there is none for now, or no more."""
        if self._output is None:
            return False
        try:
            data = os.read(self._output, _READ_BYTES)
        except BlockingIOError:
            return False
        if not data:
            self._close_output()
            return False
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        for line in lines:
            self._emit(line)
        while len(self._partial_line) > MAX_LINE_BYTES:
            self._emit(self._partial_line[:MAX_LINE_BYTES])
            self._partial_line = self._partial_line[MAX_LINE_BYTES:]
        return True

    def _emit(self, line: bytes) -> None:
        if self._on_line is not None:
            for start in range(0, max(1, len(line)), MAX_LINE_BYTES):
                self._on_line(line[start : start + MAX_LINE_BYTES].decode("utf-8", "replace").rstrip("\r"))

    def _close_output(self) -> None:
        if self._output is not None:
            self._loop.remove_reader(self._output)
            os.close(self._output)
            self._output = None
            if self._partial_line:
                self._emit(self._partial_line)
                self._partial_line = b""

    def _reap(self) -> None:
        """All is over: free the pid, the descriptors and what was still in the pipe."""
        self._kill_group()
        self._process.wait()  # it is a zombie: returns at once
        os.close(self._pidfd)
        if self._guard is not None:
            self._loop.remove_reader(self._guard)
            self._guard.close()
        del _running[self._process.pid]
        try:
            for _ in range(_LAST_READS):  # a daemon that left the group may hold the pipe for ever: do not wait for it
                if not self._read_output():
                    break
            self._close_output()
        finally:
            self._reaped.set()  # whatever `on_line` does: nobody waits for ever for a child that has ended
