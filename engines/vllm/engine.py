"""vLLM behind our Engine protocol: an AsyncLLM in this process, its core and its workers in processes of their own.

Owns vLLM's life and the legs under way. Tokens go in and come out; KV is the connector's. When vLLM's core dies this
process ends at once, and whoever supervises it starts another.
"""

import asyncio
import logging
import os
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
from vllm import SamplingParams
from vllm.exceptions import VLLMClientError, VLLMError
from vllm.inputs import TokensPrompt
from vllm.lora.request import LoRARequest
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from engines.provenance import check_unchanged
from engines.vllm.adapters import ReadAdapter, read_adapters
from engines.vllm.bus import Bus, LegReports
from engines.vllm.connector.orders import LegParams
from engines.vllm.outputs import failure_of, leg_info, leg_result, prefill_result, token_delta
from engines.vllm.sampling import (
    extra_args,
    grammar_place,
    is_greedy,
    prompt_logprobs,
    sampling_arguments,
)
from engines.vllm.start import VllmStart, start_vllm
from engines.vllm.stats import VllmStats
from kvcore.chunk_keys import split_adapter, usable_chunks
from kvcore.errors import (
    ContextLengthError,
    DeadlineExceededError,
    EngineDiedError,
    InvalidRequestError,
    ModelChangedError,
    ModelLoadError,
    OverloadedError,
)
from kvcore.telemetry import log_fields
from kvcore.types import KVSpec
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.grammars.vllm_words import structured_outputs
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
    GenerateRequest,
    PrefillRequest,
    PrefillResult,
    TokenDelta,
)

EXIT_CORE_DIED = 70
NO_DOCUMENTS = (
    "vLLM counts the computed tokens of a prompt from its beginning alone: a connector cannot say that some in the "
    "middle are there"
)
_logger = logging.getLogger("engines.vllm")


@dataclass(frozen=True, slots=True)
class VllmLimits:
    """How long the engine's front waits for the worker halves, in seconds."""

    workers_s: float = 60.0
    """For their hellos, once vLLM is up."""
    sample_s: float = 1.0
    save_grace_s: float = 5.0
    """For the report of a leg's saves, beyond the store's own time for one call."""


