"""Serves a segment from a process of its own, for libraries that may end the process that they run in.

UCX aborts a target over some of its peers' deaths (1.13 and later, seen over TCP). A node that loses this process keeps
its segment: the process is started again and the segment announced under its new address. Run as
`python -m transfer.host_process QUESTION`; the answer is one line of its output.
"""

import asyncio
import logging
import mmap
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import msgspec

from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError
from kvcore.process.child import ChildProcess
from kvcore.telemetry import configure_logging, log_fields
from transfer.base import SegmentHost
from transfer.memory.segment import SegmentMemory

_LOG = logging.getLogger("transfer")
_ANSWER = "host-process: "
_START_S = 300.0
"""Page tables (0.24 s a GB) and registration, which for RDMA pins as much."""
_CLOSE_S = 15.0
"""More than the hosts take for closing in order."""
_FIRST_DELAY_S = 0.1
_LONGEST_DELAY_S = 5.0
_STEADY_S = 10.0
"""A process that lived so long is started again without the delay that its predecessors had earned."""


class _Question(msgspec.Struct, frozen=True):
    """What the process is to serve. `fd`: the segment's memfd, inherited."""

    kind: str
    segment_id: str
    size_bytes: int
    fd: int
    config: TransportConfig
    log_level: str


class _Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    """`address`, or why there is none."""

    address: str = ""
    error: str = ""
    param: str | None = None


class ProcessSegmentHost:
    """SegmentHost whose work a child process does. `on_change` is called when `address` has become another."""

    def __init__(
        self, kind: str, memory: SegmentMemory, config: TransportConfig, on_change: Callable[[], None]
    ) -> None:
        self._kind = kind
        self._memory = memory
        self._config = config
        self._on_change = on_change
        self._clock = SystemClock()
        self._child: ChildProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._address = ""

    @property
    def address(self) -> str:
        """As SegmentHost.address, of the process that serves now, or (while there is none) of the one before."""
        return self._address

    async def start(self) -> None:
        """As SegmentHost.start. On the main thread: the child ends with the thread that started it."""
        await self._launch()
        self._keeper = asyncio.create_task(self._keep(), name=f"{self._kind} host of {self._memory.segment_id}")

    async def aclose(self) -> None:
        """As SegmentHost.aclose."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait({self._keeper})
        if self._child is not None:
            await self._child.terminate(_CLOSE_S)

    async def _keep(self) -> None:
        """Start another process whenever the one that serves has ended."""
        delay_s = _FIRST_DELAY_S
        while True:
            began = self._clock.now()
            assert self._child is not None, "start it first"
            code = await self._child.wait()
            if self._clock.now() - began >= _STEADY_S:
                delay_s = _FIRST_DELAY_S
            self._say("transfer.host_ended", returncode=code)
            while True:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, _LONGEST_DELAY_S)
                try:
                    await self._launch()
                except (ConfigError, OSError) as error:  # OSError: no process or descriptor to be had
                    self._say("transfer.host_not_started", reason=error)
                else:
                    break
            self._on_change()

    async def _launch(self) -> None:
        """Raises ConfigError: what the process says that is missing, or that it ended without a word."""
        question = _Question(
            self._kind,
            self._memory.segment_id,
            self._memory.size_bytes,
            self._memory.fileno(),
            self._config,
            logging.getLevelName(_LOG.getEffectiveLevel()).lower(),
        )
        said: asyncio.Future[_Answer] = asyncio.get_running_loop().create_future()

        def on_line(line: str) -> None:
            if not line.startswith(_ANSWER):
                sys.stderr.write(line + "\n")  # its log
            elif not said.done():
                said.set_result(msgspec.json.decode(line.removeprefix(_ANSWER), type=_Answer))

        command = [sys.executable, "-m", "transfer.host_process", msgspec.json.encode(question).decode()]
        child = await ChildProcess.start(command, on_line=on_line, pass_fds=[question.fd])
        ended = asyncio.create_task(child.wait())
        try:
            either: set[asyncio.Future[Any]] = {said, ended}
            await asyncio.wait(either, timeout=_START_S, return_when=asyncio.FIRST_COMPLETED)
            if not said.done():
                state = f"ended with {child.returncode}" if ended.done() else f"was silent for {_START_S:g} s"
                said.set_result(_Answer(error=f"the process that serves segment {question.segment_id} {state}"))
            answer = said.result()
            if answer.error:
                raise ConfigError(answer.error, param=answer.param or "transport.kind")
        except BaseException:
            child.kill()
            await asyncio.wait({ended})
            raise
        self._child, self._address = child, answer.address

    def _say(self, event: str, **fields: object) -> None:
        log_fields(_LOG, logging.WARNING, event, kind=self._kind, segment=self._memory.segment_id, **fields)


def _host(question: _Question, memory: memoryview) -> SegmentHost:
    """Loads the library."""
    if question.kind == "nixl":
        from transfer.nixl.host import NixlSegmentHost

        return NixlSegmentHost(question.segment_id, memory, question.config)
    from transfer.ucx.transport import UcxSegmentHost

    return UcxSegmentHost(question.segment_id, memory, question.config)


def _answer(answer: _Answer) -> None:
    sys.stdout.write(_ANSWER + msgspec.json.encode(answer).decode() + "\n")
    sys.stdout.flush()


async def _serve(question: _Question) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    mapping = mmap.mmap(question.fd, question.size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(question.fd)
    host = _host(question, memoryview(mapping))
    try:
        await host.start()
    except ConfigError as error:
        _answer(_Answer(error=error.message, param=error.param))
        return
    _answer(_Answer(address=host.address))
    await stop.wait()
    await host.aclose()


def main() -> None:
    """The process: serve until SIGTERM."""
    question = msgspec.json.decode(sys.argv[1], type=_Question)
    configure_logging(f"{question.segment_id}.{question.kind}", question.log_level)
    asyncio.run(_serve(question))


if __name__ == "__main__":
    main()
