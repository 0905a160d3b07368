"""Puts the torch engine together: check memory, load, measure provenance, run the shared loop over the runner.

Owns the order of start and stop. Nothing is loaded before the engine is entered.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AsyncExitStack
from functools import partial
from types import TracebackType
from typing import Self

import msgspec
from llguidance import LLTokenizer

from engines.base import Engine
from engines.model_files import ModelFiles, check_model_files
from engines.paged.loop import EngineLoop
from engines.paged.options import EngineOptions
from engines.provenance import versioned
from engines.torch.model import LoadedModel, load_checked, model_dtype
from engines.torch.runner import TorchRunner
from engines.torch.spec import build_kv_spec
from kvcore.clock import Clock, SystemClock
from kvcore.config.schema import ModelConfig, TorchEngineConfig
from kvcore.errors import ConfigError
from kvcore.model_folder import find_folder
from kvcore.types import DeclaredKV, KVSpec
from kvstore.store import KVStore
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.grammars.compiler import Grammars
from nodeapi.grammars.vocabulary import folder_vocabulary
from nodeapi.messages import EngineInfo, EngineStats, GenerateRequest, PrefillRequest, PrefillResult, TokenDelta
from transfer.memory.available import available_memory

StoreFactory = Callable[[KVSpec], KVStore | None]
"""Makes the store's client once the KV's provenance is known; None: an engine without a store. The caller closes it."""


def build_torch_engine(
    model: ModelConfig,
    engine: TorchEngineConfig,
    chunk_tokens: int,
    store_factory: StoreFactory,
    clock: Clock | None = None,
    *,
    declared: DeclaredKV = (),
    store_timeout_s: float = 30.0,
) -> Engine:
    """An engine that loads on entering, off the loop. Entering raises ModelLoadError and ConfigError. `declared`: what
    else its KV depends on (see KVSpec)."""
    options = EngineOptions.of(engine, store_timeout_s)
    return TorchEngine(
        model, engine, options, chunk_tokens, store_factory, declared=declared, clock=clock or SystemClock()
    )


class TorchEngine:
    """`Engine` that becomes an `EngineLoop` over a `TorchRunner` once entered."""

    def __init__(
        self,
        model: ModelConfig,
        engine: TorchEngineConfig,
        options: EngineOptions,
        chunk_tokens: int,
        store_factory: StoreFactory,
        *,
        declared: DeclaredKV = (),
        clock: Clock,
    ) -> None:
        _check_config(engine, chunk_tokens)
        self._model = model
        self._engine = engine
        self._options = options
        self._chunk_tokens = chunk_tokens
        self._declared = declared
        self._store_factory = store_factory
        self._clock = clock
        self._stack = AsyncExitStack()
        self._entered: EngineLoop | None = None

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            runner = await asyncio.to_thread(self._load)
            stack.push_async_callback(runner.aclose)
            info = runner.info
            grammars = Grammars(partial(self._vocabulary, info.vocab_size, info.eos_token_ids), info.eos_token_ids)
            loop = EngineLoop(runner, self._store_factory(info.kv_spec), self._options, self._clock, grammars)
            self._entered = await stack.enter_async_context(loop)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def _vocabulary(self, vocab_size: int, eos_token_ids: Sequence[int]) -> LLTokenizer:
        return folder_vocabulary(find_folder(self._model.path), vocab_size, eos_token_ids)

    def _load(self) -> TorchRunner:
        files = check_model_files(self._model.path)
        dtype = model_dtype(self._model.dtype)
        check_memory(files, int(dtype.itemsize), self._engine.kv_cache, available_memory().size_bytes)
        loaded = load_checked(files, self._model, self._engine, dtype)
        num_blocks = count_blocks(loaded, self._engine.kv_cache, self._chunk_tokens)
        spec = build_kv_spec(loaded, self._model.name, self._chunk_tokens, self._declared)
        spec = msgspec.structs.replace(spec, weights_digest=versioned(spec.weights_digest, self._model.version))
        return TorchRunner(loaded, spec, num_blocks=num_blocks, threads=self._engine.threads)

    @property
    def _loop(self) -> EngineLoop:
        assert self._entered is not None, "the engine is used before it was entered"
        return self._entered

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        return self._loop.info

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See `Engine`."""
        return await self._loop.prefill(request)

    def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine`."""
        return self._loop.generate(request)

    async def compare(self, request: CompareRequest) -> CompareReply:
        """See `Engine`."""
        return await self._loop.compare(request)

    async def end_handoff(self, request_id: str) -> None:
        """See `Engine`."""
        await self._loop.end_handoff(request_id)

    async def abort(self, request_id: str) -> None:
        """See `Engine`."""
        await self._loop.abort(request_id)

    async def stats(self) -> EngineStats:
        """See `Engine`."""
        return await self._loop.stats()


def _check_config(engine: TorchEngineConfig, chunk_tokens: int) -> None:
    if engine.device != "cpu":
        raise ConfigError(
            f"engine.device: {engine.device!r} is not supported, only 'cpu': KV blocks live in host memory"
        )
    if engine.block_size < 1 or chunk_tokens % engine.block_size:
        raise ConfigError(f"engine.block_size: {engine.block_size} does not divide kv.chunk_tokens, {chunk_tokens}")


def check_memory(files: ModelFiles, bytes_per_parameter: int, kv_cache: int, available: int) -> None:
    """Raises ConfigError if weights and KV do not fit into `available` bytes."""
    weights = files.num_parameters * bytes_per_parameter
    if weights + kv_cache > available:
        raise ConfigError(
            f"not enough memory: the weights in {files.folder} take {weights >> 20} MiB and engine.kv_cache "
            f"{kv_cache >> 20} MiB, {available >> 20} MiB are available. Lower engine.kv_cache, or take bfloat16 as "
            "model.dtype"
        )


def count_blocks(loaded: LoadedModel, kv_cache: int, chunk_tokens: int) -> int:
    """Blocks that fit into `kv_cache` bytes. Raises ConfigError if not even one chunk and the token after it do."""
    num_blocks = kv_cache // loaded.geometry.block_bytes
    least = chunk_tokens // loaded.geometry.block_size + 1
    if num_blocks < least:
        raise ConfigError(
            f"engine.kv_cache: {kv_cache} bytes hold {num_blocks} blocks of {loaded.geometry.block_bytes} bytes; one "
            f"chunk and a block take {least}. Raise it to {least * loaded.geometry.block_bytes} or more"
        )
    return num_blocks
