"""Bytes in a segment go bad behind everybody's back: the next reader notices, computes and tells on them."""

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import msgspec
import pytest
import pytest_asyncio
from support.cluster import ClusterHandle, cluster

from engines.sim.arithmetic import Arithmetic
from engines.sim.reference import expected_tokens
from engines.sim.runner import sim_spec
from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.clock import SystemClock
from kvcore.config.schema import SimEngineConfig
from kvcore.types import ReplicaRef
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, checksum, pack, parse
from metadata_server.connect import MetadataEndpoints, connect_client
from metadata_server.messages import MatchReply, MatchRequest
from nodeapi.sampling import SamplingParams
from transfer.memory.segment import attach

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CHUNK = 64
CHUNKS = 4
DAMAGED = 1
"""The chunk before it is good and is used."""
Damage = Callable[[memoryview, list[int], SimEngineConfig], None]


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["shm", "tcp"])
async def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterHandle]:
    """Round robin: the second request for a prompt goes to the decoder that does not have its blocks."""
    folder = tmp_path_factory.mktemp("damage")
    overrides = ("router.policy=round_robin", "router.decoder_prefill=needed")
    async with cluster(folder, prefillers=1, transport=request.param, overrides=overrides) as handle:
        yield handle


def sim_config(subject: ClusterHandle) -> SimEngineConfig:
    assert isinstance(subject.config.engine, SimEngineConfig)
    return subject.config.engine


async def ask(subject: ClusterHandle, prompt: list[int]) -> dict[str, Any]:
    """The router's record of a request that gave the right tokens."""
    body = await subject.complete(prompt, max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert body["choices"][0]["token_ids"] == expected_tokens(sim_config(subject), prompt, sampling)[0]
    return await subject.explain(body["id"])


async def lookup(subject: ClusterHandle, prompt: list[int]) -> MatchReply:
    spec = sim_spec(sim_config(subject), subject.config.model.name, CHUNK)
    client = connect_client(MetadataEndpoints(urls=(subject.metadata_url,), timeout_s=5.0), SystemClock())
    try:
        return await client.match(MatchRequest(keys=chunk_keys(root_key(spec.fingerprint), prompt, CHUNK)[:CHUNKS]))
    finally:
        await client.aclose()


async def damage(subject: ClusterHandle, reply: MatchReply, prompt: list[int], how: Damage) -> None:
    """Change each replica of one chunk where it lies."""
    segments = {segment.id: segment for segment in reply.segments}
    for replica in reply.replicas[DAMAGED]:
        memory = await asyncio.to_thread(attach, segments[replica.segment_id])
        try:
            extent = memory.view[replica.offset : replica.offset + replica.length]
            how(extent, prompt, sim_config(subject))
            extent.release()
        finally:
            memory.close()


def header_of(extent: memoryview) -> ChunkHeader:
    header = parse(extent)
    assert header is not None, "an undamaged chunk"
    return header


def flip_a_byte(extent: memoryview, prompt: list[int], config: SimEngineConfig) -> None:
    extent[HEADER_BYTES + 1234] ^= 0x10


def tear_the_header(extent: memoryview, prompt: list[int], config: SimEngineConfig) -> None:
    extent[40] ^= 0x01


def put_an_older_generation_there(extent: memoryview, prompt: list[int], config: SimEngineConfig) -> None:
    header = header_of(extent)
    extent[:HEADER_BYTES] = pack(replace(header, generation=header.generation - 1))


def put_another_chunk_there(extent: memoryview, prompt: list[int], config: SimEngineConfig) -> None:
    payload = memoryview(random.Random(9).randbytes(CHUNK * config.bytes_per_token))
    extent[HEADER_BYTES:] = payload
    key = bytes(16)
    extent[:HEADER_BYTES] = pack(replace(header_of(extent), key=key, checksum=checksum([payload])))  # type: ignore[arg-type]


def put_other_weights_kv_there(extent: memoryview, prompt: list[int], config: SimEngineConfig) -> None:
    """The right tokens' KV in every respect but the weights: whole, checksummed, at the right place."""
    others = msgspec.structs.replace(config, weights_version="v2")
    arithmetic = Arithmetic(others.weights_version, others.bytes_per_token, others.vocab_size)
    record, records = b"", []
    for position, token in enumerate(prompt[: (DAMAGED + 1) * CHUNK]):
        record = arithmetic.record(record, token, position)
        records.append(record)
    payload = memoryview(b"".join(records[DAMAGED * CHUNK :]))
    fingerprint = sim_spec(others, "sim", CHUNK).fingerprint
    extent[HEADER_BYTES:] = payload
    extent[:HEADER_BYTES] = pack(replace(header_of(extent), fingerprint=fingerprint, checksum=checksum([payload])))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (flip_a_byte, "checksum"),
        (tear_the_header, "malformed"),
        (put_an_older_generation_there, "stale"),
        (put_another_chunk_there, "stale"),
        (put_other_weights_kv_there, "foreign"),
    ],
)
async def test_a_damaged_chunk_is_noticed_computed_again_and_reported(
    subject: ClusterHandle, how: Damage, reason: str
) -> None:
    draw = random.Random(how.__name__)
    prompt = [draw.randrange(1, 50_000) for _ in range(CHUNKS * CHUNK + 20)]
    first = (await ask(subject, prompt))["route"]["decoder"]
    before = await lookup(subject, prompt)
    assert len(before.replicas) == CHUNKS
    await damage(subject, before, prompt, how)
    (reader,) = {"decode-0", "decode-1"} - {first}
    metric = f'kvferry_store_totals_total{{name="replica_{reason}"}}'
    counted = (await subject.metrics(subject.node_url(reader))).get(metric, 0.0)
    told = (await subject.stats()).counters.get(f"quarantined_{reason}", 0)

    record = await ask(subject, prompt)

    leg = next(leg for leg in record["legs"] if leg["kind"] == "decode")
    assert {move["transport"] for move in leg["moved"]} == {subject.config.transport.kind}
    assert leg["node"] == reader
    assert leg["cached_tokens"] == DAMAGED * CHUNK, "what came before the damage is used, nothing after it"
    assert leg["computed_tokens"] == len(prompt) - DAMAGED * CHUNK
    assert (await subject.metrics(subject.node_url(reader)))[metric] == counted + len(before.replicas[DAMAGED])

    async def replaced() -> list[ReplicaRef]:
        """The bad replica is gone; its chunk is whole again, as the reader has computed and saved it."""
        now = await lookup(subject, prompt)
        bad = {replica.generation for replica in before.replicas[DAMAGED]}
        return [ref for ref in now.replicas[DAMAGED] if ref.generation not in bad] if len(now.replicas) > 1 else []

    await subject.until(replaced, 60)
    assert (await subject.stats()).counters[f"quarantined_{reason}"] == told + len(before.replicas[DAMAGED])
    other = await ask(subject, prompt)
    assert other["cached_tokens"] >= CHUNKS * CHUNK, "as good as before"
