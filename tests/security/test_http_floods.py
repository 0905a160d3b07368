"""Clients that flood an HTTP listener, or never end what they begin: each is bounded, and others are served meanwhile.

The same attacks on both of our servers: uvicorn's (router, metadata server) and aiohttp's (nodes).
"""

import asyncio
import gzip
import json
import logging
from contextlib import AsyncExitStack, suppress

import pytest
from support.hostile_http import PART, Serving, aiohttp_listener, uvicorn_listener

from kvcore.process.limits import HttpLimits

pytestmark = pytest.mark.parametrize("serving", [uvicorn_listener, aiohttp_listener])
GET = b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
POST = b"POST /echo HTTP/1.1\r\nHost: x\r\n"
ELSEWHERE = "127.0.0.2"


async def test_a_flood_of_silent_connections_leaves_operators_a_way_in(serving: Serving):
    limits = HttpLimits(max_connections=8, max_per_client=8, max_spare=4)
    async with serving(limits) as listener, AsyncExitStack() as held:
        for _ in range(60):
            _, writer = await listener.connect()
            held.callback(writer.close)
        await listener.until(lambda: listener.gate.refused["connections"] >= 52)
        assert listener.gate.num_connections == 8, "the flood holds no more"
        assert b" 200 " in await listener.talk(GET % b"/health"), "operators see what is the matter"
        refused = await listener.talk(GET % b"/")
        assert b" 503 " in refused and b"retry-after: 1" in refused.lower() and b"8 connections" in refused


async def test_spare_connections_that_say_nothing_are_closed_soon(serving: Serving):
    limits = HttpLimits(max_connections=1, max_per_client=1, spare_head_s=0.05)
    async with serving(limits) as listener, AsyncExitStack() as held:
        _, writer = await listener.connect()
        held.callback(writer.close)
        await listener.until(lambda: listener.gate.num_connections == 1)
        assert await listener.talk() == b""


async def test_one_client_cannot_take_all_connections(serving: Serving):
    limits = HttpLimits(max_connections=16, max_per_client=4)
    async with serving(limits) as listener, AsyncExitStack() as held:
        for _ in range(20):
            _, writer = await listener.connect()
            held.callback(writer.close)
        await listener.until(lambda: listener.gate.refused["client_connections"] == 16)
        assert b" 503 " in await listener.talk(GET % b"/")
        assert b" 200 " in await listener.talk(GET % b"/", source=ELSEWHERE)
    assert listener.gate.num_connections == 0


async def test_bodies_that_never_end_hold_a_bounded_number_of_bytes(serving: Serving):
    limits = HttpLimits(max_held_bytes=1 << 20, client_share=0.5)
    async with serving(limits) as listener, AsyncExitStack() as held:
        for _ in range(60):
            _, writer = await listener.connect()
            held.callback(writer.close)
            writer.write(POST + b"Content-Length: 70000\r\n\r\n" + PART)
        await listener.until(lambda: listener.gate.refused["bodies"] > 40)
        assert 0 < listener.gate.held_bytes <= (1 << 20) // 2 + len(PART), "60 of them are 3.7 MiB"
        small = POST + b"Connection: close\r\nContent-Length: 3\r\n\r\nabc"
        assert b" 200 " in await listener.talk(small), "a body that comes whole holds nothing"
        parts = (POST + b"Connection: close\r\nContent-Length: 6\r\n\r\nabc", b"def")
        assert b" 200 " in await listener.talk(*parts, source=ELSEWHERE)
    await listener.until(lambda: listener.gate.held_bytes == 0)


async def test_a_head_a_byte_at_a_time_is_cut_at_its_deadline(serving: Serving):
    async with serving(HttpLimits(head_s=0.2)) as listener:
        reader, writer = await listener.connect()
        answer = asyncio.create_task(reader.read())
        drip = asyncio.create_task(_drip(writer, b"GET / HTTP/1.1\r\nX-Long: " + b"a" * 10_000))
        async with asyncio.timeout(60):
            with suppress(ConnectionError):  # what the client goes on to send may reset the connection first
                assert b" 408 " in await answer
        drip.cancel()
        writer.close()
    assert listener.gate.refused["head_late"] == 1


@pytest.mark.parametrize("header", [b"X-Long: " + b"a" * 6000, b"\r\n".join(b"x-%d: y" % i for i in range(800))])
async def test_a_head_over_the_bound_is_refused_in_one_piece_and_without_end(serving: Serving, header: bytes):
    async with serving(HttpLimits(max_head_bytes=4096)) as listener:
        whole = await listener.talk(b"GET / HTTP/1.1\r\nHost: x\r\n" + header + b"\r\n\r\n")
        assert b" 431 " in whole or b" 400 " in whole, "aiohttp has a bound of its own on the number of headers"
        endless = await listener.talk(b"GET / HTTP/1.1\r\nHost: x\r\n", header[:4000], header[4000:], b"a" * 200)
        assert b" 431 " in endless or b" 400 " in endless


async def test_a_client_that_does_not_read_is_cut_and_its_work_ends(serving: Serving):
    async with serving(HttpLimits(send_s=0.1)) as listener:
        _, writer = await listener.connect()
        writer.transport.pause_reading()
        writer.write(GET % b"/endless")
        async with asyncio.timeout(60):
            await listener.ended.wait()
        assert listener.sent_parts * len(PART) < 64 << 20, "what the kernel takes of loopback, and no more"
        await listener.until(lambda: listener.gate.num_connections == 0)
        writer.transport.abort()
    assert listener.gate.refused["send_late"] == 1


@pytest.mark.parametrize(
    "head",
    [
        b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n",
        b"Content-Encoding: br, gzip\r\nContent-Length: %d\r\n\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n\r\n%x\r\n",
    ],
)
async def test_a_packed_body_is_refused_by_name(serving: Serving, head: bytes):
    bomb = gzip.compress(bytes(256 << 10))
    async with serving(HttpLimits()) as listener:
        reader, writer = await listener.connect()
        end = b"\r\n0\r\n\r\n" if b"chunked" in head else b""
        writer.write(POST + head % len(bomb) + bomb + end)
        async with asyncio.timeout(60):
            status = (await reader.readline()).split()[1]
        writer.close()
        assert status == b"415"


async def test_many_broken_requests_are_a_few_lines_of_the_log(serving: Serving, caplog: pytest.LogCaptureFixture):
    async with serving(HttpLimits(max_head_bytes=1000)) as listener:
        with caplog.at_level(logging.INFO):
            for _ in range(40):
                assert b" 431 " in await listener.talk(b"GET / HTTP/1.1\r\nX: ", b"a" * 2000)
    assert listener.gate.refused["head_too_large"] == 40
    assert sum("refused" in line for line in caplog.messages) == 1


async def test_what_is_refused_early_is_json_that_names_it(serving: Serving):
    async with serving(HttpLimits(max_head_bytes=1000)) as listener:
        answer = await listener.talk(b"GET / HTTP/1.1\r\nX: ", b"a" * 2000)
        error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
        assert error["code"] == "malformed_http" and "1000 bytes" in error["message"]


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes((byte,)))
        await asyncio.sleep(0.02)  # a byte each 20 ms is what the attack is
