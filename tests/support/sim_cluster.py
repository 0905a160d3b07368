"""A whole cluster in one process and virtual time, its clients, and what must hold at the end.

All parts but network, clients and the machines' deaths are production code. One seed decides everything.
"""

import asyncio
import hashlib
import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from unittest.mock import patch

import msgspec
from support.sim_adversary import Adversary
from support.sim_http import SimHttp
from support.sim_loop import LoopClock, SimSeedLoop, run_sim
from support.sim_moves import MOVES, not_in_manifests, order
from support.sim_network import Rates, SimNetwork, SimProcess, Trace
from support.sim_nodes import CLUSTER, MODEL, DataFaults, SimMetadata, SimNode, SimSetup
from support.sim_oracle import Oracle
from support.sim_owner import NetworkOwner
from support.sim_pair import SimPair
from support.sim_partitions import SimPartitions
from support.sim_plan import Plan, Wanted, decoder_restarts, make_plan
from support.sim_strangers import Strangers, identity_faults
from support.sim_tier_watch import TierWatch
from support.sim_tiers import SimTiers
from support.sim_ways import METADATA, SimNodeClient

import router.requests.run
from kvcore.config.partitions import PartitionConfig
from kvcore.config.schema import ClusterConfig, MetadataServerConfig, ModelConfig, NodeConfig, RouterConfig
from kvcore.config.tiers import TiersConfig
from kvcore.errors import KVFerryError, NodeUnavailableError, OverloadedError
from kvcore.trust.opening import ClusterTrust
from kvcore.types import ChunkKey, Role
from kvstore.integrity.checks import Integrity
from kvstore.types import GetOutcome
from metadata_server.messages import Event, EventKind
from metadata_server.partitions.merging import merged_stats
from router.admission.no_node import NoNodeWait
from router.cache.limits import WatchLimits
from router.cache.watch import CacheWatch
from router.nodes.cluster import Cluster
from router.nodes.prober import Prober
from router.requests.dispatch import Dispatcher
from router.requests.ledger import RequestMachine
from router.requests.records import RequestLog
from router.requests.run import RequestRun
from router.requests.services import RequestServices
from router.requests.spec import RequestSpec
from router.routing.index import PrefixIndex
from router.routing.policy import make_policy

LIMIT_S = 600.0
SETTLED_S = 60.0
ROUTER = RouterConfig(min_prefill_tokens=8, request_timeout_s=60.0, prefill_timeout_s=4.0, connect_timeout_s=1.0)
TRIAL_S = 8.0
"""A suspected node that did not answer its trial has as long as a first token (`stall_first_s`) before the next one."""
_LAST_LINES = 40
_METADATA_TURNS, _ENGINE_TURNS = 64, 128
"""Turns of the loop between two full checks."""


@dataclass
class Outcome:
    """What a seed came to. `digest` is of the whole trace."""

    seed: int
    counts: Counter[str]
    digest: str
    lines: list[str]
    problems: list[str]


@dataclass
class Answer:
    """What one client saw. `error`: how an accepted request failed."""

    wanted: Wanted
    tokens: list[list[int]]
    finished: list[bool]
    accepted: bool = False
    left: bool = False
    error: KVFerryError | None = None


ROLES = {"p": Role.PREFILLER, "d": Role.DECODER, "s": Role.STORE}
"""By the first letter of a node's name."""


def _forgetful(plan: Plan) -> bool:
    """Whether the metadata server is killed while a segment lives: what is being written in it then may be taken for
    whole when the node registers again, and be found damaged by who reads it."""
    deaths = Counter(fault.at_s for fault in plan.faults if fault.kind == "kill_node")
    return any(fault.kind == "kill_metadata" and deaths[fault.at_s] < len(plan.nodes) for fault in plan.faults)


class _CheckedMachine(RequestMachine):
    def handle(self, event):  # type: ignore[no-untyped-def]
        actions = super().handle(event)
        self.check_invariants()
        return actions


