"""Prompts for the cluster of vLLM engines, asked with what a single vLLM answers at hand."""

from collections.abc import Sequence
from typing import Any

from support.cluster import ClusterHandle, Streamed
from support.tiny_models import VOCAB_SIZE
from support.vllm_reference import Reference, References

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.clock import SystemClock
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import MatchReply, MatchRequest

BLOCK = 128
NEW_TOKENS = 8


def greedy(max_tokens: int = NEW_TOKENS) -> dict[str, Any]:
    """Fields of a request whose tokens have one right answer."""
    return {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True, "return_token_ids": True}


def prompt_of(length: int, seed: int) -> list[int]:
    """Token ids that look random, none of them special, the same on every run."""
    return [3 + (seed * 7919 + i * i * 31 + i * 17) % (VOCAB_SIZE - 3) for i in range(length)]


class Questions:
    """Prompts by name, each with its reference; all references are computed in one go."""

    def __init__(self, single: References, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        self._max_tokens = max_tokens
        answers = single.answers(prompts, max_tokens)
        self._references = {tuple(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}

    def reference(self, prompt: Sequence[int]) -> Reference:
        """What one vLLM answers."""
        return self._references[tuple(prompt)]

    async def ask(self, subject: ClusterHandle, prompt: list[int], **fields: str) -> Streamed:
        """Stream an answer and hold it against the reference, which `fields` do not change."""
        answer = await subject.stream(prompt, **greedy(self._max_tokens), **fields)
        self.reference(prompt).check(answer.token_ids, await subject.explain(answer.id))
        return answer


async def lookup(subject: ClusterHandle, prompt: list[int]) -> MatchReply:
    """Where the prompt's full chunks are, as far as they are."""
    report = await subject.node_info("prefill-0")
    assert report.engine is not None
    keys = chunk_keys(root_key(report.engine.kv_spec.fingerprint), prompt, BLOCK)
    client = connect_client(MetadataEndpoints(urls=(subject.metadata_url,), timeout_s=5.0), SystemClock())
    try:
        return await client.match(MatchRequest(keys=keys))
    finally:
        await client.aclose()


async def vllm_metric(subject: ClusterHandle, node: str, name: str, *labels: str) -> float:
    """The sum of a counter that vLLM itself keeps, over the series that have all of `labels` (`key="value"`)."""
    samples = await subject.metrics(subject.node_url(node))
    return sum(
        v for series, v in samples.items() if series.startswith(name) and all(label in series for label in labels)
    )


async def computed_tokens(subject: ClusterHandle, node: str) -> float:
    """Prompt tokens that vLLM says it computed."""
    return await vllm_metric(subject, node, "vllm:prompt_tokens_by_source_total", 'source="local_compute"')
