"""Sim engines over real stores in one process and virtual time, and what tests ask of them."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import msgspec
from support.sim_loop import LoopClock
from support.store_fakes import FakeMetadata, Wire, World

from engines.base import EngineStats, GenerateRequest, Handoff, PrefillRequest, SamplingParams, TokenDelta
from engines.paged.loop import EngineLoop
from engines.paged.runner import StepOutput, StepSlice
from engines.sim.build import build_sim_engine
from engines.sim.runner import SimRunner, sim_spec
from kvcore.config import SimEngineConfig
from metadata_server.messages import WaitRequest
from transfer.inproc import FaultHook, InprocTransfer

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


async def deltas(engine: EngineLoop, wanted: GenerateRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.generate(wanted)]


async def completions(engine: EngineLoop, wanted: GenerateRequest) -> list[list[int]]:
    """Tokens of each index, those of a continued request's past included, as `expected_tokens` has them."""
    tokens: list[list[int]] = [list(wanted.output_token_ids) for _ in range(wanted.sampling.n)]
    for delta in await deltas(engine, wanted):
        tokens[delta.index] += delta.token_ids
    return tokens


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


class WaitingMetadata(FakeMetadata):
    """FakeMetadata whose `wait` waits, and whose reservations can be refused."""

    full = False

    async def dispatch(self, path: str, body: bytes) -> bytes:
        if path == "/v1/objects/wait":
            wanted = msgspec.msgpack.decode(body, type=WaitRequest)
            loop = asyncio.get_running_loop()
            end = loop.time() + wanted.timeout_s
            keys = wanted.keys[: wanted.more_than + 1]
            while loop.time() < end and not all(map(self.complete.get, keys)):  # noqa: ASYNC110 - virtual time
                await asyncio.sleep(0.001)
        if path == "/v1/objects/reserve" and self.full:
            sizes, self.segments = self.segments, {}
            try:
                return await super().dispatch(path, body)
            finally:
                self.segments = sizes
        return await super().dispatch(path, body)


class FailingRunner(SimRunner):
    """Fails its next steps as often as told."""

    failures = 0

    async def execute(self, slices: list[StepSlice]) -> StepOutput:  # type: ignore[override]
        if self.failures:
            await asyncio.sleep(0.001)
            self.failures -= 1
            raise RuntimeError("the model broke")
        return await super().execute(slices)


@dataclass
class Cluster:
    """Engines with a store each over one metadata server. Make it inside of `run_sim`."""

    config: SimEngineConfig = CONFIG
    metadata: WaitingMetadata = field(default_factory=WaitingMetadata)
    wires: dict[str, Wire] = field(default_factory=dict)
    fault: FaultHook | None = None

    def __post_init__(self) -> None:
        self.clock = LoopClock(asyncio.get_running_loop())
        self.world = World(metadata=self.metadata, clock=self.clock)

    def engine(self, node: str, config: SimEngineConfig | None = None) -> EngineLoop:
        config = config or self.config
        self.world.add_node(node, 4 << 20)
        spec = sim_spec(config, "m", CHUNK)
        store, self.wires[node] = self.world.store(node, InprocTransfer(self.world.memory, self.fault), spec=spec)
        return build_sim_engine(config, "m", CHUNK, store, self.clock)

    def damage(self, chunk: int) -> None:
        """Flip a byte in the payload of every copy of the `chunk`-th chunk committed."""
        replicas = list(self.metadata.complete.values())[chunk]
        for replica in replicas:
            self.world.memory[replica.segment_id][replica.offset + 200] ^= 1

    async def aclose(self) -> None:
        await self.world.aclose()
        assert not self.metadata.reserved, "reservations left over"
        assert not self.metadata.leases, "leases left over"


def lone_engine(config: SimEngineConfig = CONFIG) -> EngineLoop:
    return build_sim_engine(config, "m", CHUNK, None, LoopClock(asyncio.get_running_loop()))
