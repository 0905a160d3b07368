"""Worker halves over one in-process store, driven as vLLM's worker thread drives them; gates where things may hang."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Set
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, TypeVar

import torch
from support.store_fakes import World
from support.vllm_kv import BLOCK, CPU, kv_caches, span_bytes

from engines.vllm.connector.blocks.block_layout import BlockLayout, measure
from engines.vllm.connector.blocks.kv_blocks import HostBlocks
from engines.vllm.connector.limits import ConnectorLimits
from engines.vllm.connector.orders import ChunkPlace, LoadOrder, SaveOrder
from engines.vllm.connector.settings import ConnectorSettings, Provenance
from engines.vllm.connector.worker_half import WorkerHalf
from kvcore.clock import SystemClock
from kvcore.config.schema import StoreConfig, TransportConfig
from kvcore.errors import MetadataUnavailableError
from kvcore.types import ChunkKey, KVSpec
from kvstore.chunk_format import HEADER_BYTES
from kvstore.settings import KVStoreSettings
from kvstore.store import KVStore
from kvstore.wiring import OpenedStore
from metadata_server.client import MetadataClient
from metadata_server.connect import MetadataEndpoints
from transfer.inproc import InprocTransfer

CHUNK = 2 * BLOCK
NUM_BLOCKS = 16
LIMIT_S = 10.0
_Result = TypeVar("_Result")


class Gate:
    """While closed, whoever passes waits, on whatever loop. `reached` once somebody does."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._closed = False
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self.reached = threading.Event()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self.reached.clear()

    def open(self) -> None:
        with self._lock:
            self._closed = False
            waiting, self._waiting = self._waiting, []
        for loop, future in waiting:
            with suppress(RuntimeError):  # that loop is closed: nobody waits
                loop.call_soon_threadsafe(_let_pass, future)

    async def passed(self) -> None:
        with self._lock:
            if not self._closed:
                return
            loop = asyncio.get_running_loop()
            future = loop.create_future()
            self._waiting.append((loop, future))
        self.reached.set()
        await future

    def wait_reached(self) -> None:
        assert self.reached.wait(LIMIT_S), "nobody came to the gate"


def _let_pass(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


class SharedWorld(World):
    """A World whose metadata server lives on a loop of its own thread, with gates and faults for all halves.

    `down`: names of calls that fail. `calls`: all that came. `gates`: by name, of calls and of `read` and `write`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.down: set[str] = set()
        self.calls: list[str] = []
        self.gates: dict[str, Gate] = {}
        self.home = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.home.run_forever, name="test-home", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.core.run(), self.home)

    def gate(self, name: str) -> Gate:
        return self.gates.setdefault(name, Gate())

    def at_home(self, coroutine: Coroutine[Any, Any, _Result]) -> _Result:
        """Run it on the metadata server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.home).result(LIMIT_S)

    async def call(self, path: str, body: bytes, timeout_s: float) -> bytes:
        """As a MetadataTransport's, from any loop."""
        name = path.rpartition("/")[2]
        self.calls.append(name)
        try:
            async with asyncio.timeout(timeout_s):
                if name in self.gates:
                    await self.gates[name].passed()
                if name in self.down or "" in self.down:
                    raise MetadataUnavailableError("switched off")
                return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self.dispatch(path, body), self.home))
        except TimeoutError as error:
            raise MetadataUnavailableError("too late") from error

    async def fault(self, direction: str, op: object) -> None:
        if direction in self.gates:
            await self.gates[direction].passed()

    def close(self) -> None:
        self.at_home(_end_all_tasks())
        self.home.call_soon_threadsafe(self.home.stop)
        self._thread.join(LIMIT_S)
        self.home.close()


async def _end_all_tasks() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


