"""The child's end of the link: takes the node's calls to an engine in this process and sends the answers back.

Owns the calls' tasks. What engine it is, and its store, come from an `EngineOpener`.
Invariant: when the socket closes, every call is cancelled, the engine is left and `serve` returns.
"""

import asyncio
import functools
import logging
import socket
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager, aclosing
from dataclasses import dataclass

import msgspec

from engines.base import Engine
from engines.process import messages as m
from engines.process.channel import FrameChannel
from kvcore.errors import ConfigError, EngineError, KVFerryError
from kvcore.telemetry import log_fields
from nodeapi.frames import FrameError
from nodeapi.messages import EngineInfo

EXIT_DONE = 0
EXIT_REFUSED = 78
EXIT_PROTOCOL = 76
_logger = logging.getLogger("engines")


@dataclass(frozen=True)
class OpenedEngine:
    """A running engine and what its store counted, as `Sample` has it."""

    engine: Engine
    store_counters: Callable[[], dict[str, int]] = dict
    transports: Callable[[], dict[str, str]] = dict
    exposition: Callable[[], bytes] = bytes


_CallToChild = m.PrefillCall | m.GenerateCall | m.CompareCall | m.EndHandoffCall | m.AbortCall | m.StatsCall
EngineOpener = Callable[[m.EngineHello], AbstractAsyncContextManager[OpenedEngine]]
"""Entering it loads model, store and engine; raises ConfigError for what this machine cannot run."""


async def serve(sock: socket.socket, open_engine: EngineOpener, *, hello_s: float = 30.0) -> int:
    """Serve one node until it closes the socket or says Shutdown. Returns the exit status of the process.

    `hello_s`: the node says within this what it wants.
    """
    sock.set_inheritable(False)  # a compiler started by the engine must not keep the link open after us
    channel = await FrameChannel.over(sock)
    try:
        async with asyncio.timeout(hello_s):
            payloads = await channel.receive()
        if len(payloads) != 1:
            return EXIT_PROTOCOL
        hello = m.decode_to_child(payloads[0])
        if not isinstance(hello, m.EngineHello) or hello.version != m.PROTOCOL_VERSION:
            spoken = getattr(hello, "version", "none")
            raise ConfigError(
                f"the node speaks protocol {spoken} to its engine, which speaks {m.PROTOCOL_VERSION}: "
                "install one version of kvferry on both sides"
            )
        session = _Session(channel)
        return await _until_gone(channel, session, open_engine(hello))
    except KVFerryError as error:
        channel.send(m.encode(m.Refused(code=error.code, message=error.message)))
        return EXIT_REFUSED
    except (FrameError, msgspec.MsgspecError, TimeoutError) as error:
        log_fields(_logger, logging.ERROR, "engine_link_broken", reason=str(error) or type(error).__name__)
        return EXIT_PROTOCOL
    finally:
        await channel.aclose()


