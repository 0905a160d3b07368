"""A decoder that has read a prompt's beginning out of another node's memory has it in its engine: it reads it once."""

import random
from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

BEGINNING = random.Random(1).choices(range(3, 250), k=64 * 8)


async def read(subject: ClusterHandle, number: int) -> tuple[str, int]:
    """(the decoder, bytes that it read) of a request with this end."""
    body = await subject.complete([*BEGINNING, 3 + number, 5], max_tokens=2, temperature=0, ignore_eos=True)
    record = await subject.explain(body["id"])
    (leg,) = [leg for leg in record["legs"] if leg["kind"] == "decode"]
    return leg["node"], sum(moved["num_bytes"] for moved in leg["moved"] if moved["direction"] == "get")


async def test_a_beginning_is_read_once_by_each_decoder(tmp_path: Path) -> None:
    slow = "engine.prefill_tokens_per_s=1000"  # so that to read the beginning pays on whatever machine
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=["router.policy=round_robin", slow]) as subject:
        found = [await read(subject, number) for number in range(6)]
    first = dict(reversed(found))
    assert len(first) == 2 and all(first.values()), found
    assert [num_bytes for _, num_bytes in found[2:]] == [0] * 4, found
