"""Become another program that dies with its parent: `python -I -S child_exec.py PARENT_PID COMMAND...`.

Run by path in a bare interpreter (about 15 ms), so it imports the standard library only. Why a trampoline: a
preexec_fn may deadlock in a process with threads, and a child that asked for the signal itself, after its imports,
would be an orphan if the parent died before that. PR_SET_PDEATHSIG survives the exec.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


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
    """Arm the signal, give the interpreter's ignored signals back their defaults, exec."""
    parent_pid, command = int(sys.argv[1]), sys.argv[2:]
    set_parent_death_signal(parent_pid)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        os._exit(127)


if __name__ == "__main__":
    main()
