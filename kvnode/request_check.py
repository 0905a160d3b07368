"""Bounds of what the control API accepts: a body becomes a request that an engine can run, or InvalidRequestError.

Pure. The router checks what its own clients send; here every other caller of a node is held to the same bounds.
"""

import math
from typing import TypeVar

import msgspec

from kvcore.chunk_keys import split_adapter
from kvcore.errors import InvalidRequestError, ModelChangedError
from kvnode.limits import NodeLimits
from nodeapi.documents import MAX_DOCUMENTS, CompareRequest
from nodeapi.messages import EngineInfo, GenerateRequest, PrefillRequest
from nodeapi.sampling import SamplingParams

MAX_ID_CHARS = 256
MAX_SALT_BYTES = 4096 + 64
"""1,024 characters of a client, and what is put before them for an adapter."""
MAX_COMPLETIONS = 128
MAX_LOGPROBS = 128
MAX_COMPARED = 64

_Request = TypeVar("_Request", PrefillRequest, GenerateRequest, CompareRequest)


def parse_request(body: bytes, kind: type[_Request], info: EngineInfo, limits: NodeLimits = NodeLimits()) -> _Request:
    """The request in a msgpack body. Raises InvalidRequestError naming the field, and ModelChangedError for an adapter
    that the engine does not serve."""
    try:
        request = msgspec.msgpack.decode(body, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not a {kind.__name__}: {error}") from error
    _require(0 < len(request.request_id) <= MAX_ID_CHARS, "request_id", f"must have 1 to {MAX_ID_CHARS} characters")
    _require(len(request.cache_salt) <= MAX_SALT_BYTES, "cache_salt", f"must have at most {MAX_SALT_BYTES} bytes")
    _check_adapter(request.cache_salt, info)
    longest_s = limits.longest_deadline_s
    _require(0 < request.deadline_s <= longest_s, "deadline_s", f"must lie in (0, {longest_s:g}]")
    _require(len(request.prompt_token_ids) > 0, "prompt_token_ids", "must not be empty")
    _check_tokens(request.prompt_token_ids, "prompt_token_ids", info)
    _check_documents(request, info)
    if isinstance(request, GenerateRequest):
        _check_generate(request, info, longest_s)
    if isinstance(request, CompareRequest):
        _require(1 <= request.num_tokens <= MAX_COMPARED, "num_tokens", f"must be 1 to {MAX_COMPARED}")
        _require(0 <= request.max_distance < math.inf, "max_distance", "must be finite, and not negative")
    return request


def _check_adapter(salt: bytes, info: EngineInfo) -> None:
    adapter, _ = split_adapter(salt)
    if adapter and all(one.identity != adapter for one in info.adapters):
        served = ", ".join(one.name for one in info.adapters) or "none"
        raise ModelChangedError(f"the adapter {adapter} is not served by this node (any more): it has {served}")


def _check_documents(request: PrefillRequest | GenerateRequest | CompareRequest, info: EngineInfo) -> None:
    in_full = isinstance(request, GenerateRequest) and not request.reuse
    if request.documents is None and not in_full and not isinstance(request, CompareRequest):
        return
    what = "documents" if request.documents is not None else "reuse"
    _require(not info.refuses_documents, what, f"are not for this node: {info.refuses_documents}")
    if request.documents is not None:
        _require(len(request.documents.spans) <= MAX_DOCUMENTS, "documents", f"must be {MAX_DOCUMENTS} at most")
        problem = request.documents.problem(len(request.prompt_token_ids))
        _require(problem is None, "documents", f"have a wrong {problem}")


def _check_generate(request: GenerateRequest, info: EngineInfo, longest_s: float) -> None:
    _check_tokens(request.output_token_ids, "output_token_ids", info)
    _require(request.sampling.n == 1 or not request.output_token_ids, "output_token_ids", "needs sampling.n = 1")
    if request.handoff is not None:
        _require(request.handoff.num_chunks >= 0, "handoff.num_chunks", "must not be negative")
        _require(0 <= request.handoff.wait_s <= longest_s, "handoff.wait_s", f"must be 0 to {longest_s:g}")
    _check_sampling(request.sampling, info)


def _check_sampling(sampling: SamplingParams, info: EngineInfo) -> None:
    for name in ("temperature", "presence_penalty", "frequency_penalty"):
        _require(math.isfinite(getattr(sampling, name)), f"sampling.{name}", "must be a finite number")
    _require(sampling.temperature >= 0, "sampling.temperature", "must not be negative")
    _require(0 < sampling.top_p <= 1, "sampling.top_p", "must lie in (0, 1]")
    _require(0 <= sampling.min_p <= 1, "sampling.min_p", "must lie in [0, 1]")
    _require(sampling.top_k >= 0, "sampling.top_k", "must not be negative")
    _require(0 < sampling.repetition_penalty < math.inf, "sampling.repetition_penalty", "must be positive and finite")
    _require(sampling.max_tokens >= 1, "sampling.max_tokens", "must be at least 1")
    _require(sampling.min_tokens >= 0, "sampling.min_tokens", "must not be negative")
    _require(1 <= sampling.n <= MAX_COMPLETIONS, "sampling.n", f"must be 1 to {MAX_COMPLETIONS}")
    logprobs = sampling.logprobs or 0
    _require(0 <= logprobs <= MAX_LOGPROBS, "sampling.logprobs", f"must be 0 to {MAX_LOGPROBS}")
    told, most = sampling.prompt_logprobs or 0, min(MAX_LOGPROBS, info.vocab_size)
    _require(0 <= told <= most, "sampling.prompt_logprobs", f"must be 0 to {most}")
    listed = len(sampling.logprob_token_ids)
    _require(listed <= MAX_LOGPROBS, "sampling.logprob_token_ids", f"must have at most {MAX_LOGPROBS} ids")
    _check_tokens(sampling.logprob_token_ids, "sampling.logprob_token_ids", info)
    _check_tokens(list(sampling.logit_bias), "sampling.logit_bias", info)
    _check_tokens(sampling.allowed_token_ids, "sampling.allowed_token_ids", info)
    for word in sampling.bad_words_token_ids:
        _require(len(word) > 0, "sampling.bad_words_token_ids", "must not have empty words")
        _check_tokens(word, "sampling.bad_words_token_ids", info)
    _require(all(map(math.isfinite, sampling.logit_bias.values())), "sampling.logit_bias", "must be finite numbers")
    _require(all(0 <= token < 1 << 32 for token in sampling.stop_token_ids), "sampling.stop_token_ids", "must be ids")


def _check_tokens(token_ids: list[int], param: str, info: EngineInfo) -> None:
    if token_ids:
        _require(min(token_ids) >= 0 and max(token_ids) < info.vocab_size, param, f"must lie in [0, {info.vocab_size})")


def _require(holds: bool, param: str, what: str) -> None:
    if not holds:
        raise InvalidRequestError(f"{param} {what}", param=param)
