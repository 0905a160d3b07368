"""`/metadata` of Mooncake's clients by turns: ours, which is durable, beside Mooncake's own in Python and in C++.

`python -m benchmarks.metadata_dialect [--rounds 5]`. One connection and sixteen, each with one request under way;
values as a client over tcp writes them, none twice the same, 500 keys. Each server is a process of its own, the client
is this one. What is not installed is left out. `measure_dialect` is for benchmarks.metadata.
"""

import argparse
import asyncio
import importlib.util
import itertools
import json
import shutil
import statistics
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import cast

import uvloop

from benchmarks.children import program, scratch_folder
from kvcore.ports import listen

HOST = "127.0.0.1"
NUM_KEYS = 500
CONNECTIONS = (1, 16)
SECONDS = 1.0
"""Of one turn."""
_KEYS = [f"mooncake%2Fram%2F10.0.{n // 250}.{n % 250}%3A17001" for n in range(NUM_KEYS)]
_CLUSTER = {
    "cluster": "bench",
    "model": {"path": "sim", "name": "sim"},
    "engine": {"kind": "sim"},
    "nodes": {"p": {"role": "prefiller", "port": 1}, "d": {"role": "decoder", "port": 2}},
}


class _Caller(asyncio.Protocol):
    """One connection that asks again as soon as it is answered."""

    def __init__(self, ask: Callable[[], bytes | None]) -> None:
        self._ask = ask
        self._seen = b""
        self._started = 0.0
        self.took: list[float] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's is none by its class
        self._next()

    def data_received(self, data: bytes) -> None:
        self._seen += data
        head, found, rest = self._seen.partition(b"\r\n\r\n")
        if not found or len(rest) < int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0]):
            return
        if not head.startswith(b"HTTP/1.1 200"):
            self.done.set_exception(RuntimeError(self._seen.decode(errors="replace")))
            return
        self._seen = b""
        self.took.append(perf_counter() - self._started)
        self._next()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(f"the server closed the connection: {exc}"))

    def _next(self) -> None:
        request = self._ask()
        if request is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._started = perf_counter()
        self._transport.write(request)


