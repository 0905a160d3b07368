"""Documents that clients name, over whole clusters of real processes: reused in another order, by another node, after a
restart from disk, and while decoders are killed in the middle of answers."""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from support.cluster import ClusterHandle, EngineKind, cluster
from support.mid_answer import killed_at_work
from support.tiny_models import make_tiny_model

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]

WORDS = ["ferry", "train", "harbour", "cargo", "rail", "bridge", "tide", "rope", "engine", "deck", "signal", "winter"]
SYSTEM = {"role": "system", "content": "Answer from the texts alone."}
TEXTS = [" ".join(random.Random(seed).choices(WORDS, k=12)) + f", text {seed}." for seed in range(4)]
ON = ["kv.blend={mode: first_k, k: 8, shadow: 0}"]
SLOW = ["engine.prefill_tokens_per_s=200", "tiers.wait_s=60", "tiers.warm_up=0"]
"""So that a tier is worth waiting for, on whatever machine, and has not been read before it is asked."""


async def ask(subject: ClusterHandle, order: Sequence[int], question: str, **fields: Any) -> tuple[dict[str, Any], str]:
    """The answer's body, and the header that says whether it is approximate."""
    body = {
        "model": subject.config.model.name,
        "max_tokens": 8,
        "temperature": 0,
        "ignore_eos": True,
        "messages": [SYSTEM, {"role": "user", "content": question}],
        "documents": [{"text": TEXTS[at]} for at in order],
    }
    status, headers, answer = await subject.post("/v1/chat/completions", {**body, **fields})
    assert status == 200, answer
    return answer, headers["x-kvferry-approximate"]


def details(answer: dict[str, Any]) -> dict[str, int]:
    found: dict[str, int] = answer["usage"]["prompt_tokens_details"]
    return found


@pytest.mark.parametrize("engine", ["sim", "torch"])
async def test_documents_of_one_request_are_reused_by_another_in_another_order(
    tmp_path: Path, engine: EngineKind
) -> None:
    model = make_tiny_model("qwen3", tmp_path / "model") if engine == "torch" else None
    async with cluster(
        tmp_path, engine=engine, model=model, prefillers=1, decoders=1, overrides=[*ON, "router.min_prefill_tokens=16"]
    ) as subject:
        first, _ = await ask(subject, [0, 1, 2], "Which one?")
        legs = {leg["kind"]: leg for leg in (await subject.explain(first["id"]))["legs"]}
        assert legs["prefill"]["computed_tokens"] > 0 and legs["decode"]["prepared_tokens"] is None

        async def known() -> bool:
            again, _ = await ask(subject, [0, 1, 2], "Which one?")
            return (await subject.explain(again["id"]))["route"]["reason"] == "all_chunks_cached"

        await subject.until(known, 30)  # the router follows the index
        second, approximate = await ask(subject, [2, 0, 1], "And why, of all of them?")
        record = await subject.explain(second["id"])
        assert record["route"]["prefiller"] is None, "nothing is left for one to compute"
        said = record["documents"]
        assert (said["count"], said["k"], said["why_computed"]) == (3, 8, "")
        assert details(second)["approximate_tokens"] == record["approximate_tokens"] > said["tokens"] // 2
        assert sum(details(second).values()) == second["usage"]["prompt_tokens"] and approximate == "true"
        assert all(not leg["prepared_tokens"] for leg in record["legs"]), "no document was computed again"


async def test_with_the_mode_off_documents_are_text_and_the_prompt_has_the_same_tokens(tmp_path: Path) -> None:
    seen = []
    for number, overrides in enumerate((ON, [])):
        folder = tmp_path / str(number)
        folder.mkdir()
        async with cluster(folder, prefillers=1, decoders=1, overrides=overrides) as subject:
            answer, approximate = await ask(subject, [1, 0], "Why?", return_token_ids=True)
            record = await subject.explain(answer["id"])
            seen.append((answer["prompt_token_ids"], record["documents"]["why_computed"], approximate))
    assert seen[0][0] == seen[1][0]
    assert [why for _, why, _ in seen] == ["", "kv.blend.mode is off"] and seen[1][2] == "false"


async def test_documents_are_reused_from_disk_after_the_cluster_was_stopped(tmp_path: Path) -> None:
    disk = [*ON, f"tiers.disk={{path: {tmp_path}/disk, size: 32MiB}}"]
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=disk) as subject:
        first, _ = await ask(subject, [0, 1, 2], "Which one?")
        tokens = (await subject.explain(first["id"]))["documents"]["tokens"]

        async def saved() -> bool:
            reports = [await subject.node_info(node) for node in subject.nodes]
            return sum(one.counts.get("saved", 0) for report in reports for one in report.tiers) >= 3 + tokens // 64

        await subject.until(saved, 30)
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=[*disk, *SLOW]) as subject:
        second, approximate = await ask(subject, [2, 0, 1], "And why?")
        record = await subject.explain(second["id"])
        assert approximate == "true" and record["approximate_tokens"] > tokens // 2
        assert any(one["tier"] == "disk" for leg in record["legs"] for one in leg["promoted"])


async def test_a_decoder_that_is_killed_in_mid_stream_is_followed_by_one_that_reuses_them_too(tmp_path: Path) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=2, overrides=[*ON, "engine.inter_token_s=0.05"]) as subject:
        await ask(subject, [0, 1, 2], "Which one?")
        body = {
            "model": subject.config.model.name,
            "max_tokens": 60,
            "temperature": 0,
            "ignore_eos": True,
            "messages": [SYSTEM, {"role": "user", "content": "Who?"}],
            "documents": [TEXTS[at] for at in (2, 1, 0)],
        }

        async def streamed() -> list[dict[str, Any]]:
            return [chunk async for chunk in subject.events("/v1/chat/completions", body)]

        told = await killed_at_work(subject, streamed)
        record, usage = told.after, told.answer[-1]["usage"]
        decoders = [leg for leg in record["legs"] if leg["kind"] == "decode"]
        assert record["state"] == "ok" and len(decoders) > 1
        assert decoders[-1]["node"] != told.before["route"]["decoder"]
        assert all(leg["approximate_tokens"] for leg in (decoders[0], decoders[-1]))
        assert usage["prompt_tokens_details"]["approximate_tokens"] == record["approximate_tokens"]
        assert usage["completion_tokens"] == 60
