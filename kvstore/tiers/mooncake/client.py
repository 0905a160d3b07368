"""A client of Mooncake in a process of its own: started, watched, replaced when it hangs, asked, ended within a bound.

Owns the process, the socket to it and the calls under way. A master that is away is no error: the client is set up when
it is there, and mounts what it lends anew by itself when the master was started again.
"""

import asyncio
import ipaddress
import logging
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import msgspec

from kvcore.errors import ConfigError
from kvcore.ports import why_unreachable
from kvcore.process.child import ChildProcess
from kvcore.telemetry import log_fields
from kvstore.tiers.mooncake.buffer import MooncakeBuffer, MooncakeRoom
from kvstore.tiers.mooncake.limits import MooncakeLimits
from kvstore.tiers.mooncake.messages import MooncakeOperation, MooncakeReply, MooncakeRequest, MooncakeSetup

_log = logging.getLogger(__name__)
_WORKER = (sys.executable, "-m", "kvstore.tiers.mooncake.worker")
P2P_HANDSHAKE = "P2PHANDSHAKE"
"""In place of a metadata server: clients ask each other."""
_GIB = 1 << 30
_MOST_LINE = 1 << 20
_RPC_FAIL = -900
"""Mooncake's word for a master that is gone."""


class MooncakeAwayError(Exception):
    """There is no client that could be asked, or it did not answer in time. Its text is for people."""


