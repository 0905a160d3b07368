"""The processes of an offline LLM's store, kept up by a launcher on a loop in a thread of its own.

The thread lives until `close`, and the children no longer than it: the kernel kills them when it ends, also by kill -9
of the whole process (kvcore.process.child).
"""

import asyncio
import logging
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from pathlib import Path

from kvcore.clock import SystemClock
from kvcore.config.schema import MetadataServerConfig
from kvcore.config.servers import internal_url, metadata_servers, metadata_urls, secured_url
from kvcore.errors import ConfigError, DeadlineExceededError, MetadataProtocolError, MetadataUnavailableError
from kvcore.identity import ClusterIdentity
from kvcore.ports import listen
from kvcore.telemetry import log_fields
from kvcore.trust.opening import ClusterTrust, open_trust, trust_source
from kvcore.types import NodeInfo
from kvferry.launch.launcher import Launcher, LauncherEvent
from kvferry.launch.processes import plan_processes
from kvferry.launch.supervised import ProcessState
from kvferry.machine import is_local
from kvferry.offline.cluster import StoreCluster, write_cluster
from metadata_server.client import MetadataClient
from metadata_server.connect import connect_client, endpoints_of
from metadata_server.messages import NodesReply
from nodeapi.client import HttpNodeClient
from nodeapi.messages import NodeReport

_logger = logging.getLogger("kvferry.offline")


