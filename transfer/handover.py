"""Hands batches from the event loop to the thread that owns a library (UCX, NIXL), and waits until it lets go of them.

Owns the bound on batches under way, their deadlines and cancellation. Knows no library: a `BatchWorker` moves the
bytes. Invariant: while the worker may touch a caller's buffers, the caller's `read` or `write` has not returned.
"""

import asyncio
import concurrent.futures
import contextlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import msgspec

from kvcore.errors import ConfigError, PeerUnreachableError, TransferError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import Direction, TransferOp
from transfer.blocking import BatchDeadline, ended
from transfer.fragments import Fragment
from transfer.ranges import check_batch
from transfer.sealed_address import open_address

_MAX_DESCRIPTORS = 1024
"""Parsed ones kept; the oldest go first."""

_Descriptor = TypeVar("_Descriptor")
_Batch = TypeVar("_Batch")
_Batch_contra = TypeVar("_Batch_contra", contravariant=True)
_Key = tuple[str, str, int]
_Done = Callable[[TransferError | None], None]


@dataclass(frozen=True, slots=True)
class HandoverLimits:
    """Bounds of what is handed to one worker."""

    max_batches: int = 64
    """In the worker's hands at once; more wait in line, within their deadlines."""
    grace_s: float = 0.25
    """What a late or cancelled batch may still take to end in order, before what it shares with others is cut."""
    register_s: float = 120.0
    """For registering one region: RDMA pins its pages."""


class BatchWorker(Protocol[_Batch_contra]):
    """A thread that owns a library. Only `call`, `stop` and `thread` may be used from other threads."""

    @property
    def thread(self) -> threading.Thread:
        """The thread, started."""
        ...

    def call(self, command: Callable[[], None]) -> bool:
        """Have the thread call `command`, soon. False once the thread has ended: then nothing is called."""
        ...

    def stop(self) -> None:
        """End the thread soon; every batch ends before."""
        ...

    def register(self, region: memoryview) -> None:
        """Register memory until the end. Raises ConfigError."""
        ...

    def add(self, batch: _Batch_contra, key: str) -> None:
        """Begin a batch on the connection `key`. It ends with one call of its `done`, whatever happens."""
        ...

    def stop_batch(self, batch: _Batch_contra, error: TransferError, grace_s: float) -> None:
        """End a batch with `error`, within `grace_s` and what cutting its connection takes."""
        ...


