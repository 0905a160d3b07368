"""One-sided put and get on registered memory through UCX: RDMA where there are HCAs, else TCP; never shared memory.

Owns a worker (one thread) on either side. A write is reported once it was flushed at the target. Small structs in
`Segment.addresses["ucx"]` tell a peer all that it needs: no port has to be agreed upon.
"""

import asyncio
import concurrent.futures
import contextlib
import logging
import threading
from collections.abc import Sequence

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.telemetry import log_fields
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import Deadline
from transfer.pieces import Piece
from transfer.ranges import check_batch
from transfer.stripes import Part, stripe
from transfer.ucx.binding import load_library
from transfer.ucx.descriptor import UcxDescriptor, descriptor_of, pack_descriptor
from transfer.ucx.devices import plan_devices
from transfer.ucx.endpoint import Job
from transfer.ucx.worker import UcxWorker

_LOG = logging.getLogger("transfer")
_JOBS = 64
"""Batches in the worker's hands at once; more wait in line, within their deadlines."""
_STRIPE_BYTES = 2 << 20
_ENDPOINTS_A_STREAM = 2
"""Over TCP an endpoint has one message on its way: while its target copies one, another endpoint's is sent."""
_AT_ONCE_BYTES = 64 << 10
"""Up to here a batch moves in the loop's thread, if it can: two hand-overs between threads take longer than it."""
_GRACE_S = 0.25
"""What a late or cancelled batch may still take to end in order, before its connection is cut for all."""
_REGISTER_S = 120.0
_DESCRIPTORS = 1024
"""Parsed ones kept; the oldest go first."""


class UcxTransfer:
    """TransferEngine over UCX: at most twice `streams` endpoints a segment, made when first used.

    Raises ConfigError (see `_open`).
    """

    kind = "ucx"

    def __init__(self, config: TransportConfig) -> None:
        self._worker = _open(config, "kvferry-ucx", None)
        self._worker.start()
        self._endpoints = _ENDPOINTS_A_STREAM * config.streams
        self._ucx = self._worker.library.version[:2]
        self._slots = asyncio.Semaphore(_JOBS)
        self._descriptors: dict[tuple[str, str, int], UcxDescriptor] = {}
        self._closed = False

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `ucx` address."""
        return self.kind in segment.addresses

    def describe(self, segment: Segment) -> str:
        """`ucx:rc_mlx5/mlx5_0@1.13.1`: what moves its bytes, with which build; without the lanes before it was used."""
        lanes = self._worker.lanes(segment.id)
        return f"{self.kind}{':' if lanes else ''}{lanes}@{'.'.join(map(str, self._worker.library.version))}"

    def register(self, region: memoryview) -> None:
        """As TransferEngine.register. Blocks while the memory is pinned (RDMA); raises ConfigError if it cannot be."""
        if self._closed:
            raise ConfigError("the transport is closed")
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def map_it() -> None:
            try:
                self._worker.map_memory(region)
            except ConfigError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._worker.call(map_it):
            raise ConfigError("the transport's thread has ended")
        done.result(_REGISTER_S)

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose. Takes at most about four seconds, and some ms if nothing hinders it."""
        self._closed = True
        await _end(self._worker)

    async def _transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        results = check_batch(direction, ops)
        deadline = Deadline(timeout_s)
        groups: dict[tuple[str, str, int], list[int]] = {}
        for index, op in enumerate(ops):
            if results[index] is None and op.num_bytes:
                key = (op.segment.addresses.get(self.kind, ""), op.segment.id, op.segment.size_bytes)
                groups.setdefault(key, []).append(index)

        async def run(key: tuple[str, str, int], indices: list[int]) -> None:
            part = [ops[index] for index in indices]
            error = await self._run(direction, key, part, deadline)
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
        self, direction: Direction, key: tuple[str, str, int], ops: list[TransferOp], deadline: Deadline
    ) -> TransferError | None:
        """One batch on one segment, striped over endpoints if it is large."""
        try:
            descriptor = self._descriptor(key, ops[0].segment)
        except TransferError as error:
            return error
        stripes = stripe(list(enumerate(ops)), self._endpoints, _STRIPE_BYTES)
        jobs = [
            self._run_stripe(direction, descriptor, _pieces(parts), f"{number}:{key[0]}", deadline)
            for number, parts in enumerate(stripes)
        ]
        if len(jobs) == 1:
            return await jobs[0]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(job) for job in jobs]
        return next((result for task in running if (result := task.result()) is not None), None)

    async def _run_stripe(
        self, direction: Direction, descriptor: UcxDescriptor, pieces: list[Piece], key: str, deadline: Deadline
    ) -> TransferError | None:
        try:
            if self._slots.locked():
                async with asyncio.timeout(deadline.remaining()):
                    await self._slots.acquire()
            else:
                await self._slots.acquire()  # at once
        except TimeoutError:
            return deadline.error()
        except TransferError as error:
            return error
        try:
            return await self._hand_over(direction, descriptor, pieces, key, deadline)
        except TransferError as error:
            return error
        finally:
            self._slots.release()

    async def _hand_over(
        self, direction: Direction, descriptor: UcxDescriptor, pieces: list[Piece], key: str, deadline: Deadline
    ) -> TransferError | None:
        """Give a batch to the worker and wait until the worker is done with it, whatever happens here meanwhile."""
        if self._closed:
            raise PeerUnreachableError("the transport is closed")
        loop, here = asyncio.get_running_loop(), threading.get_ident()
        over: asyncio.Future[TransferError | None] = loop.create_future()

        def done(error: TransferError | None) -> None:
            if threading.get_ident() == here:
                over.set_result(error)
                return
            with contextlib.suppress(RuntimeError):  # the loop was closed without waiting
                loop.call_soon_threadsafe(over.set_result, error)

        job = Job(direction, descriptor, pieces, done)
        worker = self._worker
        timeout_s = deadline.remaining()
        small = sum(piece.view.nbytes for piece in pieces) <= _AT_ONCE_BYTES
        if not (small and worker.move_now(job, key)) and not worker.call(lambda: worker.add(job, key)):
            raise PeerUnreachableError("the transport's thread has ended")
        if over.done():
            return over.result()
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({over}, timeout=timeout_s)
        except asyncio.CancelledError as error:
            cancelled = error
        if not over.done():
            reason = deadline.error() if cancelled is None else PeerUnreachableError("the batch was cancelled")
            worker.call(lambda: worker.stop_job(job, reason, _GRACE_S))
        while not over.done():
            try:
                await asyncio.wait({over})
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return over.result()

    def _descriptor(self, key: tuple[str, str, int], segment: Segment) -> UcxDescriptor:
        found = self._descriptors.get(key)
        if found is None:
            found = descriptor_of(segment, self._ucx)
            if len(self._descriptors) >= _DESCRIPTORS:
                del self._descriptors[next(iter(self._descriptors))]
            self._descriptors[key] = found
        return found


