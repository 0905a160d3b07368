"""kvferry's ends of the transfer benchmark: the owner of a segment, and the initiator that answers questions.

A question names a path (`memcpy`, a transport's kind, or `store-KIND`), a size, a batch and how often; the answer has
the seconds of each put and of the get after it, and the processor's of all of them. The first pair of each question is
checked byte by byte.
"""

import argparse
import asyncio
import json
import mmap
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import count
from typing import Any, Literal, get_args

import msgspec
import numpy as np

from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig, TransportKind
from kvcore.errors import ConfigError, TransferError
from kvcore.process.service import loop_factory
from kvcore.types import ChunkKey, KVSpec, NodeInfo, Role, Segment
from kvstore.integrity.checks import Integrity
from kvstore.put_session import PutChunk
from kvstore.store import KVStore
from kvstore.types import GetOutcome
from metadata_server.client import MetadataClient
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import RegisterRequest, SegmentManifest
from transfer.base import TransferEngine, TransferOp
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer, start_segment_hosts

KINDS: tuple[str, ...] = tuple(kind for kind in ("shm", "tcp", "ucx", "nixl") if kind in get_args(TransportKind))
OBJECT_BYTES = 4 << 20
CALL_S = 30.0
_Way = Literal["put", "get"]
_Move = Callable[[_Way, int, int], Awaitable[None]]


def transport_config(kind: str, device: str) -> TransportConfig:
    """`device`: the network interface that UCX and NIXL use."""
    return TransportConfig(kind=kind, devices=[device] if kind in ("ucx", "nixl") else [])  # type: ignore[arg-type]


async def own_segment(size_bytes: int, host: str, device: str) -> None:
    """The owner's process: print the segment, serve it by every transport that it can until SIGTERM."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    addresses: dict[str, str] = {}
    async with AsyncExitStack() as stack:
        memory = stack.enter_context(SegmentMemory.create("n0.1", size_bytes))
        for kind in KINDS:
            try:
                hosts = await start_segment_hosts(transport_config(kind, device), memory, host=host)
            except ConfigError:  # the initiator says why
                continue
            stack.push_async_callback(hosts.aclose)
            addresses |= hosts.addresses
        segment = Segment(id="n0.1", node_id="n0", size_bytes=size_bytes, host_id=host_identity(), addresses=addresses)
        print("segment " + msgspec.json.encode(segment).decode(), flush=True)
        await stop.wait()


class Initiator:
    """Source and target memory, an engine for each transport that works here, and a store over each of them."""

    def __init__(self, segment: Segment, buffer_bytes: int) -> None:
        self._segment = segment
        self._source, self._target = (memoryview(mmap.mmap(-1, buffer_bytes)) for _ in range(2))  # as Mooncake's
        self._source[:] = os.urandom(1 << 20) * (buffer_bytes >> 20)
        self._target[:] = b"\x01" * buffer_bytes
        self._numbers = count(1)
        self._moves: dict[str, _Move] = {"memcpy": self._memcpy}
        self.reasons: dict[str, str] = {}
        """Path -> why it does not run."""

    async def open(self, stack: AsyncExitStack, device: str, metadata: MetadataClient) -> None:
        """Make whatever works; `stack` closes it."""
        for kind in KINDS:
            try:
                engine = build_transfer(transport_config(kind, device), host_identity())
            except ConfigError as error:
                self.reasons[kind] = error.message
                continue
            stack.push_async_callback(engine.aclose)
            if not engine.reaches(self._segment):
                self.reasons[kind] = (
                    "the segment is on another host" if kind == "shm" else "the owner does not serve it"
                )
                continue
            for memory in (self._source, self._target):
                engine.register(memory)
            self._moves[kind] = self._transfers(engine)
            for name, integrity in ((f"store-{kind}", Integrity()), (f"unverified-{kind}", Integrity("header"))):
                store = KVStore(
                    spec=_spec(),
                    node_id="n0",
                    incarnation=1,
                    metadata=metadata,
                    transfer=engine,
                    clock=SystemClock(),
                    host_id=host_identity(),
                    integrity=integrity,
                )
                stack.push_async_callback(store.aclose)
                self._moves[name] = _StoreMove(store, self._numbers, self._source, self._target)

    @property
    def paths(self) -> list[str]:
        """What can be asked for."""
        return list(self._moves)

    async def pairs(self, path: str, size: int, batch: int, repeats: int) -> dict[str, list[float]]:
        """Seconds of each put and of the get after it, and the processor's of both."""
        move = self._moves[path]
        taken: dict[str, list[float]] = {"put": [], "get": [], "cpu": []}
        for index in range(repeats):
            cpu_s = time.process_time()
            for way in get_args(_Way):
                began = time.perf_counter()
                await move(way, size, batch)
                taken[way].append(time.perf_counter() - began)
            taken["cpu"].append(time.process_time() - cpu_s)
            total = size * batch
            if index == 0:
                if self._source[:total] != self._target[:total]:
                    raise RuntimeError(f"{path}: what came back is not what was sent")
                self._target[:total] = bytes(total)
        return taken

    async def _memcpy(self, way: _Way, size: int, batch: int) -> None:
        for at in range(0, size * batch, size):
            source = np.frombuffer(self._source[at : at + size], np.uint8)
            np.copyto(np.frombuffer(self._target[at : at + size], np.uint8), source)

    def _transfers(self, engine: TransferEngine) -> _Move:
        async def move(way: _Way, size: int, batch: int) -> None:
            memory = self._source if way == "put" else self._target
            ops = [TransferOp(self._segment, at, [memory[at : at + size]]) for at in range(0, size * batch, size)]
            errors = await (engine.write if way == "put" else engine.read)(ops, CALL_S)
            if wrong := next((error for error in errors if error is not None), None):
                raise wrong

        return move


