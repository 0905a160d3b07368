"""A node's segment and strangers: they read and write all of it if there is no secret, and nothing if there is."""

import base64
import os
import secrets as random
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import replace

import msgspec
import pytest
from support.transfer_rigs import NIXL, UCX
from support.transports import transport_config

from kvcore.errors import TransferError, TransferProofError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.types import Segment
from transfer.base import TransferEngine, TransferOp
from transfer.greeting import InitiatorGreeting, greeting_keys
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory, host_identity
from transfer.nixl import descriptor as nixl_descriptor
from transfer.sealed_address import PREFIX, open_address
from transfer.select import build_transfer, start_segment_hosts
from transfer.tcp import wire
from transfer.tcp.limits import TcpLimits
from transfer.tcp.sockets import split_address
from transfer.ucx import descriptor as ucx_descriptor

SIZE, TIMEOUT_S = 4 << 20, 10.0
ID = "guarded.1"
OLD, NEW = random.token_bytes(32), random.token_bytes(32)
KINDS = ["tcp", UCX, NIXL]
Results = list[TransferError | None]
kinds = pytest.mark.parametrize("kind", KINDS)


def trust(*secrets: bytes) -> ClusterTrust:
    return ClusterTrust("here", Secrets(secrets))


@asynccontextmanager
async def served(
    kind: str, holder: ClusterTrust, segment_id: str = ID, **tcp: float
) -> AsyncIterator[tuple[Segment, SegmentMemory]]:
    with SegmentMemory.create(segment_id, SIZE) as memory:
        memory.view[:] = b"\x5a" * SIZE
        config, limits = transport_config(kind), TransferLimits(tcp=TcpLimits(**tcp))  # type: ignore[arg-type]
        hosts = await start_segment_hosts(config, memory, host="127.0.0.1", limits=limits, trust=holder)
        try:
            here, addresses = host_identity(), hosts.addresses
            yield Segment(id=segment_id, node_id="guarded", size_bytes=SIZE, host_id=here, addresses=addresses), memory
        finally:
            await hosts.aclose()


@asynccontextmanager
async def engine(kind: str, holder: ClusterTrust) -> AsyncIterator[TransferEngine]:
    made = build_transfer(transport_config(kind), host_identity(), trust=holder)
    try:
        yield made
    finally:
        await made.aclose()


async def both_ways(
    kind: str, holder: ClusterTrust, segment: Segment, num_bytes: int = SIZE, timeout_s: float = TIMEOUT_S
) -> Results:
    """What became of a read of all of the segment, and of a write of all of it."""
    got, forged = bytearray(num_bytes), bytes(num_bytes)
    async with engine(kind, holder) as made:
        read = await made.read([TransferOp(segment, 0, [memoryview(got)])], timeout_s)
        assert (read == [None]) == (got == b"\x5a" * num_bytes)
        assert read == [None] or not any(got)
        return [*read, *(await made.write([TransferOp(segment, 0, [memoryview(forged)])], timeout_s))]


@kinds
async def test_strangers_read_and_write_a_segment_that_is_open(kind):
    async with served(kind, OPEN) as (segment, memory):
        assert await both_ways(kind, OPEN, segment) == [None, None]
        assert not any(memory.view)


@kinds
@pytest.mark.parametrize(
    "stranger", [OPEN, trust(NEW), ClusterTrust("there", Secrets((OLD,)))], ids=["none", "other", "else"]
)
async def test_strangers_neither_read_nor_write_one_with_a_secret(kind, stranger):
    async with served(kind, trust(OLD)) as (segment, memory):
        errors = await both_ways(kind, stranger, segment)
        assert all(isinstance(error, TransferError) for error in errors)
        assert memory.view == b"\x5a" * SIZE


