"""The target's side of the NIXL transport: an agent that holds one segment's memory, and who is connected to it.

NIXL's own thread moves the bytes. Ours answers greetings, and drops peers that are gone: NIXL reports neither.
"""

import asyncio
import concurrent.futures
import logging
import secrets
import threading

from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, PeerUnreachableError, TransferProtocolError
from kvcore.telemetry import log_fields
from transfer.blocking import ended
from transfer.nixl.binding import NixlAgent, NixlLibrary, address_of, has_nvidia_gpu, load_nixl, nixl_options
from transfer.nixl.descriptor import (
    HelloAnswer,
    NixlDescriptor,
    NixlHello,
    NixlWelcome,
    pack_descriptor,
    pack_welcome,
    parse_hello,
)
from transfer.nixl.limits import NixlLimits
from transfer.ucx.devices import UcxPlan, plan_devices
from transfer.ucx.probe import UcxProbe, probe_ucx

_LOG = logging.getLogger("transfer")


class ConnectedAgents:
    """Who is connected to a segment: agents by name. Not thread-safe."""

    def __init__(self, agent: NixlAgent, segment_id: str, max_connections: int) -> None:
        self._agent = agent
        self._segment_id = segment_id
        self._max_connections = max_connections
        self._names: set[str] = set()

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        return f"<ConnectedAgents {self._segment_id} {len(self)}/{self._max_connections}>"

    def answer_greetings(self) -> None:
        """Answer every greeting that has come."""
        for sender, messages in self._agent.messages().items():
            for message in messages:
                try:
                    self._greeted(sender, parse_hello(message))
                except (TransferProtocolError, PeerUnreachableError) as error:
                    log_fields(_LOG, logging.WARNING, "transfer.greeting_failed", peer=sender, error=error.message)

    def drop_broken(self) -> None:
        """Drop those whose connection is broken: an empty message finds out."""
        for name in list(self._names):
            try:
                self._agent.send(name, b"")
            except PeerUnreachableError:
                self._forget(name)

    def _greeted(self, sender: str, hello: NixlHello) -> None:
        known = sender in self._names
        if not known and len(self._names) >= self._max_connections:
            self.drop_broken()
        full = not known and len(self._names) >= self._max_connections
        if not known:
            name = self._agent.load(hello.metadata)
            self._names.add(name)
            if name != sender:
                self._forget(name)
                raise TransferProtocolError(f"{sender} greets as {name}")
        answer = HelloAnswer.WELCOME if hello.segment_id == self._segment_id else HelloAnswer.UNKNOWN
        answer = HelloAnswer.FULL if full else answer
        try:
            self._agent.send(sender, pack_welcome(NixlWelcome(hello.nonce, answer)))
        except PeerUnreachableError:
            self._forget(sender)
            raise
        if answer is not HelloAnswer.WELCOME:
            self._forget(sender)
        elif not known:
            log_fields(_LOG, logging.INFO, "transfer.nixl_guest", segment=self._segment_id, connections=len(self))

    def _forget(self, name: str) -> None:
        self._names.discard(name)
        self._agent.drop(name)


class NixlSegmentHost:
    """SegmentHost over NIXL. `memory` is the whole segment; it must outlive this host's `aclose`."""

    def __init__(
        self,
        segment_id: str,
        memory: memoryview,
        config: TransportConfig,
        limits: NixlLimits = NixlLimits(),
    ) -> None:
        self._segment_id = segment_id
        self._memory = memory
        self._config = config
        self._limits = limits
        self._agents: ConnectedAgents | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._address = ""
        self.refused: dict[str, int] = {}
        """As SegmentHost.refused."""

    def __repr__(self) -> str:
        return f"<NixlSegmentHost {self._segment_id} bytes={self._memory.nbytes} connections={self.num_connections}>"

    @property
    def address(self) -> str:
        """As SegmentHost.address: a descriptor."""
        return self._address

    @property
    def num_connections(self) -> int:
        """Agents connected now, those included that were not missed yet."""
        return len(self._agents) if self._agents is not None else 0

    async def start(self) -> None:
        """As SegmentHost.start. Registers the memory: for RDMA that pins it."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvferry-nixl-open") as pool:
            agent = await asyncio.get_running_loop().run_in_executor(pool, self._open)
        self._agents = ConnectedAgents(agent, self._segment_id, self._limits.max_connections)
        self._thread = threading.Thread(
            target=self._serve, args=(agent, self._agents), name="kvferry-nixl-host", daemon=True
        )
        self._thread.start()

    async def aclose(self) -> None:
        """As SegmentHost.aclose. Batches under way break."""
        self._closing.set()
        if self._thread is not None:
            async with asyncio.timeout(self._limits.close_s):
                await ended(self._thread)

    def _open(self) -> NixlAgent:
        library, plan, _ = open_nixl(self._config, "host", self._segment_id)
        options = nixl_options(plan.options(), has_nvidia_gpu())
        agent = NixlAgent(library, f"{self._segment_id}.{secrets.token_hex(8)}", options, progress=True)
        base = address_of(self._memory)
        try:
            agent.register([(base, self._memory.nbytes)])
        except ConfigError:
            agent.close()
            raise
        descriptor = NixlDescriptor(library.versions, self._segment_id, self._memory.nbytes, base, agent.metadata())
        self._address = pack_descriptor(descriptor)
        return agent

    def _serve(self, agent: NixlAgent, agents: ConnectedAgents) -> None:
        clock = SystemClock()
        swept_at = clock.now()
        try:
            while not self._closing.wait(self._limits.look_s):
                agents.answer_greetings()
                if clock.now() - swept_at >= self._limits.sweep_s:
                    agents.drop_broken()
                    swept_at = clock.now()
        finally:
            agent.close()


def open_nixl(config: TransportConfig, role: str, segment_id: str | None) -> tuple[NixlLibrary, UcxPlan, UcxProbe]:
    """The library and the plan for a configuration; says in the log what will be used.

    NIXL does not say what UCX opened, so the same UCX is asked first. ConfigError names the device, wheel or transport
    that is missing.
    """
    plan = plan_devices(config.devices)
    library = load_nixl()
    probe = probe_ucx(TransportConfig(kind="ucx", devices=config.devices, ucx_library=library.ucx.path))
    log_fields(
        _LOG,
        logging.INFO,
        "transfer.nixl_opened",
        role=role,
        segment=segment_id,
        nixl=library.build,
        resources=",".join(probe.resources),
        rdma=plan.rdma,
    )
    return library, plan, probe
