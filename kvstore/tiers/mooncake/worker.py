"""The process in which Mooncake's client runs: `python -m kvstore.tiers.mooncake.worker SETUP`.

Why not in the node's own: its `setup` holds the interpreter's lock for 90 s where a master is silent, a call that hangs
cannot be ended but with its process, and it starts thirty threads and takes signals. When the node closes the socket it
takes back what it lent, and ends; if it cannot, the node kills it.
"""

import ctypes
import mmap
import os
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from kvstore.tiers.mooncake.messages import MooncakeOperation, MooncakeReply, MooncakeRequest, MooncakeSetup

_FAILED = -1
"""Mooncake's INTERNAL_ERROR."""


class _Store:
    """Mooncake's client with the buffer registered."""

    def __init__(self, store: Any, replicate: Any, address: int) -> None:
        self._store, self._replicate, self._address = store, replicate, address
        replicate.replica_num = 1
        self._calls: dict[MooncakeOperation, Callable[[MooncakeRequest], list[int]]] = {
            MooncakeOperation.FIND: lambda asked: store.batch_is_exist(asked.keys),
            MooncakeOperation.SIZES: lambda asked: [store.get_size(key) for key in asked.keys],
            MooncakeOperation.LOAD: lambda asked: store.batch_get_into(asked.keys, self._places(asked), asked.sizes),
            MooncakeOperation.SAVE: self._save,
            MooncakeOperation.REMOVE: lambda asked: store.batch_remove(asked.keys, True),
            MooncakeOperation.CLEAR: lambda asked: [store.remove_by_regex(pattern, True) for pattern in asked.keys],
        }

    def answer(self, asked: MooncakeRequest) -> MooncakeReply:
        try:
            return MooncakeReply(asked.id, [int(code) for code in self._calls[asked.operation](asked)])
        except Exception as error:  # a call has an answer, whatever Mooncake raises
            return MooncakeReply(asked.id, [_FAILED] * len(asked.keys), f"{type(error).__name__}: {error}")

    def _save(self, asked: MooncakeRequest) -> list[int]:
        codes: list[int] = self._store.batch_put_from(asked.keys, self._places(asked), asked.sizes, self._replicate)
        return codes

    def _places(self, asked: MooncakeRequest) -> list[int]:
        return [self._address + start for start in asked.starts]


def _set_up(setup: MooncakeSetup, memory: mmap.mmap) -> tuple[Any, _Store] | str:
    """The client and its calls, or what is wrong."""
    try:
        from mooncake.store import MooncakeDistributedStore, ReplicateConfig
    except ImportError as error:
        return f"mooncake.store cannot be imported: {error}"
    store, address = MooncakeDistributedStore(), ctypes.addressof(ctypes.c_char.from_buffer(memory))
    if code := store.setup(setup.options):
        return f"Mooncake's setup returned {code}"
    if code := store.register_buffer(address, setup.buffer_bytes):
        return f"Mooncake's register_buffer returned {code}"
    return store, _Store(store, ReplicateConfig(), address)


def main() -> None:
    """Set up, answer until the socket ends, take all back."""
    setup = msgspec.json.decode(sys.argv[1], type=MooncakeSetup)
    sock, lock = socket.socket(fileno=setup.socket_fd), threading.Lock()
    memory = mmap.mmap(setup.buffer_fd, setup.buffer_bytes)

    def send(reply: MooncakeReply) -> None:
        with lock:
            sock.sendall(msgspec.json.encode(reply) + b"\n")

    done = _set_up(setup, memory)
    send(MooncakeReply(error=done if isinstance(done, str) else ""))
    if isinstance(done, str):
        os._exit(1)
    store, calls = done
    pool = ThreadPoolExecutor(setup.threads)
    with sock.makefile("rb") as lines:
        for line in lines:
            request = msgspec.json.decode(line, type=MooncakeRequest)
            pool.submit(lambda asked: send(calls.answer(asked)), request)
    store.close()
    os._exit(0)  # threads whose calls hang are not waited for


if __name__ == "__main__":
    main()