class VllmEngine:
    """`Engine` over vLLM. Entering starts vLLM, which takes from 10 seconds to minutes and holds the event loop."""

    def __init__(self, start: VllmStart, limits: VllmLimits = VllmLimits()) -> None:
        self._start = start
        self._limits = limits
        self._stack = AsyncExitStack()
        self._bus = Bus()
        self._stats = VllmStats()
        self._llm: AsyncLLM | None = None
        self._info: EngineInfo | None = None
        self._adapters: Mapping[str, LoRARequest] = {}
        self._legs = 0

    def __repr__(self) -> str:
        state = "running" if self._info is not None else "not started"
        return f"<VllmEngine of {self._start.node_id}, {state}, {self._legs} of {self._start.max_legs} legs>"

    async def __aenter__(self) -> Self:
        """Raises ConfigError for arguments and models that vLLM refuses, ModelLoadError for a model or an adapter that
        cannot be read, EngineError when it fails to start."""
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._bus)
            adapters = await asyncio.to_thread(read_adapters, self._start.config.model.adapters)
            self._llm = await start_vllm(self._start, self._bus.path, self._stats, adapters)
            stack.callback(self._llm.shutdown)
            spec = await self._bus.wait_workers(self._num_ranks, self._limits.workers_s)
            self._adapters = await load_adapters(self._llm, adapters)
            self._info = _info(self._llm, spec, adapters)
            watch = asyncio.create_task(self._watch(), name="vllm-watch")
            stack.callback(watch.cancel)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    @property
    def info(self) -> EngineInfo:
        """See `Engine`."""
        assert self._info is not None, "the engine is used before it was entered"
        return self._info

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See `Engine`. Computes one token as well, as vLLM cannot do without."""
        started, prompt = time.monotonic(), request.prompt_token_ids
        leg = LegParams(
            leg=request.request_id, salt=request.cache_salt.hex(), prefer_segment=request.prefer_segment, tail=True
        )
        sampling = SamplingParams(
            max_tokens=1,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            extra_args=extra_args(leg),
        )
        with self._leg(leg.leg, len(prompt)) as reports:
            async with aclosing(
                self._outputs(leg.leg, prompt, request.cache_salt, sampling, request.deadline_s)
            ) as outputs:
                output = await anext(outputs)
            result = leg_result(output)
            left_s = request.deadline_s - (time.monotonic() - started)
            if result.saving:
                await self._wait_saved(reports, left_s)
            total_s, chunk_tokens = time.monotonic() - started, self.info.kv_spec.chunk_tokens
            return prefill_result(request, output, reports, chunk_tokens=chunk_tokens, total_s=total_s)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine`. With temperature, a continuation is not the draw that the first engine would have made."""
        started = time.monotonic()
        prompt = [*request.prompt_token_ids, *request.output_token_ids]
        leg = self._decode_leg(request)
        arguments = sampling_arguments(request, leg)
        if (grammar := request.sampling.grammar) is not None:
            arguments["structured_outputs"] = StructuredOutputsParams(**structured_outputs(grammar))
        sampling = SamplingParams(output_kind=RequestOutputKind.DELTA, **arguments)
        first, copies = True, request.sampling.n if is_greedy(request.sampling) else 1
        with self._leg(leg.leg, len(prompt)) as reports:
            async with aclosing(
                self._outputs(leg.leg, prompt, request.cache_salt, sampling, request.deadline_s)
            ) as outputs:
                async for output in outputs:
                    info = None
                    if first:
                        first = False
                        info = leg_info(output, reports, request, time.monotonic() - started)
                        for piece in prompt_logprobs(prompt, output.prompt_logprobs, request.sampling):
                            yield TokenDelta(prompt_logprobs=piece, info=info)
                            info = None
                    for completion in output.outputs:
                        delta = token_delta(completion, info, request.sampling)
                        info = None
                        yield delta
                        for index in range(1, copies):
                            yield msgspec.structs.replace(delta, index=index, info=None)

    async def compare(self, request: CompareRequest) -> CompareReply:
        """See `Engine`. vLLM gives no whole distribution, and reuses what it has whatever it is asked."""
        raise InvalidRequestError(f"this node compares nothing: {NO_DOCUMENTS}", param="documents")

    async def end_handoff(self, request_id: str) -> None:
        """See `Engine`."""
        self._bus.end_handoff(request_id)

    async def abort(self, request_id: str) -> None:
        """See `Engine`."""
        await self._vllm.abort(request_id)

    async def stats(self) -> EngineStats:
        """See `Engine`: vLLM's own gauges, and the worker halves' samples."""
        self._stats.samples = await self._bus.samples(self._limits.sample_s)
        return self._stats.engine_stats(self.info.num_blocks)

    def store_counters(self) -> dict[str, int]:
        """Totals of the workers' stores, as of the last `stats`."""
        return self._stats.store_counters()

    def transports(self) -> dict[str, str]:
        """Segment id of a peer -> transport, as of the last `stats`."""
        return self._stats.transports()

    # ---------------------------------------------------------------------------------------------------------------

    @property
    def _vllm(self) -> AsyncLLM:
        assert self._llm is not None, "the engine is used before it was entered"
        return self._llm

    @property
    def _num_ranks(self) -> int:
        return int(self._vllm.vllm_config.parallel_config.tensor_parallel_size)

    def _decode_leg(self, request: GenerateRequest) -> LegParams:
        handoff, place = request.handoff, grammar_place(request)
        if handoff is None:
            return LegParams(leg=request.request_id, salt=request.cache_salt.hex(), **place)
        chunks = usable_chunks(len(request.prompt_token_ids), self.info.kv_spec.chunk_tokens)
        return LegParams(
            leg=request.request_id,
            salt=request.cache_salt.hex(),
            handoff_chunks=min(handoff.num_chunks, chunks),
            wait_until=time.monotonic() + handoff.wait_s,
            tail=handoff.num_chunks >= chunks and not request.output_token_ids,
            **place,
        )

    @contextmanager
    def _leg(self, leg: str, num_tokens: int) -> Iterator[LegReports]:
        """Room for one more leg. Raises OverloadedError, ContextLengthError."""
        if num_tokens >= self.info.max_context:
            raise ContextLengthError(
                f"{ContextLengthError.says(self.info.max_context)}. However, your prompt contains {num_tokens} tokens, "
                "and one more is to be generated"
            )
        if self._legs >= self._start.max_legs:
            raise OverloadedError(f"{self._legs} requests are running or waiting, which is the bound")
        self._legs += 1
        try:
            with self._bus.leg(leg) as reports:
                yield reports
        finally:
            self._legs -= 1

    async def _outputs(
        self, leg: str, prompt: list[int], salt: bytes, sampling: SamplingParams, deadline_s: float
    ) -> AsyncGenerator[Any, None]:
        """vLLM's outputs of one request until the deadline; its errors become ours. Closing it aborts the request."""
        tokens, adapter = TokensPrompt(prompt_token_ids=prompt), self._adapter(salt)
        if salt:
            tokens["cache_salt"] = salt.hex()
        deadline = asyncio.get_running_loop().time() + deadline_s
        try:
            async with aclosing(self._vllm.generate(tokens, sampling, leg, lora_request=adapter)) as outputs:
                while True:
                    async with asyncio.timeout_at(deadline):
                        output = await anext(outputs, None)
                    if output is None:
                        return
                    yield output
        except TimeoutError as error:
            raise DeadlineExceededError("vLLM did not finish the request in time") from error
        except EngineDeadError as error:
            raise EngineDiedError("vLLM's engine core has died") from error
        except VLLMClientError as error:
            param = getattr(error, "parameter", None)
            raise InvalidRequestError(f"vLLM refuses the request: {error}", param=param) from error
        except (VLLMError, ValueError) as error:
            raise failure_of(error) from error

    def _adapter(self, salt: bytes) -> LoRARequest | None:
        """The one that a salt names. Raises ModelChangedError."""
        identity, _ = split_adapter(salt)
        if identity and identity not in self._adapters:
            raise ModelChangedError(f"this engine does not serve the adapter {identity}")
        return self._adapters.get(identity)

    async def _wait_saved(self, reports: LegReports, left_s: float) -> None:
        bound_s = max(0.0, min(left_s, self._start.store_timeout_s + self._limits.save_grace_s))
        try:
            async with asyncio.timeout(bound_s):
                await reports.wait_saved(self._num_ranks)
        except TimeoutError:
            log_fields(_logger, logging.WARNING, "saves_not_reported", waited_s=bound_s)

    async def _watch(self) -> None:
        """End this process when vLLM's core has died, as vLLM cannot start another one in it."""
        assert self._vllm.output_handler is not None
        await asyncio.wait({self._vllm.output_handler})
        log_fields(_logger, logging.ERROR, "vllm_core_died", exit=EXIT_CORE_DIED)
        logging.shutdown()
        os._exit(EXIT_CORE_DIED)


