"""One-sided reads and writes through NIXL's agents, with the UCX that NIXL's wheel brings. Never shared memory.

Owns an agent and a thread on either side. A write is reported once it was flushed at the target. All that a peer needs
is in `Segment.addresses["nixl"]`.
"""

from collections.abc import Sequence

from kvcore.config.schema import TransportConfig
from kvcore.errors import TransferError
from kvcore.trust.opening import OPEN, ClusterTrust
from kvcore.types import Segment
from transfer.base import TransferOp
from transfer.fragments import Fragment
from transfer.greeting import greeting_keys
from transfer.handover import Handover
from transfer.nixl.batch import NixlBatch
from transfer.nixl.descriptor import descriptor_of
from transfer.nixl.host import open_nixl
from transfer.nixl.limits import NixlLimits
from transfer.nixl.worker import NixlWorker
from transfer.ranges import byte_views


class NixlTransfer:
    """TransferEngine over NIXL: one connection a segment. Raises ConfigError (see `open_nixl`)."""

    kind = "nixl"

    def __init__(self, config: TransportConfig, limits: NixlLimits = NixlLimits(), trust: ClusterTrust = OPEN) -> None:
        library, plan, _ = open_nixl(config, "initiator", None)
        self._worker = worker = NixlWorker(library, plan, "kvferry-nixl", limits, keys=lambda: greeting_keys(trust))
        worker.start()
        self._description = f"{self.kind}:{plan.net_devices}@{'.'.join(map(str, library.versions.nixl))}"
        self._handover = Handover(
            self.kind,
            worker,
            parse=lambda segment: descriptor_of(segment, library.versions, proven=trust.secrets is not None),
            split=_one_batch,
            make=NixlBatch,
            limits=limits.handover,
            trust=trust,
        )

    def __repr__(self) -> str:
        return f"<NixlTransfer {self._description} {self._handover!r} {self._worker!r}>"

    def reaches(self, segment: Segment) -> bool:
        """Whether the segment has a `nixl` address."""
        return self.kind in segment.addresses

    def describe(self, segment: Segment) -> str:
        """`nixl:mlx5_0:1@1.5.1`: devices that may move its bytes, and the wheel. NIXL does not say which it takes."""
        return self._description

    def register(self, region: memoryview) -> None:
        """As TransferEngine.register. Blocks while the memory is pinned (RDMA); raises ConfigError if it cannot be.

        Buffers outside of what was registered are registered with each request, and for so long.
        """
        self._handover.register(region)

    async def write(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.write."""
        return await self._handover.transfer("write", ops, timeout_s)

    async def read(self, ops: Sequence[TransferOp], timeout_s: float) -> list[TransferError | None]:
        """As TransferEngine.read."""
        return await self._handover.transfer("read", ops, timeout_s)

    async def aclose(self) -> None:
        """As TransferEngine.aclose. Takes at most about a second, and some ms if nothing hinders it."""
        await self._handover.aclose()


def _one_batch(ops: Sequence[TransferOp]) -> list[list[Fragment]]:
    return [[fragment for op in ops for fragment in Fragment.of(op.offset, byte_views(op))]]
