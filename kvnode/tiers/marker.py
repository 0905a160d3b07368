"""Says in shared tiers which KV this node's engine uses, now and then, so that no other cluster clears it as stale.

Owns the marks of one node. They end with the node, by themselves if it is killed.
"""

import asyncio
from collections.abc import Sequence

import msgspec

from kvcore.types import KVSpec, NodeInfo
from kvnode.tiers.limits import MoveLimits
from kvstore.tiers.guarded import GuardedTier


class GenerationMarker:
    """`run` it in a task. `aclose` takes the marks back."""

    def __init__(
        self, tiers: Sequence[GuardedTier], node: NodeInfo, host_id: str, limits: MoveLimits = MoveLimits()
    ) -> None:
        self.owner = f"{node.cluster}/{node.id}@{host_id}:{node.control_url.rpartition(':')[2]}"
        self._tiers = [tier for tier in tiers if tier.shared]
        self._node, self._limits = node, limits
        self._used: dict[bytes, str] = {}
        """Fingerprint -> note."""
        self._left: set[bytes] = set()
        """Marked before, and used no longer."""
        self._changed = asyncio.Event()

    def __repr__(self) -> str:
        used = ", ".join(fingerprint.hex()[:8] for fingerprint in self._used) or "nothing"
        return f"<GenerationMarker {self.owner} uses {used}>"

    def use(self, spec: KVSpec) -> None:
        """The engine makes and reads KV of this spec from now on, and of no other."""
        ranks = [msgspec.structs.replace(spec, tp_rank=rank).fingerprint for rank in range(spec.tp_size)]
        note = f"{spec.title}, cluster {self._node.cluster}"
        self._left = (self._left | set(self._used)) - set(ranks)
        self._used = dict.fromkeys(ranks, note)
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._changed.clear()
            await self._say()
            try:
                async with asyncio.timeout(self._limits.mark_s):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def aclose(self) -> None:
        """The node stops: nothing is used by it any longer."""
        self._left |= set(self._used)
        self._used = {}
        await self._say()

    async def _say(self) -> None:
        left, self._left = self._left, set()
        timeout_s = self._limits.close_s
        for tier in self._tiers:
            for fingerprint, note in self._used.items():
                ttl_s = self._limits.mark_ttl_s
                await tier.mark(fingerprint, self.owner, note, ttl_s=ttl_s, timeout_s=timeout_s)
            for fingerprint in left:
                await tier.mark(fingerprint, self.owner, "", ttl_s=0, timeout_s=timeout_s)