@dataclass
class Variant:
    """How a run differs from the usual one. `integrity`: without checks of the payload there is a bug to be found.
    `peaceful`: nothing fails, of network, data and machines, but what a `plan` of the caller's own says. `revisions`:
    of the weights; a node has one of them each time that it starts, and decoders are killed more often. `strangers`:
    faults of identity come to the others. `adversary`: somebody changes chunks (`support.sim_adversary`)."""

    integrity: Integrity = Integrity()
    peaceful: bool = False
    revisions: tuple[str, ...] = ()
    strangers: bool = False
    partitions: int = 1
    """Metadata servers that share the index."""
    adversary: bool = False
    data: DataFaults = field(default_factory=DataFaults)
    plan: Plan | None = None
    """Instead of the seed's."""
    pair: bool = False
    """Two metadata servers, of which one leads. Their faults are the plan's (`support.sim_pair`)."""
    router: RouterConfig = ROUTER
    waits: bool = False
    """Requests wait while no node is up."""
    moves: bool = False
    """Nodes can move chunks. Orders are the plan's (`support.sim_moves`)."""
    trust: ClusterTrust | None = None
    """Processes call each other by HTTP, with proofs if there is a secret; None: directly."""
    owned: str = ""
    """A node whose network somebody owns (`support.sim_owner`); with `trust`."""


def run_seed(seed: int, variant: Variant | None = None) -> Outcome:
    """Simulate one seed. `problems` is empty unless something is wrong; a broken invariant raises."""
    loop = SimSeedLoop(seed, LIMIT_S)
    clusters: list[SimCluster] = []

    async def main() -> Outcome:
        clusters.append(SimCluster(seed, loop, variant or Variant()))
        return await clusters[0].run()

    try:
        with patch.object(router.requests.run, "RequestMachine", _CheckedMachine):
            return run_sim(main, loop=loop)
    except Exception as error:
        for cluster in clusters:
            error.add_note("\n".join(["last of what happened:", *cluster.trace.lines[-_LAST_LINES:]]))
        raise


def index_keys(index: PrefixIndex) -> set[ChunkKey]:
    """Those that segments which live hold."""
    return {key for table in index._tables for key, mask in table.items() if mask & index._alive}


