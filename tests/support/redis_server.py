"""A Redis or Valkey of a test's own on loopback, and what a test may do to it.

Without the program tests are skipped; in continuous integration that is a failure.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import pytest
from support.ports import free_ports
from support.server_process import ServerProcess

from kvstore.tiers.resp import RespConnection, RespValue, command
from transfer.blocking import BatchDeadline

USUAL_PORT = 6379
_Test = TypeVar("_Test", bound=Callable[..., object])
VALKEY = shutil.which("valkey-server", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
"""The system's, or what `make test` puts beside its Python."""
_skip_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None and not os.environ.get("CI"), reason="no redis-server here"
)
_skip_valkey = pytest.mark.skipif(VALKEY is None and not os.environ.get("CI"), reason="no valkey-server here")
needs_redis = (pytest.mark.slow, pytest.mark.timeout(60), _skip_redis)
needs_valkey = (pytest.mark.slow, pytest.mark.timeout(60), _skip_valkey)


def with_redis(test: _Test) -> _Test:
    """Marks a test that starts a Redis of its own."""
    for mark in needs_redis:
        test = mark(test)
    return test


class RedisServer(ServerProcess):
    """Keeps nothing on disk. Killed and started again it is on the same port, and empty."""

    def __init__(
        self, folder: Path, program: str, args: tuple[str, ...], tls_port: bool, sentinel: Path | None
    ) -> None:
        super().__init__()
        self.port = free_ports(1)[0]
        self._folder, self._program = folder, program
        port = ("--port", "0", "--tls-port", str(self.port)) if tls_port else ("--port", str(self.port))
        self._args: tuple[str, ...] = (*port, "--bind", "127.0.0.1")
        self._said_when_up = "ready to accept connections"
        if sentinel is not None:
            self._args = (str(sentinel), "--sentinel", *self._args)
            self._said_when_up = "sentinel id is"
        else:
            self._args += ("--save", "", "--appendonly", "no", "--maxmemory", "64mb")
            self._args += ("--maxmemory-policy", "allkeys-lru", *args)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def running(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        self._process = subprocess.Popen(
            [self._program, *self._args], stdout=subprocess.PIPE, text=True, cwd=self._folder
        )
        assert self._process.stdout is not None
        said = []
        for line in self._process.stdout:
            said.append(line)
            if self._said_when_up in line.lower():
                return
        raise AssertionError(f"{self._program} ended: {''.join(said)}")

    def stop(self) -> None:
        process = self._process
        super().stop()
        if process is not None and process.stdout is not None:
            process.stdout.close()

    def ask(self, *words: bytes) -> RespValue:
        """One command, by a connection of its own."""
        with self.connection() as connection:
            connection.send([command(*words)], replies=1)
            return connection.reply()

    @contextmanager
    def connection(self) -> Iterator[RespConnection]:
        with socket.create_connection(("127.0.0.1", self.port)) as sock:
            yield RespConnection(sock, BatchDeadline(10.0))


@contextmanager
def redis_server(
    *args: str,
    program: str = "redis-server",
    tls_port: bool = False,
    sentinel: Path | None = None,
    port: int | None = None,
) -> Iterator[RedisServer]:
    """64 MB, least recently used keys go first, unless `args` say otherwise. `sentinel`: a sentinel with this file.
    `port`: which must be free; else any."""
    with TemporaryDirectory() as folder:
        own = () if port is None else ("--port", str(port))
        server = RedisServer(Path(folder), program, (*args, *own), tls_port, sentinel)
        server.port = server.port if port is None else port
        try:
            server.start()
            yield server
        finally:
            server.stop()
