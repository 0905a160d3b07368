"""A cluster with `kv.encrypt`: its answers are those of `generate`, its memory and its disk show no KV to who reads
them, and a node that does not encrypt shares none with the others, and is named."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.attacks import secret_override
from support.chunk_attacks import change_all, segments
from support.cluster import ClusterHandle, cluster
from support.generate_reference import assert_identical, load_reference
from support.tiny_models import VOCAB_SIZE, make_tiny_model

from engines.sim.reference import expected_tokens
from kvferry.launch.processes import ProcessPlan
from kvstore.chunk_format import HEADER_BYTES
from kvstore.manifest import scan
from nodeapi.messages import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHUNK, CHUNKS, NEW_TOKENS = 64, 4, 16
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
PROMPT = [3 + (i * i * 31 + i * 17) % (VOCAB_SIZE - 3) for i in range(CHUNKS * CHUNK + 20)]
PIECE = 64
"""Bytes of KV that lie nowhere else by chance."""


def lying(memory: memoryview | bytes) -> Iterator[bytes]:
    """The payloads of the chunks in a node's memory."""
    view = memoryview(memory)
    for entry in scan(view):
        yield bytes(view[entry.offset + HEADER_BYTES : entry.offset + entry.length])


def read_all(subject: ClusterHandle) -> list[bytes]:
    """What any process of the same user sees of the nodes' memory."""
    with segments(subject.launcher.pids, subject.nodes) as memories:
        return [bytes(memory) for memory in memories]


@pytest.mark.parametrize("transport", ["tcp"])
async def test_answers_are_those_of_generate_and_who_reads_memory_or_disk_finds_no_kv(
    transport: str, tmp_path: Path
) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    found: dict[bool, list[bytes]] = {}
    disks: dict[bool, list[bytes]] = {}
    for encrypt in (False, True):
        folder = tmp_path / str(encrypt)
        folder.mkdir()
        overrides = [
            secret_override(folder),
            f"kv.encrypt={str(encrypt).lower()}",
            f"tiers.disk={{path: {folder}/disk, size: 16MiB}}",
        ]
        async with cluster(
            folder, engine="torch", model=model, transport=transport, prefillers=1, decoders=1, overrides=overrides
        ) as subject:
            answer = await subject.stream(PROMPT, **GREEDY)
            assert_identical(load_reference(model), PROMPT, answer.token_ids)
            leg = next(leg for leg in (await subject.explain(answer.id))["legs"] if leg["kind"] == "decode")
            assert leg["cached_tokens"] >= CHUNKS * CHUNK, "loaded from what the prefiller stored"
            assert {moved["transport"] for moved in leg["moved"]} == {transport}

            async def saved(subject: ClusterHandle = subject) -> bool:
                counts = [tier.counts.get("saved", 0) for name in subject.nodes for tier in (await told(subject, name))]
                return sum(counts) >= CHUNKS

            await subject.until(saved, 30)
            found[encrypt] = read_all(subject)
        disks[encrypt] = [file.read_bytes() for file in (folder / "disk").rglob("*") if file.is_file()]
    kv = [payload[:PIECE] for memory in found[False] for payload in lying(memory) if any(payload[:PIECE])]
    assert len(kv) >= CHUNKS and any(piece in disk for piece in kv for disk in disks[False]), "in the clear it is there"
    assert sum(1 for memory in found[True] for _ in lying(memory)) >= CHUNKS
    assert not any(piece in where for piece in kv for where in (*found[True], *disks[True]))


async def told(subject: ClusterHandle, name: str) -> list:
    return (await subject.node_info(name)).tiers


async def test_a_node_that_does_not_encrypt_shares_no_kv_and_is_named(tmp_path: Path) -> None:
    """As in an upgrade that has not reached it, or with another file."""

    def place(plan: ProcessPlan) -> ProcessPlan:
        if plan.name != "prefill-0":
            return plan
        return replace(plan, command=(*plan.command, "--set", "kv.encrypt=false"))

    overrides = [secret_override(tmp_path), "kv.encrypt=true", "router.policy=round_robin"]
    async with cluster(tmp_path, prefillers=2, decoders=1, overrides=overrides, place=place) as subject:
        engine = subject.config.engine
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        for number in range(4):
            prompt = [1 + (number * 977 + at * 31) % 40_000 for at in range(CHUNKS * CHUNK + 20)]
            body = await subject.complete(prompt, **GREEDY)
            assert body["choices"][0]["token_ids"] == expected_tokens(engine, prompt, sampling)[0]
            route = (await subject.explain(body["id"]))["route"]
            assert route["prefiller"] in (None, "prefill-1"), "the other's KV would be of no use"

        async def named() -> bool:
            problems = str((await subject.status())["problems"])
            return "prefill-0" in problems and "kv.encrypt" in problems

        await subject.until(named, 20)


async def test_chunks_that_somebody_changes_are_computed_again_and_counted(tmp_path: Path) -> None:
    overrides = [secret_override(tmp_path), "kv.encrypt=true", "router.policy=round_robin"]
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=overrides) as subject:
        engine = subject.config.engine
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        prompt = list(range(1, CHUNKS * CHUNK + 21))
        right = expected_tokens(engine, prompt, sampling)[0]
        assert (await subject.complete(prompt, **GREEDY))["choices"][0]["token_ids"] == right
        with segments(subject.launcher.pids, subject.nodes) as memories:
            assert change_all(memories, "forge", CHUNK) >= CHUNKS
        assert (await subject.complete(prompt, **GREEDY))["choices"][0]["token_ids"] == right

        async def reported() -> bool:
            return (await subject.stats()).counters.get("quarantined_forged", 0) > 0

        await subject.until(reported, 20)
