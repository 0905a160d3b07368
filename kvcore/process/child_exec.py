"""Become another program that dies with its parent: `python -I -S child_exec.py PARENT_PID [--guard FD] COMMAND...`.

Run by path in a bare interpreter (about 15 ms), so it imports the standard library only. Why a trampoline: a
preexec_fn may deadlock in a process with threads, and a child that asked for the signal itself, after its imports,
would be an orphan if the parent died before that. PR_SET_PDEATHSIG survives the exec; the command's own children do not
inherit it, so `--guard` leaves a guard in the process group: see `watch`.
"""

import ctypes
import os
import select
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1
_GUARD, _WATCH = "--guard", "--watch"
_STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def set_parent_death_signal(parent_pid: int, signal_number: int = signal.SIGKILL) -> None:
    """Have the kernel send `signal_number` to this process when the *thread* that forked it ends.

    Exits with 1 if the parent `parent_pid` is gone already. Raises OSError where the kernel has no such signal.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal_number), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:  # it died between fork and prctl: the signal will never come
        os._exit(1)


def main() -> None:
    """Arm the signal, leave a guard if asked to, give the interpreter's ignored signals back their defaults, exec."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    set_parent_death_signal(parent_pid)
    if command[0] == _GUARD:
        _fork_guard(int(command[1]))
        command = command[2:]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # whoever started us handles it: the default would end the command
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        os._exit(127)


def _fork_guard(link: int) -> None:
    """Start the guard in our process group. What happens while it starts it finds when it first looks."""
    leader = os.getpid()
    signal.pthread_sigmask(signal.SIG_BLOCK, _STOP_SIGNALS)
    if os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
        os.close(link)
        return
    for number in _STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # a request to the group to end in order is not for us; survives the exec
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOP_SIGNALS)
    silent = os.open(os.devnull, os.O_RDWR)
    for standard in range(3):
        os.dup2(silent, standard)
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - pathlib takes 10 ms to import
        if int(name) > 2 and int(name) != link:  # above all the command's own links: their end must be seen
            os.closerange(int(name), int(name) + 1)  # does not mind that the listing's own is closed already
    os.execv(sys.executable, [sys.executable, "-I", "-S", __file__, _WATCH, str(link), str(leader)])


def watch(link: int, leader: int) -> None:
    """The guard: end our process group, ourselves last. It waits for the first of three:

    1. The other end of `link` is closed: who started the command is gone, however it ended.
    2. `leader`, the command and our parent, has ended: what it started must not outlive it.
    3. `leader` had ended before we looked: our parent is another process already, and there is nothing to wait for.

    Our own end closes `link`, which tells its other end that nothing is left of the group, or that we were killed.
    """
    try:
        ended = os.pidfd_open(leader)
        if os.getppid() == leader:
            poll = select.poll()
            poll.register(link, select.POLLIN)
            poll.register(ended, select.POLLIN)
            poll.poll()
    finally:
        try:
            _end_group()
        finally:
            os.kill(0, signal.SIGKILL)


def _end_group(end_s: float = 10.0, trackers_s: float = 2.0, look_s: float = 0.01) -> None:
    """SIGKILL all but ourselves, until they are gone or `end_s` has passed: memory on a GPU takes seconds to go.

    multiprocessing's resource trackers have `trackers_s` to go by themselves, which they do once nobody is left whom
    they serve: before that they remove what those had in /dev/shm.
    """
    start = time.monotonic()
    while (passed := time.monotonic() - start) < end_s:
        others = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _is_in_group(pid)]  # noqa: PTH208
        to_kill = [pid for pid in others if passed > trackers_s or not _is_tracker(pid)]
        if not others:
            return
        for pid in to_kill:
            try:  # noqa: SIM105 - contextlib is not loaded here
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        time.sleep(look_s)


def _is_in_group(pid: int) -> bool:
    """Whether `pid` is another process of our group, and no zombie."""
    fields = _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()
    return pid != os.getpid() and len(fields) > 2 and fields[0] not in b"ZX" and int(fields[2]) == os.getpgrp()


def _is_tracker(pid: int) -> bool:
    return b"multiprocessing.resource_tracker" in _read(f"/proc/{pid}/cmdline")


def _read(path: str) -> bytes:
    """The file's bytes; empty when the process has gone."""
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


if __name__ == "__main__":
    if sys.argv[1] == _WATCH:
        watch(int(sys.argv[2]), int(sys.argv[3]))
    main()