class OfflineStore:
    """The store's processes of one LLM; used once. `start` and `close` block their caller, for a bounded time."""

    def __init__(
        self, cluster: StoreCluster, *, reach_s: float = 10.0, poll_s: float = 0.05, margin_s: float = 10.0
    ) -> None:
        """A cluster that is joined must answer within `reach_s`. `margin_s`: what a thread or a node may take beyond
        the bounds that it has of its own."""
        self._reach_s, self._poll_s, self._margin_s = reach_s, poll_s, margin_s
        self._cluster = cluster
        self._server_url = secured_url(cluster.config, metadata_urls(cluster.config.metadata_server)[0])
        self._folder: Path | None = None
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._ready: Future[NodeReport] = Future()
        self._thread = threading.Thread(target=self._run, name="kvferry-store", daemon=True)

    def __repr__(self) -> str:
        ready = self._ready.done() and self._ready.exception() is None
        state = "ended" if self._closing.is_set() else "ready" if ready else "not ready"
        return f"<OfflineStore {self._cluster.config.cluster}/{self._cluster.node_name}, {state}, {self._server_url}>"

    def start(self) -> NodeReport:
        """Start the processes. Returns the report of the LLM's node, once the metadata server knows it.

        Raises ConfigError with what went wrong, after it has closed itself.
        """
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="kvferry-llm-"))
        except OSError as error:
            raise ConfigError(f"store: no temporary folder: {error}. Set TMPDIR to one that can be written") from error
        self._thread.start()
        try:
            return self._ready.result(self._reach_s + 2 * self._cluster.config.service.start_s + self._margin_s)
        except FutureTimeoutError:
            raise DeadlineExceededError("the processes of the store did not start in time") from None
        finally:
            if not self._ready.done() or self._ready.exception() is not None:
                self.close()

    def close(self) -> None:
        """Stop the processes, the node first. Idempotent."""
        if not self._thread.is_alive():
            return
        with suppress(RuntimeError):  # the loop has been closed meanwhile
            self._loop.call_soon_threadsafe(self._closing.set)
        if threading.current_thread() is not self._thread:  # it may be: wherever garbage is collected
            self._thread.join(3 * self._margin_s)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        """The boundary of the thread: what goes wrong is raised by `start`, or logged once it has returned."""
        assert self._folder is not None, "the thread runs before start"
        work = asyncio.create_task(self._keep_up(self._folder))
        work.add_done_callback(lambda _: self._closing.set())
        await self._closing.wait()
        work.cancel()
        (error,) = await asyncio.gather(work, return_exceptions=True)
        if not self._ready.done():
            cancelled = isinstance(error, asyncio.CancelledError)
            self._ready.set_exception(ConfigError("the store was closed while it started") if cancelled else error)
            if any(self._folder.glob("*.log")):
                return  # the error names them
        elif not isinstance(error, asyncio.CancelledError):
            _logger.error("offline_store_failed", exc_info=error)
        shutil.rmtree(self._folder, ignore_errors=True)

    async def _keep_up(self, folder: Path) -> None:
        """Until cancelled."""
        config, file = self._cluster.config, folder / "cluster.yaml"
        trust = open_trust(trust_source(config, self._cluster.node_name))
        server = connect_client(endpoints_of(config.metadata_server), SystemClock(), trust)
        try:
            if self._cluster.joined:
                await self._until(
                    server, lambda _: True, self._reach_s, "cannot be reached; start it, or correct its file"
                )
            write_cluster(config, file)
            plans = [plan for plan in plan_processes(config, file) if plan.name in self._cluster.started]
            async with Launcher(config, file, log_dir=folder, plans=plans, on_event=self._changed) as launcher:
                await launcher.wait_ready(config.service.start_s)
                report = await self._ask_node(trust)
                await self._until(
                    server,
                    lambda nodes: any(_same_start(node, report.node) for node in nodes),
                    config.service.start_s,
                    f"does not know the LLM's node {self._cluster.node_name}",
                )
                self._ready.set_result(report)
                await launcher.watch()
        finally:
            await server.aclose()

    async def _ask_node(self, trust: ClusterTrust) -> NodeReport:
        config = self._cluster.config
        node = config.nodes[self._cluster.node_name]
        client = HttpNodeClient(connect_timeout_s=self._margin_s, max_connections=1, trust=trust)
        try:
            return await client.info(internal_url(config, node.host, node.port), timeout_s=self._margin_s)
        finally:
            await client.aclose()

    async def _until(
        self,
        server: MetadataClient,
        enough: Callable[[Sequence[NodeInfo]], bool],
        timeout_s: float,
        problem: str,
    ) -> None:
        """Ask the metadata server for its nodes until they are `enough`. Raises ConfigError with the last answer."""
        config, last = self._cluster.config, "no answer"
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    if server.available:
                        try:
                            reply = await server.nodes()
                            self._check_cluster(reply)
                            nodes = reply.nodes
                            if enough(nodes):
                                return
                            last = f"it knows {', '.join(node.id for node in nodes) or 'no node'}"
                        except MetadataUnavailableError as error:
                            last = error.message
                    await asyncio.sleep(self._poll_s)
        except TimeoutError:
            raise ConfigError(
                f"store: the metadata server of cluster {config.cluster!r} at {self._server_url} {problem} "
                f"(waited {timeout_s:g} s; {last})"
            ) from None
        except MetadataProtocolError as error:
            raise ConfigError(f"store: what answers at {self._server_url} is no metadata server: {error}") from error

    def _check_cluster(self, reply: NodesReply) -> None:
        config = self._cluster.config
        names = ClusterIdentity(config.cluster, config.model.name)
        differs = names.difference(ClusterIdentity(reply.cluster, reply.model))
        if differs is not None:
            raise ConfigError(
                f"store: the metadata server at {self._server_url} {differs}: correct metadata_server in its file"
            )

    def _changed(self, event: LauncherEvent) -> None:
        if event.state is not ProcessState.DIED:
            return
        log_fields(_logger, logging.WARNING, "store_process_died", process=event.name, detail=event.detail)
        if event.name == self._cluster.node_name:
            _logger.warning("store_lost nothing more is saved; make the LLM anew to have a store again")


def _same_start(one: NodeInfo, other: NodeInfo) -> bool:
    return (one.id, one.incarnation) == (other.id, other.incarnation)


def own_address(server: MetadataServerConfig) -> str:
    """The address by which the cluster of `server` reaches this machine. Raises ConfigError for an unknown host."""
    host, port = metadata_servers(server)[0]
    if is_local(host):
        return "127.0.0.1" if host in ("0.0.0.0", "::", "localhost") else host
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing: asks for the route
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"store: no way to the metadata server's host {host}: {error}. Correct metadata_server.host"
        ) from error


def free_ports(host: str, count: int) -> list[int]:
    """TCP ports of `host` that are free now, all different; nothing keeps others from them until they are bound.

    Raises ConfigError for a host that is not this machine's.
    """
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            held.append(listen(host, 0))
        return [probe.getsockname()[1] for probe in held]
    finally:
        for probe in held:
            probe.close()