@kinds
@pytest.mark.parametrize(
    ("ours", "theirs"), [((OLD,), (OLD,)), ((NEW, OLD), (OLD,)), ((OLD,), (NEW, OLD))], ids=["same", "newer", "older"]
)
@pytest.mark.parametrize("num_bytes", [100, SIZE])
async def test_the_cluster_reads_and_writes_it_also_while_the_secret_is_changed(kind, ours, theirs, num_bytes):
    async with served(kind, trust(*theirs)) as (segment, memory):
        assert await both_ways(kind, trust(*ours), segment, num_bytes) == [None, None]
        assert not any(memory.view[:num_bytes])
        async with engine(kind, trust(*ours)) as made:  # again, over the connection that stands
            for _ in range(3):
                assert await made.write([TransferOp(segment, 0, [memoryview(b"ferry")])], TIMEOUT_S) == [None]
            got = bytearray(5)
            assert await made.read([TransferOp(segment, 0, [memoryview(got)])], TIMEOUT_S) == [None]
            assert got == b"ferry"


@kinds
async def test_nothing_is_given_to_a_segment_of_strangers(kind):
    async with served(kind, OPEN) as (segment, memory):
        errors = await both_ways(kind, trust(OLD), segment)
        assert all(isinstance(error, TransferError) for error in errors)
        assert memory.view == b"\x5a" * SIZE


async def test_a_stranger_is_told_why():
    async with served("tcp", trust(OLD)) as (segment, _):
        for stranger, says in ((OPEN, "gives no proof"), (trust(NEW), "this node")):
            (error, _) = await both_ways("tcp", stranger, segment)
            assert isinstance(error, TransferProofError)
            assert says in error.message


@pytest.mark.parametrize("kind", [UCX, NIXL])
async def test_what_is_told_of_a_segment_opens_it_to_nobody_without_the_secret(kind):
    async with served(kind, OPEN) as (open_segment, _):
        told = open_segment.addresses[kind]
    async with served(kind, trust(OLD)) as (segment, memory):
        sealed = segment.addresses[kind]
        assert sealed.startswith(PREFIX) and not told.startswith(PREFIX)
        magic = base64.b64decode(told)[:4]
        assert magic not in base64.b64decode(sealed.removeprefix(PREFIX))
        for stranger in (OPEN, trust(NEW)):
            for address in (sealed, sealed.removeprefix(PREFIX), PREFIX + told, told):
                guess = msgspec.structs.replace(segment, addresses={kind: address})
                assert None not in await both_ways(kind, stranger, guess)
        assert memory.view == b"\x5a" * SIZE


@pytest.mark.parametrize("kind", [UCX, NIXL])
async def test_an_address_that_somebody_opened_serves_only_who_proves_the_secret(kind):
    """It does not say where the segment lies. A stranger that claims to have been told so, and greets as in an open
    cluster, is not answered as one; what a segment of its own lies at is no help."""
    async with served(kind, OPEN, "its-own.1") as (strangers, _), served(kind, trust(OLD)) as (segment, memory):
        leaked = open_address(trust(OLD), kind, segment)
        own = strangers.addresses[kind]
        claims: list[str] = [leaked]
        if kind == "ucx":
            told, known = ucx_descriptor.parse_descriptor(leaked), ucx_descriptor.parse_descriptor(own)
            assert (told.base, told.rkey, told.withheld) == (0, b"", True)
            guess = replace(told, base=known.base, rkey=known.rkey, withheld=False)
            claims.append(ucx_descriptor.pack_descriptor(guess))
        else:
            place, known_place = nixl_descriptor.parse_descriptor(leaked), nixl_descriptor.parse_descriptor(own)
            assert (place.base, place.withheld) == (0, True)
            assert len(place.metadata) < len(known_place.metadata), "no remote key is in it"
            claims.append(nixl_descriptor.pack_descriptor(replace(place, base=known_place.base, withheld=False)))
        for claim in claims:
            stolen = msgspec.structs.replace(segment, addresses={kind: claim})
            assert None not in await both_ways(kind, OPEN, stolen, timeout_s=1.0)
        assert memory.view == b"\x5a" * SIZE


@pytest.mark.parametrize("kind", [UCX, NIXL])
async def test_one_segments_address_is_not_taken_for_anothers(kind):
    async with served(kind, trust(OLD)) as (segment, memory):
        other = msgspec.structs.replace(segment, id="guarded.2")
        for error in await both_ways(kind, trust(OLD), other):
            assert isinstance(error, TransferProofError) and "does not open" in error.message
        assert memory.view == b"\x5a" * SIZE