class SimCluster:
    """One run."""

    def __init__(self, seed: int, loop: SimSeedLoop, variant: Variant) -> None:
        self.seed = seed
        self.plan: Plan = variant.plan or make_plan(seed)
        self.trace = Trace()
        self.clock = LoopClock(loop)
        plan = self.plan
        self.network = SimNetwork(seed, self.trace, Rates().times(0 if variant.peaceful else plan.weather))
        self.setup = SimSetup(
            network=self.network,
            clock=self.clock,
            engine=plan.engine,
            store=plan.store,
            chunk_tokens=plan.chunk_tokens,
            segment_bytes=plan.segment_bytes,
            node_ttl_s=plan.node_ttl_s,
            data=DataFaults(0, 0, 0, 0, 0) if variant.peaceful else variant.data,
            sizes=plan.sizes,
            adapters=plan.adapters,
            integrity=variant.integrity,
            revisions=variant.revisions,
            tiers=SimTiers(plan.tiers, self.clock, seed) if plan.tiers is not None else None,
            moves=MOVES if variant.moves else None,
        )
        self._owner: NetworkOwner | None = None
        if variant.trust is not None:
            self.setup.http = SimHttp(self.network, self.clock, variant.trust)
            if variant.owned:
                self._owner = NetworkOwner(self.network, self.setup.http, variant.trust, variant.owned, seed)
                self.setup.owned = self._owner
        parts = variant.partitions
        self.metadata = SimPartitions(self.setup, parts) if parts > 1 else SimMetadata(self.setup)
        if variant.pair:
            self.metadata = SimPair(self.setup, self.trace, seed)
        self.nodes = {name: SimNode(self.setup, self.metadata, name, ROLES[name[0]]) for name in plan.nodes}
        self.router = SimProcess("router")
        self.network.hosts["router"] = self.router
        self.setup.nodes.update(self.nodes)
        self.client = SimNodeClient(self.network, self.router, self.setup.nodes, self.setup.http)
        self.tier_watch: TierWatch | None = None
        if self.setup.tiers is not None:
            self.tier_watch = TierWatch(self.setup.tiers, self.nodes, self.network, seed)
        self._strict = variant.peaceful and not _forgetful(plan)
        self._whole_manifests = variant.peaceful and not variant.owned
        config = ClusterConfig(
            cluster=CLUSTER,
            model=ModelConfig(path=MODEL, name=MODEL),
            engine=plan.engine,
            nodes={name: NodeConfig(role=ROLES[name[0]], host=name, port=1) for name in self.nodes},
            router=variant.router,
            tiers=plan.tiers.config() if plan.tiers is not None else TiersConfig(),
        )
        if isinstance(self.metadata, SimPartitions):
            named = [PartitionConfig(name=name, port=1) for name in self.metadata.whole.names]
            config = msgspec.structs.replace(config, metadata_server=MetadataServerConfig(partitions=named))
        self.cluster = Cluster(config, self.clock)
        self.prober = Prober(variant.router, self.cluster, self.client, self.clock)
        self.prober.on_lost.append(lambda name, error: self.trace("given_up", name, error.message))
        self.cluster.stalls.on_suspect.append(lambda node: self.trace("suspected", node.id))
        self.subscription = self.metadata.subscribe(self.router, self.cluster.sink_of)
        self.log = RequestLog()
        self.services = RequestServices(variant.router, self.cluster, self.client, self.clock, self.log)
        self.cache = CacheWatch(self.cluster, self.log, self.clock, limits=WatchLimits(tokens_per_s=1e9))
        self.dispatcher = Dispatcher(self.services, make_policy(variant.router.policy))
        self.prober.on_lost.append(self.dispatcher.node_lost)
        self.prober.on_silent.append(self.dispatcher.node_silent)
        stopping = lambda: self.dispatcher.stopping  # noqa: E731
        self.no_node = NoNodeWait(self.cluster, self.clock, patience_s=15.0, max_waiting=64, stopping=stopping)
        self.prober.on_round.append(self.no_node.look)
        self._waits = variant.waits
        self.oracle = Oracle(plan, self.client.legs, variant.revisions)
        self._planned = [] if variant.peaceful and variant.plan is None else plan.faults
        if variant.revisions:
            self._planned = sorted([*plan.faults, *decoder_restarts(plan)], key=lambda fault: fault.at_s)
        self.strangers: Strangers | None = None
        if variant.strangers:
            self.strangers = Strangers(self.setup, self.metadata, self.client, self.nodes, variant.peaceful)
            faults = [*self._planned, *identity_faults(seed, plan.requests, peaceful=variant.peaceful)]
            self._planned = sorted(faults, key=lambda fault: fault.at_s)
        self._adversary = Adversary(self.setup, self.trace, seed) if variant.adversary else None
        self.dice = random.Random(seed + 1)
        self.problems: list[str] = []
        self.answers: list[Answer] = []
        self._loop = loop

    async def run(self) -> Outcome:
        """Load and faults, then peace, then the accounts."""
        self._loop.after_turn = self._check_turn
        self.metadata.start()
        for node in self.nodes.values():
            node.start()
        self.router.spawn(self.prober.run())
        self.router.spawn(self.cluster.stalls.run())
        self.router.spawn(self.subscription.run())
        await asyncio.sleep(0.5)
        faults = asyncio.create_task(self._faults())
        hostile = [asyncio.create_task(one.run()) for one in (self._adversary, self._owner) if one is not None]
        await asyncio.gather(*(self._client(wanted) for wanted in self.plan.requests))
        await faults
        for one in hostile:
            assert not one.done(), one.exception()
            one.cancel()
        self._make_peace()
        self.trace("peace")
        await self._settle()
        await self._check_accounts()
        await self._check_stored()
        self._check_manifests()
        if isinstance(self.metadata, SimPair):
            self.problems += self.metadata.problems()
        for answer in self.answers:
            self._check_answer(answer)
        if self.strangers is not None:
            self.problems += sorted(self.strangers.problems)
            await self.strangers.stop()
        if isinstance(self.metadata, SimPartitions):
            self.problems += sorted(self.metadata.problems)
        if self.tier_watch is not None:
            await self.tier_watch.check_use()
            self.problems += [*sorted(self.tier_watch.problems), *self.tier_watch.unsaved(self._stored())]
        await self._stop()
        self._count()
        if self.tier_watch is not None and self._strict:
            self.problems += self.tier_watch.damaged_behind(self.trace.counts)
        digest = hashlib.sha256("\n".join(self.trace.lines).encode()).hexdigest()
        return Outcome(self.seed, self.trace.counts, digest, self.trace.lines, self.problems)

    # --- faults ---

    async def _faults(self) -> None:
        for fault in self._planned:
            await asyncio.sleep(max(0.0, fault.at_s - self.clock.now()))
            self.trace(fault.kind, *fault.where)
            getattr(self, f"_do_{fault.kind}")(*fault.where)

    def _do_kill_node(self, name: str) -> None:
        if self.nodes[name].service.alive:
            self.nodes[name].kill()

    def _do_start_node(self, name: str) -> None:
        if not self.nodes[name].service.alive:
            self.nodes[name].start()

    def _do_kill_engine(self, name: str) -> None:
        node = self.nodes[name]
        if node.service.alive and node.engine_process.alive:
            node.kill_engine()

    def _do_kill_computing(self, what: str) -> None:
        """The first node whose engine computes a chunk of a prompt."""
        for name, node in self.nodes.items():
            running = node.engine._scheduler.running if node.engine is not None else []
            if any(each.num_prompt - each.num_computed >= each.chunk_tokens for each in running):
                self.trace("killed", name)
                node.kill() if what == "node" else node.kill_engine()
                return

    def _do_start_engine(self, name: str) -> None:
        node = self.nodes[name]
        if node.service.alive and not node.engine_process.alive:
            node.start_engine()

    def _do_hang(self, name: str) -> None:
        self.nodes[name].steps.clear()

    def _do_wake(self, name: str) -> None:
        self.nodes[name].steps.set()

    def _do_step_clock(self, name: str, seconds: str) -> None:
        machine = self.metadata if name == METADATA else self.nodes[name]
        machine.clock_off_s += float(seconds)

    def _do_tier(self, what: str, *where: str) -> None:
        assert self.tier_watch is not None, "faults of tiers are planned with tiers only"
        self.tier_watch.do(what, *where)

    def _do_foreign(self, name: str, differs: str) -> None:
        self._strange().join_foreign(name, differs)

    def _do_foreign_ends(self, name: str) -> None:
        self._strange().end_foreign(name)

    def _do_twin(self, name: str) -> None:
        self._strange().join_twin(name)

    def _do_twin_ends(self, name: str) -> None:
        self._strange().end_twin(name)

    def _strange(self) -> Strangers:
        assert self.strangers is not None, "faults of identity are planned with strangers only"
        return self.strangers

    def _do_kill_metadata(self) -> None:
        if self.metadata.alive:
            self.metadata.kill()

    def _do_start_metadata(self) -> None:
        if not self.metadata.alive:
            self.metadata.start()

    def _do_server(self, what: str, who: str) -> None:
        assert isinstance(self.metadata, SimPair), "such faults are planned for a pair only"
        self.metadata.do(what, who)

    def _do_drain(self, name: str) -> None:
        self._order("drain", name)

    def _do_undrain(self, name: str) -> None:
        self._order("undrain", name)

    def _do_rebalance(self, action: str) -> None:
        self._order("rebalance", action)

    def _order(self, kind: str, *where: str) -> None:
        if self.metadata.alive:
            order(self.metadata.core, self.clock.now(), kind, *where)

    def _do_cut(self, source: str, target: str) -> None:
        self.network.cut(source, target)

    def _do_heal(self, source: str, target: str) -> None:
        self.network.heal(source, target)

    def _do_scribble(self, name: str) -> None:
        """Somebody writes where nothing was granted: over a header, or into payload."""
        if self.nodes[name].service.alive:
            memory = self.setup.memory[self.nodes[name].segment.id]
            at = 4096 * self.dice.randrange(max(1, memory.nbytes // 4096)) + self.dice.choice([0, 100, 300])
            memory[at : at + 64] = self.dice.randbytes(64)

    def _make_peace(self) -> None:
        self.network.calm()
        if self._owner is not None:
            self._owner.peaceful = True
        self.setup.data = DataFaults(0, 0, 0, 0, 0)
        if self.strangers is not None:
            self.strangers.end()
        if self.tier_watch is not None:
            self.tier_watch.end()
        self._do_start_metadata()
        if isinstance(self.metadata, SimPair):
            self.metadata.mend_all()
        if self.setup.moves is not None:
            self._order("rebalance", "stop")
        for name in self.nodes:
            if self.setup.moves is not None:
                self._order("undrain", name)
            self._do_wake(name)
            self._do_start_node(name)
            self._do_start_engine(name)

    # --- clients ---

    async def _client(self, wanted: Wanted) -> None:
        n = wanted.sampling.n
        answer = Answer(wanted, [[] for _ in range(n)], [False] * n)
        self.answers.append(answer)
        await asyncio.sleep(max(0.0, wanted.at_s - self.clock.now()))
        spec = RequestSpec(wanted.id, wanted.prompt, wanted.sampling, wanted.salt, documents=wanted.documents)
        while not answer.accepted:
            if self._waits:
                await self.no_node.until_up([wanted.prompt], self._told)
            try:
                run = self.dispatcher.open(spec)
            except (NodeUnavailableError, OverloadedError) as error:
                self.trace("refused", wanted.id, error.code)
                await asyncio.sleep(0.5)
                continue
            answer.accepted = True
            self.trace("accepted", wanted.id)
            async with run:
                await self._read(answer, run)
        self.trace("ended", wanted.id, answer.error.code if answer.error else "", *map(len, answer.tokens))

    async def _told(self) -> None:
        self.trace("waits")

    async def _read(self, answer: Answer, run: RequestRun) -> None:
        left = answer.wanted.leaves_after
        try:
            async for emit in run:
                answer.tokens[emit.index] += emit.token_ids
                self.trace("emit", answer.wanted.id, emit.index, *emit.token_ids)
                if answer.finished[emit.index]:
                    self.problems.append(f"{answer.wanted.id} emits after its end")
                answer.finished[emit.index] = emit.finish_reason is not None
                if left is not None and sum(map(len, answer.tokens)) >= left:
                    answer.left = True
                    return
        except KVFerryError as error:
            answer.error = error

    # --- what must hold ---

    def _check_turn(self, turn: int) -> None:
        if turn % _METADATA_TURNS == 0:
            self.metadata.check()
            if self.strangers is not None:
                self.strangers.check()
            if self.tier_watch is not None:
                self.tier_watch.check()
        if turn % _ENGINE_TURNS == 0:
            for node in self.nodes.values():
                node.check()

    def _check_answer(self, answer: Answer) -> None:
        wanted = answer.wanted
        whole = not (answer.left or answer.error)
        if whole and not all(answer.finished):
            self.problems.append(f"{wanted.id} has no end: {answer.finished}")
        self.problems += [f"is wrong: {what}" for what in self.oracle.wrong(wanted, answer.tokens, whole=whole)]
        if answer.error is not None:
            record = self.log.find(wanted.id)
            tries = [code for leg, code in record.retried_legs if leg == "decode"] if record else []
            self.trace("failed", wanted.id, answer.error.code, record.total_s if record else 0, *tries)
            self.trace.counts[answer.error.code] += 1
            if not answer.error.retryable:
                self.problems.append(f"{wanted.id} failed for good: {answer.error.message}")
            attempts, patience_s = self.services.config.attempts, self.services.limits.patience_s
            if len(tries) < attempts and record and (record.total_s or 0.0) < patience_s:
                self.problems.append(f"{wanted.id} failed before its time: {answer.error.message}")

    async def _settle(self) -> None:
        """Until nothing is held anywhere."""
        started = self.clock.now()
        while held := await self._held():
            if self.clock.now() - started > SETTLED_S:
                self.problems.append(f"still held after {SETTLED_S} s: {held}")
                return
            await asyncio.sleep(0.5)

    async def _held(self) -> dict[str, object]:
        each = [core.state.stats(self.clock.now(), core.num_waiters) for core in self.metadata.cores]
        stats = merged_stats(each)
        held: dict[str, object] = {
            "reservations": stats.reservations,
            "read_leases": stats.read_leases,
            "waiters": stats.waiters,
            "retiring": sum(segment.retiring_bytes for segment in stats.segments),
            "nodes": sum(len(one.nodes) - len(self.nodes) for one in each),
            "index": self.subscription.epoch != stats.epoch or not self.subscription.connected,
            "in_flight": self.log.in_flight,
            "control": len(self.services.control),
            "sequences": sum(node.sequences + node.prefill_tokens for node in self.cluster.nodes.values()),
        }
        for name, node in self.nodes.items():
            if node.mover is not None:
                held[f"moves of {name}"] = len(node.mover._copied) + len(node.mover.work)
            if node.engine is None:
                held[name] = 0 if node.is_store else "no engine"
                continue
            engine = await node.engine.stats()
            held[name] = engine.running + engine.waiting + engine.loading + engine.used_blocks + engine.pending_saves
        if self.tier_watch is not None:
            held |= self.tier_watch.held()
        return {name: what for name, what in held.items() if what}

    async def _check_accounts(self) -> None:
        self.metadata.check()
        for node in self.nodes.values():
            node.check()
        await asyncio.sleep(2.5)  # a keep-alive later the router knows what the metadata server knows
        stored = {key for keys in self._stored().values() for key in keys}
        self._check_disks()
        if {key for index in self.cluster._indexes for key in index_keys(index)} != stored:
            self.problems.append(f"the router knows {len(self.cluster.index)} keys, the metadata server {len(stored)}")
        deadline = self.clock.now() + TRIAL_S
        while lost := [name for name, node in self.cluster.nodes.items() if node.lease is None or node.problem]:
            if self.clock.now() >= deadline:
                break
            await asyncio.sleep(0.5)
        if lost:
            self.problems.append(f"not in use after peace: {lost}")
        counts = self.cache.start
        explained = counts.cached_tokens + sum(counts.missed.values())
        if (counts.requests, counts.prompt_tokens) != (self.log.ok, explained):
            self.problems.append(f"{self.log.ok} answers with {explained} explained prompt tokens are not {counts}")
        if sum(counts.by_source.values()) != counts.cached_tokens:
            self.problems.append(f"cached tokens without a source: {counts}")

    def _check_manifests(self) -> None:
        if self._whole_manifests:
            stored = {name: keys for name, keys in self._stored().items() if name}
            self.problems += not_in_manifests(stored, self.setup.memory)

    def _stored(self) -> dict[str, set[ChunkKey]]:
        """By segment."""
        stored: dict[str, set[ChunkKey]] = {}
        for event in self._events():
            if event.kind is not EventKind.ON_DISK:
                stored.setdefault(event.segment_id, set()).update(event.keys)
        return stored

    def _events(self) -> Iterator[Event]:
        for core in self.metadata.cores:
            for batch in core.state.snapshot(self.clock.now()):
                yield from batch.events

    def _check_disks(self) -> None:
        on_disk: dict[str, set[ChunkKey]] = {}
        for event in self._events():
            if event.kind is EventKind.ON_DISK:
                on_disk.setdefault(event.node_id, set()).update(event.keys)
        every = list(set().union(*on_disk.values()))
        for name in self.nodes:
            known = {key for index in self.cluster.tiers._parts for key in index.held_by(name, every)}
            if known != on_disk.get(name, set()):
                self.problems.append(f"the router knows {len(known)} of {len(on_disk.get(name, set()))} on disk {name}")
        if sum(len(index_keys(index)) for index in self.cluster.tiers._parts) != len(every):
            self.problems.append("the router knows of chunks on disks that nobody has")

    async def _check_stored(self) -> None:
        """Every chunk that is listed verifies and holds the right bytes, or is refused."""
        node = next(iter(self.nodes.values()))
        store, keys = node.store(node.service), self.oracle.chunks([answer.wanted for answer in self.answers])
        buffer = memoryview(bytearray(self.plan.chunk_tokens * self.plan.engine.bytes_per_token))
        for key in sorted({key for held in self._stored().values() for key in held}):
            match = await store.match([key], timeout_s=5.0)
            if match.num_chunks:
                result = await store.get_into(match, 0, [[buffer]], timeout_s=5.0)
                await store.release(match)
                self.trace(f"at_rest_{result.outcomes[0]}")
                if result.outcomes[0] is GetOutcome.OK and bytes(buffer) != keys.get(key):
                    self.problems.append(f"chunk {key.hex()} holds wrong bytes")
        await store.aclose()

    async def _stop(self) -> None:
        await self.dispatcher.aclose()
        for core in self.metadata.cores:
            core.stop()
        for node in self.nodes.values():
            await node.stop()
        self.metadata.end()
        self.router.kill()
        await self.router.gone()
        await self.metadata.gone()

    def _count(self) -> None:
        counts = self.trace.counts
        machines = self.setup.store_counts + self.setup.engine_counts + self.metadata.counts
        if self.setup.tiers is not None:
            machines += self.setup.tiers.counts
        for name, count in sorted(machines.items()):
            counts[name] += count
        counts["moved"] = sum(node.moved for node in self.nodes.values())
        counts["reseeded"] = self.oracle.reseeded
        for revision, answers in self.oracle.revisions.items():
            counts[f"answers_of_{revision}"] = answers
        legs = [leg for record in self.log.newest() for leg in record.legs]
        for leg in legs:
            counts[f"legs_{leg.kind}"] += 1
            if (leg.error or "").startswith("node_stalled"):
                self.trace("stalled", leg.id.partition(".")[0], leg.node)
        counts["legs_of_another_model"] = sum((leg.error or "").startswith("model_changed") for leg in legs)
        counts["promoted_legs"] = sum(bool(leg.promoted) for leg in legs)
        counts["promoted_by_peers"] = sum(any(one.node for one in leg.promoted) for leg in legs)
        counts["in_need"] = self.log.in_need
        counts["slowest_ms"] = int(1000 * max(record.total_s or 0.0 for record in self.log.newest()))
        counts["retries"] = sum(len(record.retried_legs) for record in self.log.newest())
        counts["index_resets"] = self.subscription.resets