@dataclass(frozen=True, slots=True)
class MooncakePlace:
    """Where the master is, and how to set up a client of its."""

    host: str
    port: int
    options: Mapping[str, str]
    """As Mooncake's `setup` takes them, without `local_hostname`."""
    own_host: str
    """By which Mooncake's other clients reach this one: given, or the node's own."""
    lent_bytes: int

    @property
    def leaves_traces(self) -> bool:
        """Whether a client that is killed leaves something behind that others would stumble over."""
        return self.lent_bytes > 0 or self.options["metadata_server"] != P2P_HANDSHAKE

    @property
    def shown(self) -> str:
        """For people."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mooncake://{host}:{self.port}"


class _Call:
    """A request that the client has. Its room is held for the client until it answered or is no more."""

    def __init__(self, room: MooncakeRoom | None) -> None:
        self.answer: asyncio.Future[MooncakeReply] = asyncio.get_running_loop().create_future()
        self.given_up_at: float | None = None
        self._room = room
        if room is not None:
            room.hold()

    def end(self, reply: MooncakeReply | None) -> None:
        """None: there will be no answer."""
        if self._room is not None:
            self._room.let_go()
        if not self.answer.done():
            if reply is None:
                self.answer.set_exception(MooncakeAwayError("its client ended"))
            else:
                self.answer.set_result(reply)


class MooncakeClient:
    """Start it on the main thread: the process ends with the thread that started it."""

    def __init__(self, place: MooncakePlace, buffer: MooncakeBuffer, limits: MooncakeLimits) -> None:
        self.place = place
        self.closed = False
        self._buffer, self._limits = buffer, limits
        self._problem = "its client is being set up"
        self._tried = asyncio.Event()
        self._calls: dict[int, _Call] = {}
        self._number = 0
        self._answered_at = 0.0
        self._in_doubt = False
        self._writer: asyncio.StreamWriter | None = None
        self._keeper = asyncio.create_task(self._keep(), name="mooncake-client")

    def __repr__(self) -> str:
        return f"<MooncakeClient of {self.place.shown}, {len(self._calls)} calls under way: {self.problem or 'well'}>"

    @property
    def problem(self) -> str | None:
        """Why it cannot be asked now, for people."""
        return f"{self.place.shown}: {self._problem}" if self._writer is None else None

    async def call(
        self, operation: MooncakeOperation, keys: Sequence[str], room: MooncakeRoom | None, timeout_s: float
    ) -> list[int]:
        """Mooncake's code for each key. Raises MooncakeAwayError; a call that is given up keeps its room for itself.

        Once the master was found gone each call looks first whether it is there: Mooncake itself takes 4.5 s to say no.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._tried.wait()
                if self._in_doubt:
                    await self._probe()
                if self._writer is None:
                    raise MooncakeAwayError(self._problem)
                self._number += 1
                call = self._calls[self._number] = _Call(room)
                starts, sizes = ([], []) if room is None else (list(room.starts), list(room.lengths))
                request = MooncakeRequest(self._number, operation, list(keys), starts, sizes)
                try:
                    self._writer.write(msgspec.json.encode(request) + b"\n")
                    reply = await call.answer
                finally:
                    call.given_up_at = asyncio.get_running_loop().time()
        except TimeoutError:
            raise MooncakeAwayError("it did not answer in time") from None
        except OSError as error:
            raise MooncakeAwayError(why_unreachable(error)) from None
        self._in_doubt = _RPC_FAIL in reply.codes
        if reply.error:
            raise MooncakeAwayError(reply.error)
        return reply.codes

    async def aclose(self) -> None:
        """Within `limits.close_s`. Idempotent."""
        self.closed = True
        self._keeper.cancel()
        await asyncio.wait({self._keeper})

    async def _keep(self) -> None:
        told = ""
        while True:
            try:
                self._problem = await self._live()
            except (OSError, ConfigError, TimeoutError) as error:
                self._problem = "it did not answer in time" if isinstance(error, TimeoutError) else _reason(error)
            if self._problem != told:
                told = self._problem
                log_fields(_log, logging.WARNING, "mooncake_client", master=self.place.shown, problem=told)
            self._tried.set()
            await asyncio.sleep(self._limits.retry_s)

    async def _live(self) -> str:
        """One client's life; returns why it is over."""
        place, limits = self.place, self._limits
        own_host = await self._probe()
        setup_s = limits.setup_s + limits.setup_gib_s * (place.lent_bytes + self._buffer.size_bytes) / _GIB
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                reader, writer = await asyncio.open_connection(sock=ours, limit=_MOST_LINE)
            except BaseException:
                ours.close()
                raise
            try:
                child = await self._start(own_host, theirs.fileno())
            except BaseException:
                writer.close()
                raise
        try:
            async with asyncio.timeout(setup_s):
                first = await reader.readline()
            reply = msgspec.json.decode(first, type=MooncakeReply) if first else MooncakeReply(error="its client ended")
            if reply.error:
                return reply.error
            self._writer = writer
            self._tried.set()
            return await self._serve(reader)
        except TimeoutError:
            return f"its client was not set up after {setup_s:g} s: the master does not answer"
        finally:
            self._writer = None
            writer.close()
            await self._end(child)

    async def _start(self, own_host: str, socket_fd: int) -> ChildProcess:
        options = {**self.place.options, "local_hostname": own_host}
        setup = MooncakeSetup(options, socket_fd, self._buffer.fd, self._buffer.size_bytes, self._limits.threads)
        return await ChildProcess.start(
            [*_WORKER, msgspec.json.encode(setup).decode()],
            on_line=self._heard,
            pass_fds=[setup.socket_fd, setup.buffer_fd],
            env={"GLOG_minloglevel": "2", "MC_STORE_CLIENT_METRIC": "0", **os.environ},
        )

    async def _serve(self, reader: asyncio.StreamReader) -> str:
        """Give the answers to those who wait, until the client ends or hangs."""
        loop, limits = asyncio.get_running_loop(), self._limits
        reading = asyncio.create_task(self._read(reader))
        try:
            while True:
                await asyncio.wait({reading}, timeout=limits.look_s)
                if reading.done():
                    return "its client ended"
                since = loop.time() - limits.hung_s
                late = [call.given_up_at for call in self._calls.values() if call.given_up_at is not None]
                if late and min(late) < since and self._answered_at < since:
                    return f"its client hung for {limits.hung_s:g} s"
        finally:
            reading.cancel()
            await asyncio.wait({reading})

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(OSError):
            while line := await reader.readline():
                reply = msgspec.json.decode(line, type=MooncakeReply)
                self._answered_at = asyncio.get_running_loop().time()
                self._calls.pop(reply.id).end(reply)

    async def _end(self, child: ChildProcess) -> None:
        """Its socket is closed: it takes back what it lent. What hangs is killed; then it has let go of all rooms."""
        if not self.closed or not self.place.leaves_traces:
            child.kill()
        ending = asyncio.create_task(child.wait())
        with suppress(asyncio.CancelledError):
            await asyncio.wait({ending}, timeout=self._limits.close_s)
        child.kill()
        await asyncio.wait({ending})
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(None)

    async def _probe(self) -> str:
        """Whether the master accepts connections, before a client is started for it. Our host as others see it."""
        place = self.place
        async with asyncio.timeout(self._limits.retry_s):
            _, writer = await asyncio.open_connection(place.host, place.port)
        seen_as = str(writer.get_extra_info("sockname")[0])
        writer.close()
        return seen_as if _is_loopback(place.own_host) and not _is_loopback(seen_as) else place.own_host

    def _heard(self, line: str) -> None:
        log_fields(_log, logging.DEBUG, "mooncake_says", line=line)


def _reason(error: Exception) -> str:
    return error.message if isinstance(error, ConfigError) else why_unreachable(error)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
