"""Two metadata servers under the whole simulated cluster: one leads by a lease in simulated records, the other follows.

Election, terms, core and the clients that follow are production code. Servers are killed, stand still, or are cut off
from the records or from everybody.
"""

import random
from collections.abc import AsyncGenerator
from dataclasses import replace
from functools import partial

from support.sim_leaders import LEASE_S, SERVERS, SimServer, server_url, transport_to, wrong_grants
from support.sim_loop import LoopClock
from support.sim_moves import ROOM
from support.sim_network import SimNetwork, SimProcess, Trace
from support.sim_nodes import CALL_S, CLUSTER, MODEL, SimMetadata, SimSetup, SinkOf, Subscription
from support.sim_plan import Fault, Plan, make_plan
from support.sim_ways import SimEventSource

from kvcore.config.fields import ByteSize
from kvcore.config.records import EtcdRecordsConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig
from kvcore.types import Role
from metadata_server.client import MetadataClient
from metadata_server.core import MetadataCore
from metadata_server.leading.following import FollowingSource, FollowingTransport
from metadata_server.records.memory import memory_records
from metadata_server.subscription import IndexSubscription

_REPEATABLE = frozenset(["/v1/nodes/heartbeat", "/v1/nodes/register", "/v1/objects/commit", "/v1/objects/abort"])


def pair_plan(seed: int) -> Plan:
    """The plan of a seed whose faults are those of its metadata servers, and now and then of a node."""
    plan, dice = make_plan(seed), random.Random(f"pair {seed}")
    faults: list[Fault] = []
    at_s = 0.5 + 2 * LEASE_S
    requests = [replace(wanted, at_s=wanted.at_s + 2 * LEASE_S) for wanted in plan.requests]
    spread = [replace(wanted, at_s=wanted.at_s * dice.uniform(1.0, 3.0)) for wanted in requests]
    for _ in range(4):
        lasts_s = dice.uniform(0.2, 2.0) * LEASE_S
        what = dice.choice(["kill", "freeze", "cut_records", "cut_off"])
        who = dice.choice(["leader", "leader", *SERVERS])
        faults += [Fault(at_s, "server", (what, who)), Fault(at_s + lasts_s, "server", ("mend", who))]
        if dice.random() < 0.3:
            where = (dice.choice(plan.nodes),)
            faults += [Fault(at_s + 0.1, "kill_node", where), Fault(at_s + 0.5, "start_node", where)]
        at_s += lasts_s + dice.uniform(0.3, 1.5) * LEASE_S
    return replace(
        plan,
        requests=sorted(spread, key=lambda wanted: wanted.at_s),
        segment_bytes=ROOM * dice.choice([12, 40]),
        faults=sorted(faults, key=lambda fault: fault.at_s),
        weather=dice.choice([0.3, 1.0]),
    )


