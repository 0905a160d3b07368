"""A cluster with a secret: vLLM's workers write chunks with MACs, or encrypted, and load none that somebody changed."""

from pathlib import Path

import pytest
from support.attacks import secret_override
from support.chunk_attacks import change_all, cut, segments
from support.cluster import cluster
from support.vllm_questions import BLOCK, NEW_TOKENS, Questions, prompt_of
from support.vllm_reference import References

from kvcore.config.security import SecretConfig
from kvcore.trust.secrets import open_secrets
from kvstore.chunk_format import HEADER_BYTES, Expected
from kvstore.integrity.checks import Integrity
from kvstore.manifest import scan
from kvstore.types import GetOutcome

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
CHUNKS = 4
PROMPT = prompt_of(CHUNKS * BLOCK + 20, 400)  # its answer is recorded


def proved(memory: memoryview, integrity: Integrity) -> int:
    """How many chunks lie there; each has to have a MAC, or a tag, that is right."""
    entries = scan(memory)
    for entry in entries:
        chunk = memory[entry.offset : entry.offset + entry.length]
        header, _ = cut(bytes(chunk))
        expected = Expected(entry.key, header.fingerprint, entry.generation, header.payload_length)
        assert integrity.check(chunk[:HEADER_BYTES], expected, [chunk[HEADER_BYTES:]]) is GetOutcome.OK
        chunk.release()
    return len(entries)


@pytest.mark.parametrize("encrypt", [False, True], ids=["mac", "encrypted"])
async def test_workers_write_sealed_chunks_and_load_no_forged_one(
    encrypt: bool, tiny: Path, single: References, tmp_path: Path
) -> None:
    questions = Questions(single, [PROMPT], NEW_TOKENS)
    overrides = [
        "router.policy=round_robin",
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        "engine.args.kv-cache-memory-bytes=14M",
        "engine.args.enable-prefix-caching=false",  # all that the decoder reads again is the store's
        *(f"nodes.{node}.segment=64MiB" for node in ("prefill-0", "decode-0")),
        secret_override(tmp_path),
        f"kv.encrypt={str(encrypt).lower()}",
    ]
    integrity = Integrity("mac", open_secrets(SecretConfig(file=str(tmp_path / "secret"))), encrypt=encrypt)
    async with cluster(tmp_path, engine="vllm", model=tiny, prefillers=1, decoders=1, overrides=overrides) as subject:
        first = await subject.explain((await questions.ask(subject, PROMPT)).id)
        leg = next(leg for leg in first["legs"] if leg["kind"] == "decode")
        assert leg["cached_tokens"] >= CHUNKS * BLOCK, "loaded from the prefiller's chunks"
        with segments(subject.launcher.pids, subject.nodes) as memories:
            assert sum(proved(memory, integrity) for memory in memories) >= CHUNKS
            assert change_all(memories, "forge", BLOCK) >= CHUNKS
        await questions.ask(subject, PROMPT)

        async def reported() -> bool:
            return (await subject.stats()).counters.get("quarantined_forged", 0) > 0

        await subject.until(reported, 60)
