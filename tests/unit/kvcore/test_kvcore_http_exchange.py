"""What a request's answer is written by, and when its application hears that the client has left."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from starlette.types import Message, Receive, Scope, Send
from support.http_wire import Wire, connected

from kvcore.process.http_exchange import MAX_HELD_BYTES, told_when_gone

ASK = b"POST /a HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\nhi"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
Sends = Callable[[Send], Awaitable[None]]


def start(*headers: tuple[bytes, bytes]) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": list(headers)}


def part(body: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": body, "more_body": more}


async def written(sends: Sends) -> Wire:
    """What an application that sends this has written once it has ended."""
    ended = asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await sends(send)
        finally:
            ended.set()

    protocol, wire, _ = connected(app)
    protocol.data_received(ASK)
    await ended.wait()
    await asyncio.sleep(0)
    protocol.connection_lost(None)
    return wire


async def test_head_and_body_are_one_write() -> None:
    async def sends(send: Send) -> None:
        await send(start((b"content-length", b"2")))
        await send({"type": "http.response.body", "body": b"ok"})

    assert (await written(sends)).writes == [b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"]


async def test_what_a_stream_gets_in_one_turn_is_one_write_and_does_not_wait_for_the_next() -> None:
    async def sends(send: Send) -> None:
        await send(start())
        await send(part(b"a"))
        await asyncio.sleep(0)
        assert seen() == [CHUNKED + b"1\r\na\r\n"]
        await send(part(b"b"))
        await send(part(b"cd"))
        assert len(seen()) == 1
        await asyncio.sleep(0)
        await send(part(b"e"))
        await send(part(b"", more=False))

    wires: list[Wire] = []

    def seen() -> list[bytes]:
        return wires[0].writes

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await sends(send)
        ended.set()

    ended = asyncio.Event()
    protocol, wire, state = connected(app)
    wires.append(wire)
    protocol.data_received(ASK)
    async with asyncio.timeout(60):
        await ended.wait()
    assert seen()[1:] == [b"1\r\nb\r\n2\r\ncd\r\n", b"1\r\ne\r\n0\r\n\r\n"] and state.total_requests == 1


async def test_much_is_not_held_until_the_turn_ends() -> None:
    async def sends(send: Send) -> None:
        await send(start())
        for _ in range(4):
            await send(part(b"x" * (MAX_HELD_BYTES // 2)))

    assert [len(data) > MAX_HELD_BYTES for data in (await written(sends)).writes] == [True, True]


@pytest.mark.parametrize(
    "body", [[part(b"abc", more=False)], [part(b"a", more=False)], [part(b"ab", more=False), part(b"")], [start()]]
)
async def test_an_answer_that_is_not_as_long_as_it_said_is_an_error(body: list[Message]) -> None:
    failures: list[RuntimeError] = []

    async def sends(send: Send) -> None:
        await send(start((b"content-length", b"2")))
        try:
            for message in body:
                await send(message)
        except RuntimeError as error:
            failures.append(error)

    await written(sends)
    assert len(failures) == 1


async def test_a_header_cannot_end_the_head() -> None:
    async def sends(send: Send) -> None:
        await send(start((b"x-name", b"a\r\nx-other: b")))

    assert b"x-other" not in (await written(sends)).sent


async def left(app_told: asyncio.Event, scope: Scope, receive: Receive, ready: asyncio.Event) -> None:
    with told_when_gone(scope, receive, app_told.set):
        ready.set()
        await app_told.wait()


@pytest.mark.parametrize("asked", [ASK, ASK + ASK, ASK + ASK + ASK])
async def test_the_application_hears_that_the_client_has_left(asked: bytes) -> None:
    told, ready, ended = asyncio.Event(), asyncio.Event(), list[bool]()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await receive()
        await left(told, scope, receive, ready)
        await send(start())  # nobody hears it
        ended.append(True)

    protocol, wire, _ = connected(app)
    protocol.data_received(asked)
    async with asyncio.timeout(60):
        await ready.wait()
        protocol.connection_lost(None)
        await told.wait()
        while not ended:  # noqa: ASYNC110 - a turn or two
            await asyncio.sleep(0)
    assert wire.writes == []


async def test_it_hears_it_as_well_when_the_client_had_left_before() -> None:
    told, ready, go = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        ready.set()
        await go.wait()
        await left(told, scope, receive, asyncio.Event())

    protocol, _, _ = connected(app)
    protocol.data_received(ASK)
    async with asyncio.timeout(60):
        await ready.wait()
        protocol.connection_lost(None)
        go.set()
        await told.wait()


@pytest.mark.parametrize("failure", [None, OSError("broken")])
async def test_another_server_tells_it_by_a_message(failure: OSError | None) -> None:
    told = asyncio.Event()

    async def receive() -> Message:
        if failure is not None:
            raise failure
        return {"type": "http.disconnect"}

    async with asyncio.timeout(60):
        await left(told, {"type": "http"}, receive, asyncio.Event())


async def test_who_has_answered_is_told_nothing() -> None:
    told: list[bool] = []
    gone = asyncio.Event()

    async def receive() -> Message:
        await gone.wait()
        return {"type": "http.disconnect"}

    with told_when_gone({"type": "http"}, receive, lambda: told.append(True)):
        await asyncio.sleep(0)
    gone.set()
    for _ in range(3):
        await asyncio.sleep(0)
    assert told == []
