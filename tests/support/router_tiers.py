"""A wired router whose fake nodes have real tiers, in memory: a disk of each, a cloud of all."""

from types import SimpleNamespace
from typing import Any, cast

import httpx
from support.router_fakes import CHUNK_TOKENS, FakeNode, FakeNodes, Rig, make_rig, spec, two_and_two
from support.tier_rigs import chunk_of

from kvcore.chunk_keys import chunk_keys, root_key
from kvcore.clock import SystemClock
from kvcore.types import ChunkKey
from kvnode.upkeep import NodeUpkeep
from kvstore.tiers.base import ChunkName
from kvstore.tiers.guarded import GuardedTier
from kvstore.tiers.memory import MemoryTier
from nodeapi.messages import TierReport

PROMPT = list(range(1, 6 * CHUNK_TOKENS + 4))
LIVE, OLD, THEIRS = spec().fingerprint, b"\x01" * 16, b"\x02" * 16


def keys_of(prompt: list[int] = PROMPT, salt: bytes = b"") -> list[ChunkKey]:
    return chunk_keys(root_key(LIVE, salt), prompt, CHUNK_TOKENS)


class PinningDisk(MemoryTier):
    """A node's own, of which pins may take two chunks."""

    shared = False

    def __init__(self) -> None:
        super().__init__(1 << 24, SystemClock(), name="disk")
        self.kept: set[ChunkName] = set()

    def pin(self, names: list[ChunkName], ttl_s: float | None) -> tuple[int, int]:
        there = [name for name in names if name in self.chunks]
        self.kept = set(there[:2])
        return len(self.kept), len(there) - len(self.kept)

    def unpin(self, names: list[ChunkName]) -> int:
        ended, self.kept = self.kept & set(names), self.kept - set(names)
        return len(ended)

    def pinned(self, names: list[ChunkName]) -> list[bool]:
        return [name in self.kept for name in names]


class Kept:
    """Tiers of some nodes: `disk` of each, `cloud` of all."""

    def __init__(self, nodes: FakeNodes) -> None:
        self.cloud = MemoryTier(1 << 24, SystemClock(), name="cloud")
        self.disks: dict[str, PinningDisk] = {}
        self.forgotten: list[str] = []
        for node in nodes.nodes:
            self.give(node)

    def give(self, node: FakeNode) -> None:
        disk = self.disks[node.id] = PinningDisk()
        tiers = [GuardedTier(tier, SystemClock(), in_flight_bytes=1 << 24) for tier in (disk, self.cloud)]
        filler = SimpleNamespace(forget=lambda _keys: self.forgotten.append(node.id))
        marker = SimpleNamespace(owner=f"test/{node.id}")
        node.tiers = [TierReport(name="disk", shared=False), TierReport(name="cloud", shared=True)]
        made: Any = SimpleNamespace(tiers=tiers, filler=filler, marker=marker, local={"disk": disk})
        node.upkeep = NodeUpkeep(memoryview(bytearray(4096)), made)


async def put(tier: MemoryTier, keys: list[ChunkKey], fingerprint: bytes = LIVE) -> None:
    await tier.save([chunk_of(ChunkName(fingerprint, key), 100) for key in keys], timeout_s=1)


async def kept_rig(nodes: FakeNodes | None = None, **more: Any) -> tuple[Rig, Kept, httpx.AsyncClient]:
    nodes = nodes or two_and_two()
    kept = Kept(nodes)
    rig = await make_rig(nodes, **more)
    return rig, kept, httpx.AsyncClient(transport=httpx.ASGITransport(cast(Any, rig.app)), base_url="http://router")
