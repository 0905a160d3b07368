"""A chunk of real KV goes bad in its segment: it is computed again, counted, and the tokens are right."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from support.cluster import ClusterHandle
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, lookup, prompt_of
from support.vllm_reference import References

from kvcore.types import ChunkKey
from kvstore.chunk_format import HEADER_BYTES, ChunkHeader, pack, parse
from metadata_server.messages import MatchReply
from transfer.memory.segment import attach

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(300), pytest.mark.asyncio(loop_scope="session")]

Damage = Callable[[memoryview], None]
DAMAGED = 1
"""The chunk before it is good and is used."""


def flip_a_byte(extent: memoryview) -> None:
    extent[HEADER_BYTES + 1234] ^= 0x10


def put_an_older_generation_there(extent: memoryview) -> None:
    header = header_of(extent)
    extent[:HEADER_BYTES] = pack(replace(header, generation=header.generation - 1))


def say_it_is_of_other_weights(extent: memoryview) -> None:
    extent[:HEADER_BYTES] = pack(replace(header_of(extent), fingerprint=bytes(16)))


def say_it_is_another_chunk(extent: memoryview) -> None:
    extent[:HEADER_BYTES] = pack(replace(header_of(extent), key=ChunkKey(bytes(16))))


KINDS = {
    flip_a_byte: "checksum",
    put_an_older_generation_there: "stale",
    say_it_is_of_other_weights: "foreign",
    say_it_is_another_chunk: "stale",
}
PROMPTS = {how: prompt_of(4 * BLOCK + 20, 400 + i) for i, how in enumerate(KINDS)}


def header_of(extent: memoryview) -> ChunkHeader:
    header = parse(extent)
    assert header is not None, "an undamaged chunk"
    return header


@pytest.fixture(scope="module")
def questions(single: References) -> Questions:
    return Questions(single, list(PROMPTS.values()), NEW_TOKENS)


async def damage(reply: MatchReply, how: Damage) -> int:
    """Change each replica of one chunk where it lies; returns how many there are."""
    segments = {segment.id: segment for segment in reply.segments}
    for place in reply.replicas[DAMAGED]:
        memory = await asyncio.to_thread(attach, segments[place.segment_id])
        try:
            extent = memory.view[place.offset : place.offset + place.length]
            how(extent)
            extent.release()
        finally:
            memory.close()
    return len(reply.replicas[DAMAGED])


@pytest.mark.parametrize(("how", "reason"), KINDS.items(), ids=[how.__name__ for how in KINDS])
async def test_a_damaged_chunk_is_computed_again_and_counted(
    subject: ClusterHandle, questions: Questions, how: Damage, reason: str
) -> None:
    prompt = PROMPTS[how]
    first = await questions.ask(subject, prompt)
    decoder = (await subject.explain(first.id))["route"]["decoder"]
    (reader,) = {"decode-0", "decode-1"} - {decoder}
    metric = f'kvferry_store_totals_total{{name="replica_{reason}"}}'
    counted = (await subject.metrics(subject.node_url(reader))).get(metric, 0.0)
    replicas = await damage(await lookup(subject, prompt), how)

    answer = await questions.ask(subject, prompt)  # the other decoder's turn, which has not seen it

    assert (await subject.explain(answer.id))["route"]["decoder"] == reader
    assert (await subject.metrics(subject.node_url(reader)))[metric] >= counted + replicas
