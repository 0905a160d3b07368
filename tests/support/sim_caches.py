"""Nodes that are queues, as those of `support.sim_load`, and cache KV: for the choice of nodes over a trace of prompts.

In a cluster with a store, chunks lie in segments that every node reads, and one that is being computed is waited for;
plain servers have each a cache of their own. What takes time: loading over a node's link, computing, and steps, which
take longer the more sequences there are. Bytes are counted, never moved.
"""

import asyncio
from collections import Counter, OrderedDict, defaultdict
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count

from msgspec.structs import replace as changed
from support.router_fakes import FakeNode, cluster_config, spec
from support.sim_load import Flow, Load, Machine, QueueNode, QueueNodes, Seen

from kvcore.chunk_keys import prompt_keys, usable_chunks
from kvcore.config.routing import RoutingPolicy
from kvcore.config.schema import ClusterConfig
from kvcore.handoff import HandoffKind
from kvcore.types import ChunkKey, Role
from metadata_server.messages import Event, EventKind
from nodeapi.messages import (
    FinishReason,
    GenerateRequest,
    LegInfo,
    Moved,
    NodeReport,
    PrefillRequest,
    PrefillResult,
    Timings,
    TokenDelta,
)
from router.nodes.cluster import Cluster
from router.requests.records import RequestRecord
from router.requests.run import RequestRun
from router.requests.spec import RequestSpec
from router.routing.decision import Decision
from router.routing.policy import RoutePolicy

DELTA_TOKENS = 16
"""Tokens of one delta after the first: so many steps are one event."""


@dataclass
class CachingMachine(Machine):
    """An 8B model on one large GPU a node, 100 Gbit/s between them. `plain`: servers without a store."""

    prefill_rate: float = 20_000.0
    step_s: float = 0.008
    places: int = 128
    chunk_tokens: int = 256
    token_bytes: int = 131_072
    near_rate: float = 25e9
    """Bytes a second out of the node's own segment, …"""
    far_rate: float = 12.5e9
    """… and over its link."""
    engine_tokens: int = 500_000
    """KV in a node's own GPU."""
    segment_tokens: int = 2_000_000
    max_context: int = 1 << 18
    plain: bool = False
    links: dict[tuple[str, str], float] = field(default_factory=dict)
    """Bytes a second from another node, by reader and holder, where that is not `far_rate`: each is a machine then."""
    read_s: float = 5.0
    """What has not come then is given up."""


class Lru(OrderedDict[ChunkKey, int]):
    """Chunks of one cache, the one that was not used for longest first, each with the number of its last use."""

    uses = count()

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most

    def prefix(self, keys: Sequence[ChunkKey]) -> int:
        """How many leading ones are here. They were used."""
        found = 0
        while found < len(keys) and keys[found] in self:
            found += 1
        self.use(keys[:found])
        return found

    def use(self, keys: Sequence[ChunkKey]) -> None:
        """They are here now, whatever must go for them. Ends go before beginnings."""
        for key in reversed(keys):
            self[key] = next(self.uses)
            self.move_to_end(key)
        while len(self) > self.most:
            self.popitem(last=False)

    @property
    def oldest(self) -> int:
        """The last use of the one that goes next."""
        return self[next(iter(self))]


