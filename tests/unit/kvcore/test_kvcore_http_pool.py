"""The lean HTTP client against servers that lie, stall, break off and answer well; on both event loops."""

import asyncio
import secrets as random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from support.certificates import self_signed
from support.router_fakes import until

from kvcore.clock import SystemClock
from kvcore.http.connection import HttpConnection
from kvcore.http.errors import BrokenCallError, ConnectTimeoutError
from kvcore.http.limits import CallLimits
from kvcore.http.pool import HttpPool
from kvcore.process.service import loop_factory
from kvcore.trust.http_proof import WANTED, RequestVerifier
from kvcore.trust.opening import ClusterTrust
from kvcore.trust.secrets import Secrets
from kvcore.trust.tls import pinned_context

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
Runs = Callable[[Coroutine[Any, Any, None]], None]
Answers = Callable[["Call"], Awaitable[None]]


class Call:
    """One request, as the server has it. `number`: of its connection's."""

    def __init__(self, head: bytes, writer: asyncio.StreamWriter, reader: asyncio.StreamReader, number: int) -> None:
        self.head, self.writer, self.reader, self.number = head.decode(), writer, reader, number

    @property
    def line(self) -> str:
        return self.head.splitlines()[0]

    @property
    def headers(self) -> dict[str, str]:
        return {name: value for name, _, value in (line.partition(": ") for line in self.head.split("\r\n")[1:])}

    def say(self, *parts: bytes) -> None:
        for part in parts:
            self.writer.write(part)

    async def hung_up(self) -> None:
        """Returns when the client has closed its side, or reset the connection."""
        with suppress(ConnectionResetError):
            assert await self.reader.read() == b""


