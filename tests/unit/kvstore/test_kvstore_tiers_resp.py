"""RESP2 as it arrives in pieces, what is no RESP2, and which URLs name a server."""

import asyncio
import os
import socket
import threading
from collections.abc import Iterator

import pytest

from kvcore.errors import ConfigError, TransferTimeoutError
from kvstore.tiers.places.redis_url import RedisPlaces, parse_redis_url, parse_server
from kvstore.tiers.resp import RespConnection, RespError, RespRefusal, command
from kvstore.tiers.resp_client import RespClient, _Resolved, _Use
from transfer.blocking import BatchDeadline


@pytest.fixture
def pair() -> Iterator[tuple[RespConnection, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield RespConnection(ours, BatchDeadline(10.0)), theirs


ANSWERS = b"+OK\r\n:-42\r\n$5\r\na\r\nbc\r\n$-1\r\n-OOM no room\r\n*3\r\n:1\r\n$1\r\nx\r\n*0\r\n$0\r\n\r\n"
VALUES = [b"OK", -42, b"a\r\nbc", None, RespRefusal("OOM no room"), [1, b"x", []], b""]


@pytest.mark.parametrize("step", [1, 3, 7, len(ANSWERS)])
def test_replies_are_the_same_in_whatever_pieces_they_come(pair, step):
    connection, server = pair

    def answer() -> None:
        for start in range(0, len(ANSWERS), step):
            server.sendall(ANSWERS[start : start + step])

    connection.send([command(b"PING")] * len(VALUES), replies=len(VALUES))
    thread = threading.Thread(target=answer)
    thread.start()
    assert [connection.reply() for _ in VALUES] == VALUES
    thread.join()
    assert list(connection.refusals.values()) == [RespRefusal("OOM no room")]
    assert connection.refusals["OOM no room"].code == "OOM"
    assert connection.owed == 0


def test_a_value_goes_into_the_callers_memory_and_what_follows_stays_in_place(pair):
    connection, server = pair
    value = bytes(range(256)) * 200
    server.sendall(b"$%d\r\n%b\r\n+after\r\n" % (len(value), value))
    room = memoryview(bytearray(len(value) - 700))
    assert connection.bulk() == len(value)
    connection.skip(300)
    connection.fill(room)
    connection.skip(400)
    connection.end_bulk()
    assert connection.reply() == b"after" and bytes(room) == value[300:-400]


def test_a_value_that_comes_in_many_pieces_is_received_by_few_calls():
    class Counting(socket.socket):
        calls = 0

        def recv_into(self, *args: object) -> int:
            self.calls += 1
            return super().recv_into(*args)

    ours, server = socket.socketpair()
    value = os.urandom(1 << 20)
    with Counting(fileno=ours.detach()) as counting, server:
        connection = RespConnection(counting, BatchDeadline(10.0))

        def answer() -> None:
            server.sendall(b"$%d\r\n" % len(value))
            for start in range(0, len(value), 10_000):
                server.sendall(value[start : start + 10_000])
            server.sendall(b"\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        room = memoryview(bytearray(connection.bulk()))
        connection.fill(room)
        connection.end_bulk()
        thread.join()
        assert bytes(room) == value and counting.calls <= 4, "its length, the value, what stands behind it"


def test_a_server_that_reads_nothing_is_an_error(pair):
    connection, _ = pair
    connection.deadline = BatchDeadline(0.1)
    with pytest.raises(TransferTimeoutError):
        connection.send([bytes(16 << 20)], replies=1)


@pytest.mark.parametrize(
    "junk",
    [b"HTTP/1.1 400\r\n", b":many\r\n", b"$x\r\n", b"$3\r\nabcdef", b"$9999999999\r\n", b"*1\r\n" * 20, b"+" * 20_000],
)
def test_what_is_no_resp_is_an_error(pair, junk):
    connection, server = pair
    server.sendall(junk)
    server.shutdown(socket.SHUT_WR)
    with pytest.raises(RespError):
        connection.reply()


def test_an_end_in_the_middle_and_a_silence_are_errors(pair):
    connection, server = pair
    server.sendall(b"$10\r\nabc")
    connection.deadline = BatchDeadline(0.01)
    with pytest.raises((TimeoutError, TransferTimeoutError)):
        connection.reply()
    connection.deadline = BatchDeadline(10.0)
    server.close()
    with pytest.raises(RespError, match="closed"):
        connection.reply()


def test_a_reader_is_stopped_from_another_thread(pair):
    connection, _ = pair
    threading.Timer(0.01, connection.stop).start()
    with pytest.raises((RespError, OSError)):
        connection.reply()


def test_one_that_owes_or_was_left_is_not_quiet(pair):
    connection, server = pair
    assert connection.quiet
    connection.send([command(b"PING")], replies=1)
    assert not connection.quiet
    server.sendall(b"+PONG\r\n")
    connection.reply()
    assert connection.quiet
    server.close()
    assert not connection.quiet


async def test_a_connection_that_broke_in_a_reply_is_never_used_again_and_a_good_one_is():
    connections, seen = 0, []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        answer = b"junk\r\n" if connections == 1 else b"$1\r\nx\r\n"
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"-LOADING wait\r\n" if connections == 2 else b"+PONG\r\n")
            elif line == b"GET\r\n":
                writer.write(answer)
        writer.close()

    def work(connection: RespConnection) -> None:
        connection.send([command(b"GET", b"key")], replies=1)
        seen.append(connection.reply())

    def careless(connection: RespConnection) -> None:
        connection.send([command(b"GET", b"key")] * 2, replies=2)
        connection.reply()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as listening:
        port = listening.sockets[0].getsockname()[1]
        client = RespClient(parse_server(f"redis://127.0.0.1:{port}", {}), 1)
        assert "junk" in (await client.run(work, 10.0) or "") and connections == 1
        assert "LOADING" in (await client.run(work, 10.0) or "") and connections == 2
        for _ in range(2):
            assert await client.run(work, 10.0) is None and connections == 3
        assert seen == [b"x"] * 2
        assert await client.run(careless, 10.0) is None and connections == 3
        assert await client.run(work, 10.0) is None and connections == 4, "a reply was still to come"
        await client.aclose()
        assert await client.run(work, 10.0)


async def test_what_was_given_up_connects_nowhere():
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        address = listening.getsockname()
        server = parse_server(f"redis://127.0.0.1:{address[1]}", {})
        client = RespClient(server, 1)
        use = _Use()
        use.stop()
        with pytest.raises(RespError):
            client._connect(use, _Resolved(server, [(socket.AF_INET, address)] * 2), BatchDeadline(10.0))
        with pytest.raises(BlockingIOError):
            listening.accept()
        await client.aclose()


def test_urls_that_name_a_server():
    server = parse_server("redis://cache.local:7000/3", {})
    assert (server.host, server.port, server.database, server.encrypted) == ("cache.local", 7000, 3, False)
    assert parse_server("valkey://h", {}).port == 6379 and parse_server("rediss://h", {}).encrypted
    named = parse_server("redis://me:p%40ss@[::1]:1/", {"REDIS_PASSWORD": "other"})
    assert (named.host, named.user, named.password) == ("::1", "me", "p@ss")
    assert "p@ss" not in repr(named) + named.shown and named.shown == "redis://[::1]:1/0"
    ours = {"REDIS_PASSWORD": "general", "KVFERRY_REDIS_PASSWORD": "own"}
    assert parse_server("redis://h", ours).password == "own"
    assert parse_server("redis://h", {"REDIS_PASSWORD": "general"}).password == "general"


def test_urls_that_name_sentinels_or_the_nodes_of_a_cluster():
    environment = {"REDIS_PASSWORD": "from there", "KVFERRY_SENTINEL_PASSWORD": "theirs", "REDIS_SERVICE_NAME": "usual"}
    named = parse_redis_url("redis-sentinel://:p%40ss@a,[::1]:7000/main/2", environment)
    assert isinstance(named, RedisPlaces) and (named.kind, named.service) == ("sentinel", "main")
    assert [(one.host, one.port, one.database, one.password) for one in named.servers] == [
        ("a", 26379, 2, "p@ss"),
        ("::1", 7000, 2, "p@ss"),
    ]
    assert named.sentinel_password == "theirs" and named.shown == "redis-sentinel://a:26379,[::1]:7000/main"
    assert "p@ss" not in repr(named) and "theirs" not in repr(named)
    named = parse_redis_url("redis-sentinel://user:pw@a", environment)
    assert isinstance(named, RedisPlaces) and named.service == "usual" and named.servers[0].user == "user"
    named = parse_redis_url("rediss-cluster://a,b:7001", environment)
    assert isinstance(named, RedisPlaces) and named.servers[1].encrypted and named.servers[1].password == "from there"
    assert named.kind == "cluster" and named.shown == "rediss-cluster://a:6379,b:7001"


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("redis-sentinel://h:26379", "names no service.*REDIS_SERVICE_NAME"),
        ("redis-sentinel://h:26379/main/x", "names no server; write redis-sentinel"),
        ("redis-sentinel://a,,b/main", "names no server; write redis-sentinel"),
        ("redis-cluster://a:1,b:2/3", "names no server; write redis-cluster"),
        ("redis-cluster://u:secret@a:1,b:x", "names no server; write redis-cluster"),
        ("redis+cluster://h", "names no server"),
        ("redis://a:1,b:2", "several servers"),
        ("http://user:secret@h", "names no server"),
        ("redis://", "names no server"),
        ("redis://cache..local", "names no server"),
        ("redis://h/name", "names no server"),
        ("redis://h:99999", "names no server"),
        ("redis://:se/cret@h", "names no server"),
        ("127.0.0.1:6379", "names no server"),
    ],
)
def test_urls_that_do_not(url, words):
    with pytest.raises(ConfigError, match=words) as caught:
        parse_redis_url(url, {})
    assert "secret" not in caught.value.message and "cret@" not in caught.value.message