class Engine:
    """One rank of an engine: KV memory and a worker half, on the thread of the test."""

    def __init__(
        self,
        world: SharedWorld,
        node: str,
        *,
        rank: int = 0,
        tp_size: int = 1,
        weights: str = "w",
        bus: str | None = None,
        make_blocks: Callable[[BlockLayout], HostBlocks] = HostBlocks,
        device: torch.device = CPU,
        wrap: Callable[[KVStore], KVStore] = lambda store: store,
        timeout_s: float = 5.0,
        cpus: tuple[int, ...] = (),
        limits: ConnectorLimits = ConnectorLimits(),
    ) -> None:
        self.world = world
        self.caches = kv_caches(NUM_BLOCKS, device=device)
        self.layout = measure(self.caches, num_blocks=NUM_BLOCKS, block_size=BLOCK)
        self.blocks = make_blocks(self.layout)
        self.store: KVStore | None = None
        self.sent: list[str] = []
        self.received: list[str] = []
        self.failed: list[int] = []
        self._wrap = wrap
        settings = ConnectorSettings(
            store=KVStoreSettings(
                node_id=node,
                incarnation=1,
                host_id="h",
                metadata=MetadataEndpoints(urls=("http://nowhere",), timeout_s=5.0),
                transport=TransportConfig(timeout_s=timeout_s),
                store=StoreConfig(),
            ),
            chunk_tokens=CHUNK,
            save_output=True,
            provenance=Provenance(model_id="m", weights_digest=weights, tokenizer_digest="t", attention="a"),
            bus=bus,
            cpus=cpus,
        )
        self.half = WorkerHalf(settings, self.blocks, rank, tp_size, open_store=self._open, limits=limits)

    @asynccontextmanager
    async def _open(self, settings: KVStoreSettings, spec: KVSpec) -> AsyncIterator[OpenedStore]:
        store = KVStore(
            spec=spec,
            node_id=settings.node_id,
            incarnation=settings.incarnation,
            metadata=MetadataClient(self.world, SystemClock(), 5.0),
            transfer=InprocTransfer(self.world.memory, self.world.fault),
            clock=SystemClock(),
            host_id="h",
        )
        self.store = store
        try:
            yield OpenedStore(self._wrap(store), transports=lambda: {"a.1": "inproc"})
        finally:
            await store.aclose()

    # --- what vLLM does ------------------------------------------------------------------------------------------

    def step(self, finished: Set[str] = frozenset()) -> None:
        """The end of one of vLLM's steps."""
        sent, received = self.half.finished(set(finished))
        self.sent += sent
        self.received += received
        self.failed += sorted(self.half.failed_blocks())

    def until(self, condition: Callable[[], bool]) -> None:
        """Empty steps, as vLLM makes them while requests wait, until `condition()`."""
        end = time.monotonic() + LIMIT_S
        while not condition():
            assert time.monotonic() < end, f"sent {self.sent}, received {self.received}, failed {self.failed}"
            self.step()
            threading.Event().wait(0.001)

    def load(self, request_id: str, *places: ChunkPlace, **order: Any) -> None:
        """Order a load."""
        order = {"leg": None, "first_chunk": 0, **order}
        self.half.start_loads([LoadOrder(request_id=request_id, chunks=places, **order)])

    def loaded(self, request_id: str, *places: ChunkPlace, **order: Any) -> list[int]:
        """Order a load, and what failed when it was received."""
        self.load(request_id, *places, **order)
        self.until(lambda: request_id in self.received)
        failed, self.failed = self.failed, []
        return failed

    def save(self, request_id: str, *places: ChunkPlace, **order: Any) -> None:
        """Order a save, whose first order says all."""
        reserve = tuple((place.key, len(place.block_ids)) for place in places)
        order = {"leg": None, "first_chunk": 0, "reserve": reserve, **order}
        self.half.offer_saves([SaveOrder(request_id=request_id, chunks=places, **order)])

    def saved(self, request_id: str, *places: ChunkPlace, **order: Any) -> None:
        """Save, and finish the request."""
        self.save(request_id, *places, **order)
        self.step({request_id})
        self.until(lambda: request_id in self.sent)

    def counters(self) -> dict[str, int]:
        """The half's."""
        return dict(self.half._counters)

    # --- memory --------------------------------------------------------------------------------------------------

    def fill(self, *block_ids: int, number: float) -> None:
        """Overwrite blocks."""
        for tensor in self.caches.values():
            for block_id in block_ids:
                tensor[block_id] = number

    def holds(self, block_id: int, number: float) -> bool:
        """Whether the block is as `fill` leaves it."""
        return all(bool(torch.all(tensor[block_id] == number)) for tensor in self.caches.values())

    def content(self, *block_ids: int) -> bytes:
        """The blocks' bytes, in a payload's order."""
        return span_bytes(self.layout, block_ids)


def place(number: int, *block_ids: int, num_tokens: int | None = None) -> ChunkPlace:
    """The chunk with a key of this number."""
    key = ChunkKey(number.to_bytes(16, "little"))
    return ChunkPlace(
        key=key, num_tokens=len(block_ids) * BLOCK if num_tokens is None else num_tokens, block_ids=block_ids
    )


PLACES = [place(1, 0, 1), place(2, 2, 3), place(3, 4, num_tokens=3)]
"""A prompt: two full chunks and a tail."""


def stored(world: SharedWorld, number: int) -> bytes | None:
    """The payload of the complete chunk with the key of PLACES[number]."""
    found = world.replicas(PLACES[number].key)
    if not found:
        return None
    ref = found[0].ref
    return bytes(world.memory[ref.segment_id][ref.offset + HEADER_BYTES : ref.offset + ref.length])


def idle(engine: Engine) -> None:
    """Until no save is under way."""
    engine.until(lambda: engine.half._jobs.num_pending_saves == 0 and not engine.half._jobs._saves)


@contextmanager
def shared_world(segment_bytes: int = 1 << 20) -> Iterator[tuple[SharedWorld, Callable[..., Engine]]]:
    """Nodes `a` and `b`, and a function that makes engines, which are closed in the end."""
    world = SharedWorld()
    engines: list[Engine] = []

    def make(node: str, **settings: Any) -> Engine:
        engine = Engine(world, node, **settings)
        engines.append(engine)
        return engine

    try:
        for node in ("a", "b"):
            world.add_node(node, segment_bytes)
        yield world, make
    finally:
        for gate in world.gates.values():
            gate.open()
        for engine in engines:
            engine.half.close()
        world.close()
