"""The engine front's end of the bus: a Unix socket at which the connector's worker halves report and take orders.

Owns the socket and what was reported of legs under way. No request's correctness depends on it: if a worker half is
late or gone, a leg lacks its numbers, or waits for them until its bound.
"""

import asyncio
import logging
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from engines.process.channel import FrameChannel
from engines.vllm.connector import bus_messages as m
from kvcore.errors import EngineError
from kvcore.telemetry import log_fields
from kvcore.types import KVSpec
from nodeapi.frames import FrameError

MAX_WORKERS = 1024
_logger = logging.getLogger(__name__)


@dataclass
class LegReports:
    """What the ranks reported of one leg so far. With n > 1 each completion may load: a rank's best load counts."""

    loads: dict[int, m.LoadEnded] = field(default_factory=dict)
    saves: dict[int, m.SaveEnded] = field(default_factory=dict)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def add(self, report: m.LoadEnded | m.SaveEnded) -> None:
        """Note one report."""
        if isinstance(report, m.SaveEnded):
            self.saves[report.rank] = report
        elif report.rank not in self.loads or self.loads[report.rank].num_tokens < report.num_tokens:
            self.loads[report.rank] = report
        self.changed.set()

    async def wait_saved(self, num_ranks: int) -> None:
        """Until each of `num_ranks` has reported the end of its saves. The caller bounds it."""
        while len(self.saves) < num_ranks:
            self.changed.clear()
            await self.changed.wait()


@dataclass
class _WorkerSession:
    channel: FrameChannel
    spec: KVSpec
    sample: m.WorkerSample | None = None
    sampled: asyncio.Event = field(default_factory=asyncio.Event)

    def __repr__(self) -> str:
        known = "no sample" if self.sample is None else f"{self.sample.loading} loading"
        return f"<_WorkerSession rank {self.spec.tp_rank} of {self.spec.tp_size}, {known}>"


class Bus:
    """An async context manager. `path` is known once entered; worker halves may come, go and come again."""

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._server: asyncio.Server | None = None
        self._workers: dict[int, _WorkerSession] = {}
        self._legs: dict[str, LegReports] = {}
        self._joined = asyncio.Event()
        self._channels: set[FrameChannel] = set()
        self._refused: str | None = None
        """Why a worker half was sent away."""
        self._warned_silent = False
        """The last AskSample was not answered by every rank in time. This is logged once."""

    def __repr__(self) -> str:
        return f"<Bus ranks {sorted(self._workers)}, {len(self._legs)} legs>"

    async def __aenter__(self) -> Self:
        """Raises OSError where no socket can be made."""
        self._folder = Path(tempfile.mkdtemp(prefix="kvferry-bus-"))
        self._server = await asyncio.start_unix_server(self._serve, self.path)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None and self._folder is not None
        self._server.close()
        for channel in list(self._channels):
            await channel.aclose()
        shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def path(self) -> str:
        """Of the socket, in a folder that only this user may enter."""
        assert self._folder is not None, "the bus was not entered"
        return str(self._folder / "bus.sock")

    async def wait_workers(self, num_ranks: int, timeout_s: float) -> KVSpec:
        """Until all ranks have said hello; returns rank 0's spec. Raises EngineError after `timeout_s`, when ranks
        disagree on what KV it is, or when one speaks another protocol."""
        try:
            async with asyncio.timeout(timeout_s):
                while len(self._workers) < num_ranks and self._refused is None:
                    self._joined.clear()
                    await self._joined.wait()
        except TimeoutError:
            missing = sorted(set(range(num_ranks)) - self._workers.keys())
            raise EngineError(
                f"vLLM is up, but the KV connector of rank {missing} did not report within {timeout_s:g} s: see its log"
            ) from None
        if self._refused is not None:
            raise EngineError(self._refused)
        specs = {msgspec.structs.replace(worker.spec, tp_rank=0) for worker in self._workers.values()}
        if len(specs) != 1:
            raise EngineError(f"the ranks of this engine hold different kinds of KV: {sorted(map(repr, specs))}")
        return self._workers[0].spec

    @contextmanager
    def leg(self, leg: str) -> Iterator[LegReports]:
        """Collect what is reported of `leg` while inside."""
        reports = self._legs[leg] = LegReports()
        try:
            yield reports
        finally:
            if self._legs.get(leg) is reports:
                del self._legs[leg]

    def end_handoff(self, leg: str) -> None:
        """Send it to every rank. Never waits."""
        self._send_to_all(m.BusEndHandoff(leg=leg))

    async def samples(self, timeout_s: float) -> list[m.WorkerSample]:
        """A fresh sample of each rank; the last one known, or none, of those that do not answer in time."""
        workers = list(self._workers.values())
        for worker in workers:
            worker.sampled.clear()
        self._send_to_all(m.AskSample())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.gather(*(worker.sampled.wait() for worker in workers))
        except TimeoutError:
            if not self._warned_silent:
                log_fields(_logger, logging.WARNING, "worker_half_silent", timeout_s=timeout_s)
            self._warned_silent = True
        else:
            if self._warned_silent:
                log_fields(_logger, logging.INFO, "worker_half_answers_again")
            self._warned_silent = False
        return [worker.sample for worker in workers if worker.sample is not None]

    def _send_to_all(self, frame: m.ToWorker) -> None:
        payload = msgspec.msgpack.encode(frame)
        for worker in self._workers.values():
            worker.channel.send(payload)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one worker half's connection. An error in it ends this connection and nothing else."""
        channel = FrameChannel(reader, writer)
        self._channels.add(channel)
        rank: int | None = None
        try:
            while frames := await channel.receive():
                for payload in frames:
                    rank = self._handle(channel, rank, msgspec.msgpack.decode(payload, type=m.FromWorker))
        except (FrameError, msgspec.MsgspecError, EngineError) as error:
            log_fields(_logger, logging.ERROR, "bus_broken", rank=rank, error=str(error))
        finally:
            if rank is not None and self._workers[rank].channel is channel:
                del self._workers[rank]
            self._channels.discard(channel)
            await channel.aclose()

    def _handle(self, channel: FrameChannel, rank: int | None, frame: m.FromWorker) -> int:
        """One frame of the connection's. Returns the rank, which is None until the hello has come."""
        match frame:
            case m.WorkerHello() if rank is None:
                return self._welcome(channel, frame)
            case _ if rank is None or frame.__class__ is m.WorkerHello:
                raise EngineError("a connection of the bus begins with one WorkerHello, and has no other")
            case m.LoadEnded(leg=leg) | m.SaveEnded(leg=leg):
                if leg in self._legs:  # otherwise the leg has ended
                    self._legs[leg].add(frame)
            case m.WorkerSample():
                worker = self._workers[rank]
                worker.sample = frame
                worker.sampled.set()
        return rank

    def _welcome(self, channel: FrameChannel, hello: m.WorkerHello) -> int:
        rank = hello.spec.tp_rank
        if hello.protocol != m.BUS_PROTOCOL:
            self._refused = (
                f"the KV connector of rank {rank} speaks protocol {hello.protocol} of the bus, this engine protocol "
                f"{m.BUS_PROTOCOL}: vLLM's workers run another kvferry than their engine. Install one version"
            )
            self._joined.set()
            raise EngineError(self._refused)
        if not 0 <= rank < MAX_WORKERS:
            raise EngineError(f"a worker half has rank {rank}, which no engine has")
        self._workers[rank] = _WorkerSession(channel, hello.spec)
        self._joined.set()
        return rank