@dataclass
class SimStore:
    """Which segment holds a chunk, and which chunks somebody computes. `cluster`: told of each change."""

    segments: dict[str, Lru] = field(default_factory=dict)
    where: dict[ChunkKey, str] = field(default_factory=dict)
    claimed: set[ChunkKey] = field(default_factory=set)
    cluster: Cluster | None = None
    _changes: dict[ChunkKey, asyncio.Event] = field(default_factory=dict)

    def put(self, preferred: str, own: str, keys: Sequence[ChunkKey]) -> None:
        """Committed: where it is preferred, else in the own segment, else in the emptiest; what must go for them is
        what was not used for longest."""
        stored, gone = defaultdict[str, list[ChunkKey]](list), defaultdict[str, list[ChunkKey]](list)
        for key in reversed(keys):
            if key in self.where:
                continue
            wanted = (preferred, own, max(self.segments, key=self._room))
            node = next((name for name in wanted if self._room(name)), "")
            if not node:
                node = min(self.segments, key=lambda name: self.segments[name].oldest)
                old, _ = self.segments[node].popitem(last=False)
                del self.where[old]
                gone[node].append(old)
            self.segments[node].use([key])
            self.where[key] = node
            stored[node].append(key)
        for kind, changes in ((EventKind.REMOVED, gone), (EventKind.STORED, stored)):
            for node, each in changes.items():
                self._tell(kind, node, each)
        self.unclaim(keys)

    def _room(self, node: str) -> int:
        return self.segments[node].most - len(self.segments[node])

    def unclaim(self, keys: Sequence[ChunkKey]) -> None:
        """Nobody computes them any more."""
        self.claimed.difference_update(keys)
        for key in keys:
            if (change := self._changes.pop(key, None)) is not None:
                change.set()

    async def change(self, key: ChunkKey) -> None:
        """Wait until it is committed, or its claim is given back."""
        await self._changes.setdefault(key, asyncio.Event()).wait()

    def used(self, keys: Sequence[ChunkKey]) -> None:
        """They were read."""
        for key in reversed(keys):
            self.segments[self.where[key]].use([key])

    def _tell(self, kind: EventKind, node: str, keys: list[ChunkKey]) -> None:
        if keys and self.cluster is not None:
            self.cluster.on_events([Event(seq=0, kind=kind, node_id=node, segment_id=f"{node}.1", keys=keys)])


