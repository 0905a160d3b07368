"""One-sided reads and writes through NIXL's agents, with the UCX that NIXL's wheel brings. Never shared memory.

Owns an agent and a thread on either side. A write is reported once it was flushed at the target. All that a peer needs
is in `Segment.addresses["nixl"]`.
"""

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Sequence

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import Deadline
from transfer.nixl.batch import Batch
from transfer.nixl.descriptor import NixlDescriptor, descriptor_of
from transfer.nixl.host import open_nixl
from transfer.nixl.worker import NixlWorker
from transfer.pieces import Piece
from transfer.ranges import byte_views, check_batch

_BATCHES = 64
"""In the worker's hands at once; more wait in line, within their deadlines."""
_GRACE_S = 0.25
"""What a late or cancelled batch may still take to end in order, before its agent is closed."""
_REGISTER_S = 120.0
_DESCRIPTORS = 1024
"""Parsed ones kept; the oldest go first."""

_Key = tuple[str, str, int]


class NixlTransfer:
    """TransferEngine over NIXL: one connection a segment. Raises ConfigError (see `open_nixl`)."""

    kind = "nixl"

    def __init__(self, config: TransportConfig) -> None:
        library, plan, _ = open_nixl(config, "initiator", None)
        self._worker = NixlWorker(library, plan, "kvferry-nixl")
        self._worker.start()
        self._versions = library.versions
        self._shown = f"{self.kind}:{plan.net_devices}@{'.'.join(map(str, library.versions.nixl))}"
        self._slots = asyncio.Semaphore(_BATCHES)
        self._descriptors: dict[_Key, NixlDescriptor] = {}
        self._closed = False

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `nixl` address."""
        return self.kind in segment.addresses

    def describe(self, segment: Segment) -> str:
        """`nixl:mlx5_0:1@1.5.1`: devices that may move its bytes, and the wheel. NIXL does not say which it takes."""
        return self._shown

    def register(self, region: memoryview) -> None:
        """As TransferEngine.register. Blocks while the memory is pinned (RDMA); raises ConfigError if it cannot be.

        Buffers outside of what was registered are registered with each request, and for so long.
        """
        if self._closed:
            raise ConfigError("the transport is closed")
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def register_it() -> None:
            try:
                self._worker.register(region)
            except ConfigError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._worker.call(register_it):
            raise ConfigError("the transport's thread has ended")
        done.result(_REGISTER_S)

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose. Takes at most about a second, and some ms if nothing hinders it."""
        self._closed = True
        self._worker.stop()
        while self._worker.thread.is_alive():  # noqa: ASYNC110  (threads set no asyncio.Event)
            await asyncio.sleep(0.001)

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results = check_batch(direction, ops)
        deadline = Deadline(timeout_s)
        groups: dict[_Key, list[int]] = {}
        for index, op in enumerate(ops):
            if results[index] is None and op.num_bytes:
                key = (op.segment.addresses.get(self.kind, ""), op.segment.id, op.segment.size_bytes)
                groups.setdefault(key, []).append(index)

        async def run(key: _Key, indices: list[int]) -> None:
            error = await self._run(direction, key, [ops[index] for index in indices], deadline)
            for index in indices:
                results[index] = error

        if len(groups) == 1:  # no task: a small batch is all latency
            await run(*groups.popitem())
        else:
            async with asyncio.TaskGroup() as tasks:
                for key, indices in groups.items():
                    tasks.create_task(run(key, indices))
        return results

    async def _run(
        self, direction: Direction, key: _Key, ops: list[TransferOp], deadline: Deadline
    ) -> TransferError | None:
        """One batch on one segment."""
        try:
            descriptor = self._descriptor(key, ops[0].segment)
            async with asyncio.timeout(deadline.remaining()):
                await self._slots.acquire()
        except TimeoutError:
            return deadline.error()
        except TransferError as error:
            return error
        try:
            return await self._hand_over(direction, descriptor, ops, key[0], deadline)
        except TransferError as error:
            return error
        finally:
            self._slots.release()

    async def _hand_over(
        self, direction: Direction, descriptor: NixlDescriptor, ops: list[TransferOp], key: str, deadline: Deadline
    ) -> TransferError | None:
        """Give a batch to the worker and wait until the worker is done with it, whatever happens here meanwhile."""
        loop = asyncio.get_running_loop()
        over: asyncio.Future[TransferError | None] = loop.create_future()

        def done(error: TransferError | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting
                loop.call_soon_threadsafe(over.set_result, error)

        batch = Batch(direction, descriptor, _pieces(ops), done)
        worker = self._worker
        timeout_s = deadline.remaining()
        if self._closed or not worker.call(lambda: worker.add(batch, key)):
            raise PeerUnreachableError("the transport is closed")
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({over}, timeout=timeout_s)
        except asyncio.CancelledError as error:
            cancelled = error
        if not over.done():
            reason = deadline.error() if cancelled is None else PeerUnreachableError("the batch was cancelled")
            worker.call(lambda: worker.stop_batch(batch, reason, _GRACE_S))
        while not over.done():
            try:
                await asyncio.wait({over})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return over.result()

    def _descriptor(self, key: _Key, segment: Segment) -> NixlDescriptor:
        found = self._descriptors.get(key)
        if found is None:
            found = descriptor_of(segment, self._versions)
            if len(self._descriptors) >= _DESCRIPTORS:
                del self._descriptors[next(iter(self._descriptors))]
            self._descriptors[key] = found
        return found


def _pieces(ops: Sequence[TransferOp]) -> list[Piece]:
    pieces = []
    for op in ops:
        at = op.offset
        for view in byte_views(op):
            pieces.append(Piece(at, view))
            at += view.nbytes
    return pieces
