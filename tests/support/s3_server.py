"""An S3 server (moto) on loopback, in a process of its own, and what a test may do to it.

Without moto tests are skipped; in continuous integration that is a failure.
"""

import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import count
from typing import TypeVar

import pytest
from support.ports import free_ports
from support.server_process import ServerProcess

_skip = pytest.mark.skipif(find_spec("moto") is None and not os.environ.get("CI"), reason="no moto here")
needs_s3 = (pytest.mark.slow, pytest.mark.timeout(60), _skip)
_Test = TypeVar("_Test", bound=Callable[..., object])
_SIGNED_BY = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=none"


def with_s3(test: _Test) -> _Test:
    """Marks a test that starts an S3 server of its own."""
    for mark in needs_s3:
        test = mark(test)
    return test


class S3Server(ServerProcess):
    """Keeps all in memory. Killed and started again it is on the same port, and empty."""

    credentials = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "very-secret", "AWS_REGION": "us-east-1"}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.port = free_ports(1)[0]
        self._numbers = count()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        code = "from moto.server import main; main()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, "-H", "127.0.0.1", "-p", str(self.port)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said.append(line)
            if "Running on" in line:
                break
        else:
            raise AssertionError(f"moto ended: {''.join(said)}")
        threading.Thread(target=self._process.stdout.read, daemon=True).start()  # it logs each request

    def make_bucket(self, name: str = "") -> str:
        """A bucket, empty; its name, where none is given a new one."""
        name = name or f"kv-bucket-{next(self._numbers)}"
        headers = {"Authorization": _SIGNED_BY, "Content-Length": "0"}
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/{name}", method="PUT", headers=headers)):
            return name


@contextmanager
def s3_server() -> Iterator[S3Server]:
    server = S3Server()
    try:
        server.start()
        yield server
    finally:
        server.stop()
