"""Two machines on one: network namespaces joined by a veth pair, or by a wire that delays, loses and can be cut.

`tc netem` is not in every kernel; `support.netns_wire` does the same in user space. Owns the interfaces and the wire's
process; all of them are gone afterwards.
"""

import ctypes
import fcntl
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from support import netns_wire

from benchmarks.namespaces import bring_up, ip, namespaces_need, two_namespaces

DEVICE = "kv0"
"""The interface between the two, on either side."""
ADDRESSES = ("10.98.72.1", "10.98.72.2")
LinkKind = Literal["veth", "wire"]
_PREFIX = "kvtest"
_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_IFF_TAP_NO_PI = 0x0002 | 0x1000
_WIRE_END_S = 10.0


class TwoMachines:
    """`inside[side]` goes in front of a command that is to run on machine 0 or 1."""

    def __init__(self, names: tuple[str, str], wire: "subprocess.Popen[str] | None") -> None:
        self._names = names
        self._wire = wire
        self.inside = tuple(("ip", "netns", "exec", name) for name in names)

    def shape(self, *, delay_s: float = 0.0, loss: float = 0.0) -> None:
        """What the wire does to each frame, in each direction, from now on."""
        assert self._wire is not None, "a veth pair cannot be shaped"
        assert self._wire.stdin is not None
        assert self._wire.stdout is not None
        self._wire.stdin.write(f"{delay_s} {loss}\n")
        self._wire.stdin.flush()
        assert self._wire.stdout.readline() == "set\n", "the wire has ended"

    def cut(self) -> None:
        """A wire loses everything from now on, without a word to either side; of a veth pair the far end goes down,
        and the near one loses its carrier."""
        if self._wire is None:
            ip("-n", self._names[1], "link", "set", DEVICE, "down")
        else:
            self.shape(loss=1.0)

    def mend(self) -> None:
        """The link is as it was at first."""
        if self._wire is None:
            ip("-n", self._names[1], "link", "set", DEVICE, "up")
        else:
            self.shape()

    @contextmanager
    def entered(self) -> Iterator[None]:
        """This thread, and what it starts, is on machine 0. (os.setns is of Python 3.12.)"""
        home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            there = os.open(f"/run/netns/{self._names[0]}", os.O_RDONLY | os.O_CLOEXEC)
            try:
                _set_namespace(there)
            finally:
                os.close(there)
            try:
                yield
            finally:
                _set_namespace(home)
        finally:
            os.close(home)


def missing_namespaces() -> str:
    """Why there can be no two machines here; empty: there can."""
    if missing := namespaces_need():
        return f"network namespaces need {missing}"
    name = f"{_PREFIX}{os.getpid()}p"
    try:
        ip("netns", "add", name)
    except RuntimeError as error:
        return f"no network namespace can be made: {error}"
    ip("netns", "del", name)
    return "" if Path("/dev/net/tun").exists() else "the wire needs /dev/net/tun"


@contextmanager
def two_machines(link: LinkKind, *, seed: int = 1) -> Iterator[TwoMachines]:
    """Both have `DEVICE` with one of `ADDRESSES`, and their own loopback; nothing else."""
    with two_namespaces(_PREFIX) as names, ExitStack() as stack:
        wire = None
        if link == "veth":
            ip("link", "add", DEVICE, "netns", names[0], "type", "veth", "peer", "name", DEVICE, "netns", names[1])
        else:
            wire = stack.enter_context(_wire(names, seed))
        bring_up(names, DEVICE, ADDRESSES)
        yield TwoMachines(names, wire)


@contextmanager
def _wire(names: tuple[str, str], seed: int) -> "Iterator[subprocess.Popen[str]]":
    """A tap in each namespace, and the process that carries their frames. A tap's descriptor works wherever it is."""
    taps = []
    try:
        for name in names:
            taps.append(os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC))
            fcntl.ioctl(taps[-1], _TUNSETIFF, struct.pack("16sH22x", name.encode(), _IFF_TAP_NO_PI))
            ip("link", "set", name, "netns", name, "name", DEVICE)
        command = [sys.executable, "-I", "-S", netns_wire.__file__, *map(str, taps), str(seed)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=taps, start_new_session=True
        )
    finally:
        for tap in taps:
            os.close(tap)
    with process:
        try:
            yield process
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(_WIRE_END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _set_namespace(descriptor: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"setns: {os.strerror(error)}")