async def _until_gone(
    channel: FrameChannel, session: "_Session", opening: AbstractAsyncContextManager[OpenedEngine]
) -> int:
    """Load and serve, but stop loading too when the node goes: it may take a minute, and nobody waits any more."""
    reading = asyncio.create_task(session.read(), name="read")
    serving = asyncio.create_task(session.run(opening), name="serve")
    try:
        await asyncio.wait({reading, serving}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (reading, serving):
            task.cancel()
        await asyncio.wait({reading, serving})
    for task in (serving, reading):
        if not task.cancelled():
            task.result()
    return EXIT_DONE


def _check_chunks(info: EngineInfo) -> None:
    chunk_tokens = info.kv_spec.chunk_tokens
    if chunk_tokens > info.max_context:
        raise ConfigError(
            f"kv.chunk_tokens: {chunk_tokens} is over the context of {info.max_context} tokens that the model has here;"
            " no prompt would fill a chunk"
        )


class _Session:
    def __init__(self, channel: FrameChannel) -> None:
        self._channel = channel
        self._opened: OpenedEngine | None = None
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._credits: dict[int, asyncio.Semaphore] = {}

    async def run(self, opening: AbstractAsyncContextManager[OpenedEngine]) -> None:
        """Enter the engine, say so, and stay until cancelled; then end all calls and leave the engine."""
        async with opening as opened:
            self._opened = opened
            _check_chunks(opened.engine.info)
            self._send(m.Ready(info=opened.engine.info))
            try:
                await asyncio.Event().wait()
            finally:
                for task in self._calls.values():
                    task.cancel()
                await asyncio.gather(*self._calls.values(), return_exceptions=True)

    async def read(self) -> None:
        """Take frames until Shutdown or the end of the socket. Raises FrameError and msgspec's errors."""
        while payloads := await self._channel.receive():
            for payload in payloads:
                frame = m.decode_to_child(payload)
                if isinstance(frame, m.Shutdown):
                    return
                self._take(frame)

    def _take(self, frame: m.ToChild) -> None:
        match frame:
            case m.Ping():
                self._send(m.Pong())
            case m.Cancel(id=call_id):
                if call_id in self._calls:
                    self._calls[call_id].cancel()
            case m.Credit(id=call_id, count=count):
                credit = self._credits.get(call_id)
                for _ in range(min(count, m.STREAM_WINDOW) if credit is not None else 0):
                    assert credit is not None
                    credit.release()
            case (
                m.PrefillCall()
                | m.GenerateCall()
                | m.CompareCall()
                | m.EndHandoffCall()
                | m.AbortCall()
                | m.StatsCall()
            ):
                self._start(frame)
            case _:
                raise FrameError(f"{type(frame).__name__} is not expected here")

    def _start(self, frame: _CallToChild) -> None:
        if self._opened is None or frame.id in self._calls:
            raise FrameError("a call before Ready, or under a number that is in use")
        call_id, opened = frame.id, self._opened
        match frame:
            case m.PrefillCall():
                work = self._prefill(opened.engine, frame)
            case m.GenerateCall():
                work = self._generate(opened.engine, frame)
            case m.CompareCall():
                work = self._compare(opened.engine, frame)
            case m.EndHandoffCall():
                work = self._end_handoff(opened.engine, frame)
            case m.AbortCall():
                work = self._abort(opened.engine, frame)
            case m.StatsCall():
                work = self._sample(opened, frame)
        task = asyncio.create_task(self._answer(call_id, work), name=f"call-{call_id}")
        self._calls[call_id] = task
        task.add_done_callback(functools.partial(self._ended, call_id, work))

    async def _answer(self, call_id: int, work: Coroutine[None, None, m.FromChild]) -> None:
        """A call's boundary: whatever goes wrong inside it is answered, and ends this call only."""
        try:
            self._send(await work)
        except KVFerryError as error:
            self._send(m.Failure(id=call_id, code=error.code, message=error.message))
        except Exception as error:
            _logger.exception("engine_call_failed call=%d", call_id)
            self._send(m.Failure(id=call_id, code=EngineError.code, message=f"{type(error).__name__}: {error}"))

    def _ended(self, call_id: int, work: Coroutine[None, None, m.FromChild], task: asyncio.Task[None]) -> None:
        del self._calls[call_id]
        if task.cancelled():
            work.close()  # it may have been cancelled before it began
            self._send(m.Done(id=call_id))

    def _send(self, frame: m.FromChild) -> None:
        self._channel.send(m.encode(frame))

    async def _prefill(self, engine: Engine, frame: m.PrefillCall) -> m.FromChild:
        return m.Prefilled(id=frame.id, result=await engine.prefill(frame.request))

    async def _generate(self, engine: Engine, frame: m.GenerateCall) -> m.FromChild:
        credit = self._credits[frame.id] = asyncio.Semaphore(m.STREAM_WINDOW)
        try:
            async with aclosing(engine.generate(frame.request)) as deltas:
                async for delta in deltas:
                    await credit.acquire()
                    self._send(m.StreamedDelta(id=frame.id, delta=delta))
        finally:
            del self._credits[frame.id]
        return m.Done(id=frame.id)

    async def _compare(self, engine: Engine, frame: m.CompareCall) -> m.FromChild:
        return m.Compared(id=frame.id, reply=await engine.compare(frame.request))

    async def _end_handoff(self, engine: Engine, frame: m.EndHandoffCall) -> m.FromChild:
        await engine.end_handoff(frame.request_id)
        return m.Done(id=frame.id)

    async def _abort(self, engine: Engine, frame: m.AbortCall) -> m.FromChild:
        await engine.abort(frame.request_id)
        return m.Done(id=frame.id)

    async def _sample(self, opened: OpenedEngine, frame: m.StatsCall) -> m.FromChild:
        stats = await opened.engine.stats()
        return m.Sample(
            id=frame.id,
            stats=stats,
            store=opened.store_counters(),
            transports=opened.transports(),
            exposition=opened.exposition() if frame.exposition else b"",
        )
