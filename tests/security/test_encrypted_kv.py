"""Who reads a segment, or hears all that passes between two nodes, finds KV; with `kv.encrypt` he finds none, whatever
the transport, and the reader with the secret has it all the same."""

import asyncio
import contextlib
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import msgspec
import pytest
from support.nixl import needs_nixl
from support.store_fakes import KEYS, SPEC, World
from support.transports import transport_config
from support.ucx import needs_ucx

from kvcore.trust.opening import ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from kvstore.integrity.checks import Integrity
from kvstore.limits import StoreLimits
from kvstore.types import GetOutcome
from transfer.base import TransferEngine
from transfer.inproc import InprocTransfer
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.select import build_transfer, start_segment_hosts
from transfer.tcp.sockets import join_address, split_address

CALL_S = 20.0
_SO_RCVBUFFORCE = 33  # <asm-generic/socket.h>; beyond the system's bound
CHUNK_BYTES = 96 << 10
SPEC_OF_CANARY = msgspec.structs.replace(SPEC, chunk_bytes=CHUNK_BYTES)
TRUST = ClusterTrust("here", Secrets((secrets.token_bytes(32),)))
WRITES = {"one_round": StoreLimits(), "slots": StoreLimits(hash_first_bytes=0, scratch_slot_bytes=1)}
"""How many bytes are written before the store takes its slots: these or none."""
KINDS = [
    "inproc",
    "shm",
    "tcp",
    pytest.param("ucx", marks=[*needs_ucx, pytest.mark.slow]),
    pytest.param("nixl", marks=[*needs_nixl, pytest.mark.slow]),
]


class Eavesdropper:
    """All that was sent, either way."""

    def __init__(self) -> None:
        self.heard = bytearray()

    async def relay(self, address: str) -> asyncio.Server:
        """A way to `address` that leads past him."""
        target = split_address(address)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            there, to_there = await asyncio.open_connection(*target)
            await asyncio.gather(self._pass(reader, to_there), self._pass(there, writer))

        return await asyncio.start_server(serve, "127.0.0.1", 0)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 18):
                self.heard += data
                writer.write(data)
                await writer.drain()
        writer.close()

    @contextmanager
    def on_loopback(self) -> Iterator[None]:
        """Every packet of this machine's own network: for transports whose addresses nobody else can change."""
        try:
            listening = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0003))
        except PermissionError:
            if os.environ.get("CI") == "true":
                raise
            pytest.skip("needs the right to see this machine's packets (CAP_NET_RAW)")
        with listening:
            listening.bind(("lo", 0))
            listening.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
            listening.settimeout(0.1)
            over = threading.Event()

            def listen() -> None:
                while not over.is_set():
                    with contextlib.suppress(TimeoutError):
                        self.heard += listening.recv(1 << 17)
                listening.setblocking(False)
                with contextlib.suppress(BlockingIOError):
                    for _ in range(10_000):  # what is queued: others send too, and go on
                        self.heard += listening.recv(1 << 17)

            thread = threading.Thread(target=listen)
            thread.start()
            try:
                yield
            finally:
                over.set()
                thread.join()


@asynccontextmanager
async def way_to(kind: str, memory: SegmentMemory, spy: Eavesdropper) -> AsyncIterator[tuple[TransferEngine, Segment]]:
    """An engine and what it is told of the segment; what passes over a network is heard."""
    segment = Segment(
        id=memory.segment_id, node_id="a", size_bytes=memory.size_bytes, host_id=host_identity(), addresses={kind: "x"}
    )
    if kind == "inproc":
        yield InprocTransfer({segment.id: memory.view}), segment
        return
    hosts = await start_segment_hosts(transport_config(kind), memory, host="127.0.0.1", trust=TRUST)
    engine = build_transfer(transport_config(kind), host_identity(), trust=TRUST)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(hosts.aclose)
        stack.push_async_callback(engine.aclose)
        addresses = dict(hosts.addresses)
        if kind == "tcp":
            server = await spy.relay(addresses["tcp"])
            stack.callback(server.close)
            addresses["tcp"] = join_address(*server.sockets[0].getsockname()[:2])
        elif kind != "shm":
            stack.enter_context(spy.on_loopback())
        yield engine, msgspec.structs.replace(segment, addresses=addresses)


@pytest.mark.parametrize("limits", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("encrypt", [False, True], ids=["in_the_clear", "encrypted"])
@pytest.mark.parametrize("kind", KINDS)
async def test_who_reads_the_segment_or_the_wire_finds_kv_only_where_it_is_not_encrypted(kind, encrypt, limits):
    canary = secrets.token_bytes(24)
    kv = (canary * (CHUNK_BYTES // len(canary) + 1))[:CHUNK_BYTES]
    spy, world = Eavesdropper(), World()
    world.limits = limits
    integrity = Integrity("mac", TRUST.secrets, encrypt=encrypt)
    with SegmentMemory.create("a.1", 1 << 20) as memory:
        async with way_to(kind, memory, spy) as (engine, segment):
            world.register(segment)
            writer, reader = (world.store("a", engine, spec=SPEC_OF_CANARY, integrity=integrity)[0] for _ in range(2))
            async with await writer.begin_put(KEYS[:1], prefer_segment=None, timeout_s=CALL_S) as session:
                assert await session.write(KEYS[0], SPEC.chunk_tokens, [memoryview(kv)], timeout_s=CALL_S)
                assert await session.commit(timeout_s=CALL_S) == KEYS[:1]
            match = await reader.match(KEYS[:1], timeout_s=CALL_S)
            came = [bytearray(1000), bytearray(CHUNK_BYTES - 1000)]
            result = await reader.get_into(match, 0, [[memoryview(one) for one in came]], timeout_s=CALL_S)
            assert result.outcomes == [GetOutcome.OK] and b"".join(came) == kv
            await world.aclose()
        place = world.replicas(KEYS[0])[0].ref
        there = bytes(memory.view[place.offset : place.offset + place.length])
    assert KEYS[0] in there, "the chunk, and not another place"
    assert (canary in there) is not encrypt
    if kind in ("tcp", "ucx", "nixl"):
        pieces = [there[at : at + 20] for at in range(4096, CHUNK_BYTES, 4096)]  # a packet may end in one
        heard = [spy.heard.count(piece) >= 2 for piece in pieces]
        assert sum(heard) > len(pieces) // 2, "what was put and got, as it lies there"
        assert (canary in spy.heard) is not encrypt
