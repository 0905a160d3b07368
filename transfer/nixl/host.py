"""The target's side of the NIXL transport: an agent that holds one segment's memory, and who is connected to it.

NIXL's own thread moves the bytes. Ours answers greetings, and drops peers that are gone: NIXL reports neither.
"""

import asyncio
import concurrent.futures
import logging
import secrets
import threading
from collections.abc import Mapping

from kvcore.clock import SystemClock
from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError
from kvcore.telemetry import log_fields
from transfer.blocking import ended
from transfer.greeting import Keys
from transfer.nixl.binding import NixlAgent, NixlLibrary, address_of, has_nvidia_gpu, load_nixl, nixl_options
from transfer.nixl.descriptor import NixlDescriptor, pack_descriptor
from transfer.nixl.guests import ConnectedAgents, GuestBook
from transfer.nixl.limits import NixlLimits
from transfer.nixl.proving import pack_place
from transfer.ucx.devices import UcxPlan, plan_devices
from transfer.ucx.probe import UcxProbe, probe_ucx

_LOG = logging.getLogger("transfer")


class NixlSegmentHost:
    """SegmentHost over NIXL. `memory` is the whole segment; it must outlive this host's `aclose`.

    `keys`: where there are any at the start, the address withholds where the segment lies.
    """

    def __init__(
        self,
        segment_id: str,
        memory: memoryview,
        config: TransportConfig,
        limits: NixlLimits = NixlLimits(),
        keys: Keys = lambda: (),
    ) -> None:
        self._keys = keys
        self._segment_id = segment_id
        self._memory = memory
        self._config = config
        self._limits = limits
        self._agents: ConnectedAgents | None = None
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()
        self._address = ""

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

    @property
    def refused(self) -> Mapping[str, int]:
        """As SegmentHost.refused."""
        return {} if self._agents is None else self._agents.refused

    async def start(self) -> None:
        """As SegmentHost.start. Registers the memory: for RDMA that pins it."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvferry-nixl-open") as pool:
            agent, book = await asyncio.get_running_loop().run_in_executor(pool, self._open)
        self._agents = ConnectedAgents(agent, book, self._limits, SystemClock())
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

    def _open(self) -> tuple[NixlAgent, GuestBook]:
        library, plan, _ = open_nixl(self._config, "host", self._segment_id)
        options = nixl_options(plan.options(), has_nvidia_gpu())
        agent = NixlAgent(library, f"{self._segment_id}.{secrets.token_hex(8)}", options, progress=True)
        base, public = address_of(self._memory), agent.metadata()
        try:
            agent.register([(base, self._memory.nbytes)])
        except ConfigError:
            agent.close()
            raise
        metadata, place = agent.metadata(), b""
        withheld = bool(self._keys())
        if withheld:
            base, metadata, place = 0, public, pack_place(base, metadata)
        size_bytes = self._memory.nbytes
        descriptor = NixlDescriptor(library.versions, self._segment_id, size_bytes, base, metadata, withheld)
        self._address = pack_descriptor(descriptor)
        return agent, GuestBook(self._segment_id, self._keys, place)

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
