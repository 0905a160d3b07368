"""Ports that are free now, for processes that must know each other's before they bind."""

import fcntl
import socket
import tempfile
from collections.abc import Iterator
from functools import cache
from itertools import cycle
from pathlib import Path
from typing import TextIO

FIRST, BLOCK = 10_000, 256
"""Ports below those that the kernel gives out by itself: one of these could be taken, by any connection or listener on
whatever port, before the process that it is meant for has begun. So many, as a port counts as taken for a minute after
its last connection, and small clusters follow each other in seconds."""
_held: list[TextIO] = []


def free_ports(count: int) -> list[int]:
    """They differ, and no other process of tests is given one of them meanwhile."""
    ports: list[int] = []
    tries = 0
    while len(ports) < count:
        port, tries = next(_own()), tries + 1
        assert tries < 4 * BLOCK, "all ports of this process's block are taken"
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


@cache
def _own() -> Iterator[int]:
    """The ports of one block, again and again; it is this process's for as long as it lives."""
    end = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    folder = Path(tempfile.gettempdir()) / "kvferry-test-ports"
    folder.mkdir(exist_ok=True)
    for first in range(FIRST, end - BLOCK, BLOCK):
        lock = (folder / str(first)).open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        _held.append(lock)
        return cycle(range(first, first + BLOCK))
    raise AssertionError(f"no block of ports between {FIRST} and {end} is free")
