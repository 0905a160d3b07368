"""The proxy in front of a prefiller and a decoder that are plain vLLM servers: two legs, one after the other.

What vLLM's toy_proxy_server.py does, with the same libraries: the whole request goes to the prefiller with one token to
generate and the parameters that make NixlConnector keep the KV; what the prefiller answers in `kv_transfer_params` goes
with the request to the decoder, whose stream is passed on as it comes. LMCache's nodes are asked in the same way (their
connector does without the parameters). Besides, it remembers how long each leg took, under the client's X-Request-Id.
"""

import argparse
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

REMEMBERED = 64
REMOTE_DECODE = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def make_app(prefiller: str, decoder: str) -> FastAPI:
    """`prefiller`, `decoder`: base URLs."""
    legs: OrderedDict[str, dict[str, float]] = OrderedDict()
    clients: dict[str, httpx.AsyncClient] = {}

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        for role, url in (("prefill", prefiller), ("decode", decoder)):
            clients[role] = httpx.AsyncClient(timeout=None, base_url=url, limits=limits)
        yield
        for client in clients.values():
            await client.aclose()

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()
        request_id = request.headers["x-request-id"]
        headers = {"X-Request-Id": request_id}
        spent = legs[request_id] = {}
        while len(legs) > REMEMBERED:
            legs.popitem(last=False)
        began = time.perf_counter()
        params = await prefill(body, headers)
        spent["prefill_s"] = time.perf_counter() - began
        if params:
            body["kv_transfer_params"] = params
        return StreamingResponse(decode(body, headers, spent), media_type="application/json")

    async def prefill(body: dict[str, Any], headers: dict[str, str]) -> object:
        short = {**body, "kv_transfer_params": REMOTE_DECODE, "stream": False, "max_tokens": 1}
        for name in ("stream_options", "min_tokens"):
            short.pop(name, None)
        response = await clients["prefill"].post("/v1/completions", json=short, headers=headers)
        response.raise_for_status()
        return response.json().get("kv_transfer_params")

    async def decode(body: dict[str, Any], headers: dict[str, str], spent: dict[str, float]) -> AsyncIterator[bytes]:
        began = time.perf_counter()
        stream = clients["decode"].stream("POST", "/v1/completions", json=body, headers=headers)
        async with stream as response:
            response.raise_for_status()
            async for part in response.aiter_bytes():
                spent.setdefault("decode_first_s", time.perf_counter() - began)
                yield part

    @app.get("/legs/{request_id}")
    async def legs_of(request_id: str) -> dict[str, float]:
        return legs[request_id]

    @app.get("/health")
    async def health() -> None:
        return None

    return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--prefiller", required=True)
    parser.add_argument("--decoder", required=True)
    arguments = parser.parse_args()
    app = make_app(arguments.prefiller, arguments.decoder)
    uvicorn.run(app, host="127.0.0.1", port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