class Server:
    """`calls`: what came. `connections`: how many were made. `open`: how many of them stand."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
        self.calls: list[Call] = []
        self.connections = self.open = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = 0
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next((int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")), 0)
                await reader.readexactly(length)
                call = Call(head, writer, reader, number)
                self.calls.append(call)
                await self._answers(call)
                number += 1
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@asynccontextmanager
async def serving(answers: Answers | bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    async def says(call: Call) -> None:
        assert isinstance(answers, bytes)
        call.say(answers)

    server = Server(says if isinstance(answers, bytes) else answers)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
    try:
        yield server
    finally:
        listener.close()


@asynccontextmanager
async def pool(**options: Any) -> AsyncIterator[HttpPool]:
    bounds = {"connect_timeout_s": 10.0, "max_connections": 8, "keepalive_s": 10.0}
    pool = HttpPool(**{"headers": {"Accept": "x/y"}, **bounds, **options})
    try:
        yield pool
    finally:
        pool.close()


async def get(pool: HttpPool, url: str, method: str = "GET", body: bytes = b"", timeout_s: float = 10.0) -> bytes:
    answer = await pool.call(method, url, body, timeout_s, num_bytes=1 << 20)
    try:
        return answer.take()
    finally:
        answer.end()


@pytest.fixture(params=[asyncio.new_event_loop, loop_factory()], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Runs]:
    with asyncio.Runner(loop_factory=request.param) as runner:
        yield runner.run


BODIES = {
    "length": OK,
    "chunks": CHUNKED + b"1\r\no\r\n1\r\nk\r\n0\r\n\r\n",
    "trailers": CHUNKED + b"2\r\nok\r\n0\r\nX: y\r\n\r\n",
    "to the end": b"HTTP/1.1 200 OK\r\n\r\nok",
    "old": b"HTTP/1.0 200 OK\r\n\r\nok",
    "after 100": b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nX: y\r\n\r\n" + OK,
}


@pytest.mark.parametrize("name", BODIES)
def test_a_body_is_read_however_it_is_framed_and_cut(run: Runs, name: str) -> None:
    ends = name in ("to the end", "old")

    async def answers(call: Call) -> None:
        for place in range(len(BODIES[name])):
            call.say(BODIES[name][place : place + 1])
            await asyncio.sleep(0)
        if ends:
            call.writer.close()

    async def go() -> None:
        async with serving(answers) as server, pool() as calls:
            assert [await get(calls, server.url) for _ in range(2)] == [b"ok", b"ok"]
            assert server.connections == (2 if ends else 1)

    run(go())


def test_a_request_is_what_was_asked_for(run: Runs) -> None:
    async def go() -> None:
        async with serving(OK) as server, pool() as calls:
            await get(calls, server.url)
            await get(calls, f"{server.url}/a b/é?c=%20d", "POST", b"body")
            await get(calls, f"{server.url}/x", "POST")
            lines = [call.line for call in server.calls]
            assert lines == ["GET / HTTP/1.1", "POST /a%20b/%C3%A9?c=%20d HTTP/1.1", "POST /x HTTP/1.1"]
            first, second, third = (call.headers for call in server.calls)
            assert first["Host"] == server.url[7:] and first["Accept"] == "x/y" and "Content-Length" not in first
            assert (second["Content-Length"], third["Content-Length"]) == ("4", "0")
            with pytest.raises(ValueError, match="one line"):
                await calls.call("GET", server.url, b"", 1.0, headers={"X": "a\r\nEvil: b"})
            assert server.connections == 1

    run(go())


BROKEN = {
    "garbage": b"SSH-2.0-OpenSSH\r\n",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 500,
    "endless line": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 3000,
    "endless 1xx": b"HTTP/1.1 100 Continue\r\n\r\n" * 200,
    "upgrade": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: x\r\n\r\n",
    "bad chunk": CHUNKED + b"zz\r\n",
    "redirect": b"HTTP/1.1 307 Away\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_answer_breaks_the_call_and_takes_the_connection(run: Runs, name: str) -> None:
    async def go() -> None:
        async with serving(BROKEN[name]) as server, pool(limits=CallLimits(max_head_bytes=1000)) as calls:
            with pytest.raises(BrokenCallError):
                await get(calls, server.url)
            if name != "redirect":  # which is a whole answer
                await until(lambda: server.open == 0)
            assert "0 calls" in repr(calls)

    run(go())


@pytest.mark.parametrize("cut", [b"", OK[:20], OK[:-1], CHUNKED + b"5\r\nab"])
def test_an_answer_that_breaks_off_is_none(run: Runs, cut: bytes) -> None:
    async def answers(call: Call) -> None:
        call.say(cut)
        call.writer.close()

    async def go() -> None:
        async with serving(answers) as server, pool() as calls:
            with pytest.raises(BrokenCallError, match="closed the connection"):
                await get(calls, server.url)

    run(go())


def test_a_connection_that_was_closed_meanwhile_is_another_one_for_a_get_alone(run: Runs) -> None:
    async def answers(call: Call) -> None:
        if call.number:
            call.writer.close()
        else:
            call.say(OK)

    async def go() -> None:
        async with serving(answers) as server, pool() as calls:
            assert [await get(calls, server.url) for _ in range(2)] == [b"ok"] * 2
            assert (server.connections, len(server.calls)) == (2, 3)
            with pytest.raises(BrokenCallError):
                await get(calls, server.url, "POST", b"twice would be wrong")
            assert server.connections == 2

    run(go())


def test_more_than_one_answer_to_a_question_ends_the_connection(run: Runs) -> None:
    async def go() -> None:
        async with serving(OK + OK) as server, pool() as calls:
            assert [await get(calls, server.url) for _ in range(2)] == [b"ok"] * 2
            assert server.connections == 2

    run(go())


def test_a_late_answer_is_a_timeout_and_the_server_hears_of_it(run: Runs) -> None:
    hung_up: list[str] = []

    async def answers(call: Call) -> None:
        call.say(CHUNKED + b"2\r\nab\r\n")
        await call.hung_up()
        hung_up.append(call.line)

    async def go() -> None:
        async with serving(answers) as server, pool() as calls:
            with pytest.raises(TimeoutError):
                await get(calls, server.url, timeout_s=0.05)
            answer = await calls.call("GET", server.url, b"", 10.0)
            assert answer.take() == b"ab"
            with pytest.raises(TimeoutError):
                await answer.wait(1, 0.05)
            answer.end()
            await until(lambda: len(hung_up) == 2)

    run(go())


def test_a_cancelled_call_drops_its_connection_at_once(run: Runs) -> None:
    hung_up: list[str] = []

    async def answers(call: Call) -> None:
        await call.hung_up()
        hung_up.append(call.line)

    async def go() -> None:
        async with serving(answers) as server, pool() as calls:
            asking = asyncio.ensure_future(get(calls, server.url))
            await until(lambda: bool(server.calls))
            asking.cancel()
            await until(lambda: bool(hung_up))
            assert asking.cancelled() and "0 calls" in repr(calls)

    run(go())


def test_an_end_that_is_still_to_come_keeps_the_connection_and_more_than_that_does_not(run: Runs) -> None:
    going = asyncio.Event()

    async def answers(call: Call) -> None:
        call.say(CHUNKED + b"2\r\nok\r\n")
        await going.wait()
        call.say(b"ff\r\n" + bytes(255) + b"\r\n" if "long" in call.line else b"", b"0\r\n\r\n")

    async def go() -> None:
        async with serving(answers) as server, pool(limits=CallLimits(max_rest_bytes=100)) as calls:
            for path in ("/", "/", "/long", "/"):
                going.clear()
                answer = await calls.call("GET", server.url + path, b"", 10.0)
                assert answer.take() == b"ok"
                answer.end(rests=True)
                answer.end()
                assert "1 calls" in repr(calls)
                going.set()
                await until(lambda: "0 calls" in repr(calls))
            assert server.connections == 2

    run(go())


def test_a_rest_that_does_not_come_and_an_old_connection_are_dropped(run: Runs) -> None:
    async def answers(call: Call) -> None:
        call.say(CHUNKED + b"2\r\nok\r\n" if "stays" in call.line else OK)

    async def go() -> None:
        limits = CallLimits(rest_s=0.05)
        async with serving(answers) as server, pool(keepalive_s=0.05, limits=limits) as calls:
            answer = await calls.call("GET", f"{server.url}/stays", b"", 10.0)
            answer.end(rests=True)
            await until(lambda: server.open == 0)
            await get(calls, server.url)
            await until(lambda: server.connections == 2 and server.open == 0)
            assert repr(calls).endswith("0 calls, at most 8, 0 idle connections>")

    run(go())


def test_calls_beyond_the_bound_wait_for_those_before_and_leave_in_order(run: Runs) -> None:
    going = asyncio.Event()

    async def answers(call: Call) -> None:
        await going.wait()
        call.say(OK)

    async def go() -> None:
        async with serving(answers) as server, pool(max_connections=2) as calls:
            first = [asyncio.ensure_future(get(calls, server.url)) for _ in range(2)]
            await until(lambda: len(server.calls) == 2)
            with pytest.raises(TimeoutError):
                await get(calls, server.url, timeout_s=0.02)
            gone, *later = [asyncio.ensure_future(get(calls, server.url)) for _ in range(5)]
            await asyncio.sleep(0)
            gone.cancel()
            going.set()
            assert await asyncio.gather(*first, *later) == [b"ok"] * 6
            assert server.connections == 2 and gone.cancelled()

    run(go())


def test_a_server_that_calls_wait_for_is_not_forgotten(run: Runs) -> None:
    going, seen = asyncio.Event(), list[Call]()

    async def answers(call: Call) -> None:
        seen.append(call)
        if len(seen) == 1:
            await going.wait()
            call.say(OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        else:
            call.say(OK)

    async def go() -> None:
        async with serving(answers) as server, pool(max_connections=1) as calls:
            first = asyncio.ensure_future(get(calls, server.url))
            await until(lambda: len(server.calls) == 1)
            second = asyncio.ensure_future(get(calls, server.url))
            await asyncio.sleep(0)
            going.set()
            assert await asyncio.gather(first, second) == [b"ok", b"ok"]
            assert await get(calls, server.url) == b"ok"
            assert server.connections == 2, "the second connection was found again"
            assert repr(calls).endswith("1 idle connections>")

    run(go())


def test_what_a_call_waits_for_a_connection_is_part_of_its_time(run: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    wait = HttpConnection.wait

    async def noted(self: HttpConnection, num_bytes: int, until: float) -> None:
        left.append(until - asyncio.get_running_loop().time())
        await wait(self, num_bytes, until)

    async def go() -> None:
        monkeypatch.setattr(HttpConnection, "wait", noted)
        async with serving(OK) as server, pool(max_connections=1) as calls:
            first = await calls.call("GET", server.url, b"", 10.0)
            second = asyncio.ensure_future(get(calls, server.url))
            asyncio.get_running_loop().call_later(0.1, first.end)
            assert await second == b"ok"
            assert left[1] < 9.95

    run(go())


def test_a_reader_that_takes_nothing_is_not_read_for(run: Runs) -> None:
    sent = 0

    async def answers(call: Call) -> None:
        nonlocal sent
        call.say(CHUNKED)
        for _ in range(400):
            call.say(b"10000\r\n" + bytes(1 << 16) + b"\r\n")
            await call.writer.drain()
            sent += 1 << 16
        call.say(b"0\r\n\r\n")

    async def go() -> None:
        async with serving(answers) as server, pool(limits=CallLimits(max_unread_bytes=1 << 17)) as calls:
            answer = await calls.call("GET", server.url, b"", 10.0)
            await until(lambda: answer.num_unread >= 1 << 17)
            held, taken = answer.num_unread, 0
            for _ in range(100):
                await asyncio.sleep(0)
            assert answer.num_unread == held < 1 << 20 and sent < 400 << 16
            while part := answer.take():
                taken += len(part)
                await answer.wait(1, 10.0)
            assert taken == 400 << 16 and answer.is_whole
            answer.end()
            assert "1 idle" in repr(calls)

    run(go())


def test_nobody_there_and_no_address(run: Runs) -> None:
    async def go() -> None:
        async with pool() as calls:
            nowhere = [
                "http://127.0.0.1:1",
                "http://169.254.169.254",
                "http://[fe80::1%25lo]:80",
                "ftp://x",
                "http://:1",
            ]
            for url in nowhere:
                with pytest.raises(OSError) as caught:
                    await get(calls, url)
                assert not isinstance(caught.value, TimeoutError | ConnectTimeoutError)
            assert repr(calls).endswith("0 calls, at most 8, 0 idle connections>")

    run(go())


def test_https_is_spoken_with_whom_the_context_knows(run: Runs, tmp_path: Any) -> None:
    cert, key = self_signed(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)

    async def go() -> None:
        async with serving(OK, context) as server, pool(tls=pinned_context(str(cert))) as calls, pool() as others:
            assert await get(calls, server.url) == b"ok"
            with pytest.raises(ssl.SSLCertVerificationError):
                await get(others, server.url)

    run(go())


def test_calls_are_proved_answers_checked_and_an_older_secret_is_learnt(run: Runs) -> None:
    old, new = random.token_bytes(32), random.token_bytes(32)
    theirs = RequestVerifier(ClusterTrust("c", Secrets((old,))), SystemClock(), None)
    strangers = RequestVerifier(ClusterTrust("c", Secrets((new,))), SystemClock(), None)

    async def answers(call: Call) -> None:
        method, target, _ = call.line.split()
        if f'keyid="{Secrets((old,)).newest.name}"' not in call.headers["Signature-Input"]:
            call.say(f"HTTP/1.1 401 No\r\nContent-Length: 0\r\n{WANTED}: {theirs.wanted}\r\n\r\n".encode())
            return
        proof = theirs.check(method, target, call.headers)
        lines = "".join(f"{name}: {value}\r\n" for name, value in theirs.reply_headers(proof, 200, b"ok"))
        said = OK if "liar" in target else OK.replace(b"\r\n", b"\r\n" + lines.encode(), 1)
        call.say(said)

    async def go() -> None:
        trust = ClusterTrust("c", Secrets((new, old)))
        async with serving(answers) as server, pool(trust=trust) as calls:
            for _ in range(3):
                assert await get(calls, f"{server.url}/x?y=z", "POST", b"body") == b"ok"
            assert len(server.calls) == 4 and server.connections == 1
            with pytest.raises(BrokenCallError, match="does not know this cluster's secret"):
                await get(calls, f"{server.url}/liar", "POST", b"body")
        assert strangers.wanted != theirs.wanted

    run(go())
