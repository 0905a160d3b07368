"""Sim engines over real stores in one process and virtual time, and what tests ask of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from llguidance import LLMatcher
from support.sim_loop import LoopClock, run_sim
from support.store_fakes import Wire, World

from engines.paged.loop import EngineLoop
from engines.paged.runner import StepOutput, StepSlice
from engines.sim.build import build_sim_engine, sim_grammars
from engines.sim.runner import SimRunner, sim_spec
from kvcore.clock import ManualClock
from kvcore.config.schema import SimEngineConfig
from nodeapi.grammars.compiler import Grammars
from nodeapi.messages import EngineStats, GenerateRequest, Handoff, PrefillRequest, TokenDelta
from nodeapi.sampling import SamplingParams
from transfer.inproc import FaultHook, InprocTransfer

Result = TypeVar("Result")
CHUNK = 32
CONFIG = SimEngineConfig(block_size=8, num_blocks=512, bytes_per_token=32, max_context=1024, vocab_size=500)


def prompt_of(length: int, seed: int = 0, config: SimEngineConfig = CONFIG) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(1, config.vocab_size) for _ in range(length)]


def request(
    request_id: str,
    prompt: list[int],
    *,
    output: list[int] | None = None,
    handoff: Handoff | None = None,
    deadline_s: float = 100.0,
    **sampling: object,
) -> GenerateRequest:
    params = msgspec.convert({"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling}, SamplingParams)
    return GenerateRequest(
        request_id=request_id,
        prompt_token_ids=prompt,
        output_token_ids=output or [],
        sampling=params,
        handoff=handoff,
        deadline_s=deadline_s,
    )


def prefill_request(request_id: str, prompt: list[int], deadline_s: float = 100.0) -> PrefillRequest:
    return PrefillRequest(request_id=request_id, prompt_token_ids=prompt, deadline_s=deadline_s)


def inline_grammars(config: SimEngineConfig) -> Grammars:
    """Of bytes, compiled on the loop: a thread's work would take no virtual time."""

    async def at_once(work: Callable[[], LLMatcher]) -> LLMatcher:
        return work()

    return sim_grammars(config, beside=at_once, clock=ManualClock())


async def deltas(engine: EngineLoop, wanted: GenerateRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(wanted)]


async def completions(engine: EngineLoop, wanted: GenerateRequest) -> list[list[int]]:
    """Tokens of each index, those of a continued request's past included, as `expected_tokens` has them."""
    tokens: list[list[int]] = [list(wanted.output_token_ids) for _ in range(wanted.sampling.n)]
    for delta in await deltas(engine, wanted):
        tokens[delta.index] += delta.token_ids
    return tokens


async def read_some(engine: EngineLoop, wanted: GenerateRequest, count: int) -> None:
    """As a reader that leaves after `count` deltas."""
    async with aclosing(engine.generate(wanted)) as stream:
        for _ in range(count):
            await anext(stream, None)


async def settle(done: Callable[[], Awaitable[bool]], limit_s: float = 60.0) -> None:
    async with asyncio.timeout(limit_s):
        while not await done():  # noqa: ASYNC110 - virtual time, and no event says that an engine is idle
            await asyncio.sleep(0.001)


async def idle(engine: EngineLoop) -> EngineStats:
    """Wait until the engine holds nothing, check its invariants, and return its stats."""

    async def holds_nothing() -> bool:
        stats = await engine.stats()
        return not (stats.running or stats.waiting or stats.loading or stats.used_blocks or stats.pending_saves)

    await settle(holds_nothing)
    engine.check()
    return await engine.stats()


class FailingRunner(SimRunner):
    """Fails its next steps as often as told."""

    failures = 0

    async def execute(self, slices: list[StepSlice]) -> StepOutput:  # type: ignore[override]
        if self.failures:
            await asyncio.sleep(0.001)
            self.failures -= 1
            raise RuntimeError("the model broke")
        return await super().execute(slices)


class Cluster:
    """Engines with a store each over one metadata server's core. Make it inside of `run_sim`."""

    def __init__(
        self, config: SimEngineConfig = CONFIG, segment_bytes: int = 4 << 20, fault: FaultHook | None = None
    ) -> None:
        self.config = config
        self.wires: dict[str, Wire] = {}
        self.clock = LoopClock(asyncio.get_running_loop())
        self.world = World()
        self.world.use(self.clock)
        self._segment_bytes = segment_bytes
        self._fault = fault

    @property
    def num_stored(self) -> int:
        """Complete chunks in the store."""
        return self.world.state.num_objects

    def engine(self, node: str, config: SimEngineConfig | None = None) -> EngineLoop:
        config = config or self.config
        self.world.add_node(node, self._segment_bytes)
        spec = sim_spec(config, "m", CHUNK)
        store, self.wires[node] = self.world.store(node, InprocTransfer(self.world.memory, self._fault), spec=spec)
        return build_sim_engine(config, "m", CHUNK, store, self.clock, grammars=inline_grammars(config))

    def damage(self, chunk: int) -> None:
        """Flip a byte in the payload of every copy of the `chunk`-th chunk of all that are stored, oldest first."""
        batch = [event for snapshot in self.world.core.snapshot() for event in snapshot.events]
        stored = {key for event in batch for key in event.keys}
        keys = sorted(stored, key=lambda key: min(replica.ref.id for replica in self.world.replicas(key)))
        for replica in self.world.replicas(keys[chunk]):
            self.world.memory[replica.ref.segment_id][replica.ref.offset + 200] ^= 1

    def forget_chunks(self) -> None:
        """The metadata server starts again, and the nodes say that they hold nothing."""
        self.world.restart_metadata(epoch="2", first_generation=1 << 40)
        for segment in self.world.segments:
            self.world.register(segment)

    async def aclose(self) -> None:
        await self.world.aclose()
        stats = self.world.stats()
        assert (stats.reservations, stats.read_leases, stats.waiters) == (0, 0, 0)
        self.world.state.check_invariants(self.clock.now())


def lone_engine(config: SimEngineConfig = CONFIG) -> EngineLoop:
    clock = LoopClock(asyncio.get_running_loop())
    return build_sim_engine(config, "m", CHUNK, None, clock, grammars=inline_grammars(config))


def alone(act: Callable[[EngineLoop], Awaitable[Result]], config: SimEngineConfig = CONFIG) -> Result:
    """What `act` does with an engine without a store, which it leaves idle."""

    async def main() -> Result:
        async with lone_engine(config) as engine:
            result = await act(engine)
            await idle(engine)
            return result

    return run_sim(main, limit_s=1000)


def in_cluster(
    act: Callable[[Cluster, EngineLoop, EngineLoop], Awaitable[Result]],
    *,
    configs: Mapping[str, SimEngineConfig] | None = None,
    **settings: Any,
) -> Result:
    """What `act` does with two engines over one store, `p` and `d`, which it leaves idle. `configs`: of those of them
    that have another one."""
    of = configs or {}

    async def main() -> Result:
        cluster = Cluster(**settings)
        async with cluster.engine("p", of.get("p")) as prefiller, cluster.engine("d", of.get("d")) as decoder:
            result = await act(cluster, prefiller, decoder)
            await idle(prefiller)
            await idle(decoder)
        await cluster.aclose()
        return result

    return run_sim(main, limit_s=100)