class _StoreMove:
    """Objects of OBJECT_BYTES through the whole store: reserve, write, commit; match, get, verify."""

    def __init__(self, store: KVStore, numbers: "count[int]", source: memoryview, target: memoryview) -> None:
        self._store = store
        self._numbers = numbers
        self._source = source
        self._target = target
        self._keys: list[ChunkKey] = []

    async def __call__(self, way: _Way, size: int, batch: int) -> None:
        await (self._put(batch) if way == "put" else self._get(batch))

    async def _put(self, batch: int) -> None:
        keys = [ChunkKey(next(self._numbers).to_bytes(16, "big")) for _ in range(batch)]
        async with await self._store.begin_put(keys, prefer_segment="n0.1", timeout_s=CALL_S) as session:
            chunks = [PutChunk(key, 1, [_object(self._source, index)]) for index, key in enumerate(keys)]
            await session.write_batch(chunks, timeout_s=CALL_S)
            committed = await session.commit(timeout_s=CALL_S)
        if committed != keys:
            raise RuntimeError(f"the put failed: {self._store.counters()}")
        self._keys = keys

    async def _get(self, batch: int) -> None:
        match = await self._store.match(self._keys, timeout_s=CALL_S)
        buffers = [[_object(self._target, index)] for index in range(batch)]
        result = await self._store.get_into(match, 0, buffers, timeout_s=CALL_S)
        self._store.release_soon(match)
        if result.outcomes != [GetOutcome.OK] * batch:
            raise RuntimeError(f"the get failed: {result.outcomes}, {self._store.counters()}")


def _object(memory: memoryview, index: int) -> memoryview:
    return memory[index * OBJECT_BYTES : (index + 1) * OBJECT_BYTES]


def _spec() -> KVSpec:
    return KVSpec(
        model_id="transfer",
        weights_digest="",
        tokenizer_digest="",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype="uint8",
        attention="",
        layout_id="transfer",
        chunk_tokens=1,
        chunk_bytes=OBJECT_BYTES,
    )


async def answer_questions(fd: int) -> None:
    """The initiator's process. The first question is the set-up; its answer has `paths` and `reasons`."""
    reader, writer = await asyncio.open_connection(sock=socket.socket(fileno=fd))
    print("up", flush=True)
    setup = json.loads(await reader.readline())
    segment = msgspec.json.decode(setup["segment"], type=Segment)
    initiator = Initiator(segment, setup["buffer"])
    async with AsyncExitStack() as stack:
        metadata = connect_client(MetadataEndpoints(urls=(setup["metadata"],), timeout_s=CALL_S), SystemClock())
        stack.push_async_callback(metadata.aclose)
        node = NodeInfo(id="n0", role=Role.STORE, control_url="http://127.0.0.1:1", incarnation=1)
        await metadata.register(RegisterRequest(node=node, segments=[SegmentManifest(segment=segment)], ttl_s=600))
        await initiator.open(stack, setup["device"], metadata)
        answer: dict[str, Any] = {"paths": initiator.paths, "reasons": initiator.reasons}
        while True:
            writer.write(json.dumps(answer).encode() + b"\n")
            line = await reader.readline()
            if not line:
                return
            question = json.loads(line)
            try:
                answer = await initiator.pairs(**question)
            except (TransferError, RuntimeError) as error:
                answer = {"failed": f"{type(error).__name__}: {error}"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, default=-1)
    parser.add_argument("--own", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--device", default="lo")
    arguments = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:  # the loop that engines have
        if arguments.own:
            runner.run(own_segment(arguments.own, arguments.host, arguments.device))
        else:
            runner.run(answer_questions(arguments.fd))


if __name__ == "__main__":
    main()
