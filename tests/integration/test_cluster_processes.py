"""A router of several processes on one port: one is killed, one is told to stop, and what any of them says."""

import asyncio
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from support.cluster import ClusterHandle, cluster
from support.ports import free_ports
from test_cluster_chaos import RESTART_S, ask, expect, load, make_prompt

from kvcore.config.servers import process_urls
from kvcore.tenants.keys import KeyFile, TenantLimits, new_key

pytestmark = pytest.mark.slow
NAMES = ("router.1", "router.2")


def neighbours() -> int:
    """The first of two ports that are free."""
    while True:
        first, second = free_ports(2)
        if second == first + 1:
            return first


@asynccontextmanager
async def two_processes(tmp_path: Path, *overrides: str, **named: Any) -> AsyncIterator[ClusterHandle]:
    own = ["router.processes=2", f"router.process_port={neighbours()}", *overrides]
    async with cluster(tmp_path, overrides=own, **named) as subject:
        yield subject


def fresh() -> aiohttp.ClientSession:
    """Each request by a connection of its own, so that the kernel deals it out."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True, limit=0))


def completion(subject: ClusterHandle, prompt: list[int], max_tokens: int) -> dict[str, Any]:
    name = subject.config.model.name
    return {"model": name, "prompt": prompt, "max_tokens": max_tokens, "seed": 1, "ignore_eos": True}


async def answers(subject: ClusterHandle, count: int) -> list[tuple[str, dict[str, Any]]]:
    """(request id that was sent, body of the answer) of so many requests."""

    async def one(session: aiohttp.ClientSession, name: str) -> tuple[str, dict[str, Any]]:
        body = completion(subject, [1, 2, 3], 2)
        async with session.post(f"{subject.url}/v1/completions", json=body, headers={"X-Request-Id": name}) as reply:
            assert reply.status == 200, await reply.text()
            return name, await reply.json()

    async with fresh() as session:
        return [await one(session, f"mine-{number}") for number in range(count)]


async def test_any_process_answers_for_all(tmp_path: Path):
    async with two_processes(tmp_path, prefillers=1, decoders=1) as subject:
        urls = process_urls(subject.config)
        sent = await answers(subject, 40)

        async def hear_each_other() -> bool:
            return not any("say nothing of their load" in line for line in (await subject.status())["problems"])

        await subject.until(hear_each_other, RESTART_S)
        async with fresh() as session:

            async def told(url: str) -> Any:
                async with session.get(url) as reply:
                    assert reply.status == 200, await reply.text()
                    return await reply.json()

            for url in urls:
                by = Counter[str]()
                for name, body in sent:
                    found = [await told(f"{url}/v1/requests/{given}") for given in (name, body["id"])]
                    assert found[0] == found[1] and found[0]["id"] == body["id"]
                    by[found[0]["process"]] += 1
                assert set(by) == set(NAMES), "the kernel deals connections out to both"
                own = await told(f"{url}/v1/process")
                assert own["requests"]["total"] == by[own["name"]]
                listed = (await told(f"{url}/v1/requests"))["requests"]
                assert [one["id"] for one in listed[:40]] == [body["id"] for _, body in reversed(sent)]
                status = await told(f"{url}/v1/cluster")
                assert status["requests"]["total"] == 40 and [one["name"] for one in status["processes"]] == [*NAMES]
                assert (await told(f"{url}/v1/cache/stats"))["start"]["requests"] == 40
                metrics = await subject.metrics(url)
                counts = [metrics[f'kvferry_router_request_seconds_count{{process="{name}"}}'] for name in NAMES]
                assert counts == [by[name] for name in NAMES]
            async with session.get(f"{urls[0]}/v1/requests/none") as reply:
                assert reply.status == 404


async def stream_on(subject: ClusterHandle, session: aiohttp.ClientSession, prompt: list[int], name: str) -> list[int]:
    """Its tokens."""
    body = {**completion(subject, prompt, 300), "stream": True, "return_token_ids": True}
    async with session.post(f"{subject.url}/v1/completions", json=body, headers={"X-Request-Id": name}) as reply:
        assert reply.status == 200, await reply.text()
        tokens: list[int] = []
        async for line in reply.content:
            data = line.strip().removeprefix(b"data: ")
            if data == b"[DONE]":
                return tokens
            for choice in msgspec.json.decode(data)["choices"] if data and not data.startswith(b":") else ():
                tokens += choice.get("token_ids") or []
    raise AssertionError("the stream ended without [DONE]")


async def test_a_process_that_is_killed_loses_its_own_connections_alone(tmp_path: Path):
    async with two_processes(tmp_path, "engine.inter_token_s=0.02") as subject, fresh() as session:
        draw = random.Random(5)
        prompts = [make_prompt(draw, 640) for _ in range(20)]  # one process had all of 12 once in 2,048 times
        streams = [
            asyncio.create_task(stream_on(subject, session, prompt, f"s-{number}"))
            for number, prompt in enumerate(prompts)
        ]

        async def at() -> list[str]:
            """The process of each that has its first token."""
            found = [await subject.explain(f"s-{number}") for number in range(len(prompts))]
            return [one["process"] for one in found if one["ttft_s"] is not None]

        where = await subject.until(lambda: _all_there(at, len(prompts)), RESTART_S)
        assert set(where) == set(NAMES)
        pid = subject.launcher.pids["router.1"]
        os.kill(pid, signal.SIGKILL)
        ended = await asyncio.gather(*streams, return_exceptions=True)
        for number, (outcome, process) in enumerate(zip(ended, where, strict=True)):
            if process == "router.2":
                assert outcome == expect(subject, prompts[number], 300, 1), outcome
            else:
                assert isinstance(outcome, aiohttp.ClientError), outcome
        lost = [prompts[number] for number, process in enumerate(where) if process == "router.1"]
        for again in await asyncio.gather(*(ask(subject, prompt, 300) for prompt in lost)):
            assert again["cached"] > 0, "what the first try computed is found"
        await subject.launcher.wait_restarted("router.1", pid, RESTART_S)
        status = await subject.status()
        assert [one["problem"] for one in status["processes"]] == [None, None]


async def _all_there(at: Any, count: int) -> list[str]:
    with suppress(AssertionError):
        found: list[str] = await at()
        return found if len(found) == count else []
    return []


async def test_a_process_that_stops_under_load_loses_no_request(tmp_path: Path):
    async with two_processes(tmp_path) as subject, fresh() as session:
        wrong: list[object] = []
        served = 0
        over = asyncio.Event()

        async def short() -> None:
            nonlocal served
            draw = random.Random()
            while not over.is_set():
                body = completion(subject, make_prompt(draw, 80), 3)
                try:
                    async with session.post(f"{subject.url}/v1/completions", json=body) as reply:
                        if reply.status != 200:
                            wrong.append(await reply.text())
                except (aiohttp.ClientError, OSError) as error:
                    wrong.append(error)
                served += 1

        async with load(subject) as kept, asyncio.TaskGroup() as clients:  # whose connections are kept
            for _ in range(4):
                clients.create_task(short())
            for name in NAMES:
                await kept.reach(kept.answered + 20)
                before, pid = served, subject.launcher.pids[name]
                os.kill(pid, signal.SIGTERM)
                await subject.launcher.wait_restarted(name, pid, RESTART_S)
                assert served > before
            over.set()
        assert not wrong


async def test_a_process_that_hangs_is_killed_so_that_the_other_has_its_connections(tmp_path: Path):
    async with two_processes(tmp_path, prefillers=0, decoders=1) as subject, fresh() as session:
        hung = subject.launcher.pids["router.2"]
        os.kill(hung, signal.SIGSTOP)
        waited = Counter[str]()

        async def one() -> None:
            """As a client that tries again where its connection breaks."""
            while True:
                try:
                    body = completion(subject, [1, 2, 3], 2)
                    async with session.post(f"{subject.url}/v1/completions", json=body) as reply:
                        waited["answered"] += reply.status == 200
                        return
                except aiohttp.ClientError:
                    waited["broken"] += 1

        async with asyncio.timeout(RESTART_S):
            await asyncio.gather(*(one() for _ in range(40)))
        await subject.launcher.wait_restarted("router.2", hung, RESTART_S)
        assert waited["answered"] == 40 and waited["broken"] >= 1, waited


async def test_what_a_tenant_asks_of_one_process_counts_at_the_other(tmp_path: Path):
    key, record = new_key("t", admin=False, created="")
    admin, admins = new_key("ops", admin=True, created="")
    keys, secret = tmp_path / "keys.json", tmp_path / "secret"
    limits = {"t": TenantLimits(requests_per_minute=20)}
    keys.write_bytes(msgspec.json.encode(KeyFile(tenants=limits, keys=[record, admins])))
    secret.write_text(os.urandom(32).hex())
    for file in (keys, secret):
        file.chmod(0o600)
    (admin_port,) = free_ports(1)
    more = [
        f"security={{secret: {{file: {secret}}}, keys: {{file: {keys}}}}}",
        f"router.admin_port={admin_port}",
    ]
    async with (
        two_processes(tmp_path, *more, prefillers=0, decoders=1, key=admin) as subject,
        fresh() as session,
    ):
        headers = {"Authorization": f"Bearer {key}"}
        statuses = Counter[int]()
        ids, began = [], time.monotonic()
        for _ in range(60):
            body = completion(subject, [1, 2, 3], 1)
            async with session.post(f"{subject.url}/v1/completions", json=body, headers=headers) as reply:
                statuses[reply.status] += 1
                if reply.status == 200:
                    ids.append((await reply.json())["id"])
        saved = (time.monotonic() - began) / 60 * 20
        assert 20 <= statuses[200] <= 21 + saved, "each by itself would give twenty"
        for name in ids:  # on the public port a tenant sees its own requests, whichever process had them
            async with session.get(f"{subject.url}/v1/requests/{name}", headers=headers) as reply:
                assert reply.status == 200, await reply.text()
            async with session.get(f"{subject.url}/v1/requests/{name}") as reply:
                assert reply.status == 401
        for url in process_urls(subject.config):
            async with session.get(f"{url}/v1/process/requests", headers=headers) as reply:
                assert reply.status == 403, "a tenant's key is none for operators' questions"
