"""Servers that stand for engines in benchmarks.faults: each a process of its own with OpenAI's completions.

The same for kvferry's router and for others': vLLM's fields where they are asked for, and the endpoints that SGLang's
routers probe. The model is greedy: the next token is a byte that follows from all tokens before it, so a text goes on
elsewhere as it would have gone on here. `POST /control {"fault": ...}` hurts a server, `GET /control` says what it
holds. Run by benchmarks.faults: python -m benchmarks.faults_mocks NAME
"""

import asyncio
import json
import sys
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import uvloop
from aiohttp import web

from benchmarks.faults_cells import SLOW_STEP_S
from benchmarks.faults_proxy import LATE_S, serving

MODEL = "mock"
PREFILL_S, STEP_S = 0.05, 0.02
DIES_AFTER = 10
_Body = dict[str, Any]


def next_token(tokens: Sequence[int]) -> int:
    """A printable byte."""
    return 97 + zlib.crc32(bytes(token & 255 for token in tokens)) % 26


def text_after(prompt: str, max_tokens: int) -> str:
    """What a server answers."""
    tokens = list(prompt.encode())
    for _ in range(max_tokens):
        tokens.append(next_token(tokens))
    return bytes(tokens[-max_tokens:]).decode()


class MockServer:
    """One of them."""

    def __init__(self, name: str) -> None:
        self.name, self.fault, self.running = name, "", 0
        self._healed = asyncio.Event()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Every request."""
        if request.path == "/control":
            return await self._control(request)
        if request.method == "GET" or request.path in {"/abort_request", "/flush_cache"}:
            if self.fault == "late":
                await asyncio.sleep(LATE_S)
            return web.json_response(_said_of(request.path))
        if self.fault == "error":
            return web.json_response({"error": {"message": "the server has a fault", "code": 500}}, status=500)
        body = await request.json()
        trial = request.headers.get("X-Request-Id", "").startswith("trial-")  # kvferry's own, and no client's
        self.running += not trial
        try:
            if self.fault == "hang":
                await self._healed.wait()
            await asyncio.sleep(PREFILL_S)
            return await (self._stream(request, body) if body.get("stream") else self._whole(body))
        finally:
            self.running -= not trial

    async def _control(self, request: web.Request) -> web.Response:
        if request.method == "POST":
            self.fault = (await request.json())["fault"]
            if not self.fault:
                self._healed.set()
                self._healed = asyncio.Event()
        return web.json_response({"running": self.running})

    async def _tokens(self, body: _Body) -> AsyncIterator[int]:
        prompt = body["prompt"]
        tokens = list(prompt.encode()) if isinstance(prompt, str) else list(prompt)
        for _ in range(body.get("max_tokens", 16)):
            await asyncio.sleep(SLOW_STEP_S if self.fault == "slow" else STEP_S)
            tokens.append(next_token(tokens))
            yield tokens[-1]

    async def _whole(self, body: _Body) -> web.Response:
        tokens = [token async for token in self._tokens(body)]
        params = {"remote_engine_id": self.name, "remote_block_ids": [[1]], "remote_host": "127.0.0.1"}
        answer = _answer([_choice(tokens, "length")])
        return web.json_response(answer | {"usage": _usage(body, len(tokens)), "kv_transfer_params": params})

    async def _stream(self, request: web.Request, body: _Body) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
        await response.prepare(request)
        sent, wanted = 0, body.get("max_tokens", 16)
        async for token in self._tokens(body):
            if self.fault == "die" and sent == DIES_AFTER and request.transport is not None:
                request.transport.abort()
                return response
            sent += 1
            await _event(response, _answer([_choice([token], "length" if sent == wanted else None)]))
        await _event(response, _answer([]) | {"usage": _usage(body, sent)})
        await response.write(b"data: [DONE]\n\n")
        return response


def _said_of(path: str) -> _Body:
    if path == "/v1/models":
        return {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 8192, "root": MODEL}]}
    return {"model_path": MODEL, "served_model_name": MODEL, "status": "ok", "is_generation": True}


def _answer(choices: list[_Body]) -> _Body:
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": MODEL, "choices": choices}


def _choice(tokens: list[int], reason: str | None) -> _Body:
    ended = {"finish_reason": reason, "stop_reason": None, "logprobs": None}
    return {"index": 0, "text": bytes(tokens).decode(), "token_ids": tokens, **ended}


def _usage(body: _Body, completion: int) -> _Body:
    prompt = len(body["prompt"])
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


async def _event(response: web.StreamResponse, body: _Body) -> None:
    await response.write(b"data: " + json.dumps(body).encode() + b"\n\n")


async def main(name: str) -> None:
    """Serve until ended; says where."""
    async with serving(MockServer(name).handle) as url:
        print(f"serves {url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1]))