def connect(segment: Segment) -> socket.socket:
    return socket.create_connection(split_address(segment.addresses["tcp"]), timeout=5)


def frame(sock: socket.socket) -> tuple[wire.Header, bytes]:
    header = wire.parse_header(sock.recv(wire.HEADER_BYTES, socket.MSG_WAITALL))
    return header, sock.recv(header.payload_bytes, socket.MSG_WAITALL)


WRITE = wire.pack_request(wire.FrameKind.WRITE, [(0, 4)], 1) + b"evil"


async def test_requests_sent_ahead_of_the_proof_are_not_served():
    async with served("tcp", trust(OLD)) as (segment, memory):
        hello = InitiatorGreeting(greeting_keys(trust(OLD)), "tcp", ID).hello()
        for first in (b"", wire.pack_hello(ID), wire.pack_greeting(wire.FrameKind.PROVEN_HELLO, hello)):
            with connect(segment) as sock, suppress(OSError):
                sock.sendall(first + WRITE)
                sock.shutdown(socket.SHUT_WR)
                said = b""
                while part := sock.recv(1 << 16):
                    said += part
                assert bytes([wire.FrameKind.WRITTEN]) != said[6:7]
        assert memory.view == b"\x5a" * SIZE


async def test_a_proof_that_was_heard_opens_no_other_connection():
    async with served("tcp", trust(OLD)) as (segment, memory):
        greeting = InitiatorGreeting(greeting_keys(trust(OLD)), "tcp", ID)
        with connect(segment) as first, connect(segment) as second:
            for sock in (first, second):
                sock.sendall(wire.pack_greeting(wire.FrameKind.PROVEN_HELLO, greeting.hello()))
            challenge, _ = frame(first)[1], frame(second)
            proof = wire.pack_greeting(wire.FrameKind.PROOF, greeting.answer(challenge))
            second.sendall(proof + WRITE)
            header, _ = frame(second)
            assert (header.kind, header.count) == (wire.FrameKind.ERROR, wire.ErrorCode.PROOF)
            assert memory.view == b"\x5a" * SIZE
            first.sendall(proof + WRITE)
            assert frame(first)[0].kind is wire.FrameKind.WELCOME
            assert frame(first)[0].kind is wire.FrameKind.WRITTEN
            assert memory.view[:4] == b"evil"


async def test_a_host_proves_nothing_for_another_segment_that_a_stranger_could_pass_on():
    async with served("tcp", trust(OLD)) as (segment, _):
        with connect(segment) as sock:
            hello = InitiatorGreeting(greeting_keys(trust(OLD)), "tcp", "of-a-dead-node.1").hello()
            sock.sendall(wire.pack_greeting(wire.FrameKind.PROVEN_HELLO, hello))
            header, _ = frame(sock)
            assert (header.kind, header.count) == (wire.FrameKind.ERROR, wire.ErrorCode.SEGMENT_UNKNOWN)


async def test_a_stranger_that_says_nothing_holds_a_connection_no_longer_than_a_greeting_takes():
    async with served("tcp", trust(OLD), greeting_s=0.2) as (segment, _):
        hello = InitiatorGreeting(greeting_keys(trust(OLD)), "tcp", ID).hello()
        for first in (b"", wire.pack_greeting(wire.FrameKind.PROVEN_HELLO, hello)):
            with connect(segment) as sock:
                sock.sendall(first)
                while sock.recv(1 << 16):
                    pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_of_the_machine_cannot_map_a_segment():
    with SegmentMemory.create(ID, SIZE) as memory:
        pid, _, number = memory.shm_address.partition(":")
        opened = ["/bin/sh", "-c", f"exec 3<>/proc/{pid}/fd/{number}"]
        done = subprocess.run(opened, user=65_534, capture_output=True, text=True, check=False, timeout=10)
        assert done.returncode != 0 and "ermission denied" in done.stderr
        assert subprocess.run(opened, check=False, timeout=10).returncode == 0
