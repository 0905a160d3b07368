"""One-sided put and get on registered memory through UCX: RDMA where there are HCAs, else TCP; never shared memory.

Owns a worker (one thread) on either side. A write is reported once it was flushed at the target. Small structs in
`Segment.addresses["ucx"]` tell a peer all that it needs: no port has to be agreed upon.
"""

import asyncio
import concurrent.futures
import logging
from collections.abc import Mapping, Sequence

from kvcore.config.schema import TransportConfig
from kvcore.errors import ConfigError, TransferError
from kvcore.telemetry import log_fields
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.blocking import ended
from transfer.fragments import Fragment
from transfer.greeting import Keys, greeting_keys
from transfer.handover import Handover
from transfer.stripes import stripe
from transfer.ucx.batch import UcxBatch
from transfer.ucx.binding import load_library
from transfer.ucx.descriptor import UcxDescriptor, descriptor_of, pack_descriptor, pack_place
from transfer.ucx.devices import plan_devices
from transfer.ucx.greetings import HostedSegment
from transfer.ucx.limits import UcxLimits
from transfer.ucx.worker import UcxWorker

_LOG = logging.getLogger("transfer")
_STRIPE_BYTES = 2 << 20
_ENDPOINTS_A_STREAM = 2
"""Over TCP an endpoint has one message on its way: while its target copies one, another endpoint's is sent."""


class UcxTransfer:
    """TransferEngine over UCX: at most twice `streams` endpoints a segment, made when first used.

    Raises ConfigError (see `_open`).
    """

    kind = "ucx"

    def __init__(self, config: TransportConfig, limits: UcxLimits = UcxLimits(), trust: ClusterTrust = OPEN) -> None:
        self._worker = worker = _open(config, "kvferry-ucx", None, limits, lambda: greeting_keys(trust))
        worker.start()
        version = worker.library.version[:2]
        self._max_stripes = _ENDPOINTS_A_STREAM * config.streams
        self._move_now_bytes = limits.move_now_bytes
        self._handover = Handover(
            self.kind,
            worker,
            parse=lambda segment: descriptor_of(segment, version, proven=trust.secrets is not None),
            split=self._split,
            make=UcxBatch,
            move_now=self._move_now,
            limits=limits.handover,
            trust=trust,
        )

    def __repr__(self) -> str:
        return f"<UcxTransfer {self._handover!r} {self._worker!r}>"

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `ucx` address."""
        return self.kind in segment.addresses

    def describe(self, segment: Segment) -> str:
        """`ucx:rc_mlx5/mlx5_0@1.13.1`: what moves its bytes, with which build; without the lanes before it was used."""
        lanes = self._worker.lanes(segment.id)
        return f"{self.kind}{':' if lanes else ''}{lanes}@{'.'.join(map(str, self._worker.library.version))}"

    def register(self, region: memoryview) -> None:
        """As TransferEngine.register. Blocks while the memory is pinned (RDMA); raises ConfigError if it cannot be."""
        self._handover.register(region)

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._handover.transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._handover.transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose. Takes at most about four seconds, and some ms if nothing hinders it."""
        await self._handover.aclose()

    def _split(self, ops: Sequence[TransferOp]) -> list[list[Fragment]]:
        """Striped over endpoints if it is much."""
        stripes = stripe(list(enumerate(ops)), self._max_stripes, _STRIPE_BYTES)
        return [[one for part in parts for one in Fragment.of(part.offset, part.views)] for parts in stripes]

    def _move_now(self, batch: UcxBatch, key: str) -> bool:
        return batch.num_bytes <= self._move_now_bytes and self._worker.move_now(batch, key)


class UcxSegmentHost:
    """SegmentHost over UCX. `memory` is the whole segment; it must outlive this host's `aclose`.

    `keys`: where there are any at the start, the address withholds where the segment lies.
    """

    def __init__(
        self,
        segment_id: str,
        memory: memoryview,
        config: TransportConfig,
        limits: UcxLimits = UcxLimits(),
        keys: Keys = lambda: (),
    ) -> None:
        self._keys = keys
        self._segment_id = segment_id
        self._memory = memory
        self._config = config
        self._limits = limits
        self._worker: UcxWorker | None = None
        self._address = ""

    def __repr__(self) -> str:
        return f"<UcxSegmentHost {self._segment_id} bytes={self._memory.nbytes} {self._worker!r}>"

    @property
    def address(self) -> str:
        """As SegmentHost.address: a descriptor."""
        return self._address

    @property
    def refused(self) -> Mapping[str, int]:
        """As SegmentHost.refused."""
        return {} if self._worker is None else self._worker.greetings.refused

    async def start(self) -> None:
        """As SegmentHost.start. Registers the memory: for RDMA that pins it."""
        with concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="kvferry-ucx-open") as pool:
            worker = await asyncio.get_running_loop().run_in_executor(pool, self._open)
        worker.start()
        self._worker = worker

    async def aclose(self) -> None:
        """As SegmentHost.aclose. Batches under way break."""
        if self._worker is not None:
            self._worker.stop()
            await ended(self._worker.thread)

    def _open(self) -> UcxWorker:
        hosted = HostedSegment(self._segment_id)
        worker = _open(self._config, "kvferry-ucx-host", hosted, self._limits, self._keys)
        try:
            handle, base = worker.context.map_memory(self._memory)
            rkey = worker.context.pack_rkey(handle)
            withheld = bool(self._keys())
            if withheld:
                hosted.place, base, rkey = pack_place(base, rkey), 0, b""
            descriptor = UcxDescriptor(
                worker.library.version[:2],
                self._segment_id,
                self._memory.nbytes,
                base,
                worker.context.address,
                rkey,
                withheld,
            )
        except ConfigError:
            worker.close_unstarted()
            raise
        self._address = pack_descriptor(descriptor)
        return worker


def _open(config: TransportConfig, name: str, hosted: HostedSegment | None, limits: UcxLimits, keys: Keys) -> UcxWorker:
    """A worker for a configuration. ConfigError names the device, library or transport that is missing."""
    plan = plan_devices(config.devices)
    worker = UcxWorker(load_library(config.ucx_library), plan, name, hosted, limits, keys=keys)
    log_fields(
        _LOG,
        logging.INFO,
        "transfer.ucx_opened",
        role="initiator" if hosted is None else "host",
        segment=None if hosted is None else hosted.segment_id,
        ucx=worker.library.build,
        resources=",".join(worker.context.resources),
        rdma=plan.rdma,
    )
    return worker
