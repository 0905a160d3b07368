"""Two metadata servers over one simulated etcd, nodes that register, reserve and pin, and faults, in virtual time.

Election, terms, core and clients are production code; clocks of the servers run at different speeds.
"""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import suppress
from typing import TypeVar

from support.metadata_words import keys, registration, reservation
from support.sim_loop import LoopClock, SimSeedLoop, run_sim
from support.sim_network import NetworkError, Rates, SimNetwork, SimProcess, Trace
from support.sim_ways import SimMetadataTransport

from kvcore.config.fields import ByteSize
from kvcore.config.records import EtcdRecordsConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig, SimEngineConfig
from kvcore.errors import (
    MetadataUnavailableError,
    RecordsUnavailableError,
)
from kvcore.types import ChunkKey, Role
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.leading.election import Election
from metadata_server.leading.following import FollowingTransport
from metadata_server.leading.terms import Terms, new_index
from metadata_server.messages import HeartbeatRequest
from metadata_server.records.base import NO_LEASE, Guard, Listing, PutReply, Record, Records, RecordsUpdate
from metadata_server.records.memory import memory_records

T = TypeVar("T")
LEASE_S = 2.0
SERVERS = ("m0", "m1")
_GRANTS = ("/v1/nodes/register", "/v1/nodes/heartbeat", "/v1/objects/reserve", "/v1/objects/match")


def server_url(name: str) -> str:
    """Of one of SERVERS."""
    return f"http://{name}:1"


def wrong_grants(grants: list[tuple[int, str]]) -> str:
    """What is wrong with (token, server) of each grant, in the order of their giving; empty: nothing."""
    tokens = [token for token, _ in grants]
    if 0 in tokens or tokens != sorted(tokens):
        return "a leader granted after the next one had"
    return "two servers granted with one token" if len(set(tokens)) != len(set(grants)) else ""


class _DriftingClock(LoopClock):
    def __init__(self, loop: asyncio.AbstractEventLoop, rate: float) -> None:
        super().__init__(loop)
        self._rate = rate

    def now(self) -> float:
        return super().now() * self._rate


class _FarRecords(Records):
    """Those of etcd, seen from one server."""

    def __init__(self, server: "SimServer", there: Records) -> None:
        self._server = server
        self._there = there

    async def _ask(self, call: Callable[[Records], Awaitable[T]]) -> T:
        server = self._server
        await server.awake.wait()
        try:
            reply = await server.network.call(
                server.process, "etcd", lambda _: call(self._there), timeout_s=0.5, repeatable=False
            )
        except NetworkError as error:
            raise RecordsUnavailableError(str(error)) from error
        finally:
            await server.awake.wait()
        return reply

    async def run(self) -> None:
        raise NotImplementedError

    async def get(self, key: str) -> Record | None:
        return await self._ask(lambda there: there.get(key))

    async def listing(self, prefix: str) -> Listing:
        return await self._ask(lambda there: there.listing(prefix))

    async def put(
        self, key: str, value: bytes, *, expect: int | None = None, lease: int = NO_LEASE, guard: Guard | None = None
    ) -> PutReply:
        return await self._ask(lambda there: there.put(key, value, expect=expect, lease=lease, guard=guard))

    async def delete(self, key: str, *, expect: int | None = None, guard: Guard | None = None) -> bool:
        return await self._ask(lambda there: there.delete(key, expect=expect, guard=guard))

    async def grant(self, ttl_s: float) -> int:
        return await self._ask(lambda there: there.grant(ttl_s))

    async def renew(self, lease: int) -> bool:
        return await self._ask(lambda there: there.renew(lease))

    async def revoke(self, lease: int) -> None:
        await self._ask(lambda there: there.revoke(lease))

    def watch(self, prefix: str) -> AsyncIterator[RecordsUpdate]:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


class SimServer:
    """One metadata server. Its life ends with its process."""

    def __init__(self, world: "SimLeaders", name: str, rate: float) -> None:
        self.world = world
        self.network = world.network
        self.name = name
        self.awake = asyncio.Event()
        self.awake.set()
        self._clock = _DriftingClock(world.loop, rate)
        self.process = SimProcess(name)
        self.process.alive = False

    def start(self) -> None:
        """A life."""
        world = self.world
        self.awake.set()
        self.process = SimProcess(self.name)
        world.network.hosts[self.name] = self.process
        records = _FarRecords(self, world.etcd)
        self.core = MetadataCore(new_index(world.config, world.clock, 1), world.clock)
        terms = Terms(world.config, world.clock, records, self.core)
        self.election = Election(
            records, self._clock, server_url(self.name), LEASE_S, lead=terms.lead, follow=terms.end
        )
        self.core.leader = self.election
        self.process.spawn(self.election.run())
        self.process.spawn(self.core.run())

    async def answer(self, path: str, body: bytes) -> bytes:
        """What a call gets; while the process is stopped it waits."""
        await self.awake.wait()
        reply = await self.core.dispatch(path, body)
        if path in _GRANTS:
            self.world.grants.append((self.core.token, self.name))
        return reply


