"""Serves a segment from a process of its own, for libraries that may end the process that they run in.

UCX aborts a target over some of its peers' deaths (1.13 and later, seen over TCP). A node that loses this process keeps
its segment: the process is started again and the segment announced under its new address, which the node seals. The
process (`transfer.host_child`) knows no secret: it is told, through a pipe, what greetings are proved with, and again
when that changes.
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError
from kvcore.process.child import ChildProcess
from kvcore.telemetry import log_fields
from kvcore.trust.opening import OPEN, ClusterTrust
from transfer.greeting import GreetingKey, greeting_keys
from transfer.host_child import REPLY_PREFIX, HostReply, HostRequest
from transfer.limits import TransferLimits
from transfer.memory.segment import SegmentMemory
from transfer.sealed_address import AddressSeal

_LOG = logging.getLogger("transfer")


class _ServingProcess:
    """One process that serves. `ended`: its exit code, once it has one."""

    def __init__(self, child: ChildProcess, keys_fd: int) -> None:
        self.child = child
        self.ended = asyncio.create_task(child.wait())
        self._keys_fd: int | None = keys_fd

    def __repr__(self) -> str:
        return f"<_ServingProcess pid={self.child.pid}>"

    def tell(self, keys: Sequence[GreetingKey]) -> None:
        """What greetings are proved with from now on. One that has ended is told nothing."""
        if self._keys_fd is not None:
            with contextlib.suppress(OSError):
                os.write(self._keys_fd, msgspec.json.encode(keys) + b"\n")

    async def end(self, close_s: float) -> None:
        """Idempotent."""
        await self.child.terminate(close_s)
        if self._keys_fd is not None:
            os.close(self._keys_fd)
            self._keys_fd = None


class ProcessSegmentHost:
    """SegmentHost whose work a child process does.

    `on_change` is called when another process serves, for the one before has ended. `on_reseal`: the address is another
    for secrets of the cluster that have changed. Where a secret is accepted no more, what was told under it is changed
    too: another process serves under another address, and the one before goes on for a while for those who use it.
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
        self._trust = trust
        self._seal = AddressSeal(trust, kind, memory.segment_id)
        self._on_reseal = on_reseal
        self._kind = kind
        self._memory = memory
        self._config = config
        self._on_change = on_change
        self._clock = SystemClock()
        self._server: _ServingProcess | None = None
        self._retiring: set[_ServingProcess] = set()
        self._told: tuple[GreetingKey, ...] = ()
        """The keys that greetings are proved with, as `_server` was told last."""
        self._outdated = False
        self._replace_at = 0.0
        """Whether `_server` was started when a secret was accepted that is no more."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._address = ""
        self.refused: Counter[str] = Counter()
        """As SegmentHost.refused, of all its processes."""

    def __repr__(self) -> str:
        process = "not started" if self._server is None else f"pid={self._server.child.pid}"
        return f"<ProcessSegmentHost {self._kind} {self._memory.segment_id} {process}>"

    @property
    def address(self) -> str:
        """As SegmentHost.address, of the process that serves now, or (while there is none) of the one before.

        Sealed where the cluster has a secret.
        """
        return self._seal.told(self._address)

    async def start(self) -> None:
        """As SegmentHost.start. On the main thread: the child ends with the thread that started it."""
        self._server = await self._launch()
        name = f"{self._kind} host of {self._memory.segment_id}"
        self._tasks = {asyncio.create_task(self._keep(self._server), name=name)}

    async def aclose(self) -> None:
        """As SegmentHost.aclose."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        servers = [*self._retiring, *([] if self._server is None else [self._server])]
        self._retiring, self._server = set(), None
        await asyncio.gather(*(server.end(self._limits.host_process.close_s) for server in servers))

    async def _keep(self, server: _ServingProcess) -> None:
        """Start another process whenever the one that serves has ended, or is outdated."""
        limits = self._limits.host_process
        delay_s = limits.first_delay_s
        began = self._clock.now()
        while True:
            await asyncio.wait({server.ended}, timeout=limits.reseal_s if self._told else None)
            if not server.ended.done():
                server = await self._look_at_secrets(server)
                continue
            if self._clock.now() - began >= limits.steady_s:
                delay_s = limits.first_delay_s
            self._warn("transfer.host_ended", returncode=server.ended.result())
            await server.end(limits.close_s)
            while True:
                await asyncio.sleep(delay_s)
                delay_s = min(2 * delay_s, limits.longest_delay_s)
                try:
                    self._server = server = await self._launch()
                except (ConfigError, OSError) as error:  # OSError: no process or descriptor to be had
                    self._warn("transfer.host_not_started", reason=error)
                else:
                    break
            began = self._clock.now()
            self._on_change()

    async def _look_at_secrets(self, server: _ServingProcess) -> _ServingProcess:
        """Who serves from now on. Three cases:
        1. the secrets are the same: nothing;
        2. there is one more: the process is told its key, and the address sealed for it too;
        3. one is gone: likewise, and whoever learned by it where the segment lies is to lose that: another process
           takes over, at another place in its memory and with other remote keys. If it cannot be started, again later.
        """
        keys = greeting_keys(self._trust)
        if keys != self._told:
            self._outdated |= not set(self._told) <= set(keys)
            self._told = keys
            server.tell(keys)
            self._on_reseal()
        if not self._outdated or self._clock.now() < self._replace_at:
            return server
        try:
            self._server = fresh = await self._launch()
        except (ConfigError, OSError) as error:
            self._warn("transfer.host_not_replaced", reason=error)
            self._replace_at = self._clock.now() + self._limits.host_process.longest_delay_s
            return server
        self._retiring.add(server)
        self._tasks.add(asyncio.create_task(self._retire(server), name=f"end of {server!r}"))
        self._on_reseal()
        return fresh

    async def _retire(self, server: _ServingProcess) -> None:
        await asyncio.wait({server.ended}, timeout=self._limits.host_process.retire_s)
        await server.end(self._limits.host_process.close_s)
        self._retiring.discard(server)

    async def _launch(self) -> _ServingProcess:
        """Another process, which knows what greetings are proved with now; `address` is its own from then on.

        Raises ConfigError: what the process says that is missing, or that it ended without a word.
        """
        told = greeting_keys(self._trust)
        replied: asyncio.Future[HostReply] = asyncio.get_running_loop().create_future()
        seen: Counter[str] = Counter()

        def on_line(line: str) -> None:
            if not line.startswith(REPLY_PREFIX):
                sys.stderr.write(line + "\n")  # its log
                return
            reply = msgspec.json.decode(line.removeprefix(REPLY_PREFIX), type=HostReply)
            if not replied.done():
                replied.set_result(reply)
            self.refused.update(Counter(reply.refused) - seen)
            seen.update(Counter(reply.refused) - seen)

        keys_fd, ours = os.pipe()
        os.set_blocking(ours, False)
        try:
            command, fds = self._command(keys_fd), [self._memory.fileno(), keys_fd]
            server = _ServingProcess(await ChildProcess.start(command, on_line=on_line, pass_fds=fds), ours)
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(keys_fd)
        server.tell(told)
        try:
            address = await self._answer(server, replied)
        except BaseException:
            server.child.kill()
            await asyncio.wait({server.ended})
            await server.end(self._limits.host_process.close_s)
            raise
        self._told, self._outdated, self._address = told, False, address
        return server

    async def _answer(self, server: _ServingProcess, replied: "asyncio.Future[HostReply]") -> str:
        start_s = self._limits.host_process.start_s
        either: set[asyncio.Future[Any]] = {replied, server.ended}
        await asyncio.wait(either, timeout=start_s, return_when=asyncio.FIRST_COMPLETED)
        if not replied.done():
            state = f"ended with {server.child.returncode}" if server.ended.done() else f"was silent for {start_s:g} s"
            raise ConfigError(
                f"the process that serves segment {self._memory.segment_id} {state}", param="transport.kind"
            )
        reply = replied.result()
        if reply.error:
            raise ConfigError(reply.error, param=reply.param or "transport.kind")
        return reply.address

    def _command(self, keys_fd: int) -> list[str]:
        request = HostRequest(
            self._kind,
            self._memory.segment_id,
            self._memory.size_bytes,
            self._memory.fileno(),
            keys_fd,
            self._config,
            self._limits,
            logging.getLevelName(_LOG.getEffectiveLevel()).lower(),
        )
        return [sys.executable, "-m", "transfer.host_child", msgspec.json.encode(request).decode()]

    def _warn(self, event: str, **fields: object) -> None:
        log_fields(_LOG, logging.WARNING, event, kind=self._kind, segment=self._memory.segment_id, **fields)
