"""`EngineProcess`: an Engine that lives in a child process, behind frames on a Unix socket.

Owns the child, the socket and the calls under way. Does not restart anything: see kvnode.supervisor.
Invariants: every call ends when the child does; what its caller no longer waits for is cancelled in the child; whatever
processes the child starts, none outlives it or us (`kvcore.process.child`, guard).
"""

import asyncio
import itertools
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import msgspec

from engines.process import messages as m
from engines.process.calls import Call, CallFrame, EngineProcessLimits
from engines.process.channel import FrameChannel
from kvcore.errors import DeadlineExceededError, EngineDiedError, EngineError, error_from_code
from kvcore.process.child import ChildProcess
from kvcore.telemetry import log_fields
from nodeapi.documents import CompareReply, CompareRequest
from nodeapi.frames import FrameError
from nodeapi.messages import EngineInfo, EngineStats, GenerateRequest, PrefillRequest, PrefillResult, TokenDelta

CHILD_COMMAND = (sys.executable, "-m", "engines.process.child")
_logger = logging.getLogger("engines")


class EngineProcess:
    """One life of a child. Entering starts it and waits until its engine is ready; leaving ends it.

    Enter it on the main thread (see kvcore.process.child). `command` is run with `--fd N` added; `on_line` gets its
    output.
    """

    def __init__(
        self,
        hello: m.EngineHello,
        *,
        start_s: float,
        command: Sequence[str] = CHILD_COMMAND,
        on_line: Callable[[str], None] | None = None,
        env: Mapping[str, str] | None = None,
        limits: EngineProcessLimits = EngineProcessLimits(),
    ) -> None:
        """`env` is laid over our own environment. `stall_s`: a child whose loop has not turned for this long is killed,
        whatever it was doing."""
        self._hello = hello
        self._command = command
        self._on_line = on_line
        self._env = dict(env or {})
        self._start_s = start_s
        self._limits = limits
        self._ids = itertools.count(1)
        self._calls: dict[int, Call] = {}
        self._died: str | None = None
        self._ended = asyncio.Event()
        self._hung = asyncio.Event()
        self._silent_ticks = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._child: ChildProcess | None = None
        self._channel: FrameChannel | None = None
        self._info: EngineInfo | None = None

    async def __aenter__(self) -> Self:
        """Raises ConfigError and ModelLoadError as the child found them, EngineDiedError if it went without a word."""
        try:
            await self._start()
        except BaseException:
            await self._stop(graceful=False)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop(graceful=self._died is None)

    def __repr__(self) -> str:
        life = self._died or ("running" if self._info is not None else "starting")
        child = f" pid {self._child.pid}" if self._child is not None else ""
        return f"<EngineProcess {self._hello.node_name}{child}: {life}, {len(self._calls)} calls under way>"

    @property
    def info(self) -> EngineInfo:
        """What the child said when it was ready."""
        assert self._info is not None, "the engine was not entered"
        return self._info

    @property
    def pid(self) -> int:
        """Of the child."""
        assert self._child is not None, "the engine was not entered"
        return self._child.pid

    @property
    def ended(self) -> bool:
        """Whether the child is of no more use."""
        return self._ended.is_set()

    async def wait_ended(self) -> str:
        """Returns why, once the child is of no more use: its calls have failed, new ones fail at once."""
        await self._ended.wait()
        return self._died or "it was stopped"

    async def wait_hung(self) -> None:
        """Until its loop has not turned for a while, each time once. It may go on, or is killed later."""
        await self._hung.wait()
        self._hung.clear()

    async def prefill(self, request: PrefillRequest) -> PrefillResult:
        """See `Engine`. EngineDiedError when the child ends first."""
        deadline = self._deadline(request.deadline_s + self._limits.late_s)
        with self._call() as call:
            await self._send(m.PrefillCall(id=call.id, request=request), deadline)
            answer = await call.next(deadline)
        if not isinstance(answer, m.Prefilled):
            raise EngineError(f"the engine answered a prefill with {type(answer).__name__}")
        return answer.result

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenDelta, None]:
        """See `Engine`. Deltas that arrived before the child died are still given out before EngineDiedError."""
        deadline = self._deadline(request.deadline_s + self._limits.late_s)
        with self._call() as call:
            await self._send(m.GenerateCall(id=call.id, request=request), deadline)
            taken = 0
            while isinstance(answer := await call.next(deadline), m.StreamedDelta):
                taken += 1
                if taken == m.STREAM_WINDOW // 2:
                    self._post(m.Credit(id=call.id, count=taken))
                    taken = 0
                yield answer.delta

    async def compare(self, request: CompareRequest) -> CompareReply:
        """See `Engine`."""
        deadline = self._deadline(request.deadline_s + self._limits.late_s)
        with self._call() as call:
            await self._send(m.CompareCall(id=call.id, request=request), deadline)
            answer = await call.next(deadline)
        if not isinstance(answer, m.Compared):
            raise EngineError(f"the engine answered a comparison with {type(answer).__name__}")
        return answer.reply

    async def end_handoff(self, request_id: str) -> None:
        """See `Engine`."""
        with self._call() as call:
            await self._ask(call, m.EndHandoffCall(id=call.id, request_id=request_id))

    async def abort(self, request_id: str) -> None:
        """See `Engine`."""
        with self._call() as call:
            await self._ask(call, m.AbortCall(id=call.id, request_id=request_id))

    async def stats(self) -> EngineStats:
        """See `Engine`."""
        return (await self.sample()).stats

    async def sample(self, *, exposition: bool = False) -> m.Sample:
        """The engine's stats together with what the child's store counted, and the engine's own metrics if wanted."""
        with self._call() as call:
            answer = await self._ask(call, m.StatsCall(id=call.id, exposition=exposition))
        if not isinstance(answer, m.Sample):
            raise EngineError(f"the engine answered a question for stats with {type(answer).__name__}")
        return answer

    # --- calls -------------------------------------------------------------------------------------------------

    @contextmanager
    def _call(self) -> Generator[Call]:
        if self._died is not None or self._channel is None:
            raise EngineDiedError(f"the engine's process is gone: {self._died or 'it was not started'}")
        call = Call(next(self._ids))
        self._calls[call.id] = call
        try:
            yield call
        finally:
            self._calls.pop(call.id, None)
            if not call.ended:
                self._post(m.Cancel(id=call.id))

    async def _ask(self, call: Call, frame: m.ToChild) -> CallFrame:
        deadline = self._deadline(self._limits.call_s)
        await self._send(frame, deadline)
        return await call.next(deadline)

    def _deadline(self, seconds: float) -> float:
        return asyncio.get_running_loop().time() + seconds

    def _post(self, frame: m.ToChild) -> None:
        """Send a small frame without waiting; nothing happens if the child is gone."""
        if self._channel is not None and self._died is None:
            self._channel.send(m.encode(frame))

    async def _send(self, frame: m.ToChild, deadline: float) -> None:
        assert self._channel is not None
        try:
            self._channel.send(m.encode(frame))
            async with asyncio.timeout_at(deadline):
                await self._channel.drain()
        except FrameError as error:
            raise EngineError(f"the request is too large for the engine's link: {error}") from error
        except TimeoutError as error:
            raise DeadlineExceededError("the engine did not take the request in time") from error

    # --- the child's life --------------------------------------------------------------------------------------

    async def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            try:
                self._channel = await FrameChannel.over(ours)
            except BaseException:
                ours.close()
                raise
            self._child = await ChildProcess.start(
                [*self._command, "--fd", str(theirs.fileno())],
                on_line=self._on_line,
                pass_fds=(theirs.fileno(),),
                env=os.environ | self._env,
                guard=True,
            )
        self._channel.send(m.encode(self._hello))
        try:
            async with asyncio.timeout(self._start_s):
                answer = await self._receive()
        except TimeoutError as error:
            raise EngineDiedError(f"the engine was not ready within {self._start_s:g} s") from error
        match answer:
            case [m.Ready(version=m.PROTOCOL_VERSION, info=info)]:
                self._info = info
            case [m.Refused(code=code, message=message)]:
                raise error_from_code(code, message)
            case []:
                raise EngineDiedError(f"the engine's process {await self._exit_status()} before it was ready")
            case _:
                raise EngineDiedError("the engine's process speaks another protocol version")
        self._tasks = [asyncio.create_task(self._read(), name="engine-read"), asyncio.create_task(self._watch())]

    async def _receive(self) -> list[m.FromChild]:
        """Empty: the child closed its end. Raises EngineDiedError for what the protocol does not allow."""
        assert self._channel is not None
        try:
            return [m.decode_from_child(payload) for payload in await self._channel.receive()]
        except (FrameError, msgspec.MsgspecError) as error:
            raise EngineDiedError(f"the engine's process sent garbage: {error}") from error

    async def _read(self) -> None:
        reason = "its reader failed"
        try:
            while frames := await self._receive():
                self._silent_ticks = 0
                for frame in frames:
                    self._dispatch(frame)
            reason = f"it {await self._exit_status()}"
        except EngineDiedError as error:
            reason = error.message
        except asyncio.QueueFull:
            reason = "it sent more than the window of a stream allows"
        finally:
            self._fail(reason)

    def _dispatch(self, frame: m.FromChild) -> None:
        if isinstance(frame, m.Pong):
            return
        if isinstance(frame, m.Ready | m.Refused):
            raise EngineDiedError(f"the engine's process sent {type(frame).__name__} twice")
        call = self._calls.get(frame.id)
        if call is not None:  # else its caller has gone
            call.put(frame)

    async def _watch(self) -> None:
        """Ping; kill a child that stays silent. Counts our own turns: a pause of *this* process accuses nobody."""
        while self._silent_ticks < self._limits.pings:
            if self._silent_ticks == self._limits.hung_pings:
                self._hung.set()
            self._silent_ticks += 1
            self._post(m.Ping())
            await asyncio.sleep(self._limits.stall_s / self._limits.pings)
        self._fail(f"it did not answer for {self._limits.stall_s:g} s")

    def _fail(self, reason: str) -> None:
        """Every call ends now; the child, whatever state it is in, is killed."""
        if self._died is not None:
            return
        self._died = reason
        log_fields(_logger, logging.WARNING, "engine_process_lost", pid=self.pid, reason=reason, calls=len(self._calls))
        self._end_calls()
        if self._child is not None:
            self._child.kill()

    def _end_calls(self) -> None:
        for call in self._calls.values():
            if not call.ended:
                call.put(EngineDiedError(f"the engine's process is gone: {self._died}"))
        self._ended.set()

    async def _exit_status(self) -> str:
        assert self._child is not None
        try:
            async with asyncio.timeout(self._limits.exit_status_s):
                code = await self._child.wait_ended()
        except TimeoutError:
            return "closed its connection"
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"

    async def _stop(self, *, graceful: bool) -> None:
        """Bounded by `stop_s`; on cancellation the child is killed at once. Leaves no task, process or descriptor."""
        if graceful:
            self._post(m.Shutdown())
        self._died = self._died or "it was stopped"
        self._end_calls()
        try:
            if graceful and self._child is not None:
                async with asyncio.timeout(self._limits.stop_s):
                    await self._child.wait()
        except TimeoutError:
            log_fields(_logger, logging.WARNING, "engine_process_killed", pid=self.pid, after_s=self._limits.stop_s)
        finally:
            await self._release()

    async def _release(self) -> None:
        if self._child is not None:
            self._child.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._channel is not None:
            await self._channel.aclose()
        if self._child is not None:
            await self._child.wait()
