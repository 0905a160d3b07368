"""An engine without KV, for tests of what stands around an engine. Also runnable as a child: `fake_engine.py --fd N`.

What it does is in the request's id: `count` streams numbers, `hang` waits for ever, `die` kills its process after three
tokens, `fail:<code>` raises that error, `bug` raises one that is not ours.
"""

import argparse
import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from types import TracebackType
from typing import Self

import msgspec

from engines.process import messages as m
from engines.process.session import OpenedEngine, serve
from kvcore.config.schema import ClusterConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.errors import ConfigError, error_from_code
from kvcore.types import KVSpec, Role
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerateRequest,
    LegInfo,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)
from nodeapi.sampling import SamplingParams

SPEC = KVSpec(
    model_id="fake",
    weights_digest="00",
    tokenizer_digest="00",
    num_layers=1,
    num_kv_heads=1,
    head_dim=1,
    dtype="float32",
    attention="none",
    layout_id="fake",
    chunk_tokens=16,
    chunk_bytes=1024,
)
INFO = EngineInfo(
    kind="fake", kv_spec=SPEC, max_context=4096, vocab_size=1000, eos_token_ids=[0], block_size=16, num_blocks=8
)


def cluster_config(model_path: str = "fake") -> ClusterConfig:
    """One prefiller, `p0`, one decoder, `d0`, one store node, `s0`."""
    return ClusterConfig(
        cluster="test",
        model=ModelConfig(path=model_path, name="fake"),
        engine=SimEngineConfig(),
        nodes={
            "p0": NodeConfig(role=Role.PREFILLER, port=0),
            "d0": NodeConfig(role=Role.DECODER, port=0),
            "s0": NodeConfig(role=Role.STORE, port=0),
        },
    )


def hello(model_path: str = "fake") -> m.EngineHello:
    return m.EngineHello(config=cluster_config(model_path), node_name="p0", incarnation=1)


def prefill_request(request_id: str = "count", deadline_s: float = 10.0, num_tokens: int = 33) -> PrefillRequest:
    return PrefillRequest(request_id=request_id, prompt_token_ids=list(range(1, num_tokens + 1)), deadline_s=deadline_s)


def generate_request(request_id: str = "count", deadline_s: float = 10.0, max_tokens: int = 8) -> GenerateRequest:
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=[1, 2, 3],
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
        deadline_s=deadline_s,
    )


class FakeEngine:
    def __init__(self, info: EngineInfo = INFO) -> None:
        self.info = info
        self.active: set[str] = set()
        self.aborted = 0
        self.deltas_out = 0
        self.handoffs_ended: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert not self.active, "a call outlived the engine"

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        self.active.add(request.request_id)
        try:
            await self._behave(request.request_id)
            return PrefillResult(
                request_id=request.request_id,
                cached_tokens=0,
                computed_tokens=len(request.prompt_token_ids),
                stored_chunks=len(request.prompt_token_ids) // 16,
            )
        finally:
            self.active.discard(request.request_id)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        self.active.add(request.request_id)
        try:
            await self._behave(request.request_id)
            last = request.sampling.max_tokens - 1
            for token in range(last + 1):
                if request.request_id.startswith("die") and token == 3:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.deltas_out += 1
                yield TokenDelta(
                    token_ids=[token],
                    info=LegInfo(cached_tokens=0, computed_tokens=3) if token == 0 else None,
                    finish_reason=FinishReason.LENGTH if token == last else None,
                )
                await asyncio.sleep(0.001 if request.request_id.startswith("slow") else 0)
        except (GeneratorExit, asyncio.CancelledError):
            self.aborted += 1
            raise
        finally:
            self.active.discard(request.request_id)

    async def compare(self, request: CompareRequest) -> CompareReply:
        await self._behave(request.request_id)
        return CompareReply(request_id=request.request_id, token_ids=[1], kl=[0.5], gaps=[0.0])

    async def end_handoff(self, request_id: str) -> None:
        self.handoffs_ended.append(request_id)

    async def abort(self, request_id: str) -> None:
        self.aborted += 1

    async def stats(self) -> EngineStats:
        counters = {"aborted": self.aborted, "deltas_out": self.deltas_out, "handoffs": len(self.handoffs_ended)}
        return EngineStats(running=len(self.active), total_blocks=8, counters=counters)

    async def _behave(self, request_id: str) -> None:
        kind, _, rest = request_id.partition(":")
        if kind == "hang":
            try:
                await asyncio.Event().wait()
            finally:
                self.aborted += 1
        if kind == "fail":
            raise error_from_code(rest, "as asked")
        if kind == "bug":
            raise ZeroDivisionError("not one of ours")


@asynccontextmanager
async def open_fake(hello: m.EngineHello) -> AsyncIterator[OpenedEngine]:
    if hello.config.model.path == "missing":
        raise ConfigError("model.path: missing: there is no such folder")
    if hello.config.model.path == "crash":
        sys.exit(3)
    short = hello.config.model.path == "short"
    async with FakeEngine(msgspec.structs.replace(INFO, max_context=15) if short else INFO) as engine:
        said = os.environ.get("FAKE_ENGINE_EXPOSITION", "").encode()
        yield OpenedEngine(engine, lambda: {"reads_ok": 7}, lambda: {"d0.1": "shm"}, lambda: said)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--fd", type=int, required=True)
    sock = socket.socket(fileno=parser.parse_args().fd)
    sys.exit(asyncio.run(serve(sock, open_fake)))


if __name__ == "__main__":
    main()
