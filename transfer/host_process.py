"""Serves a segment from a process of its own, for libraries that may end the process that they run in.

UCX aborts a target over some of its peers' deaths (1.13 and later, seen over TCP). A node that loses this process keeps
its segment: the process is started again and the segment announced under its new address, which the node seals: the
process knows no secret. Run as `python -m transfer.host_process REQUEST`; the reply is one line of its output.
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
from kvcore.trust.opening import OPEN, ClusterTrust
from transfer.base import SegmentHost
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory
from transfer.sealed_address import AddressSeal

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
    """SegmentHost whose work a child process does.

    `on_change` is called when another process serves, whose `address` is another. `on_reseal`: the address is sealed
    anew, for secrets of the cluster that have changed.
    """

    def __init__(
        self,
        kind: str,
        memory: SegmentMemory,
        config: TransportConfig,
        on_change: Callable[[], None],
        limits: TransferLimits = TransferLimits(),
        *,
        trust: ClusterTrust = OPEN,
        on_reseal: Callable[[], None] = lambda: None,
    ) -> None:
        self._limits = limits
        self._seal = AddressSeal(trust, kind, memory.segment_id)
        self._on_reseal = on_reseal
        self._kind = kind
        self._memory = memory
        self._config = config
        self._on_change = on_change
        self._clock = SystemClock()
        self._child: ChildProcess | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._address = ""
        self.refused: dict[str, int] = {}
        """As SegmentHost.refused."""

    def __repr__(self) -> str:
        process = "not started" if self._child is None else f"pid={self._child.pid}"
        return f"<ProcessSegmentHost {self._kind} {self._memory.segment_id} {process}>"

    @property
    def address(self) -> str:
        """As SegmentHost.address, of the process that serves now, or (while there is none) of the one before.

        Sealed where the cluster has a secret.
        """
        return self._seal.told(self._address)

    async def start(self) -> None:
        """As SegmentHost.start. On the main thread: the child ends with the thread that started it."""
        await self._launch()
        name = f"{self._kind} host of {self._memory.segment_id}"
        self._tasks = {asyncio.create_task(self._keep(), name=name)}
        if self._seal.key_ids:
            self._tasks.add(asyncio.create_task(self._reseal(), name=f"seal of the {name}"))

    async def aclose(self) -> None:
        """As SegmentHost.aclose."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
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

    async def _reseal(self) -> None:
        """Say so when the secrets are others: who knows only the new ones cannot open what was told before."""
        sealed_for = self._seal.key_ids
        while True:
            await asyncio.sleep(self._limits.host_process.reseal_s)
            if (now := self._seal.key_ids) != sealed_for:
                sealed_for = now
                self._on_reseal()

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
