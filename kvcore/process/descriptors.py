"""File descriptors of a process: its limit raised, and running out of them told from other failures.

A descriptor a connection: the soft limit of most shells, 1024, ends a router at some hundred streams.
"""

import errno
import resource
import socket
from contextlib import suppress

MOST = 1 << 20
"""No process of ours needs more; some containers allow a milliard, which programs that go through all of them feel."""
RESERVED = 64
"""What a process has open beside its connections: files, pipes, segments, the event loop's own."""


def raise_limit() -> int:
    """Raise the soft limit to the hard one, for this process and its children. Returns what it is then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft_limit()
    with suppress(OSError, ValueError):  # the kernel's own bound (fs.nr_open) is lower: what there is must do
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return soft_limit()


def soft_limit() -> int:
    """Descriptors that this process may have open."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if soft == resource.RLIM_INFINITY else soft


def hard_limit() -> int:
    """What `raise_limit` can raise it to."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)


def are_exhausted(error: BaseException) -> bool:
    """Whether this failure came of our own lack of descriptors: it says nothing about the other side."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        return True
    cause = error.__cause__ or error.__context__
    if isinstance(error, socket.gaierror):  # it cannot open /etc/hosts, and says that the name is unknown
        return not _one_is_free()
    return cause is not None and are_exhausted(cause)


def _one_is_free() -> bool:
    try:
        socket.socket().close()
    except OSError:
        return False
    return True
