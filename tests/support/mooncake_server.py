"""A `mooncake_master` of a test's own and a client that lends it memory, in a network namespace.

Mooncake's clients refuse a host that has nothing but loopback. Without the package or namespaces tests are skipped; in
continuous integration that is a failure.
"""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic
from typing import TypeVar

import pytest
from support.netns import ADDRESSES, TwoMachines, missing_namespaces, two_machines
from support.process_tree import freeze

_Test = TypeVar("_Test", bound=Callable[..., object])
HOST = ADDRESSES[0]
PORT = 50051
START_S = 20.0
LENT_BYTES = 256 << 20
_missing = missing_namespaces() or ("" if importlib.util.find_spec("mooncake") else "no mooncake package here")
needs_mooncake = (
    pytest.mark.slow,
    pytest.mark.timeout(120),
    pytest.mark.skipif(bool(_missing) and not os.environ.get("CI"), reason=_missing),
)


def with_mooncake(test: _Test) -> _Test:
    """Marks a test that starts a Mooncake of its own."""
    for mark in needs_mooncake:
        test = mark(test)
    return test


class MooncakeServer:
    """The master, and the client that lends: both of Mooncake's package. `machines`: where they are."""

    def __init__(self, machines: TwoMachines, folder: Path) -> None:
        self.machines = machines
        self.master = f"{HOST}:{PORT}"
        self._folder = folder
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *args: str) -> None:
        """The master, empty. Who lends mounts its memory within about a second."""
        ports = (f"--rpc_port={PORT}", "--metrics_port=9003", f"--metrics_host={HOST}")
        times = ("--default_kv_lease_ttl=200", "--client_ttl=60")  # a lender that stood still for 10 s would be gone
        self._run("mooncake_master", f"--rpc_address={HOST}", *ports, *times, *args)
        end = monotonic() + START_S
        with self.machines.entered():
            while True:
                try:
                    socket.create_connection((HOST, PORT), timeout=1.0).close()
                except OSError:
                    assert monotonic() < end, self.log("mooncake_master")
                    assert self._processes["mooncake_master"].poll() is None, self.log("mooncake_master")
                else:
                    return

    def lend(self, num_bytes: int = LENT_BYTES) -> None:
        """A client of Mooncake's that lives on when kvferry's nodes are stopped."""
        place = (f"--host={HOST}", "--port=50052", f"--master_server_address={self.master}", "--protocol=tcp")
        size = f"--global_segment_size={num_bytes >> 20} MB"
        self._run("mooncake_client", *place, "--metadata_server=P2PHANDSHAKE", size)

    def stop(self) -> None:
        """Kill the master."""
        self._end("mooncake_master")

    def freeze(self) -> None:
        freeze(self._processes["mooncake_master"].pid)

    def thaw(self) -> None:
        self._processes["mooncake_master"].send_signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill all."""
        for name in list(self._processes):
            self._end(name)

    def log(self, name: str) -> str:
        return (self._folder / f"{name}.log").read_text()

    def _run(self, name: str, *args: str) -> None:
        program = str(Path(sys.executable).parent / name)
        with (self._folder / f"{name}.log").open("ab") as log:
            self._processes[name] = subprocess.Popen(
                [*self.machines.inside[0], program, *args], stdout=log, stderr=log, cwd=self._folder
            )

    def _end(self, name: str) -> None:
        process = self._processes.pop(name, None)
        if process is not None:
            process.kill()
            process.wait()


@contextmanager
def mooncake_server() -> Iterator[MooncakeServer]:
    """LENT_BYTES of room."""
    with TemporaryDirectory() as folder, two_machines("veth") as machines:
        server = MooncakeServer(machines, Path(folder))
        try:
            server.start()
            server.lend()
            yield server
        finally:
            server.end()
