"""A cluster of real processes whose router compares what was reused: exactly, and of documents."""

from pathlib import Path

import pytest
from support.cluster import ClusterHandle, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SHADOWS = ("kv.shadow=1", "kv.blend={mode: first_k, shadow: 1}")
TEXTS = ["first text " * 30, "second text " * 30]


async def compared(subject: ClusterHandle, what: str) -> int:
    async with subject.session.get(f"{subject.url}/v1/blend") as reply:
        assert reply.status == 200
        report = await reply.json()
    return int(report["comparisons"].get(what, 0))


async def test_both_kinds_of_reuse_are_compared_in_the_background(tmp_path: Path) -> None:
    async with cluster(tmp_path, prefillers=1, decoders=1, overrides=SHADOWS) as subject:
        for _ in range(2):
            await subject.complete(list(range(3, 203)), max_tokens=2, temperature=0)

        async def exact() -> bool:
            return await compared(subject, "exact same") > 0

        await subject.until(exact, 60)
        for texts in (TEXTS, TEXTS[::-1]):
            await subject.complete("which?", documents=texts, max_tokens=2, temperature=0)

        async def of_documents() -> bool:
            return await compared(subject, "documents compared") > 0

        await subject.until(of_documents, 60)
        assert await compared(subject, "exact diverged") == 0