class SimPair(SimMetadata):
    """As one server to the cluster: the one that leads."""

    def __init__(self, setup: SimSetup, trace: Trace, seed: int) -> None:
        super().__init__(setup)
        self.network: SimNetwork = setup.network
        self.loop = setup.network.loop
        self.clock: LoopClock = setup.clock
        self.etcd = memory_records(setup.clock)
        self.grants: list[tuple[int, str]] = []
        self._trace = trace
        self._dice = random.Random(f"clocks {seed}")
        self.config = ClusterConfig(
            cluster=CLUSTER,
            model=ModelConfig(path=MODEL, name=MODEL),
            engine=setup.engine,
            store=setup.store,
            nodes={"d": NodeConfig(role=Role.DECODER, host="d", port=1, segment=ByteSize(1 << 20))},
            metadata_server=MetadataServerConfig(
                host=SERVERS[0],
                port=1,
                standbys=[f"{SERVERS[1]}:1"],
                node_ttl_s=setup.node_ttl_s,
                records=EtcdRecordsConfig(endpoints=["http://etcd:1"]),
            ),
        )
        self.servers = {name: SimServer(self, name, self._dice.uniform(0.95, 1.05)) for name in SERVERS}  # type: ignore[arg-type]
        self._records_process = SimProcess("etcd")
        self._graves: list[SimProcess] = []
        self._cut: dict[str, list[tuple[str, str]]] = {}
        self._hit: dict[str, str] = {}

    @property
    def core(self) -> MetadataCore:  # type: ignore[override]
        """Of who leads, or of anybody while nobody does."""
        leads = [server for server in self.servers.values() if server.process.alive and server.election.leads]
        return (leads or list(self.servers.values()))[0].core

    @property
    def alive(self) -> bool:
        return all(server.process.alive for server in self.servers.values())

    def start(self) -> None:
        """Whoever does not run; the records at first."""
        if "etcd" not in self.network.hosts:
            self.network.hosts["etcd"] = self._records_process
            self._records_process.spawn(self.etcd.run())
        for server in self.servers.values():
            if not server.process.alive:
                server.start()

    def kill(self) -> None:
        """All of it."""
        for server in self.servers.values():
            self._kill(server)
        self._records_process.kill()

    def check(self) -> None:
        """Every invariant of each index."""
        for server in self.servers.values():
            if server.process.alive:
                server.core.state.check_invariants(self.clock.now())

    def problems(self) -> list[str]:
        """Of what they granted."""
        return [wrong] if (wrong := wrong_grants(self.grants)) else []

    async def gone(self) -> None:
        for process in (*(server.process for server in self.servers.values()), *self._graves, self._records_process):
            await process.gone()

    def connect(self, process: SimProcess) -> MetadataClient:
        """Follows whoever leads."""
        urls = [server_url(name) for name in SERVERS]
        to = partial(transport_to, self.servers, process, repeatable=_REPEATABLE)
        way = FollowingTransport(urls, to)
        return MetadataClient(way, self.clock, CALL_S)

    def subscribe(self, process: SimProcess, sink_of: SinkOf) -> Subscription:
        """The same for events."""
        source = FollowingSource([server_url(name) for name in SERVERS], lambda url: self._source_of(process, url))
        return IndexSubscription(source, sink_of(None), self.clock)

    def _source_of(self, process: SimProcess, url: str) -> SimEventSource:
        server = self.servers[url.removeprefix("http://").partition(":")[0]]

        async def awake(epoch: str, from_seq: int) -> AsyncGenerator[bytes, None]:
            await server.awake.wait()
            async for frame in server.core.events(epoch, from_seq):
                await server.awake.wait()
                yield frame

        return SimEventSource(self.network, process, awake, server.name)

    # --- faults ---

    def do(self, what: str, who: str) -> None:
        """Something happens to one of them; `mend` undoes what happened to that one last."""
        if what == "mend":
            self._mend(self._hit.pop(who, ""))
            return
        name = who if who != "leader" else self._leader()
        self._mend(self._hit.pop(who, ""))
        self._hit[who] = name
        server = self.servers[name]
        self._trace(f"server_{what}", name)
        if what == "kill":
            self._kill(server)
        elif what == "freeze":
            server.awake.clear()
        else:
            others = ["etcd"] if what == "cut_records" else ["etcd", "router", *self._setup.nodes]
            self._cut[name] = [pair for other in others for pair in ((name, other), (other, name))]
            for pair in self._cut[name]:
                self.network.cut(*pair)

    def mend_all(self) -> None:
        """Peace."""
        for name in SERVERS:
            self._mend(name)
        self.start()

    def _mend(self, name: str) -> None:
        if not name:
            return
        for pair in self._cut.pop(name, ()):
            self.network.heal(*pair)
        self.servers[name].awake.set()
        if not self.servers[name].process.alive:
            self.servers[name].start()

    def _kill(self, server: SimServer) -> None:
        if server.process.alive:
            self.counts += server.core.state.counters
            server.core.stop()
            server.awake.set()
            server.process.kill()
            self._graves.append(server.process)

    def _leader(self) -> str:
        leads = [name for name, server in self.servers.items() if server.process.alive and server.election.leads]
        return (leads or list(SERVERS))[0]
