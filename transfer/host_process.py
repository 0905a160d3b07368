"""Serves a segment from a process of its own, for libraries that may end the process that they run in.

UCX aborts a target over some of its peers' deaths (1.13 and later, seen over TCP). A node that loses this process keeps
its segment: the process is started again and the segment announced under its new address. Run as
`python -m transfer.host_process REQUEST`; the reply is one line of its output.
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
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory

_LOG = logging.getLogger("transfer")
_REPLY_PREFIX = "host-process: "


class _HostRequest(msgspec.Struct, frozen=True):
    """What the process is to serve. `fd`: the segment's memfd, inherited."""

    kind: str
    segment_id: str
    size_bytes: int
    fd: int
    config: TransportConfig
    limits: TransferLimits
    log_level: str


class _HostReply(msgspec.Struct, frozen=True, omit_defaults=True):
    """`address`, or why there is none."""

    address: str = ""
    error: str = ""
    param: str | None = None


class ProcessSegmentHost:
    """SegmentHost whose work a child process does. `on_change` is called when `address` has become another."""

    def __init__(
        self,
        kind: str,
        memory: SegmentMemory,
        config: TransportConfig,
        on_change: Callable[[], None],
        limits: TransferLimits = TransferLimits(),
    ) -> None:
        self._limits = limits
        self._kind = kind
        self._memory = memory
        self._config = config
        self._on_change = on_change
        self._clock = SystemClock()
        self._child: ChildProcess | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._address = ""

    def __repr__(self) -> str:
        process = "not started" if self._child is None else f"pid={self._child.pid}"
        return f"<ProcessSegmentHost {self._kind} {self._memory.segment_id} {process}>"

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
            await self._child.terminate(self._limits.host_process.close_s)

    async def _keep(self) -> None:
        """Start another process whenever the one that serves has ended."""
        limits = self._limits.host_process
        delay_s = limits.first_delay_s
        while True:
            began = self._clock.now()
            assert self._child is not None, "start it first"
            code = await self._child.wait()
            if self._clock.now() - began >= limits.steady_s:
                delay_s = limits.first_delay_s
            self._warn("transfer.host_ended", returncode=code)
            while True:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, limits.longest_delay_s)
                try:
                    await self._launch()
                except (ConfigError, OSError) as error:  # OSError: no process or descriptor to be had
                    self._warn("transfer.host_not_started", reason=error)
                else:
                    break
            self._on_change()

    async def _launch(self) -> None:
        """Raises ConfigError: what the process says that is missing, or that it ended without a word."""
        start_s = self._limits.host_process.start_s
        request = _HostRequest(
            self._kind,
            self._memory.segment_id,
            self._memory.size_bytes,
            self._memory.fileno(),
            self._config,
            self._limits,
            logging.getLevelName(_LOG.getEffectiveLevel()).lower(),
        )
        replied: asyncio.Future[_HostReply] = asyncio.get_running_loop().create_future()

        def on_line(line: str) -> None:
            if not line.startswith(_REPLY_PREFIX):
                sys.stderr.write(line + "\n")  # its log
            elif not replied.done():
                replied.set_result(msgspec.json.decode(line.removeprefix(_REPLY_PREFIX), type=_HostReply))

        command = [sys.executable, "-m", "transfer.host_process", msgspec.json.encode(request).decode()]
        child = await ChildProcess.start(command, on_line=on_line, pass_fds=[request.fd])
        ended = asyncio.create_task(child.wait())
        try:
            either: set[asyncio.Future[Any]] = {replied, ended}
            await asyncio.wait(either, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
            if not replied.done():
                state = f"ended with {child.returncode}" if ended.done() else f"was silent for {start_s:g} s"
                replied.set_result(_HostReply(error=f"the process that serves segment {request.segment_id} {state}"))
            reply = replied.result()
            if reply.error:
                raise ConfigError(reply.error, param=reply.param or "transport.kind")
        except BaseException:
            child.kill()
            await asyncio.wait({ended})
            raise
        self._child, self._address = child, reply.address

    def _warn(self, event: str, **fields: object) -> None:
        log_fields(_LOG, logging.WARNING, event, kind=self._kind, segment=self._memory.segment_id, **fields)


def _host(request: _HostRequest, memory: memoryview) -> SegmentHost:
    """Loads the library."""
    if request.kind == "nixl":
        from transfer.nixl.host import NixlSegmentHost

        return NixlSegmentHost(request.segment_id, memory, request.config, request.limits.nixl)
    from transfer.ucx.transport import UcxSegmentHost

    return UcxSegmentHost(request.segment_id, memory, request.config, request.limits.ucx)


def _print_reply(reply: _HostReply) -> None:
    sys.stdout.write(_REPLY_PREFIX + msgspec.json.encode(reply).decode() + "\n")
    sys.stdout.flush()


async def _serve(request: _HostRequest) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    mapping = mmap.mmap(request.fd, request.size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE)
    os.close(request.fd)
    host = _host(request, memoryview(mapping))
    try:
        await host.start()
    except ConfigError as error:
        _print_reply(_HostReply(error=error.message, param=error.param))
        return
    _print_reply(_HostReply(address=host.address))
    await stop.wait()
    await host.aclose()


def main() -> None:
    """The process: serve until SIGTERM."""
    request = msgspec.json.decode(sys.argv[1], type=_HostRequest)
    configure_logging(f"{request.segment_id}.{request.kind}", request.log_level)
    asyncio.run(_serve(request))


if __name__ == "__main__":
    main()
