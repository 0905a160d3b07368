"""A cluster with `kv.encrypt`: its answers are those of `generate`, its memory and its disk show no KV to who reads
them, and a node that does not encrypt shares none with the others, and is named."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from support.attacks import secret_override
from support.chunk_attacks import change_all, segments
from support.cluster import cluster
from support.generate_reference import assert_identical, load_reference
from support.tiny_models import VOCAB_SIZE, make_tiny_model

from engines.sim.reference import expected_tokens
from kvcore.config.security import SecretConfig
from kvcore.trust.secrets import open_secrets
from kvferry.launch.processes import ProcessPlan
from kvstore.chunk_format import HEADER_BYTES, parse
from kvstore.integrity.checks import Integrity
from kvstore.manifest import scan
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

CHUNK, CHUNKS, NEW_TOKENS = 64, 4, 16
GREEDY = {"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "return_token_ids": True}
PROMPT = [3 + (i * i * 31 + i * 17) % (VOCAB_SIZE - 3) for i in range(CHUNKS * CHUNK + 20)]
PIECE = 64
"""Bytes of KV that lie nowhere else by chance."""


def opened(memory: bytes, integrity: Integrity) -> Iterator[bytes]:
    """The KV of the chunks in a node's memory, as only who has the secret finds it."""
    view = memoryview(memory)
    for entry in scan(view):
        chunk = view[entry.offset : entry.offset + entry.length]
        header = parse(chunk[:HEADER_BYTES])
        assert header is not None and header.encrypted
        kv = memoryview(bytearray(header.payload_length))
        assert integrity.open(header, chunk[HEADER_BYTES:], kv)
        yield bytes(kv)


async def test_answers_are_those_of_generate_and_who_reads_memory_or_disk_finds_no_kv(tmp_path: Path) -> None:
    model = make_tiny_model("llama", tmp_path / "model")
    overrides = [secret_override(tmp_path), "kv.encrypt=true", f"tiers.disk={{path: {tmp_path}/disk, size: 16MiB}}"]
    integrity = Integrity("mac", open_secrets(SecretConfig(file=str(tmp_path / "secret"))), encrypt=True)
    async with cluster(
        tmp_path, engine="torch", model=model, transport="tcp", prefillers=1, decoders=1, overrides=overrides
    ) as subject:
        answer = await subject.stream(PROMPT, **GREEDY)
        assert_identical(load_reference(model), PROMPT, answer.token_ids)
        leg = next(leg for leg in (await subject.explain(answer.id))["legs"] if leg["kind"] == "decode")
        assert leg["cached_tokens"] >= CHUNKS * CHUNK, "loaded from what the prefiller stored"
        assert {moved["transport"] for moved in leg["moved"]} == {"tcp"}

        async def saved() -> bool:
            tiers = [tier for name in subject.nodes for tier in (await subject.node_info(name)).tiers]
            return sum(tier.counts.get("saved", 0) for tier in tiers) >= CHUNKS

        await subject.until(saved, 60)
        with segments(subject.launcher.pids, subject.nodes) as memories:
            there = [bytes(memory) for memory in memories]
    disks = [file.read_bytes() for file in (tmp_path / "disk").rglob("*") if file.is_file()]
    kv = [one[at : at + PIECE] for memory in there for one in opened(memory, integrity) for at in (0, len(one) // 2)]
    kv = [piece for piece in kv if any(piece)]
    assert len(kv) >= CHUNKS and disks
    assert not any(piece in where for piece in kv for where in (*there, *disks))


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

        await subject.until(named, 60)


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

        await subject.until(reported, 60)
