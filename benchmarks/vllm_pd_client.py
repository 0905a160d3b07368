"""Asking as a client does: a completion of token ids, streamed, with the time until its first token came."""

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

import aiohttp

MODEL_NAME = "subject"
NEW_TOKENS = 16
ASK_S = 300.0


@dataclass(frozen=True, slots=True)
class Measured:
    """One answer. `spent`: seconds of its parts (and counts) by name, as far as the system tells them."""

    ttft_s: float
    total_s: float
    token_ids: tuple[int, ...]
    cached_tokens: int | None = None
    """Prompt tokens that were not computed, as far as the server's usage says."""
    request_id: str = ""
    """What it was sent as: X-Request-Id."""
    decoder_ttft_s: float | None = None
    """Until the decoder's own first token, all KV having been stored before it was asked."""
    spent: dict[str, float] = field(default_factory=dict)


def completion(prompt: list[int], max_tokens: int, **fields: Any) -> dict[str, Any]:
    """The body: greedy, so that each system has to answer the same."""
    return {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_token_ids": True,
        **fields,
    }


async def ask(
    session: aiohttp.ClientSession, url: str, prompt: list[int], *, max_tokens: int = NEW_TOKENS, **fields: Any
) -> Measured:
    """Raises RuntimeError for an answer that is not 200, breaks off, or has another number of tokens."""
    body = json.dumps(completion(prompt, max_tokens, **fields)).encode()
    headers = {"Content-Type": "application/json", "X-Request-Id": uuid.uuid4().hex}
    token_ids: list[int] = []
    usage: dict[str, Any] = {}
    ttft_s = 0.0
    began = time.perf_counter()
    timeout = aiohttp.ClientTimeout(total=ASK_S)
    async with session.post(f"{url}/v1/completions", data=body, headers=headers, timeout=timeout) as response:
        if response.status != 200:
            raise RuntimeError(f"{url} answered {response.status}: {await response.text()}")
        async for line in response.content:
            data = line.strip().removeprefix(b"data: ")
            if not data or data == b"[DONE]" or data.startswith(b":"):
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(f"{url} failed in mid-answer: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                token_ids += choice.get("token_ids") or []
            if token_ids and not ttft_s:
                ttft_s = time.perf_counter() - began
    if len(token_ids) != max_tokens:
        raise RuntimeError(f"{url} gave {len(token_ids)} tokens of {max_tokens}")
    return Measured(
        ttft_s=ttft_s,
        total_s=time.perf_counter() - began,
        token_ids=tuple(token_ids),
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens"),
        request_id=headers["X-Request-Id"],
    )
