"""A node's leases at all partitions of the index: one Membership each, as each knows the node by itself.

Owns what is said of them together. The node counts as joined where any partition knows it: what belongs to the others
is a miss until they do.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable

from kvcore.types import KVSpec, NodeInfo, Segment
from kvnode.limits import NodeLimits
from kvnode.membership import Membership
from metadata_server.client import MetadataClient
from metadata_server.messages import SegmentManifest


class Memberships:
    """See Membership. Of an index of one server there is one."""

    def __init__(
        self,
        client: MetadataClient,
        node: NodeInfo,
        segments: Callable[[], list[Segment]],
        scan: Callable[[], Awaitable[list[SegmentManifest]]],
        *,
        ttl_s: float,
        draw: Callable[[], float] = random.random,
        limits: NodeLimits = NodeLimits(),
    ) -> None:
        """The client stays the caller's."""
        self._each = [
            Membership(part, node, segments, scan, ttl_s=ttl_s, draw=draw, limits=limits) for part in client.parts
        ]

    def __repr__(self) -> str:
        return f"<Memberships {', '.join(map(repr, self._each))}>"

    @property
    def node(self) -> NodeInfo:
        """The node as it registers."""
        return self._each[0].node

    @property
    def joined(self) -> bool:
        """Whether, as far as we know, a metadata server knows us."""
        return any(each.joined for each in self._each)

    @property
    def joined_all(self) -> bool:
        """Whether, as far as we know, every one of them knows us."""
        return all(each.joined for each in self._each)

    @property
    def refused(self) -> str:
        """Why a metadata server does not take the node in; empty: none has said so."""
        return "; ".join(dict.fromkeys(each.refused for each in self._each if each.refused))

    @property
    def drained(self) -> str:
        """By order: `stay`, or `move` its chunks elsewhere; empty: it is not. Each partition says it by itself, and one
        may hear of it later than another."""
        return max((each.drained for each in self._each), key=("", "stay", "move").index)

    @property
    def sheds(self) -> bool:
        """Whether chunks are to move away from here, as the segment is fuller than others."""
        return any(each.sheds for each in self._each)

    @property
    def registrations(self) -> int:
        """Since start, at all of them."""
        return sum(each.registrations for each in self._each)

    @property
    def heartbeat_failures(self) -> int:
        """Since start, at all of them."""
        return sum(each.heartbeat_failures for each in self._each)

    def on_registered(self, told: Callable[[], None]) -> None:
        """Have `told` called after each registration: that metadata server knows no more than it was told then."""
        for each in self._each:
            each.on_registered = told

    def announce(self, spec: KVSpec) -> None:
        """An engine is ready whose KV is of this spec: the node registers with it at once."""
        for each in self._each:
            each.announce(spec)

    def announce_again(self) -> None:
        """What is known of the segments has changed: the node registers again at once."""
        for each in self._each:
            each.announce_again()

    async def run(self) -> None:
        """Until cancelled. Does not leave: call `leave` after that."""
        async with asyncio.TaskGroup() as tasks:
            for each in self._each:
                tasks.create_task(each.run())

    async def leave(self) -> None:
        """Give the leases up, so that nobody is sent here any more. Bounded."""
        await asyncio.gather(*(each.leave() for each in self._each))

    async def release_writer(self, *, hangs: bool = False) -> None:
        """Give back what the engine that has just died, or hangs, had reserved and leased. Bounded."""
        await asyncio.gather(*(each.release_writer(hangs=hangs) for each in self._each))
