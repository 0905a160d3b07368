"""The load generator: OpenAI completions over kept connections, lean enough that what is measured is what answers them.

A process of its own: `python -m benchmarks.router_load PORT --clients 32 --requests 4000 [--chars 1900] [--tokens 1]
[--stream] [--same]` prints one line of JSON. Each prompt begins with a number of its own, unless they are the `--same`.
"""

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Iterator

import httptools
import uvloop

NUMBER = b"00000000"
WORDS = "the quick brown fox jumps over the lazy dog and then it sleeps for a long while under the old tree "


def request_of(chars: int, tokens: int, *, stream: bool) -> bytes:
    """The bytes of one request, with `NUMBER` once in them."""
    prompt = (NUMBER.decode() + " " + WORDS * (chars // len(WORDS) + 1))[:chars]
    body = json.dumps({"model": "mock", "prompt": prompt, "max_tokens": tokens, "stream": stream}).encode()
    head = "POST /v1/completions HTTP/1.1\r\nhost: router\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


class _Client(asyncio.Protocol):
    """Sends a request when the last one has been answered, until there are no numbers any more."""

    def __init__(self, request: bytes, numbers: Iterator[int], taken: list[float], *, same: bool) -> None:
        self._head, _, self._tail = request.partition(NUMBER)
        self._numbers, self._taken, self._same = numbers, taken, same
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._body = bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one
        self._transport = transport
        self._parser = httptools.HttpResponseParser(self)
        self._send()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        self._taken.append(time.perf_counter() - self._began)
        if self._parser.get_status_code() != 200 or b'"finish_reason":' not in self._body or b'"error"' in self._body:
            self._fail(f"answered {self._parser.get_status_code()}: {bytes(self._body[:300])!r}")
            return
        self._send()

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection was closed")

    def _fail(self, why: str) -> None:
        if not self.done.done():
            self.done.set_exception(RuntimeError(why))

    def _send(self) -> None:
        number = next(self._numbers, None)
        if number is None:
            if not self.done.done():
                self.done.set_result(None)
            return
        self._body.clear()
        self._began = time.perf_counter()
        self._transport.write(self._head + (NUMBER if self._same else b"%08d" % number) + self._tail)


async def load(port: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Requests a second, and how long they took."""
    request = request_of(arguments.chars, arguments.tokens, stream=arguments.stream)
    first = time.time_ns() // 1000 % 100_000_000  # the prompts of an earlier load are others
    numbers, taken = iter(range(first, first + arguments.requests)), list[float]()
    loop, began = asyncio.get_running_loop(), time.perf_counter()

    def client() -> _Client:
        return _Client(request, numbers, taken, same=arguments.same)

    made = await asyncio.gather(*(loop.create_connection(client, "127.0.0.1", port) for _ in range(arguments.clients)))
    await asyncio.gather(*(one.done for _, one in made))
    seconds = time.perf_counter() - began
    p50, p99 = statistics.median(taken), statistics.quantiles(taken, n=100)[98]
    return {"rps": len(taken) / seconds, "p50_ms": p50 * 1e3, "p99_ms": p99 * 1e3, "num": len(taken)}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("port", type=int)
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--requests", type=int, default=100)
    parser.add_argument("--chars", type=int, default=1900)
    parser.add_argument("--tokens", type=int, default=1)
    parser.add_argument("--stream", action="store_true")
    parser.add_argument("--same", action="store_true")
    arguments = parser.parse_args()
    print("LOAD " + json.dumps(uvloop.run(load(arguments.port, arguments))))


if __name__ == "__main__":
    main()
