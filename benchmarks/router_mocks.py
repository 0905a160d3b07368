"""Mock workers that have computed everything before they are asked: our nodes' control API and OpenAI's, lean enough
that what is measured is the router before them.

One process for all of them, a port each. A token is written each `TICK_S`, to all streams of a worker at once, as an
engine's step does; an answer of one token comes at once. Run by `benchmarks.router` and `benchmarks.router_nodes`.
"""

import asyncio
import json
import sys
from collections.abc import Callable

import httptools
import msgspec
import uvloop

from kvcore.chunk_keys import usable_chunks
from kvcore.process.descriptors import raise_limit
from kvcore.types import KVSpec, NodeInfo, Role, Segment
from nodeapi.frames import pack_frame
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    LegInfo,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
    TokenLogprob,
)

CHUNK_TOKENS = 256
ROLES = (Role.PREFILLER, Role.PREFILLER, Role.DECODER, Role.DECODER)
TICK_S = 0.004
MODEL = "mock"
TOKEN = 65
_Write = Callable[[bytes], None]
_pack = msgspec.msgpack.Encoder().encode
_prefill = msgspec.msgpack.Decoder(PrefillRequest)
_generate = msgspec.msgpack.Decoder(GenerateRequest)


def report(node_id: str, role: Role) -> NodeReport:
    """What a mock node says of itself."""
    kv_spec = KVSpec(
        model_id=MODEL,
        weights_digest="",
        tokenizer_digest="",
        num_layers=1,
        num_kv_heads=1,
        head_dim=1,
        dtype="uint8",
        attention="",
        layout_id="mock",
        chunk_tokens=CHUNK_TOKENS,
        chunk_bytes=CHUNK_TOKENS,
    )
    return NodeReport(
        node=NodeInfo(id=node_id, role=role, control_url="", incarnation=1),
        engine=EngineInfo(
            kind="mock",
            kv_spec=kv_spec,
            max_context=1 << 20,
            vocab_size=1 << 20,
            eos_token_ids=[],
            block_size=16,
            num_blocks=1 << 20,
        ),
        stats=EngineStats(total_blocks=1 << 20),
        segments=[Segment(id=f"{node_id}.1", node_id=node_id, size_bytes=1 << 20, host_id="h", addresses={})],
    )


class Worker:
    """One worker, on its port. Streams that are under way get a token each tick."""

    def __init__(self, node_id: str, role: Role) -> None:
        self.report = _pack(report(node_id, role))
        self._streams: dict[Callable[[int], bool], int] = {}
        """What writes the token of a number, and says whether there are more; and that number."""

    def stream(self, step: Callable[[int], bool]) -> None:
        """Call `step` with 0 now, and with 1, 2, … at each tick, while it returns True."""
        if not step(0):
            return
        if not self._streams:
            asyncio.get_running_loop().call_later(TICK_S, self._tick)
        self._streams[step] = 1

    def _tick(self) -> None:
        for step, number in list(self._streams.items()):
            if step(number):
                self._streams[step] = number + 1
            else:
                del self._streams[step]
        if self._streams:
            asyncio.get_running_loop().call_later(TICK_S, self._tick)


class _Connection(asyncio.Protocol):
    """HTTP/1.1, one request after the other."""

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._parser = httptools.HttpRequestParser(self)
        self._url, self._body = b"", bytearray()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # it is one
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body = b"", bytearray()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        path, body = self._url.partition(b"?")[0], bytes(self._body)
        if path == b"/v1/prefill":
            self._answer(_prefilled(body))
        elif path == b"/v1/generate":
            self._generated(body)
        elif path in (b"/v1/completions", b"/v1/chat/completions"):
            self._completed(body)
        elif path == b"/v1/info":
            self._answer(self._worker.report)
        else:
            self._answer(json.dumps({"data": [{"id": MODEL}], "model_path": MODEL, "status": "ready"}).encode())

    def _answer(self, body: bytes, kind: bytes = b"application/json") -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ncontent-length: %d\r\n\r\n" % (kind, len(body))
        self._transport.write(head + body)

    def _generated(self, raw: bytes) -> None:
        request = _generate.decode(raw)
        last = request.sampling.max_tokens - 1
        info = LegInfo(cached_tokens=len(request.prompt_token_ids) - 1, computed_tokens=1)

        n, logprobs = request.sampling.n, None
        if (most := request.sampling.logprobs) is not None:
            logprobs = [TokenLogprob(logprob=-0.5, top=[(TOKEN + at, -0.5 - at) for at in range(most)])]

        def event(number: int) -> bytes:
            reason = FinishReason.LENGTH if number == last else None
            told = info if number == 0 else None
            delta = TokenDelta(index=0, token_ids=[TOKEN], finish_reason=reason, info=told, logprobs=logprobs)
            if n == 1:
                return pack_frame(_pack(delta))
            return b"".join(pack_frame(_pack(msgspec.structs.replace(delta, index=index))) for index in range(n))

        self._stream(b"application/octet-stream", event, last)

    def _completed(self, raw: bytes) -> None:
        request = json.loads(raw)
        last = request.get("max_tokens", 1) - 1
        if not request.get("stream"):
            self._answer(json.dumps(_completion("A" * (last + 1), done=True)).encode())
            return

        def event(number: int) -> bytes:
            said = b"data: " + json.dumps(_completion("A", done=number == last)).encode() + b"\n\n"
            return said + b"data: [DONE]\n\n" if number == last else said

        self._stream(b"text/event-stream", event, last)

    def _stream(self, kind: bytes, event: Callable[[int], bytes], last: int) -> None:
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %s\r\ntransfer-encoding: chunked\r\n\r\n" % kind

        def step(number: int) -> bool:
            if self._transport.is_closing():
                return False
            data = event(number)
            chunk = b"%x\r\n%s\r\n" % (len(data), data)
            if number == 0:
                chunk = head + chunk
            self._transport.write(chunk + b"0\r\n\r\n" if number == last else chunk)
            return number < last

        self._worker.stream(step)


def _prefilled(raw: bytes) -> bytes:
    request = _prefill.decode(raw)
    tokens = len(request.prompt_token_ids)
    stored = usable_chunks(tokens, CHUNK_TOKENS)
    return _pack(
        PrefillResult(request_id=request.request_id, cached_tokens=0, computed_tokens=tokens, stored_chunks=stored)
    )


def _completion(text: str, *, done: bool) -> dict[str, object]:
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": "length" if done else None}
    usage = {"prompt_tokens": 1900, "completion_tokens": len(text), "total_tokens": 1900 + len(text)}
    body = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": [choice]}
    return {**body, "usage": usage, "kv_transfer_params": {"remote_engine_id": "e", "remote_block_ids": []}}


async def serve(count: int) -> None:
    """Print the ports of so many workers, the first half of them prefillers; serve until ended."""
    loop, ports = asyncio.get_running_loop(), []
    for number in range(count):
        role = ROLES[number * len(ROLES) // count]
        worker = Worker(f"n{number}", role)
        server = await loop.create_server(lambda worker=worker: _Connection(worker), "127.0.0.1", 0)
        ports.append(server.sockets[0].getsockname()[1])
    print("ports " + json.dumps(ports), flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    raise_limit()
    uvloop.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else len(ROLES)))
