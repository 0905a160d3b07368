"""Serve an ASGI app with uvicorn inside a loop that runs already; signals and logs stay ours.

Invariant: once `drain` or `aclose` has returned, the port is free and no connection of the app is open.
"""

import asyncio
import contextlib
import functools
import logging
import socket
import ssl
from collections.abc import Callable, Generator
from typing import Any

import uvicorn

from kvcore.peer_log import PeerLog
from kvcore.ports import base_url, listen
from kvcore.process.http_gate import HttpGate, TlsListener, queued
from kvcore.process.http_protocol import BoundedHttp
from kvcore.process.limits import HttpLimits
from kvcore.telemetry import log_fields

_logger = logging.getLogger("kvcore.asgi")


class _Server(uvicorn.Server):
    """uvicorn's server without its signal handlers, and waiting on an event instead of ten ticks a second."""

    def __init__(
        self, config: uvicorn.Config, accept_tls: Callable[[Callable[[], Any]], Any] | None, look_s: float
    ) -> None:
        """`accept_tls`: what accepts in uvicorn's place, of what makes a connection's protocol; can be closed.
        `look_s`: see HttpLimits."""
        super().__init__(config)
        self._look_s = look_s
        self._accept_tls = accept_tls
        self.tls_listener: Any = None
        self._queued: set[asyncio.Task[Any]] = set()
        self.up = asyncio.Event()
        self.stop = asyncio.Event()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self._accept_tls is not None:
            self.tls_listener = self._accept_tls(self._make)
            self.servers.append(self.tls_listener)
        self.up.set()

    def _make(self) -> Any:
        """A connection's protocol."""
        kind: Any = self.config.http_protocol_class
        return kind(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    @property
    def num_connections(self) -> int:
        """With those that are no protocol's yet."""
        shaking = 0 if self.tls_listener is None else self.tls_listener.num_shaking
        return len(self.server_state.connections) + len(self._queued) + shaking

    def leave(self, bound: socket.socket) -> None:
        """Accept what the kernel has accepted for this listener, and then no more: the rest is other processes'."""
        if self.tls_listener is not None:
            self.tls_listener.leave()
            return
        with bound.dup() as held:
            for listener in self.servers:
                listener.close()
            for connection, _ in queued(held):
                made = asyncio.get_running_loop().connect_accepted_socket(self._make, connection)
                task = asyncio.create_task(made)
                self._queued.add(task)
                task.add_done_callback(self._queued.discard)

    async def main_loop(self) -> None:
        await self.on_tick(0)
        await self.stop.wait()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's own, which waits for a tenth of a second even where nothing is open."""
        for server in self.servers:
            server.close()
        for bound in sockets or []:
            bound.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        await asyncio.sleep(0)  # idle ones are lost in the loop's next turn
        while self.server_state.connections or self.server_state.tasks or self._queued:  # noqa: ASYNC110 - uvicorn's own sets
            await asyncio.sleep(self._look_s)
        for server in self.servers:
            await server.wait_closed()
        await self.lifespan.shutdown()


class AsgiServer:
    """One app on one address. `start`, then `drain` or `aclose`; not restartable.

    `app` is an ASGI application (FastAPI, Starlette): its own type is the framework's and untyped.
    """

    def __init__(
        self,
        app: Any,
        host: str,
        port: int,
        *,
        limits: HttpLimits = HttpLimits(),
        tls: ssl.SSLContext | None = None,
        shared: bool = False,
    ) -> None:
        """`shared`: other processes listen there, too (`kvcore.ports.listen`)."""
        self._app = app
        self._shared = shared
        self._bound: socket.socket | None = None
        self._host = host
        self._port = port
        self._limits = limits
        self.gate = HttpGate(limits)
        """What the listener holds and refuses."""
        self._tls = tls
        self._server: _Server | None = None
        self._serving: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        state = "not started" if self._serving is None else "ended" if self._serving.done() else "serving"
        return f"<AsgiServer {self._host}:{self._port}, {state}>"

    @property
    def port(self) -> int:
        """The bound port; known after `start`."""
        return self._port

    @property
    def url(self) -> str:
        """`http://host:port`, or `https://…`, after `start`."""
        url = base_url(self._host, self._port)
        return url if self._tls is None else url.replace("http", "https", 1)

    async def start(self) -> None:
        """Bind, run the app's lifespan start-up and serve. Raises ConfigError (address in use, no such address) or
        RuntimeError if the app's start-up failed."""
        assert self._serving is None, "started before"
        self._bound = bound = listen(self._host, self._port, shared=self._shared)
        self._port = int(bound.getsockname()[1])
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            http=functools.partial(BoundedHttp, gate=self.gate, log=PeerLog(_logger)),  # type: ignore[arg-type]  # it makes them
            ws="none",
            lifespan="auto",
            date_header=False,
            server_header=False,
            proxy_headers=False,  # else any process of this machine could say that it is another address
            timeout_keep_alive=75,
        )
        config.load()
        tls = self._tls
        accept_tls = None if tls is None else functools.partial(TlsListener, self.gate, bound, tls)
        self._server = server = _Server(config, accept_tls, self._limits.look_s)
        self._serving = asyncio.create_task(
            self._serve(server, bound, by_tls=tls is not None), name=f"asgi {self._host}:{self._port}"
        )
        up = asyncio.create_task(server.up.wait())
        try:
            await asyncio.wait({self._serving, up}, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            # Not cancelled in its midst: the lifespan would be left over, to be cut with a stack trace in the log.
            server.stop.set()
            await asyncio.wait({self._serving}, timeout=self._limits.close_s)
            self._serving.cancel()
            raise
        finally:
            up.cancel()
        if not server.up.is_set():
            await self._serving  # raises what ended it
            raise RuntimeError(f"the app for {self._host}:{self._port} did not start")

    @staticmethod
    async def _serve(server: _Server, bound: socket.socket, *, by_tls: bool) -> None:
        try:
            await server.serve(sockets=[] if by_tls else [bound])
        except SystemExit as error:  # uvicorn's way to say that the lifespan start-up failed; it has logged why
            raise RuntimeError("the app's start-up failed") from error
        finally:
            if server.tls_listener is not None:
                server.tls_listener.close()
            bound.close()

    async def wait_failed(self) -> None:
        """Return or raise when the server ends; for a TaskGroup that should go down with it."""
        assert self._serving is not None
        await asyncio.shield(self._serving)

    @property
    def num_connections(self) -> int:
        """How many are open."""
        return 0 if self._server is None else self._server.num_connections

    def leave(self) -> None:
        """Accept no more connections; those that there are go on. For a `shared` address, whose other processes get the
        new ones from now on. Idempotent."""
        if self._server is not None and self._bound is not None:
            self._server.leave(self._bound)
            self._bound = None

    def begin_drain(self) -> None:
        """As `drain`, without waiting for anything."""
        if self._server is not None:
            self._server.stop.set()

    async def drain(self, deadline_s: float) -> None:
        """Refuse new connections, let requests under way end, at the deadline cut the rest. Idempotent; a second call
        with a shorter deadline cuts earlier."""
        server, serving = self._server, self._serving
        if server is None or serving is None or serving.done():
            return
        server.stop.set()
        await asyncio.wait({serving}, timeout=deadline_s)
        if not serving.done():
            self._abort_connections(server)
            await asyncio.wait({serving}, timeout=self._limits.close_s)
        if not serving.done():
            serving.cancel()
            await asyncio.wait({serving})
        if not serving.cancelled() and (error := serving.exception()) is not None:
            raise error

    def _abort_connections(self, server: _Server) -> None:
        connections = list(server.server_state.connections)
        log_fields(_logger, logging.WARNING, "connections_cut", num=len(connections), port=self._port)
        for request in list(server.server_state.tasks):
            request.cancel()
        for connection in connections:
            transport = getattr(connection, "transport", None)  # both of uvicorn's protocols have one
            if transport is not None:
                transport.abort()

    async def aclose(self) -> None:
        """End now, cutting whatever is under way. Idempotent."""
        await self.drain(0.0)
