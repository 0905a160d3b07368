"""vLLM's outputs as our results, deltas and timings. Values only: needs no vLLM."""

from http import HTTPStatus
from typing import Any

import msgspec

from engines.vllm.bus import LegReports
from engines.vllm.connector.orders import PARAMS_NAME, LegResult
from engines.vllm.sampling import finish, token_logprobs
from kvcore.errors import EngineError, KVFerryError, OverloadedError
from nodeapi.messages import (
    GenerateRequest,
    LegInfo,
    PrefillRequest,
    PrefillResult,
    Timings,
    TokenDelta,
)
from nodeapi.sampling import SamplingParams


def leg_result(output: Any) -> LegResult:
    """What the scheduler half reports of a finished request. Raises EngineError if it reports nothing."""
    params = (output.kv_transfer_params or {}).get(PARAMS_NAME)
    if params is None:
        raise EngineError("vLLM's answer says nothing of the KV it saved: the connector is not in place")
    return msgspec.convert(params, LegResult)


def cached_tokens(output: Any, reports: LegReports, num_prompt: int) -> int:
    """Leading prompt tokens that were not computed: vLLM counts a load as a hit before it knows what comes of it."""
    cached = output.num_cached_tokens or 0
    loaded = [load.num_tokens for load in reports.loads.values()]
    return max(0, min(cached, num_prompt - 1, *loaded))


def _timings(output: Any, reports: LegReports, total_s: float) -> Timings:
    wait_s = max((load.wait_s for load in reports.loads.values()), default=0.0)
    load_s = max((load.load_s for load in reports.loads.values()), default=0.0)
    save_s = max((save.save_s for save in reports.saves.values()), default=0.0)
    stamps = output.metrics
    queue_s = compute_s = 0.0
    if stamps is not None and stamps.scheduled_ts:
        queue_s = max(0.0, stamps.scheduled_ts - stamps.queued_ts - wait_s - load_s)
        compute_s = max(0.0, stamps.first_token_ts - stamps.scheduled_ts)
    return Timings(queue_s=queue_s, wait_s=wait_s, load_s=load_s, compute_s=compute_s, save_s=save_s, total_s=total_s)


def prefill_result(
    request: PrefillRequest, output: Any, reports: LegReports, *, chunk_tokens: int, total_s: float
) -> PrefillResult:
    """Of a prefill leg that took `total_s`, with what the ranks have reported so far."""
    num_prompt = len(request.prompt_token_ids)
    cached, saves = cached_tokens(output, reports, num_prompt), list(reports.saves.values())
    stored = min((save.num_chunks for save in saves), default=leg_result(output).stored_chunks)
    return PrefillResult(
        request_id=request.request_id,
        cached_tokens=cached,
        computed_tokens=num_prompt - cached,
        stored_chunks=min(stored, num_prompt // chunk_tokens),
        moved=[
            *(move for load in reports.loads.values() for move in load.moved),
            *(move for save in saves for move in save.moved),
        ],
        timings=_timings(output, reports, total_s),
    )


def leg_info(output: Any, reports: LegReports, request: GenerateRequest, total_s: float) -> LegInfo:
    """Of a decode leg whose first token came after `total_s`."""
    num_prompt = len(request.prompt_token_ids)
    cached = cached_tokens(output, reports, num_prompt)
    return LegInfo(
        cached_tokens=cached,
        computed_tokens=num_prompt - cached,
        moved=[move for load in reports.loads.values() for move in load.moved],
        timings=_timings(output, reports, total_s),
    )


def token_delta(completion: Any, info: LegInfo | None, sampling: SamplingParams) -> TokenDelta:
    """vLLM's CompletionOutput as a delta. Raises EngineError for a failure inside vLLM."""
    token_ids = list(completion.token_ids)
    reason = stop_token = None
    if completion.finish_reason is not None:
        reason, stop_token = finish(completion.finish_reason, completion.stop_reason, token_ids)
    return TokenDelta(
        index=completion.index,
        token_ids=token_ids,
        logprobs=token_logprobs(token_ids, completion.logprobs, sampling) if token_ids else None,
        finish_reason=reason,
        stop_token_id=stop_token,
        info=info,
    )


def failure_of(error: Exception) -> KVFerryError:
    """A VLLMError that is neither the client's fault nor the engine's death: OverloadedError if vLLM would have it
    tried again (its errors carry an HTTP status), else EngineError."""
    status = getattr(error, "http_status", getattr(error, "status_code", None))
    said = f"vLLM failed: {error.__cause__ or error}"
    return OverloadedError(said) if status == HTTPStatus.SERVICE_UNAVAILABLE else EngineError(said)
