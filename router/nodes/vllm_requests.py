"""What a vLLM server is sent for a leg: bodies of its `/v1/completions`, tokens in and tokens out. Pure.

Fields as in vLLM 0.32: `entrypoints/openai/completion/protocol.py`; `kv_transfer_params` as its connectors read them
(`kv_connector/v1/nixl/pull_scheduler.py`, `mooncake/mooncake_connector.py`).
"""

from collections.abc import Mapping
from hashlib import sha256

import msgspec

from kvcore.chunk_keys import split_adapter
from kvcore.handoff import HandoffKind
from nodeapi.grammars.vllm_words import structured_outputs
from nodeapi.messages import GenerateRequest, PrefillRequest
from nodeapi.sampling import SamplingParams

_NIXL_PREFILL: dict[str, object] = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
_GREEDY_BELOW = 1e-5
"""A temperature that vLLM takes for 0 (`sampling_params.py`)."""
_OPTIONAL = ("allowed_token_ids", "bad_words")
"""Sent where they are not empty."""
_SEED_STEP = 0x9E3779B97F4A7C15
_MAX_SALT_CHARS, _NOT_IN_SALTS = 128, frozenset("@/\\\0")
_encoder = msgspec.json.Encoder()


def prefill_body(model: str, kind: HandoffKind, request: PrefillRequest) -> bytes:
    """A prefill leg's: one token, which nobody reads, and not streamed, as only whole answers carry what nixl's decode
    leg needs. It must not end by a stop token: mooncake would take that for an abort and send no KV."""
    params = _PREFILL_PARAMS[kind](request.request_id)
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": 1,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": False,
        "kv_transfer_params": params,
    }
    return _encoder.encode(body | _salt(request.cache_salt))


def decode_body(model: str, request: GenerateRequest) -> bytes:
    """A decode leg's. A sequence that is continued has its tokens at the end of the prompt."""
    done = len(request.output_token_ids)
    body = {
        "model": model,
        "prompt": request.prompt_token_ids + request.output_token_ids,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **_sampling(request.sampling, done),
        **_salt(request.cache_salt),
    }
    if request.handoff_params:
        body["kv_transfer_params"] = msgspec.Raw(request.handoff_params)
    return _encoder.encode(body)


def scores_body(model: str, request: GenerateRequest) -> bytes:
    """Of a request of its own for the logprobs of the prompt's tokens: no stream has them, so it is a whole answer, of
    one token that nobody reads."""
    body = {
        "model": model,
        "prompt": request.prompt_token_ids,
        "max_tokens": 1,
        "temperature": 0.0,
        "stream": False,
        "prompt_logprobs": request.sampling.prompt_logprobs,
    }
    return _encoder.encode(body | _salt(request.cache_salt))


def num_sequences(sampling: SamplingParams) -> int:
    """How many of the n are asked for: of greedy ones, which are all the same, vLLM computes one only."""
    return 1 if sampling.temperature < _GREEDY_BELOW else sampling.n


def mooncake_decode_params(peer: Mapping[str, str], prefill_leg: str) -> bytes:
    """What the decode leg beside `prefill_leg` must carry; `peer` is the prefiller's `EngineInfo.kv_peer`."""
    flags = {"do_remote_prefill": True, "do_remote_decode": False}
    return _encoder.encode({**flags, **peer, "transfer_id": _transfer_id(prefill_leg)})


def _nixl_prefill(_: str) -> dict[str, object]:
    return _NIXL_PREFILL


def _mooncake_prefill(leg: str) -> dict[str, object]:
    return {"do_remote_decode": True, "do_remote_prefill": False, "transfer_id": _transfer_id(leg)}


_PREFILL_PARAMS = {HandoffKind.NIXL: _nixl_prefill, HandoffKind.MOONCAKE: _mooncake_prefill}
"""`kv_transfer_params` of a prefill leg, by its id."""


def _transfer_id(prefill_leg: str) -> str:
    return f"xfer-{prefill_leg}"


def _sampling(sampling: SamplingParams, done: int) -> dict[str, object]:
    """All of it: what is left out is taken from the model's generation_config there. `done`: tokens emitted before."""
    body: dict[str, object] = {
        "n": num_sequences(sampling),
        "max_tokens": sampling.max_tokens - done,
        "min_tokens": max(0, sampling.min_tokens - done),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "min_p": sampling.min_p,
        "presence_penalty": sampling.presence_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "stop_token_ids": sampling.stop_token_ids,
        "ignore_eos": sampling.ignore_eos,
    }
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    for name in _OPTIONAL:
        if value := getattr(sampling, name):
            body[name] = value
    if sampling.thinking_token_budget is not None:
        body["thinking_token_budget"] = sampling.thinking_token_budget
    if sampling.grammar is not None:
        body["structured_outputs"] = structured_outputs(sampling.grammar)
    if sampling.extra_args:
        body["vllm_xargs"] = sampling.extra_args
    if sampling.logprobs is not None:
        body |= {"logprobs": sampling.logprobs, "return_tokens_as_token_ids": True}
    if sampling.logprob_token_ids:
        body["logprob_token_ids"] = sampling.logprob_token_ids
    if sampling.temperature >= _GREEDY_BELOW:
        # Its random numbers begin anew with each request, so a continued one must not draw the first ones again.
        body["seed"] = (sampling.seed + _SEED_STEP * done) % (1 << 63)
    return body


def _salt(salt: bytes) -> dict[str, object]:
    """vLLM takes no long salts, and none that could be a path; ours may be any text. It keeps adapters apart itself."""
    _, salt = split_adapter(salt)
    text = salt.decode()
    plain = len(text) <= _MAX_SALT_CHARS and _NOT_IN_SALTS.isdisjoint(text)
    return {"cache_salt": text if plain else sha256(salt).hexdigest()} if salt else {}