class Handover(Generic[_Descriptor, _Batch]):
    """The event loop's side of one worker.

    `kind`: of the transport, and of the segments' addresses, which `trust` opens where they are sealed. `parse`: the
    descriptor of a segment whose address was opened, or a TransferError.
    `split`: the fragments of each batch that the ops on one segment become. `make`: a batch, whose `done` is called
    once, in any thread. `move_now`: moves a batch in the loop's thread, or returns False and has not begun it.
    """

    def __init__(
        self,
        kind: str,
        worker: BatchWorker[_Batch],
        *,
        parse: Callable[[Segment], _Descriptor],
        split: Callable[[Sequence[TransferOp]], list[list[Fragment]]],
        make: Callable[[Direction, _Descriptor, Sequence[Fragment], _Done], _Batch],
        move_now: Callable[[_Batch, str], bool] = lambda batch, key: False,
        limits: HandoverLimits = HandoverLimits(),
        trust: ClusterTrust = OPEN,
    ) -> None:
        self._kind = kind
        self._trust = trust
        self._worker = worker
        self._parse = parse
        self._split = split
        self._make = make
        self._move_now = move_now
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.max_batches)
        self._num_batches = 0
        self._descriptors: dict[_Key, tuple[str, _Descriptor]] = {}
        self._closed = False

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Handover {self._kind} {state} batches={self._num_batches}/{self._limits.max_batches}>"

    def register(self, region: memoryview) -> None:
        """As TransferEngine.register: blocks while the memory is pinned. Raises ConfigError if it cannot be."""
        if self._closed:
            raise ConfigError("the transport is closed")
        done: concurrent.futures.Future[None] = concurrent.futures.Future()

        def register_in_thread() -> None:
            try:
                self._worker.register(region)
            except ConfigError as error:
                done.set_exception(error)
            else:
                done.set_result(None)

        if not self._worker.call(register_in_thread):
            raise ConfigError("the transport's thread has ended")
        done.result(self._limits.register_s)

    async def aclose(self) -> None:
        """End the worker's thread and wait for it. Batches under way end with an error before."""
        self._closed = True
        self._worker.stop()
        await ended(self._worker.thread)

    async def transfer(
        self, direction: Direction, ops: Sequence[TransferOp], timeout_s: float
    ) -> list[TransferError | None]:
        """As TransferEngine.write and TransferEngine.read. All ops on one segment share one result."""
        results = check_batch(direction, ops)
        deadline = BatchDeadline(timeout_s)
        groups: dict[_Key, list[int]] = {}
        for index, op in enumerate(ops):
            if results[index] is None and op.num_bytes:
                key = (op.segment.addresses.get(self._kind, ""), op.segment.id, op.segment.size_bytes)
                groups.setdefault(key, []).append(index)

        async def run(key: _Key, indices: list[int]) -> None:
            error = await self._run_segment(direction, key, [ops[index] for index in indices], deadline)
            for index in indices:
                results[index] = error

        if len(groups) == 1:  # no task: a small batch is all latency
            await run(*groups.popitem())
        else:
            async with asyncio.TaskGroup() as tasks:
                for key, indices in groups.items():
                    tasks.create_task(run(key, indices))
        return results

    async def _run_segment(
        self, direction: Direction, key: _Key, ops: list[TransferOp], deadline: BatchDeadline
    ) -> TransferError | None:
        """All ops on one segment, as one batch or several at once; the first error of any."""
        try:
            address, descriptor = self._descriptor(key, ops[0].segment)
        except TransferError as error:
            return error
        runs = [
            self._run_batch(direction, descriptor, fragments, f"{number}:{address}", deadline)
            for number, fragments in enumerate(self._split(ops))
        ]
        if len(runs) == 1:
            return await runs[0]
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(run) for run in runs]
        return next((task.result() for task in running if task.result() is not None), None)

    async def _run_batch(
        self,
        direction: Direction,
        descriptor: _Descriptor,
        fragments: Sequence[Fragment],
        key: str,
        deadline: BatchDeadline,
    ) -> TransferError | None:
        """One batch, once there is a place for it."""
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
        self._num_batches += 1
        try:
            return await self._hand_over(direction, descriptor, fragments, key, deadline)
        except TransferError as error:
            return error
        finally:
            self._num_batches -= 1
            self._slots.release()

    async def _hand_over(
        self,
        direction: Direction,
        descriptor: _Descriptor,
        fragments: Sequence[Fragment],
        key: str,
        deadline: BatchDeadline,
    ) -> TransferError | None:
        """Give a batch to the worker and wait until the worker is done with it, whatever happens here meanwhile.

        Once the worker has it, there are four ways out, and in each of them the worker has called `done` before:
        1. it ends in time: its result;
        2. it is late: the worker is told to stop it, and the result is the deadline's error (or None, if it ended
           while it was told);
        3. this task is cancelled: the worker is told to stop it, and the cancellation is raised once it has;
        4. this task is cancelled again while it waits for case 2 or 3: the wait goes on, and the last cancellation is
           raised after it.
        """
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

        worker = self._worker
        batch = self._make(direction, descriptor, fragments, done)
        timeout_s = deadline.remaining()
        if not self._move_now(batch, key) and not worker.call(lambda: worker.add(batch, key)):
            raise PeerUnreachableError("the transport's thread has ended")
        if over.done():  # moved at once
            return over.result()
        cancelled: asyncio.CancelledError | None = None
        try:
            await asyncio.wait({over}, timeout=timeout_s)  # wait() cancels nothing: `over` is the worker's to end
        except asyncio.CancelledError as error:
            cancelled = error
        if not over.done():  # cases 2 and 3
            reason = deadline.error() if cancelled is None else PeerUnreachableError("the batch was cancelled")
            worker.call(lambda: worker.stop_batch(batch, reason, self._limits.grace_s))
        while not over.done():
            try:
                await asyncio.wait({over})
            except asyncio.CancelledError as error:  # case 4
                cancelled = error
        if cancelled is not None:
            raise cancelled
        return over.result()

    def _descriptor(self, key: _Key, segment: Segment) -> tuple[str, _Descriptor]:
        """Also its address, opened: sealed anew it is the same, and so is the connection."""
        found = self._descriptors.get(key)
        if found is None:
            address = open_address(self._trust, self._kind, segment)
            found = address, self._parse(msgspec.structs.replace(segment, addresses={self._kind: address}))
            if len(self._descriptors) >= _MAX_DESCRIPTORS:
                del self._descriptors[next(iter(self._descriptors))]
            self._descriptors[key] = found
        return found