class UcxSegmentHost:
    """SegmentHost over UCX. `memory` is the whole segment; it must outlive this host's `aclose`."""

    def __init__(self, segment_id: str, memory: memoryview, config: TransportConfig) -> None:
        self._segment_id = segment_id
        self._memory = memory
        self._config = config
        self._worker: UcxWorker | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """As SegmentHost.address: a descriptor."""
        return self._address

    async def start(self) -> None:
        """As SegmentHost.start. Registers the memory: for RDMA that pins it."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvferry-ucx-open") as pool:
            worker = await asyncio.get_running_loop().run_in_executor(pool, self._open)
        worker.start()
        self._worker = worker

    async def aclose(self) -> None:
        """As SegmentHost.aclose. Batches under way break."""
        if self._worker is not None:
            await _end(self._worker)

    def _open(self) -> UcxWorker:
        worker = _open(self._config, "kvferry-ucx-host", self._segment_id)
        try:
            handle, base = worker.map_memory(self._memory)
            descriptor = UcxDescriptor(
                worker.library.version[:2],
                self._segment_id,
                self._memory.nbytes,
                base,
                worker.address,
                worker.pack_rkey(handle),
            )
        except ConfigError:
            worker.close_unstarted()
            raise
        self._address = pack_descriptor(descriptor)
        return worker


def _open(config: TransportConfig, name: str, hosted: str | None) -> UcxWorker:
    """A worker for a configuration. ConfigError names the device, library or transport that is missing."""
    plan = plan_devices(config.devices)
    worker = UcxWorker(load_library(config.ucx_library), plan, name, hosted)
    log_fields(
        _LOG,
        logging.INFO,
        "transfer.ucx_opened",
        role="initiator" if hosted is None else "host",
        segment=hosted,
        ucx=worker.library.build,
        resources=",".join(worker.resources),
        rdma=plan.rdma,
    )
    return worker


def _pieces(parts: Sequence[Part]) -> list[Piece]:
    pieces = []
    for part in parts:
        at = part.offset
        for view in part.views:
            pieces.append(Piece(at, view))
            at += view.nbytes
    return pieces


async def _end(worker: UcxWorker) -> None:
    """Stop a worker's thread and wait for it; it takes about four seconds at most."""
    worker.stop()
    while worker.thread.is_alive():  # noqa: ASYNC110  (threads set no asyncio.Event)
        await asyncio.sleep(0.001)
