"""Tenants of a cluster of vLLM engines: what is declared public is computed once for all of them, and nothing else."""

from pathlib import Path

import aiohttp
import msgspec
import pytest
from support.attacks import secret_override
from support.cluster import ClusterHandle, cluster

from kvcore.tenants.keys import KeyFile, new_key

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(600)]
PUBLIC = "You answer in one short sentence, and say so where you do not know. " * 12
TAIL, OTHER_TAIL = "What is a prefix cache for? " * 12, "And what is a lease? " * 16


async def ask(subject: ClusterHandle, key: str, prompt: str) -> tuple[str, int, int]:
    """The text, and of how many of the prompt's tokens there was KV; and how many it has."""
    body = {"model": subject.config.model.name, "prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {key}"}
    async with (
        aiohttp.ClientSession() as session,
        session.post(subject.url + "/v1/completions", json=body, headers=headers) as reply,
    ):
        answer = await reply.json()
        assert reply.status == 200, answer
        usage = answer["usage"]
        return answer["choices"][0]["text"], usage["prompt_tokens_details"]["cached_tokens"], usage["prompt_tokens"]


async def test_tenants_share_what_is_declared_public_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    made = {name: new_key(name, admin=name == "ops", created="") for name in ("ops", "one", "two")}
    keys = {name: key for name, (key, _) in made.items()}
    (tmp_path / "keys.json").write_bytes(
        msgspec.json.encode(KeyFile(tenants={}, keys=[record for _, record in made.values()]))
    )
    (tmp_path / "system.txt").write_text(PUBLIC)
    overrides = [
        secret_override(tmp_path),
        f"security.keys.file={tmp_path}/keys.json",
        f"security.keys.public=[{{file: {tmp_path}/system.txt}}]",
        "router.min_prefill_tokens=0",
        "router.decoder_prefill=needed",
        *(f"nodes.{node}.segment=64MiB" for node in ("prefill-0", "decode-0")),
    ]
    async with cluster(
        tmp_path, engine="vllm", model=tiny, prefillers=1, decoders=1, overrides=overrides, key=keys["ops"]
    ) as subject:
        chunk = subject.config.kv.chunk_tokens
        cold, none, _ = await ask(subject, keys["one"], PUBLIC + TAIL)
        warm, all_of_it, total = await ask(subject, keys["one"], PUBLIC + TAIL)
        theirs, public, _ = await ask(subject, keys["two"], PUBLIC + TAIL)
        _, of_another, _ = await ask(subject, keys["two"], PUBLIC + OTHER_TAIL)
        _, private, _ = await ask(subject, keys["two"], TAIL + PUBLIC)
        await ask(subject, keys["one"], OTHER_TAIL + PUBLIC)
        _, heard, _ = await ask(subject, keys["two"], OTHER_TAIL + PUBLIC)
    assert none == private == heard == 0
    assert cold == warm == theirs
    assert public == of_another > 0 and public % chunk == 0
    assert all_of_it >= public + chunk and total - all_of_it <= chunk
