"""The small HTTP client against a server that says exactly what each test tells it to, byte by byte."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from kvcore.http_client import HttpClient, HttpError

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


class Server:
    """Answers each request with the next of `answers` (the last one again and again); None closes the connection."""

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.requests: list[bytes] = []
        self.connections = 0
        self.url = ""
        self.gone = asyncio.Event()
        self.writer: asyncio.StreamWriter | None = None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writer = writer
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                size = next((int(line[15:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0)
                self.requests.append(head + await reader.readexactly(size))
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    return
                writer.write(answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def serving(*answers: bytes | None, max_connections: int = 8, idle_s: float = 60.0):
    server = Server(*answers)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    client = HttpClient(max_connections=max_connections, connect_timeout_s=5.0, idle_s=idle_s)
    try:
        async with asyncio.timeout(10):
            yield server, client
    finally:
        await client.aclose()
        listener.close()
        if server.writer is not None:
            server.writer.close()


async def ask(client: HttpClient, url: str, body: bytes = b"") -> tuple[int, bytes]:
    async with client.request("POST", url, "/v1/x", body) as response:
        return response.status, await response.read(1 << 20)


async def test_nobody_listening_is_an_os_error():
    async with serving(OK) as (_, client):
        with pytest.raises(OSError):
            await ask(client, "http://127.0.0.1:1")


@pytest.mark.parametrize("url", ["https://127.0.0.1:1", "127.0.0.1:1", "http://h:x", "http://h/path", ""])
async def test_an_origin_that_is_none_is_refused_without_a_connection(url):
    async with serving(OK) as (_, client):
        with pytest.raises(HttpError):
            await ask(client, url)


async def test_a_path_cannot_smuggle_a_header():
    async with serving(OK) as (server, client):
        with pytest.raises(ValueError):
            async with client.request("GET", server.url, "/a\r\nX: y"):
                pass
        assert server.connections == 0


@pytest.mark.parametrize(
    "answer",
    [
        None,
        b"SSH-2.0-OpenSSH\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    ],
)
async def test_what_is_no_answer_is_an_error_and_the_connection_is_gone(answer):
    async with serving(answer, OK) as (server, client):
        with pytest.raises(HttpError):
            await ask(client, server.url)
        server.answers = [OK]
        assert await ask(client, server.url) == (200, b"hi")
        assert server.connections == 2


@pytest.mark.parametrize(
    "cut",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi",
    ],
)
async def test_an_answer_broken_off_gives_what_came_and_then_an_error(cut):
    async with serving(cut) as (server, client), client.request("POST", server.url, "/") as response:
        assert await response.read_some() in (b"hi", b"h")
        assert server.writer is not None
        server.writer.close()
        with pytest.raises(HttpError):
            while await response.read_some():
                pass


async def test_chunks_come_as_they_are_sent_and_the_connection_is_used_again():
    start = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n"
    async with serving(start, OK) as (server, client):
        async with client.request("POST", server.url, "/") as response:
            assert await response.read_some() == b"hi"
            assert server.writer is not None
            server.writer.write(b"3\r\nyou\r\n0\r\n\r\n")
            assert await response.read(100) == b"you"
        assert await ask(client, server.url, b"body") == (200, b"hi")
        assert server.connections == 1
        assert server.requests[1].endswith(b"Content-Length: 4\r\n\r\nbody")


async def test_an_error_status_is_an_answer_like_any_other():
    async with serving(b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nlate") as (server, client):
        assert await ask(client, server.url) == (503, b"late")
        assert await ask(client, server.url) == (503, b"late")
        assert server.connections == 1


async def test_a_server_that_says_close_gets_a_new_connection():
    async with serving(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi") as (server, client):
        assert [await ask(client, server.url) for _ in range(2)] == [(200, b"hi")] * 2
        assert server.connections == 2


async def test_leaving_before_the_end_cuts_the_connection():
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhi") as (server, client):
        async with client.request("POST", server.url, "/") as response:
            assert response.status == 200
        await server.gone.wait()


async def test_cancelling_the_wait_for_an_answer_cuts_the_connection():
    async with serving(b"") as (server, client):
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ask(client, server.url)
        await server.gone.wait()


async def test_an_answer_that_nobody_asked_for_ends_an_idle_connection():
    async with serving(OK + OK, OK) as (server, client):
        assert (await ask(client, server.url))[0] == 200
        await server.gone.wait()
        assert await ask(client, server.url) == (200, b"hi")


async def test_a_connection_that_the_server_closed_meanwhile_is_not_used_again():
    async with serving(OK) as (server, client):
        await ask(client, server.url)
        assert server.writer is not None
        server.writer.close()
        await server.gone.wait()
        await asyncio.sleep(0.01)  # the end of the stream is on its way to the client
        assert await ask(client, server.url) == (200, b"hi")
        assert server.connections == 2


async def test_a_connection_idle_for_too_long_is_not_used_again():
    async with serving(OK, idle_s=0.0) as (server, client):
        await ask(client, server.url)
        await asyncio.sleep(0.001)
        await ask(client, server.url)
        assert server.connections == 2


async def test_a_longer_answer_than_wanted_is_an_error():
    async with serving(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 100) as (server, client):
        with pytest.raises(HttpError, match="more than 10"):
            async with client.request("POST", server.url, "/") as response:
                await response.read(10)


async def test_an_answer_that_is_not_read_is_not_held_in_memory():
    size = 32 << 20
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size
    async with serving(head + bytes(size)) as (server, client), client.request("POST", server.url, "/") as response:
        assert server.writer is not None
        await asyncio.sleep(0.05)
        assert server.writer.transport.get_write_buffer_size() > size // 4
        assert len(await response.read(size)) == size


async def test_requests_beyond_the_bound_wait_for_a_connection():
    async with serving(b"", max_connections=1) as (server, client):
        first = asyncio.create_task(ask(client, server.url))
        second = asyncio.create_task(ask(client, server.url))
        await asyncio.sleep(0.02)
        assert len(server.requests) == 1
        assert server.writer is not None
        server.writer.write(OK)
        assert await first == (200, b"hi")
        second.cancel()
        await asyncio.wait([second])


async def test_closing_fails_what_is_under_way_and_what_comes_after():
    async with serving(b"") as (server, client):
        request = asyncio.create_task(ask(client, server.url))
        await asyncio.sleep(0.02)
        await client.aclose()
        with pytest.raises(HttpError):
            await request
        with pytest.raises(HttpError):
            await ask(client, server.url)
        await server.gone.wait()
