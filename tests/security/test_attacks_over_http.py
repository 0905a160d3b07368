"""What strangers can do over HTTP: all of it with a cluster that is open, none of it with one that has a secret."""

import asyncio
import re
from collections import Counter

import aiohttp
import pytest
from support.attacks import OVER_HTTP, secret_override, stranger
from support.cluster import ClusterHandle, cluster
from support.process_plans import started

from kvferry.launch.processes import plan_processes
from kvferry.secret import run_new
from router.tenants.paths import POOLING

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]
PROMPT = list(range(3, 203))
PROCESSES = ("metadata-server", "router", "prefill-0", "prefill-0.engine", "decode-0", "decode-0.engine")
"""Of a cluster with one node of each kind, as its logs call them."""
ASKING = {"/v1/nodes", "/v1/nodes/rebalance", "/v1/janitor", "/v1/cache/generations", "/v1/blend"}
CLIENTS = {"/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/messages/count_tokens"}
CLIENTS |= {"/inference/v1/generate", "/v1/chat/completions/batch"}
CLIENTS |= POOLING
CLIENTS |= {"/tokenize", "/detokenize", "/ping", "/v1/responses", "/v1/responses/{response_id}/cancel"}


async def tried(handle: ClusterHandle) -> tuple[set[str], list[str]]:
    async with stranger(handle) as it:
        worked = {attack.__name__ for attack in OVER_HTTP if await attack(it)}
        return worked, it.refusals


async def orders_without_proof(handle: ClusterHandle) -> set[str]:
    """The router's routes that change something or have others asked, but for the OpenAI API, and that a stranger gets
    to."""
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{handle.url}/openapi.json") as reply:
            paths = (await reply.json())["paths"]
        orders = {path for path, methods in paths.items() if "post" in methods} - CLIENTS
        assert len(orders) > 10
        asked = {path for path in ASKING if (await session.get(handle.url + path)).status != 401}
        return asked | {path for path in orders if (await session.post(handle.url + path, json={})).status != 401}


async def test_a_stranger_can_do_all_of_it_to_an_open_cluster(tmp_path):
    async with cluster(tmp_path) as handle:
        worked, refusals = await tried(handle)
    assert worked == {attack.__name__ for attack in OVER_HTTP}
    assert not refusals


async def test_a_stranger_can_do_none_of_it_to_a_cluster_with_a_secret(tmp_path):
    async with cluster(tmp_path, overrides=[secret_override(tmp_path)]) as handle:
        before = await handle.complete(PROMPT, max_tokens=4, temperature=0, return_token_ids=True)
        worked, refusals = await tried(handle)
        assert worked == set()
        assert len(refusals) >= len(OVER_HTTP)
        assert set(refusals) == {"proof_refused"}
        assert await orders_without_proof(handle) == set()
        after = await handle.complete(PROMPT, max_tokens=4, temperature=0, return_token_ids=True)
        assert after["choices"][0]["token_ids"] == before["choices"][0]["token_ids"]
        assert after["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert (await handle.stats()).objects > 0
    secret = (tmp_path / "secret").read_text().strip()
    assert not [log for log in (tmp_path / "logs").glob("*.log") if secret in log.read_text()]


@pytest.mark.parametrize("theirs", ["none", "another"])
async def test_a_node_without_the_secret_is_refused_by_name_and_serving_goes_on(tmp_path, theirs):
    mine = secret_override(tmp_path)
    run_new(tmp_path / "other", rotate=False)
    other = {"none": "security.secret=null", "another": f"security.secret.file={tmp_path / 'other'}"}[theirs]
    async with cluster(tmp_path, overrides=[mine], without=["prefill-1"]) as handle:
        plans = plan_processes(handle.config, tmp_path / "cluster.yaml", [mine])
        (plan,) = (plan for plan in plans if plan.name == "prefill-1")
        log = tmp_path / "prefill-1.log"
        with started(plan, log, "--set", other):

            async def told() -> bool:
                nodes = {node["id"]: node for node in (await handle.status())["nodes"]}
                reason = nodes["prefill-1"]["reason"] or ""
                return "secret" in reason and "refused node=prefill-1" in log.read_text()

            await handle.until(told, 60.0)
            answers = await asyncio.gather(*(handle.complete(PROMPT, max_tokens=4) for _ in range(8)))
            assert len(answers) == 8
            legs = [leg["node"] for answer in answers for leg in (await handle.explain(answer["id"]))["legs"]]
            assert legs and "prefill-1" not in legs
        assert "security.secret" in log.read_text()


async def test_the_secret_is_changed_under_load_and_no_request_is_lost(tmp_path):
    async with cluster(tmp_path, overrides=[secret_override(tmp_path)], prefillers=1, decoders=1) as handle:
        done = asyncio.Event()
        answered = 0

        async def ask(seed: int) -> None:
            nonlocal answered
            while not done.is_set():
                prompt = [3 + (seed * 977 + answered * 31 + at) % 20_000 for at in range(150)]
                await handle.complete(prompt, max_tokens=4)
                answered += 1

        async def taken(changes: int) -> None:
            """Until each process has taken up so many, and requests were answered after that."""

            async def by_all() -> bool:
                logs = "".join(log.read_text() for log in (tmp_path / "logs").glob("*.log"))
                seen = Counter(re.findall(r" (\S+) kvcore\.trust secret_reloaded ", logs))
                return all(seen[name] >= changes for name in PROCESSES)

            await handle.until(by_all, 60.0)
            enough = answered + 10
            await handle.until(lambda: asyncio.sleep(0, answered >= enough), 60.0)

        async with asyncio.TaskGroup() as tasks:
            for seed in range(4):
                tasks.create_task(ask(seed))
            await taken(0)
            for changes in (1, 2):
                run_new(tmp_path / "secret", rotate=True)
                await taken(changes)
            newest = (tmp_path / "secret").read_text().split()[0]
            (tmp_path / "secret").write_text(newest + "\n")
            await taken(3)
            done.set()
        assert (await handle.status())["requests"]["failed"] == 0
        assert all(node["healthy"] for node in (await handle.status())["nodes"])
