"""Load on a router in virtual time: its own admission, policy and requests, over nodes that are queues.

A prefiller computes prompts one after the other, a decoder has so many places; nothing else is pretended, so that a
request costs a test a millisecond.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from support.delta_readers import give
from support.router_fakes import CHUNK_TOKENS, MAX_CONTEXT, VOCAB, cluster_config, spec
from support.router_fakes import FakeNode as _Named
from support.sim_loop import LoopClock, run_sim

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.config.routing import RoutingPolicy
from kvcore.config.schema import ClusterConfig
from kvcore.errors import KVFerryError, RateLimitError
from kvcore.types import NodeInfo, Role, Segment
from nodeapi.messages import (
    EngineInfo,
    EngineStats,
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
from nodeapi.protocol import DeltaReader
from nodeapi.sampling import SamplingParams
from router.admission.gate import Admission
from router.admission.no_node import none_is_up_yet
from router.answering import Answerer
from router.nodes.cluster import Cluster
from router.nodes.prober import Prober
from router.requests.dispatch import Dispatcher
from router.requests.records import RequestLog
from router.requests.services import RequestServices
from router.requests.spec import AnswerRequest, RequestSpec, Turn
from router.routing.index import PrefixIndex
from router.routing.policy import RoutePolicy, make_policy
from router.text.tokenizer import ByteTokenizer


@dataclass
class Machine:
    """How fast nodes are. A prompt of 200 tokens takes a prefiller 0.2 s."""

    prefillers: int = 2
    decoders: int = 2
    prefill_rate: float = 1000.0
    step_s: float = 0.01
    places: int = 64
    net_s: float = 0.001
    """One way."""
    shared: int = 0
    """Tokens with which all prompts begin: they are cached, at the first decoder."""
    read_s: float = 0.0
    """In which another one reads them, once."""
    apart: bool = False
    """Each node is a machine of its own."""


class QueueNode:
    """One node. `computing`: held while a prompt is computed; `places`: one for each sequence that is decoded;
    `read_rate`: bytes a second of KV that it is handed over; `write_rate`: so that it hands over. None: it takes no
    time."""

    def __init__(self, name: str, role: Role, machine: Machine, computed: dict[str, asyncio.Event]) -> None:
        self.id, self.role, self._machine, self._computed = name, role, machine, computed
        self._computing = asyncio.Lock()
        self._places = asyncio.Semaphore(machine.places)
        self.legs = 0
        self.hangs = False
        self.read_rate: float | None = None
        self.write_rate: float | None = None
        self.has_shared = name == "d0"

    async def _compute(self, tokens: int | Callable[[], int]) -> Timings:
        """So many, or as many as it is asked for when its turn comes."""
        loop = asyncio.get_running_loop()
        arrived = loop.time()
        async with self._computing:
            started = loop.time()
            await asyncio.sleep((tokens if isinstance(tokens, int) else tokens()) / self._machine.prefill_rate)
            return Timings(queue_s=started - arrived, compute_s=loop.time() - started, total_s=loop.time() - arrived)

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        self.legs += 1
        await asyncio.sleep(self._machine.net_s)
        tokens = len(request.prompt_token_ids) - self._machine.shared
        timings = await self._compute(tokens)
        if self.hangs:
            await asyncio.get_running_loop().create_future()
        moved = list[Moved]()
        if self.write_rate is not None:
            num_bytes = tokens // CHUNK_TOKENS * spec().chunk_bytes
            seconds = num_bytes / self.write_rate
            await asyncio.sleep(seconds)
            moved.append(Moved(transport="tcp", direction="put", num_bytes=num_bytes, seconds=seconds))
        self._done(request.request_id).set()
        await asyncio.sleep(self._machine.net_s)
        return PrefillResult(
            request_id=request.request_id,
            cached_tokens=0,
            computed_tokens=tokens,
            stored_chunks=99,
            moved=moved,
            timings=timings,
        )

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta]:
        self.legs += 1
        await asyncio.sleep(self._machine.net_s)
        shared, timings, moved = self._machine.shared, Timings(), list[Moved]()
        if not self.has_shared and shared:
            await asyncio.sleep(self._machine.read_s)
            self.has_shared = True
        computed = len(request.prompt_token_ids) - shared
        if request.handoff is not None:
            computed -= await self._handed(request, moved)
        if computed > 1:
            timings = await self._compute(computed)
        async with self._places:
            info: LegInfo | None = LegInfo(
                cached_tokens=len(request.prompt_token_ids) - computed,
                computed_tokens=computed,
                timings=timings,
                moved=moved,
            )
            for number in range(1, request.sampling.max_tokens + 1):
                await asyncio.sleep(self._machine.step_s)
                last = number == request.sampling.max_tokens
                yield TokenDelta(token_ids=[7], info=info, finish_reason=FinishReason.LENGTH if last else None)
                info = None

    async def _handed(self, request: GenerateRequest, moved: list[Moved]) -> int:
        """Tokens that another node computed, and that were read in time: chunk by chunk, or all but one at once."""
        assert request.handoff is not None
        loop, tokens, num_bytes, began = asyncio.get_running_loop(), 0, 0, 0.0
        try:
            async with asyncio.timeout(request.handoff.wait_s):
                await self._done(request.request_id).wait()
                if self.read_rate is None:
                    return len(request.prompt_token_ids) - self._machine.shared - 1
                began = loop.time()
                for _ in range(request.handoff.num_chunks):
                    await asyncio.sleep(spec().chunk_bytes / self.read_rate)
                    tokens, num_bytes = tokens + CHUNK_TOKENS, num_bytes + spec().chunk_bytes
        except TimeoutError:
            pass
        if num_bytes:
            moved.append(Moved(transport="tcp", direction="get", num_bytes=num_bytes, seconds=loop.time() - began))
        return tokens

    def report(self) -> NodeReport:
        host = self.id if self._machine.apart else "h"
        return NodeReport(
            node=NodeInfo(id=self.id, role=self.role, control_url="http://there", incarnation=1),
            engine=EngineInfo(
                kind="queue",
                kv_spec=spec(),
                max_context=MAX_CONTEXT,
                vocab_size=VOCAB,
                eos_token_ids=[0],
                block_size=16,
                num_blocks=4096,
                max_sequences=self._machine.places,
            ),
            stats=EngineStats(),
            segments=[Segment(id=f"{self.id}.1", node_id=self.id, size_bytes=1, host_id=host, addresses={})],
        )

    def _done(self, leg: str) -> asyncio.Event:
        return self._computed.setdefault(leg.rpartition(".")[0], asyncio.Event())


class QueueNodes:
    """NodeClient over them, by url `http://127.0.0.1:<number>`."""

    def __init__(self, machine: Machine, kind: "type[QueueNode]" = QueueNode) -> None:
        computed: dict[str, asyncio.Event] = {}
        names = [(f"p{number}", Role.PREFILLER) for number in range(machine.prefillers)]
        names += [(f"d{number}", Role.DECODER) for number in range(machine.decoders)]
        self.nodes = [kind(name, role, machine, computed) for name, role in names]
        self.by_url = {f"http://127.0.0.1:{port}": node for port, node in enumerate(self.nodes, 1)}

    async def prefill(self, url: str, request: PrefillRequest, *, timeout_s: float) -> PrefillResult:
        return await self.by_url[url].prefill(request)

    async def generate(
        self, url: str, request: GenerateRequest, reader: DeltaReader, *, first_s: float, gap_s: float
    ) -> None:
        await give(self.by_url[url].generate(request), reader, first_s=first_s, gap_s=gap_s)

    async def end_handoff(self, url: str, request_id: str, *, timeout_s: float) -> None: ...

    async def abort(self, url: str, request_id: str, *, timeout_s: float) -> None: ...

    async def info(self, url: str, *, timeout_s: float) -> NodeReport:
        return self.by_url[url].report()

    async def aclose(self) -> None: ...


@dataclass(frozen=True)
class Flow:
    """One client's requests: Poisson arrivals, lengths from `lengths` (drawn of the arrivals' dice)."""

    per_s: float
    user: str = ""
    until_s: float = 20.0
    lengths: Callable[[random.Random], int] = lambda dice: min(1500, 20 + int(dice.expovariate(1 / 180)))
    max_tokens: int = 8
    rank: int = 1
    first_token_s: float | None = None


@dataclass
class Seen:
    """What a client saw. `ttft_s` None: it was refused, with `error`."""

    user: str
    at_s: float
    tokens: int
    ttft_s: float | None = None
    total_s: float | None = None
    error: KVFerryError | None = None

    @property
    def retry_after_s(self) -> float:
        return self.error.retry_after_s if isinstance(self.error, RateLimitError) else 0.0


@dataclass
class Load:
    """A router under load. Made inside a running simulated loop."""

    machine: Machine = field(default_factory=Machine)
    admits: bool = True
    router: dict[str, object] = field(default_factory=dict)
    over: QueueNodes | None = None
    """Nodes that it has in common with other routers; None: its own."""

    def __post_init__(self) -> None:
        loop = asyncio.get_running_loop()
        clock = LoopClock(loop)
        self.nodes = self.over or self._make_nodes()
        config = self._make_config([_Named(node.id, node.role) for node in self.nodes.nodes])
        self.log = RequestLog()
        self.cluster = Cluster(config, clock)
        self.prober = Prober(config.router, self.cluster, self.nodes, clock)
        services = RequestServices(config.router, self.cluster, self.nodes, clock, self.log, config.handoff)
        self.dispatcher = Dispatcher(services, self._make_policy(config.router.policy))
        self.admission = Admission(
            self.dispatcher.route,
            clock,
            config.router,
            none_is_up=partial(none_is_up_yet, self.cluster),
            stopping=lambda: self.dispatcher.stopping,
        )
        self.cluster.on_less_load = self.admission.wake
        self.log.prompt_observers.append(self.admission.ended)

        async def run(work: Callable[[], Any]) -> Any:
            return work()

        self.answerer = Answerer(
            model="m",
            tokenizer=ByteTokenizer(VOCAB),
            dispatcher=self.dispatcher,
            cluster=self.cluster,
            run=run,
            admission=self.admission if self.admits else None,
        )
        self.seen: list[Seen] = []
        self._count = 0
        shared = chunk_keys(root_key(spec().fingerprint), [1] * self.machine.shared, CHUNK_TOKENS)
        assert isinstance(self.cluster.index, PrefixIndex)
        self.cluster.index.store("d0", shared, "d0.1")

    def _make_nodes(self) -> QueueNodes:
        return QueueNodes(self.machine)

    def _make_config(self, named: list[_Named]) -> ClusterConfig:
        return cluster_config(named, None, **{"first_token_s": 1.0, "min_prefill_tokens": 8, **self.router})

    def _make_policy(self, name: RoutingPolicy) -> RoutePolicy:
        return make_policy(name)

    async def ask(self, flow: Flow, tokens: int) -> Seen:
        """One request of a prompt that no other begins like, to its end."""
        number = self._count + 1
        own = [number % VOCAB, *[1 + (number >> 9)] * (tokens - 1)]
        return await self.send(flow, [1] * self.machine.shared + own)

    async def send(self, flow: Flow, prompt: list[int]) -> Seen:
        """One request, to its end."""
        loop = asyncio.get_running_loop()
        self._count += 1
        name, started = f"r{self._count}", loop.time()
        seen = Seen(flow.user, started, len(prompt) - self.machine.shared)
        self.seen.append(seen)
        params = SamplingParams(max_tokens=flow.max_tokens, temperature=0, ignore_eos=True)
        turn = Turn(flow.user, flow.rank, client_s=flow.first_token_s)
        request = AnswerRequest([RequestSpec(name, prompt, params, flow=flow.user)], turn=turn)
        try:
            answer = await self.answerer.admit(request)
            async for _ in answer.pieces():
                if seen.ttft_s is None:
                    seen.ttft_s = loop.time() - started
            seen.total_s = loop.time() - started
        except KVFerryError as error:
            seen.error = error
        return seen

    async def drive(self, flows: Sequence[Flow], seed: int) -> list[Seen]:
        """All of these at once, until the last one has its answer."""
        await self.prober.probe()
        await self.warm_up()
        self.seen.clear()
        async with asyncio.TaskGroup() as tasks:
            for number, flow in enumerate(flows):
                tasks.create_task(self._arrivals(flow, random.Random(f"{seed} {number}"), tasks))
        assert not len(self.admission) and not self.log.in_flight and not self.dispatcher._opened
        assert {(node.sequences, node.prefill_tokens) for node in self.cluster.nodes.values()} == {(0, 0)}
        return list(self.seen)

    async def warm_up(self) -> None:
        """Until it is known how fast the nodes are."""
        for _ in range(3):
            await asyncio.gather(*(self.ask(Flow(0, max_tokens=4), 100) for _ in self.nodes.nodes))

    async def _arrivals(self, flow: Flow, dice: random.Random, tasks: asyncio.TaskGroup) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + flow.until_s
        while True:
            await asyncio.sleep(dice.expovariate(flow.per_s))
            if loop.time() > until:
                return
            tasks.create_task(self.ask(flow, flow.lengths(dice)))


def run_load(
    flows: Sequence[Flow], seed: int = 1, machine: Machine | None = None, *, admits: bool = True, **router: object
) -> list[Seen]:
    """What the clients of `flows` saw."""

    async def main() -> list[Seen]:
        return await Load(machine or Machine(), admits, dict(router)).drive(flows, seed)

    return run_sim(main, limit_s=10_000.0)


def goodput(seen: Sequence[Seen], within_s: float = 1.0, until_s: float = 20.0) -> float:
    """Answers a second whose first token came in time."""
    return sum(one.ttft_s is not None and one.ttft_s < within_s for one in seen) / until_s


def p99(seen: Sequence[Seen], user: str) -> float:
    """Of the time to the first token, of a client of which nothing was refused."""
    times = sorted(one.ttft_s for one in seen if one.user == user and one.ttft_s is not None)
    return times[int(0.99 * len(times))]


def outcomes(seen: Sequence[Seen]) -> Counter[str]:
    """How many were answered, and the others by the code of their errors."""
    return Counter("ok" if one.error is None else one.error.code for one in seen)
