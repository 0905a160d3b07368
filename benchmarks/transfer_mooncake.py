"""Mooncake's end of the transfer benchmark: `put_from`, `get_into` over TCP, run by a Python that has its wheel.

Imports nothing of kvferry. `--own BYTES` contributes the memory and waits; `--fd N` answers questions like
`benchmarks.transfer_worker`. Both meet at the master that runs on `--master` (host:port).
"""

import argparse
import ctypes
import json
import mmap
import os
import signal
import socket
import sys
import time
from itertools import count
from typing import Any

from mooncake.store import MooncakeDistributedStore  # type: ignore[import-not-found]

_LOCAL_BYTES = 16 << 20


class Client:
    """Source and target memory, registered, and the store that moves it."""

    def __init__(self, store: Any, buffer_bytes: int) -> None:
        self._store = store
        self._memories = [mmap.mmap(-1, buffer_bytes) for _ in range(2)]
        for memory in self._memories:
            memory[:] = os.urandom(1 << 20) * (buffer_bytes >> 20)
        self._source, self._target = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in self._memories)
        for address in (self._source, self._target):
            _check(store.register_buffer(address, buffer_bytes), "register_buffer")
        self._numbers = count()

    def pairs(self, size: int, batch: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of each put and of the get after it, and the processor's of both; what was put is removed."""
        taken: dict[str, list[float]] = {"put": [], "get": [], "cpu": []}
        for index in range(repeats):
            cpu_s = time.process_time()
            keys = [f"k{next(self._numbers)}" for _ in range(batch)]
            began = time.perf_counter()
            put = self._move("put", keys, size)
            between = time.perf_counter()
            got = self._move("get", keys, size)
            taken["get"].append(time.perf_counter() - between)
            taken["put"].append(between - began)
            taken["cpu"].append(time.process_time() - cpu_s)
            if put != [0] * batch or got != [size] * batch or (index == 0 and not self._arrived(size * batch)):
                raise RuntimeError(f"put {put}, got {got}")
            for key in keys:
                self._store.remove(key, True)
        return taken

    def _move(self, way: str, keys: list[str], size: int) -> list[int]:
        base = self._source if way == "put" else self._target
        store = self._store
        if len(keys) == 1:
            return [store.put_from(keys[0], base, size) if way == "put" else store.get_into(keys[0], base, size)]
        addresses, sizes = [base + index * size for index in range(len(keys))], [size] * len(keys)
        move = store.batch_put_from if way == "put" else store.batch_get_into
        return list(move(keys, addresses, sizes))

    def _arrived(self, num_bytes: int) -> bool:
        source, target = (memoryview(memory)[:num_bytes] for memory in self._memories)
        same = source == target
        target[:] = bytes(num_bytes)
        return same


def _check(code: int, what: str) -> None:
    if code:
        raise RuntimeError(f"mooncake: {what} returned {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", required=True)
    parser.add_argument("--master", required=True)
    parser.add_argument("--own", type=int, default=0)
    parser.add_argument("--buffer", type=int, default=0)
    parser.add_argument("--fd", type=int, default=-1)
    arguments = parser.parse_args()
    store = MooncakeDistributedStore()
    _check(
        store.setup(arguments.host, "P2PHANDSHAKE", arguments.own, _LOCAL_BYTES, "tcp", "", arguments.master), "setup"
    )
    if arguments.own:
        sys.stdout.write("up\n")
        sys.stdout.flush()
        signal.pause()  # SIGTERM ends it
    client = Client(store, arguments.buffer)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    with socket.socket(fileno=arguments.fd) as sock, sock.makefile("rwb") as lines:
        for line in lines:
            question = json.loads(line)
            answer: dict[str, Any]
            try:
                answer = client.pairs(question["size"], question["batch"], question["repeats"])
            except RuntimeError as error:
                answer = {"failed": str(error)}
            lines.write(json.dumps(answer).encode() + b"\n")
            lines.flush()
    store.close()


if __name__ == "__main__":
    main()
