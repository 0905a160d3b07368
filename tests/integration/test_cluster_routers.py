"""Two routers of one cluster file, as processes."""

import os
import random
import signal
from contextlib import suppress
from pathlib import Path

import aiohttp
import msgspec
import pytest
from support.cluster import ClusterHandle, cluster
from support.ports import free_ports
from test_cluster_chaos import RESTART_S, ask, load, make_prompt

from kvcore.tenants.keys import KeyFile, TenantLimits, new_key

pytestmark = pytest.mark.slow


class Second(ClusterHandle):
    """The same cluster, asked through its other router."""

    def __init__(self, first: ClusterHandle) -> None:
        plans = list(first.plans.values())
        super().__init__(first.config, plans, first.launcher, first.session, inner=first.inner, admin=first.admin)

    @property
    def url(self) -> str:
        return self.plans["router-2"].url

    @property
    def operators_url(self) -> str:
        return self.url


async def test_a_router_that_is_killed_loses_its_own_connections_alone_and_the_other_gives_the_same_answer(tmp_path):
    (port,) = free_ports(1)
    async with cluster(tmp_path, overrides=[f"routers=['127.0.0.1:{port}']"]) as subject:
        second = Second(subject)
        await subject.until(second.all_ready, RESTART_S)
        prompt = make_prompt(random.Random(3), 640)
        async with load(subject) as running:
            await running.reach(running.answered + 5)
            pid = subject.launcher.pids["router-2"]
            body = {
                "model": subject.config.model.name,
                "prompt": prompt,
                "max_tokens": 400,
                "seed": 1,
                "ignore_eos": True,
            }
            with pytest.raises(aiohttp.ClientError):
                async for _ in second.events("/v1/completions", body):
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            again = await ask(subject, prompt, 400)
            assert again["cached"] > 0, "what the first try computed is found"
            await subject.launcher.wait_restarted("router-2", pid, RESTART_S)
            await subject.until(second.all_ready, RESTART_S)
            assert (await ask(second, prompt, 20))["cached"] > 0
        assert (await subject.status())["requests"]["failed"] == 0


async def test_what_a_tenant_asks_of_one_router_counts_at_the_other(tmp_path: Path):
    (port,) = free_ports(1)
    key, record = new_key("t", admin=False, created="")
    admin, admins = new_key("ops", admin=True, created="")
    keys = tmp_path / "keys.json"
    limits = {"t": TenantLimits(requests_per_minute=20)}
    keys.write_bytes(msgspec.json.encode(KeyFile(tenants=limits, keys=[record, admins])))
    keys.chmod(0o600)
    (tmp_path / "secret").write_text(os.urandom(32).hex())
    (tmp_path / "secret").chmod(0o600)
    security = f"security={{secret: {{file: {tmp_path}/secret}}, keys: {{file: {keys}}}}}"
    overrides = [f"routers=['127.0.0.1:{port}']", security]
    async with (
        cluster(tmp_path, prefillers=0, decoders=1, overrides=overrides, key=admin) as subject,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {key}"}) as client,
    ):
        second = Second(subject)
        await subject.until(second.all_ready, RESTART_S)

        async def accepted(of: ClusterHandle) -> int:
            """How many requests, one after the other, until one is too much."""
            body = {"model": subject.config.model.name, "prompt": [1, 2, 3], "max_tokens": 1}
            number = 0

            async def is_too_much() -> bool:
                nonlocal number
                async with client.post(f"{of.url}/v1/completions", json=body) as reply:
                    if reply.status == 429:
                        return True
                    assert reply.status == 200, await reply.text()
                number += 1
                return False

            await subject.until(is_too_much, RESTART_S)
            return number

        assert await accepted(subject) >= 20
        assert await accepted(second) < 20, "by itself it would take twenty"