class _Subject:
    """One server, and the rates of its turns."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._numbers = itertools.count()
        self.rates: dict[str, list[float]] = {}
        self.p99_ms: dict[str, list[float]] = {}

    async def turn(self, method: str, connections: int, seconds: float) -> None:
        """Ask for so long."""
        end = perf_counter() + seconds

        def ask() -> bytes | None:
            return None if perf_counter() >= end else self._request(method, next(self._numbers))

        started, loop = perf_counter(), asyncio.get_running_loop()
        made = [await loop.create_connection(lambda: _Caller(ask), HOST, self._port) for _ in range(connections)]
        callers = [caller for _, caller in made]
        await asyncio.gather(*(caller.done for caller in callers))
        took = sorted(itertools.chain.from_iterable(caller.took for caller in callers))
        name = f"{method.lower()}_c{connections}"
        self.rates.setdefault(name, []).append(len(took) / (perf_counter() - started))
        self.p99_ms.setdefault(name, []).append(took[int(len(took) * 0.99)] * 1e3)

    async def fill(self) -> None:
        """Every key is there."""
        left = iter(range(NUM_KEYS))
        request = (self._request("PUT", number) for number in left)
        _, caller = await asyncio.get_running_loop().create_connection(
            lambda: _Caller(lambda: next(request, None)), HOST, self._port
        )
        await caller.done

    @staticmethod
    def _request(method: str, number: int) -> bytes:
        key = _KEYS[number % NUM_KEYS]
        head = f"{method} /metadata?key={key} HTTP/1.1\r\nHost: {HOST}\r\nAccept: */*\r\n"
        if method == "GET":
            return f"{head}\r\n".encode()
        body = _value(key, number)
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        return head.encode() + body


def _value(key: str, number: int) -> bytes:
    name = key.partition("ram%2F")[2].replace("%3A", ":")
    buffers = [{"addr": 140479429599296, "length": 1 << 28, "name": name}] * 2
    more = {"rdma_server_name": "", "tcp_data_host": name.partition(":")[0], "tcp_data_port": 16267}
    stamp = {"tcp_proto_version": 2, "timestamp": f"2026-11-26 08:53:17.{number:06}"}
    value = {"buffers": buffers, "name": name, "protocol": "tcp", **more, **stamp}
    return json.dumps(value, separators=(",", ":")).encode()


def free_port() -> int:
    """One that nobody has now."""
    with listen(HOST, 0) as bound:
        return int(bound.getsockname()[1])


@asynccontextmanager
async def _servers(folder: Path) -> AsyncIterator[dict[str, _Subject]]:
    """Those that can run here, by the prefix of their results' names."""
    ports = {name: free_port() for name in ("", "mooncake_py_", "mooncake_cpp_")}
    records = {"kind": "sqlite", "path": str(folder / "records.sqlite")}
    server = {"host": HOST, "port": ports[""], "records": records}
    (folder / "cluster.yaml").write_text(json.dumps({**_CLUSTER, "metadata_server": server}))
    ours = [sys.executable, "-m", "metadata_server", "--config", str(folder / "cluster.yaml")]
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(program(ours, "() ready|(ready)"))
        found = [""]
        if importlib.util.find_spec("mooncake") is not None:
            theirs = [sys.executable, "-m", "mooncake.http_metadata_server", "--host", HOST]
            theirs += ["--port", str(ports["mooncake_py_"])]
            await stack.enter_async_context(program(theirs, "(Server started)"))
            found.append("mooncake_py_")
        master = shutil.which("mooncake_master", path=str(Path(sys.executable).parent))
        if master is not None:
            more = (f"--rpc_port={free_port()}", f"--metrics_port={free_port()}", f"--metrics_host={HOST}")
            where = (f"--http_metadata_server_host={HOST}", f"--http_metadata_server_port={ports['mooncake_cpp_']}")
            command = [master, f"--rpc_address={HOST}", *more, "--enable_http_metadata_server=true", *where]
            await stack.enter_async_context(program(command, "(Master Admin Metrics)"))
            found.append("mooncake_cpp_")
        yield {name: _Subject(ports[name]) for name in found}


async def measure_dialect(rounds: int = 5, seconds: float = SECONDS) -> dict[str, float]:
    """Calls a second as `get_c1`, `put_c1`, `get_c16`, `put_c16`, and their `…_p99_ms`: medians of the rounds. Ours
    without a prefix, Mooncake's with `mooncake_py_` and `mooncake_cpp_`."""
    with scratch_folder() as folder:
        async with _servers(Path(folder)) as subjects:
            for subject in subjects.values():
                await subject.fill()
            for turn in range(rounds + 1):  # the first warms up
                for connections, method in itertools.product(CONNECTIONS, ("PUT", "GET")):
                    for subject in subjects.values():
                        await subject.turn(method, connections, seconds if turn else seconds / 4)
            found = {}
            for prefix, subject in subjects.items():
                for name, rates in subject.rates.items():
                    found[prefix + name] = statistics.median(rates[1:])
                    found[f"{prefix}{name}_p99_ms"] = statistics.median(subject.p99_ms[name][1:])
            return found


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    found = uvloop.run(measure_dialect(options.rounds))
    for prefix in ("", "mooncake_py_", "mooncake_cpp_"):
        for method, connections in itertools.product(("get", "put"), CONNECTIONS):
            name = f"{prefix}{method}_c{connections}"
            if name in found:
                print(f"{name:22} {found[name]:8,.0f} /s, p99 {found[f'{name}_p99_ms']:.2f} ms")
    print("RESULT", json.dumps({name: round(value, 2) for name, value in found.items()}))


if __name__ == "__main__":
    main()