async def load_adapters(llm: AsyncLLM, adapters: Sequence[ReadAdapter]) -> dict[str, LoRARequest]:
    """By their identities. Raises ModelLoadError for one that vLLM refuses or that was written meanwhile."""
    requests: dict[str, LoRARequest] = {}
    for number, one in enumerate(adapters, 1):
        name, identity = one.served.name, one.served.identity
        requests[identity] = LoRARequest(lora_name=name, lora_int_id=number, lora_path=str(one.folder))
        try:
            await llm.add_lora(requests[identity])
        except Exception as error:  # of any kind, as its text came from vLLM's core
            raise ModelLoadError(f"model.adapters.{name}: vLLM does not load {one.folder}: {error}") from error
        check_unchanged(one.stamps)
    return requests


def _info(llm: AsyncLLM, spec: KVSpec, adapters: Sequence[ReadAdapter]) -> EngineInfo:
    config = llm.vllm_config
    reasoning = config.reasoning_config
    model = config.model_config
    eos = model.try_get_generation_config().get("eos_token_id") or model.hf_config.eos_token_id
    eos_ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return EngineInfo(
        kind="vllm",
        kv_spec=spec,
        max_context=int(model.max_model_len),
        vocab_size=int(model.get_vocab_size()),
        eos_token_ids=[int(token) for token in eos_ids],
        block_size=int(config.cache_config.block_size),
        num_blocks=int(config.cache_config.num_gpu_blocks or 0),
        max_sequences=int(config.scheduler_config.max_num_seqs),
        refuses_documents=NO_DOCUMENTS,
        adapters=[one.served for one in adapters],
        lacks=[] if reasoning is not None and reasoning.enabled else ["thinking_token_budget"],
    )
