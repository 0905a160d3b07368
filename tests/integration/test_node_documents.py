"""Documents that one node's engine computed are reused by another's: real processes, from memory, disk and Redis."""

import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from support.attacks import secret_override
from support.cluster import ClusterHandle, cluster
from support.delta_readers import deltas_of
from support.redis_server import redis_server, with_redis
from support.tiny_models import make_tiny_model

from engines.sim.reference import expected_tokens
from engines.torch.engine import build_torch_engine
from kvcore.config.schema import SimEngineConfig, TorchEngineConfig
from kvcore.trust.opening import open_trust, trust_source
from nodeapi.client import HttpNodeClient
from nodeapi.documents import CompareRequest, Documents
from nodeapi.messages import GenerateRequest, LegInfo, PrefillRequest, TokenDelta
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

CHUNK_TOKENS = 64
HEADER, *TEXTS = (random.Random(size).choices(range(3, 250), k=size) for size in (100, 150, 64, 33))
CHUNKS = 1 + 3 + 1 + 1
"""Of the header and of the texts, whose rests are chunks too."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
SLOW = ("engine.prefill_tokens_per_s=200", "tiers.wait_s=60", "tiers.warm_up=0")
"""So that a tier is worth waiting for, on whatever machine, and has not been read before it is asked."""


def joined(order: list[int]) -> tuple[list[int], Documents]:
    prompt, spans = list(HEADER), list[tuple[int, int]]()
    for at in order:
        spans.append((len(prompt), len(prompt) + len(TEXTS[at])))
        prompt += TEXTS[at]
    return [*prompt, 9, 9, 9], Documents(header=len(HEADER), spans=spans, k=8)


@contextlib.asynccontextmanager
async def client(subject: ClusterHandle) -> AsyncIterator[HttpNodeClient]:
    trust = open_trust(trust_source(subject.config))
    made = HttpNodeClient(connect_timeout_s=5, max_connections=4, trust=trust)
    try:
        yield made
    finally:
        await made.aclose()


async def have_computed(subject: ClusterHandle) -> None:
    prompt, said = joined([0, 1, 2])
    wanted = PrefillRequest(request_id="p", prompt_token_ids=prompt, documents=said, deadline_s=60.0)
    async with client(subject) as nodes:
        done = await nodes.prefill(subject.node_url("prefill-0"), wanted, timeout_s=60)
    assert (done.stored_chunks, done.cached_tokens) == (CHUNKS, 0)


async def reused(subject: ClusterHandle, engine: SimEngineConfig) -> LegInfo:
    """What the decoder did for a prompt with the same documents in another order, whose answer is right."""
    prompt, said = joined([2, 0, 1])
    wanted = GenerateRequest(request_id="d", prompt_token_ids=prompt, documents=said, sampling=GREEDY, deadline_s=60.0)
    async with client(subject) as nodes:
        deltas = await deltas_of(nodes, subject.node_url("decode-0"), wanted, 60)
    tokens = [token for delta in deltas for token in delta.token_ids]
    assert [tokens] == expected_tokens(engine, prompt, GREEDY, documents=said)
    [info] = [delta.info for delta in deltas if delta.info is not None]
    assert info.prepared_tokens == 0, "the decoder computed no document"
    assert (info.cached_tokens, info.approximate_tokens) == (64 + 33, 150 - 8 + 64 - 8)
    return info


def engine_of(subject: ClusterHandle) -> SimEngineConfig:
    assert isinstance(subject.config.engine, SimEngineConfig)
    return subject.config.engine


def proved(folder: Path, kv: str) -> list[str]:
    """The overrides for a cluster with a secret, and what that does to KV."""
    return [secret_override(folder), kv] if kv else []


@pytest.mark.parametrize("kv", ["", "kv.verify=mac", "kv.encrypt=true"])
async def test_a_decoder_reuses_what_a_prefiller_computed_and_compares_it(tmp_path: Path, kv: str) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=proved(tmp_path, kv)) as subject:
        await have_computed(subject)
        info = await reused(subject, engine_of(subject))
        assert sum(move.num_bytes for move in info.moved if move.direction == "get") >= CHUNKS * CHUNK_TOKENS * 64
        prompt, said = joined([1, 2, 0])
        wanted = CompareRequest(request_id="c", prompt_token_ids=prompt, documents=said, deadline_s=60.0)
        async with client(subject) as nodes:
            reply = await nodes.compare(subject.node_url("decode-0"), wanted, timeout_s=60)
        assert reply.approximate_tokens == 150 - 8 + 33 - 8 and min(reply.kl) > 0


async def found_after_a_restart(folder: Path, tier: str, *overrides: str) -> str:
    """Whose tier it was."""
    async with cluster(folder, prefillers=1, decoders=1, overrides=overrides) as subject:
        await have_computed(subject)

        async def saved() -> bool:
            reports = [await subject.node_info(node) for node in subject.nodes]
            return sum(one.counts.get("saved", 0) for report in reports for one in report.tiers) >= CHUNKS

        await subject.until(saved, 60)
    async with cluster(folder, prefillers=1, decoders=1, overrides=[*overrides, *SLOW]) as subject:
        info = await reused(subject, engine_of(subject))
        assert sum(one.num_chunks for one in info.promoted if one.tier == tier) == CHUNKS
        [node] = {one.node for one in info.promoted}
        return node


@pytest.mark.parametrize("kv", ["", "kv.encrypt=true"])
async def test_documents_are_found_on_another_nodes_disk_after_the_cluster_was_stopped(tmp_path: Path, kv: str) -> None:
    disk = f"tiers.disk={{path: {tmp_path}/disk, size: 32MiB}}"
    assert await found_after_a_restart(tmp_path, "disk", disk, *proved(tmp_path, kv)) == "prefill-0"


@with_redis
@pytest.mark.timeout(180)
@pytest.mark.parametrize("kv", ["", "kv.encrypt=true"])
async def test_documents_are_found_in_redis_after_the_cluster_was_stopped(tmp_path: Path, kv: str) -> None:
    with redis_server() as server:
        await found_after_a_restart(tmp_path, "redis", f"tiers.redis={{url: '{server.url}'}}", *proved(tmp_path, kv))


async def test_what_a_torch_decoder_makes_of_a_prefillers_documents_is_what_one_engine_makes(tmp_path: Path) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model")
    prompt, said = joined([2, 0, 1])
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=5)
    wanted = GenerateRequest(request_id="d", prompt_token_ids=prompt, documents=said, sampling=params, deadline_s=60.0)
    plain = msgspec.structs.replace(wanted, request_id="plain", documents=None)
    async with cluster(tmp_path, engine="torch", model=model, prefillers=1, decoders=1) as subject:
        await have_computed(subject)
        config = subject.config.engine
        assert isinstance(config, TorchEngineConfig)
        async with client(subject) as nodes:
            url = subject.node_url("decode-0")
            deltas = await deltas_of(nodes, url, wanted, 60)
            without = await deltas_of(nodes, url, plain, 60)
    assert deltas[0].info is not None and deltas[0].info.prepared_tokens == 0
    async with build_torch_engine(subject.config.model, config, CHUNK_TOKENS, lambda _: None) as engine:
        alone = [delta async for delta in engine.generate(wanted)]
    async with build_torch_engine(subject.config.model, config, CHUNK_TOKENS, lambda _: None) as engine:
        full = [delta async for delta in engine.generate(plain)]
    assert logprobs(deltas) == pytest.approx(logprobs(alone), abs=1e-4)
    assert logprobs(without) == pytest.approx(logprobs(full), abs=1e-4)
    assert logprobs(deltas) != pytest.approx(logprobs(without), abs=1e-4), "else nothing was compared"


def logprobs(deltas: list[TokenDelta]) -> list[float]:
    return [one for delta in deltas for said in delta.logprobs or [] for pair in said.top for one in pair]
