"""Prompts of three documents behind one header, for engines of `support.engine_fakes`."""

from typing import Any

import msgspec
from support.engine_fakes import CHUNK, CONFIG, prompt_of, request

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.documents import Documents
from nodeapi.messages import GenerateRequest, PrefillRequest

HEADER = prompt_of(CHUNK + 5, 1)
TEXTS = {name: prompt_of(length, seed) for seed, (name, length) in enumerate([("a", 77), ("b", 20), ("c", 64)], 2)}
TAIL = prompt_of(13, 9)
K = 4


def joined(order: str, tail: list[int] = TAIL, k: int = K) -> tuple[list[int], Documents]:
    """A prompt with the texts in this order, a token of its own before each but the first."""
    prompt, spans = list(HEADER), []
    for at, name in enumerate(order):
        prompt += [400 + at] * bool(at)
        spans.append((len(prompt), len(prompt) + len(TEXTS[name])))
        prompt += TEXTS[name]
    return prompt + tail, Documents(header=len(HEADER), spans=spans, k=k)


def asked(order: str, request_id: str = "d", *, k: int = K, tail: list[int] = TAIL, **fields: Any) -> GenerateRequest:
    prompt, documents = joined(order, tail, k)
    return msgspec.structs.replace(request(request_id, prompt, **fields), documents=documents)


def expected(order: str, **fields: Any) -> list[list[int]]:
    wanted = asked(order, **fields)
    return expected_tokens(CONFIG, wanted.prompt_token_ids, wanted.sampling, documents=wanted.documents)


def prefill(order: str) -> PrefillRequest:
    prompt, documents = joined(order)
    return PrefillRequest(request_id="p", prompt_token_ids=prompt, documents=documents, deadline_s=100.0)


def slow_of(**fields: Any) -> SimEngineConfig:
    """A chunk a second."""
    return msgspec.structs.replace(CONFIG, prefill_tokens_per_s=CHUNK, max_batch_tokens=CHUNK, **fields)
