"""A process on the machine changes chunks in the nodes' segments behind a running cluster. Without a secret its clients
get wrong tokens and status 200."""

import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio
from support.attacks import secret_override
from support.chunk_attacks import ATTACKS, change_all, segments
from support.cluster import ClusterHandle, cluster

from engines.sim.reference import expected_tokens
from kvcore.config.schema import SimEngineConfig
from nodeapi.sampling import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module")]

CHUNK = 64
CHUNKS = 4
SECURED = "secured"


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=["open", SECURED])
async def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[ClusterHandle]:
    """Round robin: the second request for a prompt goes to the decoder that does not have its blocks."""
    folder = tmp_path_factory.mktemp("forged")
    overrides = ["router.policy=round_robin", "router.decoder_prefill=needed"]  # whatever is faster on this machine
    if request.param == SECURED:
        overrides.append(secret_override(folder))
    async with cluster(folder, prefillers=1, overrides=overrides) as handle:
        yield handle


async def ask(subject: ClusterHandle, prompt: list[int]) -> tuple[bool, dict[str, Any]]:
    """Whether the tokens were the right ones, and the router's record."""
    body = await subject.complete(prompt, max_tokens=8, temperature=0, ignore_eos=True, return_token_ids=True)
    sampling = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert isinstance(subject.config.engine, SimEngineConfig)
    right = expected_tokens(subject.config.engine, prompt, sampling)[0]
    return body["choices"][0]["token_ids"] == right, await subject.explain(body["id"])


@pytest.mark.parametrize("attack", ATTACKS)
async def test_a_changed_chunk_is_computed_again_where_there_is_a_secret(subject: ClusterHandle, attack: str) -> None:
    draw = random.Random(attack)
    prompt = [draw.randrange(1, 50_000) for _ in range(CHUNKS * CHUNK + 20)]
    secured = subject.config.security.secret is not None
    told = (await subject.stats()).counters.get(f"quarantined_{ATTACKS[attack].outcome}", 0)
    right, first = await ask(subject, prompt)
    assert right
    with segments(subject.launcher.pids, subject.nodes) as memories:
        assert change_all(memories, attack, CHUNK) >= CHUNKS
    right, record = await ask(subject, prompt)
    reader = next(leg["node"] for leg in record["legs"] if leg["kind"] == "decode")
    assert reader != first["route"]["decoder"]
    if not secured:
        assert not right, "the attack is one"
        return
    assert right
    name = f"quarantined_{ATTACKS[attack].outcome}"

    async def reported() -> bool:
        return (await subject.stats()).counters.get(name, 0) > told

    await subject.until(reported, 60)
    assert (await ask(subject, prompt))[0], "what was computed anew is as good as before"