class CachingNode(QueueNode):
    """One node."""

    def __init__(self, name: str, role: Role, machine: CachingMachine, store: SimStore) -> None:
        super().__init__(name, role, machine, {})
        self._of, self._store = machine, store
        self._link = asyncio.Lock()
        self._cached = Lru(machine.engine_tokens // machine.chunk_tokens)
        self._running = 0
        store.segments[name] = Lru(machine.segment_tokens // machine.chunk_tokens)
        self._chunk_bytes = machine.chunk_tokens * machine.token_bytes
        size = (1, 0) if machine.plain else (machine.chunk_tokens, self._chunk_bytes)
        self._spec = changed(spec(), chunk_tokens=size[0], chunk_bytes=size[1])

    def report(self) -> NodeReport:
        found = super().report()
        assert found.engine is not None
        blocks = self._of.engine_tokens // found.engine.block_size
        engine = changed(found.engine, kv_spec=self._spec, max_context=self._of.max_context, num_blocks=blocks)
        segments = [changed(one, host_id=self.id) for one in found.segments] if self._of.links else found.segments
        return changed(found, engine=engine, segments=segments)

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        self.legs += 1
        await asyncio.sleep(self._of.net_s)
        of, loop = self._of, asyncio.get_running_loop()
        started, keys = loop.time(), self._keys(request.prompt_token_ids)
        cached, moved, claims = self._cached.prefix(keys), list[Moved](), list[ChunkKey]()
        if not of.plain:
            cached, moved = await self._loaded(keys, cached, waits=True)
            claims = [key for key in keys[cached:] if key not in self._store.where]
            self._store.claimed.update(claims)
        try:
            loaded_s = loop.time() - started
            timings, cached = await self._compute_rest(keys, cached, len(request.prompt_token_ids))
            timings = changed(timings, load_s=loaded_s)
            if not of.plain:
                self._store.put((request.prefer_segment or self.id).partition(".")[0], self.id, claims)
        finally:
            self._store.unclaim(claims)
        await asyncio.sleep(self._of.net_s)
        return PrefillResult(
            request_id=request.request_id,
            cached_tokens=cached * of.chunk_tokens,
            computed_tokens=len(request.prompt_token_ids) - cached * of.chunk_tokens,
            stored_chunks=0 if of.plain else len(keys),
            moved=moved,
            timings=Timings() if of.plain else timings,  # vLLM says nothing of its own
            handoff_params=b"{}" if of.plain else b"",
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        self.legs += 1
        await asyncio.sleep(self._of.net_s)
        prompt = len(request.prompt_token_ids)
        computed, moved, timings = await self._prepared(request)
        info: LegInfo | None = LegInfo(
            cached_tokens=prompt - computed, computed_tokens=computed, moved=moved, timings=timings
        )
        async with self._places:
            self._running += 1
            try:
                left, tokens = request.sampling.max_tokens, 1
                while left:
                    await asyncio.sleep(tokens * self._of.step_s * (1 + self._running / self._of.places))
                    left -= tokens
                    end = None if left else FinishReason.LENGTH
                    yield TokenDelta(token_ids=[7] * tokens, info=info, finish_reason=end)
                    info, tokens = None, min(left, DELTA_TOKENS)
            finally:
                self._running -= 1

    async def _prepared(self, request: GenerateRequest) -> tuple[int, list[Moved], Timings]:
        """The prompt's KV is here: (how much of it was computed, what was moved, when)."""
        of, keys, prompt = self._of, self._keys(request.prompt_token_ids), len(request.prompt_token_ids)
        cached = self._cached.prefix(keys)
        if not of.plain:
            cached, moved = await self._loaded(keys, cached, waits=False)
            if request.handoff is not None:
                await self._handed_over(keys[cached:], request.handoff.wait_s)
                cached, more = await self._loaded(keys, cached, waits=False)
                moved += more
        elif request.handoff_params:
            moved, cached = await self._moved(0, Counter({"": len(keys) - cached})), len(keys)
        else:
            moved = []
        timings, cached = await self._compute_rest(keys, cached, prompt)
        computed = prompt - cached * of.chunk_tokens
        if not of.plain:
            self._store.put(self.id, self.id, keys[cached:])
            return computed, moved, timings
        return computed, [], Timings()  # vLLM says nothing of them

    async def _compute_rest(self, keys: Sequence[ChunkKey], cached: int, prompt: int) -> tuple[Timings, int]:
        """The rest of a prompt, of which so many chunks are cached. A plain server looks for them when the turn of the
        prompt comes, as vLLM's scheduler does: by then the one before may have left its beginning."""

        def rest() -> int:
            nonlocal cached
            cached = max(cached, self._cached.prefix(keys) if self._of.plain else 0)
            return prompt - cached * self._of.chunk_tokens

        timings = await self._compute(rest)
        self._cached.use(keys)
        return timings, cached

    def _keys(self, prompt: Sequence[int]) -> list[ChunkKey]:
        size = self._of.chunk_tokens
        return prompt_keys(self._spec.fingerprint, b"", prompt, size)[: usable_chunks(len(prompt), size)]

    async def _handed_over(self, keys: Sequence[ChunkKey], wait_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                for key in keys:
                    while key not in self._store.where:
                        await self._store.change(key)

    async def _loaded(self, keys: Sequence[ChunkKey], own: int, *, waits: bool) -> tuple[int, list[Moved]]:
        """How many leading chunks are here in the end. `waits`: also for those that others are computing."""
        there, store = own, self._store
        while there < len(keys):
            if keys[there] in store.where:
                there += 1
            elif waits and keys[there] in store.claimed:
                await store.change(keys[there])
            else:
                break
        wanted = [key for key in keys[own:there] if key in store.where]
        holders = Counter(store.where[key] for key in wanted)
        store.used(wanted)
        moved = await self._moved(holders.pop(self.id, 0), holders)
        if any(move.late_bytes for move in moved):
            return own, moved
        self._cached.use(keys[:there])
        return there, moved

    async def _moved(self, near: int, far: Counter[str]) -> list[Moved]:
        of, loop = self._of, asyncio.get_running_loop()
        found = []
        moves = [(near, of.near_rate, "shm", self.id)]
        moves += [(n, of.links.get((self.id, name), of.far_rate), "tcp", name) for name, n in far.items()]
        for chunks, rate, transport, machine in moves:
            if chunks:
                async with self._link:
                    began, size = loop.time(), chunks * self._chunk_bytes
                    late = size / rate > of.read_s
                    await asyncio.sleep(min(of.read_s, size / rate))
                found.append(
                    Moved(
                        transport=transport,
                        direction="get",
                        num_bytes=0 if late else size,
                        seconds=loop.time() - began,
                        machine=machine if of.links else "",
                        late_bytes=size if late else 0,
                    )
                )
        return found


class CachingNodes(QueueNodes):
    """All of them, over one store."""

    def __init__(self, machine: CachingMachine) -> None:
        self.store = SimStore()
        names = [(f"p{number}", Role.PREFILLER) for number in range(machine.prefillers)]
        names += [(f"d{number}", Role.DECODER) for number in range(machine.decoders)]
        self.nodes = [CachingNode(name, role, machine, self.store) for name, role in names]
        self.by_url = {f"http://127.0.0.1:{port}": node for port, node in enumerate(self.nodes, 1)}


@dataclass(frozen=True)
class Asked:
    """One request of a trace."""

    at_s: float
    prompt: list[int]
    output_tokens: int


@dataclass
class TraceLoad(Load):
    """A router over caching nodes. `policy`: instead of the configured one."""

    machine: CachingMachine = field(default_factory=CachingMachine)
    policy: RoutePolicy | None = None
    on_sent: Callable[[str, Sequence[int]], None] = lambda _node, _prompt: None
    """Told of each prompt that is sent to a prefiller, and …"""
    on_ended: Callable[[str], None] = lambda _node: None
    """… that its request has ended."""

    def __post_init__(self) -> None:
        super().__post_init__()
        assert isinstance(self.nodes, CachingNodes)
        self.nodes.store.cluster = None if self.machine.plain else self.cluster
        self.records: list[RequestRecord] = []
        opens = self.dispatcher.open

        def opened(spec: RequestSpec, decision: Decision | None = None, *, waited_s: float = 0.0) -> RequestRun:
            run = opens(spec, decision, waited_s=waited_s)
            if (route := run.record.route) is not None and route.prefiller is not None:
                self.on_sent(route.prefiller, spec.prompt_token_ids)
            return run

        def ended(record: RequestRecord) -> None:
            if record.route is not None and record.route.prefiller is not None:
                self.on_ended(record.route.prefiller)

        self.dispatcher.open = opened  # type: ignore[method-assign]
        self.log.observers.append(ended)

    def _make_nodes(self) -> CachingNodes:
        return CachingNodes(self.machine)

    def _make_config(self, named: list[FakeNode]) -> ClusterConfig:
        config = cluster_config(named, None, **self.router)
        return changed(config, handoff=HandoffKind.NIXL if self.machine.plain else HandoffKind.KVFERRY)

    def _make_policy(self, name: RoutingPolicy) -> RoutePolicy:
        return self.policy or super()._make_policy(name)

    async def play(self, trace: Sequence[Asked]) -> list[Seen]:
        """The whole trace, until its last request has its answer."""
        loop = asyncio.get_running_loop()
        await self.prober.probe()
        await self.warm_up()
        self.seen.clear()
        self.log.observers.append(self.records.append)
        began = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for asked in trace:
                await asyncio.sleep(max(0.0, began + asked.at_s - loop.time()))
                tasks.create_task(self.send(Flow(0, max_tokens=asked.output_tokens), asked.prompt))
        assert not self.log.in_flight and not self.dispatcher._opened
        assert {(node.sequences, node.prefill_tokens) for node in self.cluster.nodes.values()} == {(0, 0)}
        return list(self.seen)
