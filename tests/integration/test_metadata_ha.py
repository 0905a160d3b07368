"""Two metadata servers over an etcd of three members, and a cluster that serves: whatever dies, hangs or is cut off."""

import asyncio
import contextlib
import json
import os
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path

import aiohttp
import pytest
from support.cluster import ClusterHandle, cluster
from support.cut_proxy import CutProxy, cut_proxy
from support.etcd_server import EtcdServer, etcd_server, needs_etcd
from support.metadata_words import key
from support.ports import free_ports
from support.process_tree import freeze
from test_cluster_chaos import ask, make_prompt

from kvcore.clock import SystemClock
from kvcore.config.servers import metadata_urls
from kvcore.errors import KVFerryError, NotLeaderError
from kvcore.types import ChunkKey
from kvferry.launch.processes import ProcessKind, ProcessPlan
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, endpoints_of
from metadata_server.leading.election import LEADER
from metadata_server.records.base import Guard, Records
from metadata_server.records.opening import open_records

pytestmark = list(needs_etcd)
LEASE_S = 3.0
NAMES = ("metadata-server", "metadata-server-2")


class Subject:
    """`ways`: of each metadata server to the members of etcd."""

    def __init__(self, handle: ClusterHandle, etcd: EtcdServer, ways: dict[str, list[CutProxy]]) -> None:
        self.handle, self.etcd, self.ways = handle, etcd, ways
        self.urls = dict(zip(NAMES, metadata_urls(handle.config.metadata_server), strict=True))
        self.answered = 0
        self.pinned: list[ChunkKey] = []
        """Whose pins were answered."""
        self._stopping = False

    async def leads(self, name: str) -> bool:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            timeout = aiohttp.ClientTimeout(total=0.5)
            async with self.handle.session.get(f"{self.urls[name]}/health", timeout=timeout) as reply:
                return bool(json.loads(await reply.read())["leads"])
        return False

    async def leader(self) -> str:
        """The name of who leads."""
        found = [name for name in NAMES if await self.leads(name)]
        assert len(found) <= 1, "two lead"
        return found[0] if found else ""

    async def load(self) -> None:
        """Ask without pause, half of it with a prefix that is known; every answer is exactly right."""
        draw = random.Random(11)
        prefix = make_prompt(draw, 300)
        while not self._stopping:
            prompt = prefix + make_prompt(draw, 40) if draw.random() < 0.5 else make_prompt(draw, 150)
            await ask(self.handle, prompt, 8)
            self.answered += 1

    async def pin(self, client: MetadataClient) -> None:
        for number in range(1, 1 << 30):
            if self._stopping:
                return
            with contextlib.suppress(KVFerryError):
                if (await client.pin([key(number)])).done:
                    self.pinned.append(key(number))
            await asyncio.sleep(0.02)

    async def go_on(self) -> None:
        """Until requests and pins were answered again."""
        requests, pins = self.answered, len(self.pinned)

        async def more() -> bool:
            return self.answered >= requests + 5 and len(self.pinned) > pins

        await self.handle.until(more, 60)

    async def rebuilt(self) -> bool:
        """Whether who leads has been told of all segments."""
        return (await self.handle.stats()).rebuilding == 0

    def stop(self) -> None:
        self._stopping = True


@asynccontextmanager
async def subject(tmp_path: Path) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        etcd = stack.enter_context(etcd_server(3))
        ways = {
            name: [await stack.enter_async_context(cut_proxy(member.port)) for member in etcd.members] for name in NAMES
        }

        def place(plan: ProcessPlan) -> ProcessPlan:
            if plan.kind is not ProcessKind.METADATA_SERVER:
                return plan
            urls = json.dumps([way.url for way in ways[plan.name]])
            return replace(plan, command=(*plan.command, "--set", f"metadata_server.records.endpoints={urls}"))

        records = {"kind": "etcd", "endpoints": etcd.urls, "timeout_s": 1.0}
        overrides = (
            f"metadata_server.records={json.dumps(records)}",
            f"metadata_server.standbys={json.dumps([f'127.0.0.1:{free_ports(1)[0]}'])}",
            f"metadata_server.lease_s={LEASE_S}",
            "metadata_server.timeout_s=0.5",
        )
        handle = await stack.enter_async_context(
            cluster(tmp_path, prefillers=1, decoders=1, overrides=overrides, place=place)
        )
        found = Subject(handle, etcd, ways)
        client = connect_client(endpoints_of(handle.config.metadata_server), SystemClock())
        stack.push_async_callback(client.aclose)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(found.load())
            tasks.create_task(found.pin(client))
            try:
                yield found
            finally:
                found.stop()
        pins = {pin.key for pin in (await client.pins()).pins}
        assert found.pinned and pins >= set(found.pinned), "an answered pin is lost"
        assert (await handle.status())["requests"]["failed"] == 0


async def taken_over(one: Subject, records: Records, guard: Guard) -> None:
    """Until a later term than that of `guard` has begun."""
    began = asyncio.get_running_loop().time()

    async def leads() -> bool:
        found = await records.get(LEADER)
        return found is not None and found.revision > guard.revision and bool(await one.leader())

    await one.handle.until(leads, 60)
    took_s = asyncio.get_running_loop().time() - began
    print(f"takeover took {took_s:.2f} s")
    assert took_s <= 10 * LEASE_S, "two leases on a machine that has nothing else to do"


async def test_whatever_happens_to_who_leads_a_later_term_begins_and_every_request_is_answered(tmp_path):
    async with subject(tmp_path) as one:
        records = await open_records(one.handle.config, SystemClock())
        try:
            await one.go_on()
            for happens in ("killed", "stopped", "cut off"):
                await one.handle.until(one.leader, 60)
                await one.handle.until(one.handle.all_ready, 60)
                old = await one.leader()
                guard = Guard(LEADER, (await records.get(LEADER)).revision)
                pid = one.handle.launcher.pids[old]
                if happens == "killed":
                    os.kill(pid, signal.SIGKILL)
                elif happens == "stopped":
                    freeze(pid)
                else:
                    for way in one.ways[old]:
                        way.cut()
                await taken_over(one, records, guard)
                await one.go_on()
                assert happens == "killed" or not await one.leads(old)  # it may be started again before its lease ends
                if happens == "stopped":
                    os.kill(pid, signal.SIGCONT)
                for way in one.ways[old]:
                    way.heal()
                await refused(records, guard)
                await one.handle.until(one.handle.all_ready, 60)
                await one.handle.until(one.rebuilt, 60)
        finally:
            await records.aclose()


async def refused(records: Records, guard: Guard) -> None:
    with pytest.raises(NotLeaderError):
        await records.put("pins/late", b"{}", guard=guard)


async def test_etcd_loses_its_leader_is_compacted_and_started_again_and_who_leads_goes_on(tmp_path):
    async with subject(tmp_path) as one:
        await one.go_on()
        victim = await asyncio.to_thread(one.etcd.leader)
        victim.stop()
        await one.go_on()
        victim.start()
        await asyncio.to_thread(one.etcd.wait_ready)
        revision = json.loads(await asyncio.to_thread(one.etcd.ctl, "get", "ready", "-w", "json"))["header"]["revision"]
        await asyncio.to_thread(one.etcd.ctl, "compact", str(revision))
        await one.go_on()
        for member in one.etcd.members:
            member.stop()
        for member in one.etcd.members:
            member.start()
        await asyncio.to_thread(one.etcd.wait_ready)
        await one.handle.until(one.leader, 60)
        await one.go_on()