def transport_to(
    servers: Mapping[str, SimServer], source: SimProcess, url: str, repeatable: frozenset[str] = frozenset()
) -> SimMetadataTransport:
    """To the server at `url`, one of `servers`."""
    server = servers[url.removeprefix("http://").partition(":")[0]]
    return SimMetadataTransport(server.network, source, server.answer, server.name, repeatable=repeatable)


class SimLeaders:
    """One run."""

    def __init__(self, seed: int, loop: SimSeedLoop) -> None:
        self.loop = loop
        self.dice = random.Random(seed)
        self.clock = LoopClock(loop)
        self.trace = Trace()
        self.network = SimNetwork(seed, self.trace, Rates())
        self.etcd = memory_records(self.clock)
        self.config = ClusterConfig(
            cluster="c",
            model=ModelConfig(path="m", name="m"),
            engine=SimEngineConfig(),
            nodes={"d": NodeConfig(role=Role.DECODER, host="d", port=1, segment=ByteSize(1 << 20))},
            metadata_server=MetadataServerConfig(
                host="m0", port=1, standbys=["m1:1"], records=EtcdRecordsConfig(endpoints=["http://etcd:1"])
            ),
        )
        self.servers = {name: SimServer(self, name, self.dice.uniform(0.93, 1.07)) for name in SERVERS}
        self.grants: list[tuple[int, str]] = []
        """(token, server) of each grant of either, in the order of their giving."""
        self.pinned: list[ChunkKey] = []
        """Whose pins were answered."""
        self.answered = 0

    async def run(self) -> None:
        """Faults for some leases, then peace; everything that must hold is asserted."""
        etcd = SimProcess("etcd")
        self.network.hosts["etcd"] = etcd
        etcd.spawn(self.etcd.run())
        for server in self.servers.values():
            server.start()
        nodes = [SimProcess(f"n{at}") for at in range(3)]
        for at, node in enumerate(nodes):
            self.network.hosts[node.name] = node
            node.spawn(self._live(node, at))
        try:
            await self._suffer()
        finally:
            for process in (*nodes, *(server.process for server in self.servers.values()), etcd):
                process.kill()
                await process.gone()

    async def _suffer(self) -> None:
        for _ in range(8):
            await self._fault()
        self.network.calm()
        for server in self.servers.values():
            server.awake.set()
            if not server.process.alive:
                server.start()
        await asyncio.sleep(3 * LEASE_S)
        before = self.answered
        await asyncio.sleep(LEASE_S)
        self._check()
        assert self.answered > before, "nobody is answered"

    async def _fault(self) -> None:
        dice, name = self.dice, self.dice.choice(SERVERS)
        server, lasts_s = self.servers[name], self.dice.uniform(0.2, 2.5) * LEASE_S
        kind = dice.choice(["kill", "freeze", "cut_etcd", "cut_nodes", "peace"])
        ways = {"cut_etcd": [(name, "etcd"), ("etcd", name)], "cut_nodes": [(f"n{at}", name) for at in range(3)]}
        self.trace(kind, name, f"{lasts_s:.2f}")
        if kind == "kill":
            server.process.kill()
        elif kind == "freeze":
            server.awake.clear()
        for way in ways.get(kind, ()):
            self.network.cut(*way)
        await asyncio.sleep(lasts_s)
        for way in ways.get(kind, ()):
            self.network.heal(*way)
        server.awake.set()
        if not server.process.alive:
            server.start()

    async def _live(self, process: SimProcess, at: int) -> None:
        """A node: registers where it is not known, reserves, pins."""
        name, urls = process.name, [server_url(server) for server in SERVERS]
        transport = FollowingTransport(urls, lambda url: transport_to(self.servers, process, url))
        client = MetadataClient(transport, self.clock, 0.5)
        for number in range(at, 1 << 30, 3):
            await asyncio.sleep(self.dice.uniform(0.05, 0.3))
            with suppress(MetadataUnavailableError):
                token = client.token
                if not (await client.heartbeat(HeartbeatRequest(node_id=name, incarnation=1))).known:
                    await client.register(registration(name))
                await client.reserve(reservation(name, [number % 64]))
                (key,) = keys(number)
                if (await client.pin([key])).done:
                    self.pinned.append(key)
                self.answered += 1
                assert client.token >= token

    def _check(self) -> None:
        leading = [server for server in self.servers.values() if server.election.leads]
        assert len(leading) == 1, "not one leader"
        assert not (wrong := wrong_grants(self.grants)), wrong
        state = leading[0].core.state
        assert {node.id for node in state.nodes(self.clock.now()).nodes} == {"n0", "n1", "n2"}
        pins = {pin.key for pin in state.pins(None, self.clock.now()).pins}
        assert pins >= set(self.pinned), "an answered pin is lost"


def run_leaders(seed: int) -> SimLeaders:
    """Simulate one seed; whatever is wrong raises."""
    loop = SimSeedLoop(seed, 600.0)
    worlds: list[SimLeaders] = []

    async def main() -> None:
        worlds.append(SimLeaders(seed, loop))
        try:
            await worlds[0].run()
        except BaseException as error:
            error.add_note("\n".join([f"seed {seed}; last of what happened:", *worlds[0].trace.lines[-40:]]))
            raise

    run_sim(main, loop=loop)
    return worlds[0]
